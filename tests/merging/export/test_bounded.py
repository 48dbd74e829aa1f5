from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from map_bo.merging.export.bounded import (
    Merge,
    merge_bounded,
    merge_by_pieces,
    merge_by_tensor,
    merges_files,
    reads_pieces,
)
from map_bo.merging.export.model import merge_checkpoints
from map_bo.merging.vectors import kernel as chunked
from map_bo.merging.vectors.kernel import Kernel, KernelMerge
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.on_disk import OnDiskVectors
from map_bo.merging.vectors.operator import Deltas, PreparedMerge
from map_bo.merging.vectors.storage import resident_bytes
from map_bo.operators.regmean import RegMean
from map_bo.operators.sparse import Della, Ties
from map_bo.space import CoefficientSpace
from tests.merging.checkpoint_files import BASE, EXPERTS
from tests.merging.hard_checkpoints import hard_family, hard_tensors, loaded, opened, threads


def family(tensors: Mapping[str, Tensor]) -> tuple[Checkpoint, dict[str, Checkpoint]]:
    return open_checkpoint(tensors), {"e": open_checkpoint(tensors)}


def merge_of(
    base: Checkpoint, experts: Mapping[str, Checkpoint], operator: Any, c: Tensor, **settings: Any
) -> Merge:
    return Merge(base, experts, operator, tuple(experts), c, **{"check_base": False, **settings})


def collected(pieces: Any) -> dict[str, Tensor]:
    parts: dict[str, dict[int, Tensor]] = {}
    pieces(lambda name, start, piece: parts.setdefault(name, {}).update({start: piece.clone()}))
    return {name: torch.cat([part[at] for at in sorted(part)]) for name, part in parts.items()}


class Opaque:
    """An operator without further abilities, for a merge of its own."""

    def space(self, experts: tuple[str, ...], *, lower: float, upper: float) -> CoefficientSpace:
        return CoefficientSpace.box(experts, lower=lower, upper=upper)

    def prepare(self, deltas: Deltas) -> PreparedMerge:
        return TaskArithmetic().prepare(deltas)

    def describe(self) -> dict[str, Any]:
        return {"name": "opaque"}


def test_what_can_be_merged_from_files() -> None:
    narrow = open_checkpoint(hard_tensors("base", torch.bfloat16))
    assert reads_pieces(narrow, TaskArithmetic())
    assert reads_pieces(narrow, Ties())
    assert not reads_pieces(BASE, Ties())  # float64 and complex
    assert not reads_pieces(narrow, Opaque())
    assert merges_files(BASE, TaskArithmetic())  # tensor by tensor
    assert not merges_files(BASE, Ties())
    assert not merges_files(narrow, Opaque())


def test_an_operator_that_needs_loaded_task_vectors() -> None:
    merge = merge_of(BASE, EXPERTS, Opaque(), torch.tensor([0.5, 0.5]))
    assert merge.weights is None
    for way in (merge_bounded, merge_by_pieces):
        with pytest.raises(MergeError, match="opaque cannot merge by pieces") as caught:
            way(merge)
        assert "loaded problem" in str(caught.value.hint)
    with pytest.raises(MergeError, match="opaque is not linear"):
        merge_by_tensor(merge)
    tensors = {"w": torch.ones(1)}
    assert dict(merge_bounded(replace(merge, tensors=tensors))) == tensors  # type: ignore[arg-type]


def test_a_merge_says_its_coefficients_and_weights() -> None:
    merge = merge_of(BASE, EXPERTS, TaskArithmetic(), torch.tensor([0.5, -1.0]))
    assert merge.coefficients == dict(zip(EXPERTS, (0.5, -1.0), strict=True))
    assert merge.weights is not None
    assert merge.weights("any") == merge.coefficients
    blocks = {"first": "^first", "rest": "*"}
    tied = replace(
        merge,
        operator=TaskArithmetic(blocks),
        names=("a", "b", "c", "d"),
        c=torch.tensor([1.0, 2.0, 3.0, 4.0]),
        ties={"first.weight": "last.weight"},
    )
    assert tied.weights is not None
    assert list(tied.weights("first.bias").values()) == [1.0, 3.0]
    assert list(tied.weights("first.weight").values()) == [2.0, 4.0]  # those of its tensor


def test_inputs_are_checked_at_once_and_passes_are_made_when_pieces_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = opened(*hard_family(tmp_path))
    c = torch.tensor([0.5, 0.5, 0.5])
    passes: list[int] = []
    real = Ties.prepare_pieces

    def prepare_pieces(self: Ties, deltas: Deltas) -> KernelMerge:
        passes.append(1)
        return real(self, deltas)

    monkeypatch.setattr(Ties, "prepare_pieces", prepare_pieces)
    pieces = merge_by_pieces(merge_of(base, experts, Ties(), c))
    assert passes == []
    assert sorted(collected(pieces)) == sorted(n for n in base.names if base.shape(n).numel())
    assert passes == [1]
    with pytest.raises(MergeError, match="lacks"):
        merge_by_pieces(
            merge_of(base, {"e": open_checkpoint({"one": torch.ones(1, 1)})}, Ties(), c[:1])
        )


def test_one_tensor_under_three_names_of_which_the_base_records_two(tmp_path: Path) -> None:
    value = torch.arange(6.0)
    base = {"b": value, "c": value, "a": value.clone(), "other": torch.ones(3)}
    assert open_checkpoint(base).ties == {"c": "b"}
    tuned = {"c": value + 2, "other": torch.zeros(3)}
    out = merge_checkpoints(
        base,
        {"e": tuned},
        {"e": 0.5},
        tmp_path / "m",
        operator=Ties(density=1.0),
        ties={"c": "a"},
        check_base=False,
        progress=False,
    )
    found = loaded(out)
    for name in "abc":
        torch.testing.assert_close(found[name], value + 1)
    assert open_checkpoint(out).ties == {"c": "b"}


@pytest.mark.parametrize("alias", [torch.bfloat16, torch.float32])
def test_a_tied_name_keeps_its_own_dtype(alias: torch.dtype, tmp_path: Path) -> None:
    value = torch.arange(6.0)
    base = {"a": value, "b": value.to(alias)}
    out = merge_checkpoints(
        base, {"e": {"a": value + 1}}, {"e": 1.0}, tmp_path / "m", ties={"b": "a"}, progress=False
    )
    assert loaded(out)["b"].dtype == alias
    torch.testing.assert_close(loaded(out)["b"].float(), value + 1)


def test_fixed_tensors_go_by_pieces_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("map_bo.merging.align.experts._PIECE", 4)
    table = torch.arange(10)
    base, experts = family({"w": torch.ones(3), "table": table, "none": torch.zeros(0).long()})
    monkeypatch.setattr(Checkpoint, "load", lambda *_: pytest.fail("loaded whole"))
    found = collected(
        merge_by_pieces(
            merge_of(base, experts, TaskArithmetic(), torch.tensor([0.5]), check_base=True)
        )
    )
    assert torch.equal(found["table"], table)


class Wide(Kernel):
    """A kernel that cuts at multiples of 20000 and takes a MB beside for each thread."""

    def unit(self, slot: int) -> int:
        return 20_000

    def overhead(self, threads: int) -> int:
        return 1_000_000 * threads

    def piece(self, rows: Tensor, slot: int, start: int, c: Tensor) -> Tensor:
        return rows[0].clone()


class TestLimit:
    def merge(self, kernel: Kernel) -> KernelMerge:
        deltas = OnDiskVectors(*family({"w": torch.ones(1_000_000)}), check_base=False)
        return KernelMerge(deltas, kernel, (0,))

    def test_much_room_changes_nothing(self) -> None:
        merge = self.merge(Wide())
        merge.limit(10**12, 4)
        assert (merge._threads, merge._chunk) == (4, chunked._CHUNK["cpu"] // 2)

    @pytest.mark.parametrize("share", [1.0, 1.5, 2.1, 3.7, 10.0])
    def test_threads_and_pieces_fit(self, share: float) -> None:
        merge = self.merge(Wide())
        least = merge.least_memory()
        room = int(share * least)
        merge.limit(room, 8)
        assert merge._threads == min(8, int(share))
        each = (least - 1_000_000) // 20_000
        assert merge._chunk >= 20_000
        assert merge._threads * (merge._chunk * each + 1_000_000) <= room

    def test_less_than_the_least_is_refused(self) -> None:
        merge = self.merge(Wide())
        with pytest.raises(MergeError, match=r"merging needs \d+ MB beside .* are allowed"):
            merge.limit(merge.least_memory() - 1, 8)

    def test_rows_of_della_are_not_cut(self) -> None:
        base, experts = family({"w": torch.ones(3, 100_000)})
        merge = Della().prepare(OnDiskVectors(base, experts, check_base=False))
        merge.limit(merge.least_memory(), 4)
        found: list[tuple[int, int]] = []
        merge.run(torch.ones(1), lambda slot, start, piece: found.append((start, len(piece))))
        assert sorted(found) == [(0, 100_000), (100_000, 100_000), (200_000, 100_000)]

    def test_products_of_layers_are_counted(self) -> None:
        base, experts = family({"w": torch.ones(5, 300)})
        operator = RegMean({"e": {"w": torch.eye(300)}})
        merge = operator.prepare(OnDiskVectors(base, experts, check_base=False))
        assert merge.least_memory() > 12 * 8 * 300**2

    def test_fewer_threads_prepare_where_memory_is_short(self, tmp_path: Path) -> None:
        base, experts = opened(*hard_family(tmp_path))
        c = torch.tensor([0.5, 0.5, 0.5])
        seen: list[int | None] = []

        class Telling(Ties):
            def kernel(self, deltas: Any) -> Kernel:
                seen.append(deltas.threads)
                return super().kernel(deltas)

        with threads(6):
            for spare in (64_000_000 + 70_000_000, 10**10):
                memory = resident_bytes() + spare
                collected(merge_by_pieces(merge_of(base, experts, Telling(), c), memory))
        assert seen == [2, 6]


def test_the_tensors_of_a_linear_merge_in_its_own_precision_are_checked() -> None:
    merge = merge_of(BASE, EXPERTS, TaskArithmetic(), torch.tensor([0.5, 0.0]))
    assert len(list(merge_by_tensor(merge))) == len(BASE.names)
    with pytest.raises(MergeError, match="max_memory is 1 MB"):
        merge_by_tensor(merge, 1_000_000)
