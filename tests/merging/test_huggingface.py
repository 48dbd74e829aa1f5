from __future__ import annotations

import copy
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.export.bounded import merge_linearly
from map_bo.merging.export.model import merge_checkpoints
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.operator import MergeOperator
from map_bo.operators.sparse import Ties
from map_bo.problems.merged.problem import MergedModelProblem
from tests.merging.checkpoint_files import export


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
            tensors=merge_linearly(base, experts, lambda name: coefficients),
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


class TestMergedByPieces:
    """Sharded exports by pieces are models that transformers loads, with the merged weights."""

    def family(self, folder: Path, kind: str) -> tuple[nn.Module, dict[str, nn.Module]]:
        transformers = pytest.importorskip("transformers")
        transformers.logging.disable_progress_bar()
        tokens: dict[str, Any] = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 0}
        if kind == "gpt2":
            config = transformers.GPT2Config(**tokens, n_positions=8, n_embd=8, n_layer=2, n_head=2)
        else:
            config = transformers.LlamaConfig(
                **tokens,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=16,
                tie_word_embeddings=False,
            )
        dtype = torch.float32 if kind == "gpt2" else torch.bfloat16
        with torch.random.fork_rng():
            torch.random.manual_seed(0)
            base = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
        experts = {name: moved(base, seed) for seed, name in enumerate(("math", "code"))}
        for name, model in {"base": base, **experts}.items():
            model.save_pretrained(folder / name)
        return base, experts

    @pytest.mark.parametrize("kind", ["gpt2", "llama"])
    @pytest.mark.parametrize("operator", [TaskArithmetic(), Ties()])
    def test_they_load(self, kind: str, operator: MergeOperator, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        base, experts = self.family(tmp_path, kind)
        problem = MergedModelProblem(
            base,
            base=base,
            experts=experts,
            evaluators={"one": lambda model: 1.0},
            operator=operator,
        )
        out = merge_checkpoints(
            tmp_path / "base",
            {name: tmp_path / name for name in experts},
            {"math": 0.75, "code": 0.5},
            tmp_path / "merged",
            operator=operator,
            shard_size="2kB",
            progress=False,
        )
        assert len(list(out.glob("model-*.safetensors"))) > 3
        found = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
        tied = found.get_output_embeddings().weight is found.get_input_embeddings().weight
        assert tied == (kind == "gpt2")
        expected = problem.merged(torch.tensor([0.75, 0.5]))
        for name, value in found.state_dict().items():
            assert value.dtype == base.state_dict()[name].dtype
            # bfloat16: the sum in float32 may be in the middle of two numbers.
            close = 2e-6 if kind == "gpt2" else 2**-7
            torch.testing.assert_close(value, expected[name], rtol=close, atol=2e-6)
        bare = transformers.AutoModel.from_pretrained(out)
        assert isinstance(bare, nn.Module)

    def test_tied_embeddings_stay_tied_in_an_adapter(self, tmp_path: Path) -> None:
        """Files of transformers have one of the two names; the adapter has the value for both."""
        peft = pytest.importorskip("peft")
        base, experts = self.family(tmp_path, "gpt2")
        problem = MergedModelProblem(
            base,
            base=tmp_path / "base",
            experts={name: tmp_path / name for name in experts},
            evaluators={"one": lambda model: 1.0},
        )
        result = problem.export_adapter(torch.tensor([0.5, 0.5]), tmp_path / "adapter", rank=24)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Conv1D and tied weights
            found = peft.PeftModel.from_pretrained(copy.deepcopy(base), result.path)
            found = found.merge_and_unload()
        assert found.lm_head.weight is found.transformer.wte.weight
        merged = problem.merged(torch.tensor([0.5, 0.5]))
        for name, tensor in merged.items():
            torch.testing.assert_close(found.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def moved(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    result = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in result.parameters():
            noise = 0.05 * torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter.dtype))
    return result
