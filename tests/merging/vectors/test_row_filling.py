from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.adapters.adapter import open_expert
from map_bo.merging.align.layout import FlatLayout
from map_bo.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from map_bo.merging.vectors import row_filling
from map_bo.merging.vectors.row_filling import Extras, adapters_among, dense_among, fill
from map_bo.merging.vectors.task_vectors import TaskVectors
from tests.merging.adapter_files import small_base, write_adapter
from tests.merging.small_models import family

SHAPES = {"head.weight": (7, 7)}


def filled(
    base: Checkpoint, experts: Mapping[str, Checkpoint], **settings: Any
) -> tuple[Tensor, Extras]:
    layout = FlatLayout.of(base, base.ties)
    rows = torch.full((1 + len(dense_among(base, experts)), layout.size), torch.nan)

    def put(row: int, start: int, piece: Tensor) -> None:
        part = rows[row, start : start + len(piece)]
        assert bool(part.isnan().all()), "put twice"
        part.copy_(piece)

    return rows, fill(base, experts, layout, put, **{"dtype": torch.float32, **settings})


def opened(kind: str) -> tuple[Checkpoint, dict[str, Checkpoint]]:
    base, experts = family(kind)
    return open_checkpoint(base), {name: open_checkpoint(e) for name, e in experts.items()}


@pytest.mark.parametrize("piece", [1, 5, 1 << 18])
def test_every_number_is_put_once_whatever_the_pieces(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_filling, "_PIECE", piece)
    base, experts = opened("cnn")
    rows, extras = filled(base, experts)
    vectors = TaskVectors.load(base, experts)
    for slot in vectors.layout.slots:
        assert torch.equal(
            rows[:, slot.offset : slot.stop], vectors.rows[:, slot.offset : slot.stop]
        )
    [(index, floor)] = extras.floors.items()
    name = vectors.layout.slots[index].name
    assert name == "norm.running_var"
    models = [base, *experts.values()]
    assert torch.equal(floor, torch.stack([m.load(name) for m in models]).amin(0))
    assert extras.fixed.keys() == {"norm.num_batches_tracked"}


def test_adapters_have_no_rows(tmp_path: Path) -> None:
    base = open_checkpoint(small_base())
    whole = open_checkpoint({name: base.load(name) + 1.0 for name in base.names})
    adapter = open_expert(write_adapter(tmp_path / "a", SHAPES, seed=1, modules=["head"]), base)
    experts = {"adapter": adapter, "whole": whole}
    assert list(adapters_among(base, experts)) == [0]
    assert dense_among(base, experts) == (1,)
    rows, extras = filled(base, experts, check_base=False)
    assert len(rows) == 2
    assert list(extras.similarity) == [1]
    layout = FlatLayout.of(base, base.ties)
    assert [layout.slots[index].name for index in extras.adapted] == ["head.weight"]


def test_what_was_gathered_is_judged_later_as_it_was_then() -> None:
    base = {"w": torch.randn(40, 40, generator=torch.Generator().manual_seed(0))}
    other = {"w": torch.randn(40, 40, generator=torch.Generator().manual_seed(1))}
    checkpoints = open_checkpoint(base), {"e": open_checkpoint(other)}
    with pytest.raises(MergeError, match="'e' does not look fine-tuned") as now:
        filled(*checkpoints)
    _, extras = filled(*checkpoints, check_base=False)
    with pytest.raises(MergeError) as later:
        extras.judge(["e"])
    assert later.value.message == now.value.message


@pytest.mark.parametrize("same", ["base", "other"])
def test_experts_that_add_nothing(same: str) -> None:
    base, experts = opened("mlp")
    twice = {**experts, "again": base if same == "base" else experts["e1"]}
    message = "'again': its task vector is zero" if same == "base" else "'e1' and 'again' have"
    with pytest.raises(MergeError, match=message):
        filled(base, twice)


@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        (torch.float16, 1e5, "'w' of the base cannot be stored as float16, which ends at 65504"),
        (torch.float16, 1e-9, "float16 would change the task vector of expert 'e' by"),
        (torch.bfloat16, 1e-9, None),
    ],
)
def test_storage_that_loses_too_much(dtype: torch.dtype, value: float, message: str | None) -> None:
    large = value > 1
    base = open_checkpoint({"w": torch.full((4,), value if large else 0.0)})
    expert = open_checkpoint({"w": torch.full((4,), 2.0 if large else value)})
    if message is None:
        rows, _ = filled(base, {"e": expert}, dtype=dtype)
        assert float(rows[1, 0]) == pytest.approx(value, rel=2**-8)
        return
    with pytest.raises(MergeError, match=message):
        filled(base, {"e": expert}, dtype=dtype)
