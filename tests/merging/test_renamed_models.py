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
