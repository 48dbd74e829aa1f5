from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from map_bo.errors import MergeError
from map_bo.merging.adapters.adapter import open_adapter
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.checkpoints.saved_names import ModuleTensors, Saved
from map_bo.merging.export.adapter_changes import ChangeMerger, whole_of
from tests.merging.adapter_files import small_adapters, small_base


def test_a_tensor_is_put_together_from_its_pieces() -> None:
    whole = torch.arange(12.0).view(3, 4)
    base = open_checkpoint({"top": whole[:1].clone(), "rest": whole[1:].clone()})
    parts = {
        "w": (
            ("top", Saved("w", torch.Size((1, 4)), (4, 1), 0)),
            ("rest", Saved("w", torch.Size((2, 4)), (4, 1), 4)),
        )
    }
    assert torch.equal(whole_of(base, ModuleTensors(parts, {"w": whole.shape}), "w"), whole)


class TestCompare:
    def merger(self, folder: Path) -> ChangeMerger:
        self.base = small_base()
        experts = small_adapters(folder, self.base)
        modules = ModuleTensors.plain({name: self.base.shape(name) for name in self.base.names})
        return ChangeMerger(
            self.base, experts, lambda _: {"math": 1.0}, None, "save", None, {}, modules
        )

    def test_what_was_written_is_compared_with_what_was_meant(self, tmp_path: Path) -> None:
        merger = self.merger(tmp_path)
        changes = merger.find()
        assert merger.compare(open_adapter(tmp_path / "math", self.base), changes) < 1e-6

    @pytest.mark.parametrize(
        "name", ["layers.1.fc.lora_B.weight", "layers.0.fc.lora_A.weight", "layers.0.fc.bias"]
    )
    def test_a_change_that_is_lost_is_refused(self, tmp_path: Path, name: str) -> None:
        merger = self.merger(tmp_path)
        changes = merger.find()
        copied = shutil.copytree(tmp_path / "math", tmp_path / "damaged")
        file = copied / "adapter_model.safetensors"
        tensors = load_file(file)
        tensors[f"base_model.model.{name}"] *= 1.1
        save_file(tensors, file)
        tensor = name.split(".lora")[0] + ".weight" if "lora" in name else name
        with pytest.raises(MergeError, match=rf"changes '{tensor}' otherwise than the merge"):
            merger.compare(open_adapter(copied, self.base), changes)
