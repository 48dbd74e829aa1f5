from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.export.model import merge_checkpoints
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.operators.recipes import merge_again
from map_bo.operators.sparse import Dare

BASE = {"a.weight": torch.arange(12.0).view(3, 4), "a.bias": torch.ones(3), "ids": torch.arange(5)}


def expert(shift: float, width: int) -> dict[str, Tensor]:
    moved = {f"net.{n}": t + shift for n, t in BASE.items() if t.is_floating_point()}
    return moved | {"head.weight": torch.full((width, 3), shift)}


BLOCKS = TaskArithmetic(blocks={"w": r"^a\.weight$", "b": r"^a\.bias$"})
EXPERTS = {"x": expert(1.0, 2), "y": expert(-2.0, 6)}


def merged(out: Path, **settings: object) -> dict[str, Tensor]:
    written = merge_checkpoints(
        BASE, EXPERTS, {"x": 0.5, "y": 0.25}, out, progress=False, **settings  # type: ignore[arg-type]
    )  # fmt: skip
    return load_file(written / "model.safetensors")


def test_a_merge_is_written_like_the_base_or_like_a_task(tmp_path: Path) -> None:
    plain = merged(tmp_path / "plain")
    assert plain.keys() == BASE.keys()
    for task in EXPERTS:
        found = merged(tmp_path / task, task=task)
        assert found.keys() == EXPERTS[task].keys()
        assert torch.equal(found["head.weight"], EXPERTS[task]["head.weight"])
        assert torch.equal(found["net.a.weight"], plain["a.weight"])


def test_masks_are_drawn_by_the_names_of_the_base(tmp_path: Path) -> None:
    operator = Dare(drop_rate=0.5)
    plain = merged(tmp_path / "plain", operator=operator)
    found = merged(tmp_path / "x", operator=operator, task="x")
    assert torch.equal(found["net.a.weight"], plain["a.weight"])


def test_the_recipe_repeats_it_and_the_card_says_so(tmp_path: Path) -> None:
    files = {"base": BASE, **EXPERTS}
    for name, tensors in files.items():
        torch.save(tensors, tmp_path / f"{name}.pt")
    experts = {name: tmp_path / f"{name}.pt" for name in EXPERTS}
    out = merge_checkpoints(
        tmp_path / "base.pt",
        experts,
        {"x": 1.0, "y": 0.5},
        tmp_path / "m",
        task="y",
        progress=False,
    )
    card = (out / "README.md").read_text()
    assert "the head is that of y" in card
    assert "task head kept apart and not merged: head.weight" in card
    assert "No mergekit configuration" in (out / "mergekit.yaml").read_text()
    again = merge_again(out, tmp_path / "again", progress=False)
    one, two = (load_file(f / "model.safetensors") for f in (out, again))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_blocks_are_those_of_the_base(tmp_path: Path) -> None:
    plain = merge_checkpoints(
        BASE, EXPERTS, {"x/w": 0.5, "x/b": 1.0}, tmp_path / "plain", operator=BLOCKS, progress=False
    )
    out = merge_checkpoints(
        BASE, EXPERTS, {"x/w": 0.5, "x/b": 1.0}, tmp_path / "x", operator=BLOCKS, task="x",
        progress=False,
    )  # fmt: skip
    found, base = (load_file(f / "model.safetensors") for f in (out, plain))
    assert torch.equal(found["net.a.weight"], base["a.weight"])
    assert "the model has the task head of 'x'" in (out / "mergekit.yaml").read_text()


@pytest.mark.parametrize("task", ["z", ""])
def test_an_unknown_task_is_refused(task: str, tmp_path: Path) -> None:
    with pytest.raises(MergeError, match=f"no expert '{task}' with a task head") as caught:
        merged(tmp_path / "m", task=task)
    assert "x, y" in str(caught.value.hint)
    assert not (tmp_path / "m").exists()
