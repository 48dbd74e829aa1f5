from __future__ import annotations

import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor, nn

from map_bo.errors import MergeError
from map_bo.merging.adapters.peft_check import load_with_peft, without_weights
from tests.merging.peft_models import language_model, trained, with_settings


def adapter(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    trained(model, folder, target_modules=["q_proj"], lora_alpha=2)
    return load_file(folder / "adapter_model.safetensors")


def test_a_copy_without_weights() -> None:
    model = language_model("gpt2")
    found = without_weights(model)
    assert {p.untyped_storage().nbytes() for p in found.parameters()} == {4}
    assert {n: t.shape for n, t in found.state_dict().items()} == {
        n: t.shape for n, t in model.state_dict().items()
    }
    assert [name for name, _ in found.named_modules()] == [n for n, _ in model.named_modules()]
    assert found.lm_head.weight is found.transformer.wte.weight  # type: ignore[union-attr]
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_what_peft_takes_is_compared(tmp_path: Path) -> None:
    model = language_model("llama")
    tensors = adapter(tmp_path, model)
    assert load_with_peft(model, tmp_path, tensors)
    name = next(iter(tensors))
    with pytest.raises(MergeError, match="for other values"):
        load_with_peft(model, tmp_path, {**tensors, name: tensors[name] + 1})
    with pytest.raises(MergeError, match=r"peft leaves out .*gone"):
        load_with_peft(model, tmp_path, {**tensors, "base_model.model.gone": tensors[name]})
    with_settings(tmp_path, lora_alpha=4)
    with pytest.raises(MergeError, match="scales the adapter's factors by 2"):
        load_with_peft(model, tmp_path, tensors)
    with_settings(tmp_path, target_modules=["of_another_model"])
    with pytest.raises(MergeError, match="peft cannot load the adapter"):
        load_with_peft(model, tmp_path, tensors)


def test_without_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert not load_with_peft(nn.Linear(2, 2), tmp_path, {})
