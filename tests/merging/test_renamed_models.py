"""Adapters of models whose files have other names and pieces than their modules."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from map_bo.errors import MergeError
from map_bo.merging.adapters.adapter import adapter_checkpoint
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.export.adapter import export_adapter
from map_bo.merging.export.model import merge_checkpoints
from map_bo.rng import make_generator
from tests.merging.renamed_models import RENAMED, moved, renamed

QUICK = ("vit", "mixtral")
NAMES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in sorted(RENAMED)
]


def saved(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder


def with_peft(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Return the weights of the model that peft makes of it and an adapter."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)
        state: dict[str, Tensor] = loaded.merge_and_unload().state_dict()
    return state


def distance(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    assert one.keys() == two.keys()
    return math.hypot(*(float((one[n].double() - two[n].double()).norm()) for n in one))


@pytest.mark.parametrize("name", NAMES)
def test_the_adapter_of_a_whole_expert_has_all_of_its_change(tmp_path: Path, name: str) -> None:
    model = renamed(name)
    expert = moved(copy.deepcopy(model), 1, 0.02)
    base = open_checkpoint(saved(model, tmp_path / "base"))
    experts = {"e": open_checkpoint(saved(expert, tmp_path / "e"))}
    result = export_adapter(
        tmp_path / "adapter",
        base=base,
        experts=experts,
        weights=lambda _: {"e": 1.0},
        operator={"name": "task_arithmetic"},
        coefficients={"e": 1.0},
        rank=64,
    )
    found, whole = with_peft(model, result.path), distance(model.state_dict(), expert.state_dict())
    lost = distance(found, expert.state_dict()) / whole
    assert lost < 1e-5
    assert result.error < 1e-5
    card = (result.path / "README.md").read_text()
    assert f"relative error of {result.error:.2g}" in card
    assert "peft has loaded it" in card


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_by_peft_is_merged_and_written_again(tmp_path: Path, name: str) -> None:
    peft = pytest.importorskip("peft")
    model = renamed(name)
    settings: dict[str, Any] = {
        "target_modules": [
            n
            for n, module in model.named_modules()
            if isinstance(module, nn.Linear) and "head" not in n and "shared_expert." not in n
        ]
    }
    bare = [n for n, p in model.named_parameters() if p.dim() == 3 and ".experts." in n]
    if bare:
        settings["target_parameters"] = bare
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, **settings))
        generator = make_generator(1)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        adapted.save_pretrained(tmp_path / "lora")
    base = saved(model, tmp_path / "base")
    meant = with_peft(model, tmp_path / "lora")
    merged = merge_checkpoints(
        base, {"e": tmp_path / "lora"}, {"e": 1.0}, tmp_path / "merged", progress=False
    )
    found = type(model).from_pretrained(merged)  # type: ignore[attr-defined]
    assert distance(found.state_dict(), meant) < 1e-4
    assert distance(model.state_dict(), meant) > 0.1
    opened = open_checkpoint(base)
    experts = {"e": adapter_checkpoint(tmp_path / "lora", opened)}
    result = export_adapter(
        tmp_path / "again",
        base=opened,
        experts=experts,
        weights=lambda _: {"e": 1.0},
        operator={"name": "task_arithmetic"},
        coefficients={"e": 1.0},
    )
    assert distance(with_peft(model, result.path), meant) < 1e-4


def adapted(model: nn.Module, folder: Path, **settings: Any) -> nn.Module:
    """Save a random adapter in a folder, and return the model with it, as it was trained."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result: nn.Module = peft.get_peft_model(
            copy.deepcopy(model), peft.LoraConfig(r=2, **settings)
        )
        generator = make_generator(1)
        with torch.no_grad():
            for parameter in result.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        result.save_pretrained(folder)  # type: ignore[operator]
    return result.eval()


def test_a_bare_matrix_is_no_linear_layer_of_peft(tmp_path: Path) -> None:
    model = renamed("mixtral")
    adapted(model, tmp_path / "lora", target_modules=["q_proj"],
            target_parameters=["mlp.gate.weight"])  # fmt: skip
    meant = with_peft(model, tmp_path / "lora")
    base = open_checkpoint(saved(model, tmp_path / "base"))
    result = export_adapter(
        tmp_path / "again",
        base=base,
        experts={"e": adapter_checkpoint(tmp_path / "lora", base)},
        weights=lambda _: {"e": 1.0},
        operator={"name": "task_arithmetic"},
        coefficients={"e": 1.0},
    )
    assert distance(with_peft(model, result.path), meant) < 1e-5


class TestTied:
    """A base whose files leave the output layer out, since its configuration ties it."""

    def base(self, tmp_path: Path) -> tuple[nn.Module, Path]:
        model = renamed("llama-tied")
        return model, saved(model, tmp_path / "base")

    @pytest.mark.parametrize(
        "settings",
        [
            {"target_modules": ["embed_tokens", "q_proj"]},
            {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        ],
    )
    def test_what_peft_tied_is_one_change(self, tmp_path: Path, settings: dict[str, Any]) -> None:
        model, base = self.base(tmp_path)
        expert = adapted(model, tmp_path / "lora", ensure_weight_tying=True, **settings)
        merged = merge_checkpoints(
            base, {"e": tmp_path / "lora"}, {"e": 1.0}, tmp_path / "merged", progress=False
        )
        found = type(model).from_pretrained(merged)  # type: ignore[attr-defined]
        x = torch.arange(4, 9)[None]
        # As it was trained: peft's own merge adds the change of the one tensor twice.
        torch.testing.assert_close(found(x).logits, expert(x).logits, rtol=1e-4, atol=1e-5)

    def test_factors_of_the_embedding_alone_are_told(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        model, base = self.base(tmp_path)
        adapted(model, tmp_path / "lora", target_modules=["embed_tokens"])
        adapter_checkpoint(tmp_path / "lora", open_checkpoint(base))
        assert "changes model.embed_tokens.weight, which the base ties to lm_head" in caplog.text

    @pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
    def test_a_value_of_one_name_alone_is_refused(self, tmp_path: Path, module: str) -> None:
        model, base = self.base(tmp_path)
        adapted(model, tmp_path / "lora", target_modules=["q_proj"], modules_to_save=[module])
        with pytest.raises(MergeError, match=rf"a value of its own for '(model\.)?{module}\.wei"):
            adapter_checkpoint(tmp_path / "lora", open_checkpoint(base))


def test_a_module_that_files_join_with_others_is_named(tmp_path: Path) -> None:
    library = pytest.importorskip("transformers")
    config = library.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4,
        num_labels=3, use_swiglu_ffn=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = library.Dinov2ForImageClassification(config)
    if "dinov2.encoder.layer.0.mlp.gate_proj.weight" not in model.state_dict():
        pytest.skip("this transformers has the joined tensor in the module too")
    base = open_checkpoint(saved(model, tmp_path / "base"))
    adapted(model, tmp_path / "lora", target_modules=["q_proj"])
    adapter_checkpoint(tmp_path / "lora", base)
    adapted(model, tmp_path / "joined", target_modules=["gate_proj"])
    with pytest.raises(MergeError, match=r"gate_proj\.weight, which the base's files hold as one"):
        adapter_checkpoint(tmp_path / "joined", base)
