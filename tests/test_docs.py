"""The examples of the documentation run."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from map_bo.app.main import main
from map_bo.merging.adapters.adapter import adapter_checkpoint
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.export.bounded import merge_linearly
from map_bo.rng import make_generator
from tests.merging.peft_models import language_model, outputs, trained

DOCS = Path(__file__).parents[1] / "docs"


def examples(name: str) -> list[str]:
    text = (DOCS / name).read_text()
    found = re.findall(r"<!-- example -->\n```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(found) == text.count("```python")
    return found


def likeness(model: nn.Module, target: Tensor) -> float:
    return float((-(outputs(model) - target).abs().mean()).exp())


@pytest.mark.slow
def test_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model("llama")
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    base = open_checkpoint(model)
    experts = {}
    for seed, label in enumerate(("math", "code"), start=1):
        folder = tmp_path / "adapters" / label
        trained(model, folder, seed, target_modules="all-linear")
        experts[label] = adapter_checkpoint(folder, base)
    targets = []  # merges of both are best for either score
    for c in ({"math": 0.8, "code": 0.4}, {"math": 0.4, "code": 0.8}):
        merged = copy.deepcopy(model)
        merged.load_state_dict(dict(merge_linearly(base, experts, lambda _, c=c: c)))  # type: ignore[misc]
        targets.append(outputs(merged))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {
        "score_math": lambda model: likeness(model, targets[0]),
        "score_code": lambda model: likeness(model, targets[1]),
    }
    for code in examples("adapters.md"):
        exec(code, names)
    exact, small = names["exact"], names["small"]
    assert exact.error < 1e-6 < small.error  # type: ignore[attr-defined]
    assert (exact.rank, small.rank) == (4, 2)  # type: ignore[attr-defined]
    assert (tmp_path / "small-adapter" / "recipe.yaml").exists()


@pytest.mark.slow
def test_merging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model("llama")
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    generator = make_generator(0)
    for label in ("math", "code"):
        expert = copy.deepcopy(model)
        for parameter in expert.parameters():
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
        expert.save_pretrained(tmp_path / label)  # type: ignore[operator]
    monkeypatch.chdir(tmp_path)
    for code in examples("merging.md"):
        exec(code, {})
    merged = open_checkpoint(tmp_path / "merged")
    assert set(merged.names) == set(open_checkpoint(tmp_path / "base").names)
    assert main_status(["merge", "merged", "--out", "again"]) == 0
    assert open_checkpoint(tmp_path / "again").digest() == merged.digest()


@pytest.mark.slow
def test_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in examples("items.md"):
        exec(code, names)
    summary, confirmed = names["result"].summary, names["confirmed"]
    assert summary["evaluations"] > 6 >= summary["full_evaluations"] - 1e-9
    assert summary["examples"]["math"]["held_out"] == 120
    assert confirmed.held_out
    assert bool((confirmed.measured.counts == 120).all())
    rows = (tmp_path / "runs/items/evaluations.csv").read_text().splitlines()
    assert len(rows) == summary["evaluations"] + 1


def main_status(arguments: list[str]) -> int:
    try:
        main(arguments)
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def test_every_test_that_a_promise_names_is_there() -> None:
    root = Path(__file__).parents[1]
    named = re.findall(
        r"`((?:tests|benchmarks)/[^`]+)`", (root / "docs/reliability.md").read_text()
    )
    assert len(named) > 50
    for name in named:
        path, _, test = name.partition("::")
        assert (root / path).exists(), name
        assert not test or f"def {test}" in (root / path).read_text(), name
