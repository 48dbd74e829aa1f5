from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from map_bo.merging.checkpoint import open_checkpoint
from map_bo.merging.export import merge_streamed
from tests.merging.checkpoints import export


class TestHuggingFace:
    @pytest.fixture
    def folders(self, tmp_path: Path) -> Path:
        transformers = pytest.importorskip("transformers")
        transformers.logging.disable_progress_bar()
        config = transformers.GPT2Config(
            vocab_size=40,
            n_positions=8,
            n_embd=8,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
        with torch.random.fork_rng():
            for i, label in enumerate(("base", "math", "code")):
                torch.random.manual_seed(i)
                transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / label)
        return tmp_path

    def load(self, folder: Path) -> nn.Module:
        transformers = pytest.importorskip("transformers")
        model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        return model

    def logits(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            result: Tensor = model(torch.arange(8)[None]).logits
        return result

    @pytest.mark.parametrize("shard_bytes", [5_000_000_000, 2_000])
    @pytest.mark.parametrize("in_memory", [False, True])
    def test_a_merged_language_model_is_the_one_merged_by_hand(
        self, folders: Path, shard_bytes: int, in_memory: bool
    ) -> None:
        coefficients = {"math": 0.6, "code": 0.3}
        models = {label: self.load(folders / label) for label in ("base", *coefficients)}
        pre = models["base"].state_dict()
        hand = self.load(folders / "base")
        hand.load_state_dict(
            {
                name: value
                + sum(c * (models[e].state_dict()[name] - value) for e, c in coefficients.items())
                for name, value in pre.items()
            }
        )
        base = open_checkpoint(models["base"] if in_memory else folders / "base")
        experts = {label: open_checkpoint(folders / label) for label in coefficients}
        assert ("lm_head.weight" in base.names) == in_memory
        out = export(
            folders / "merged",
            tensors=merge_streamed(base, experts, lambda name: coefficients),
            base=base,
            experts=experts,
            coefficients=coefficients,
            shard_bytes=shard_bytes,
        )
        if in_memory:
            shutil.copy(folders / "base" / "config.json", out)
        merged_model = self.load(out)
        torch.testing.assert_close(self.logits(merged_model), self.logits(hand))
        assert not torch.allclose(self.logits(merged_model), self.logits(models["base"]))
        assert merged_model.lm_head.weight is merged_model.transformer.wte.weight  # type: ignore[union-attr]
        assert (out / "generation_config.json").exists() != in_memory

    def test_a_live_model_and_its_directory_have_one_digest(self, folders: Path) -> None:
        live, directory = self.load(folders / "base"), open_checkpoint(folders / "base")
        assert open_checkpoint(live).ties == {"lm_head.weight": "transformer.wte.weight"}
        assert open_checkpoint(live).digest() == directory.digest()
        assert directory.directory == folders / "base"
