from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from map_bo.merging.export.bounded import merged_pieces, merged_tensors, streams
from map_bo.merging.export.model import merge_checkpoints
from map_bo.merging.vectors import kernel as chunked
from map_bo.merging.vectors.kernel import Kernel, KernelMerge
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.on_disk import OnDiskVectors
from map_bo.merging.vectors.operator import Deltas
from map_bo.merging.vectors.storage import resident_bytes
from map_bo.operators.regmean import RegMean
from map_bo.operators.sparse import Della, Ties
from tests.merging.checkpoint_files import BASE, EXPERTS
from tests.merging.hard_checkpoints import hard_family, hard_tensors, loaded, opened, threads


def family(tensors: Mapping[str, Tensor]) -> tuple[Checkpoint, dict[str, Checkpoint]]:
    return open_checkpoint(tensors), {"e": open_checkpoint(tensors)}


def collected(pieces: Any) -> dict[str, Tensor]:
    parts: dict[str, dict[int, Tensor]] = {}
    pieces(lambda name, start, piece: parts.setdefault(name, {}).update({start: piece.clone()}))
    return {name: torch.cat([part[at] for at in sorted(part)]) for name, part in parts.items()}


def test_what_streams() -> None:
    narrow = open_checkpoint(hard_tensors("base", torch.bfloat16))
    assert streams(narrow, TaskArithmetic())
    assert streams(narrow, Ties())
    assert not streams(BASE, Ties())
    assert not streams(narrow, object())  # type: ignore[arg-type]


def test_inputs_are_checked_at_once_and_passes_are_made_when_pieces_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = opened(*hard_family(tmp_path))
    c = torch.tensor([0.5, 0.5, 0.5])
    passes: list[int] = []
    real = Ties.prepare

    def prepare(self: Ties, deltas: Deltas) -> KernelMerge:
        passes.append(1)
        return real(self, deltas)

    monkeypatch.setattr(Ties, "prepare", prepare)
    pieces = merged_pieces(base, experts, Ties(), c, check_base=False)
    assert passes == []
    assert sorted(collected(pieces)) == sorted(n for n in base.names if base.shape(n).numel())
    assert passes == [1]
    with pytest.raises(MergeError, match="lacks"):
        merged_pieces(base, {"e": open_checkpoint({"one": torch.ones(1, 1)})}, Ties(), c[:1])


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
    found = collected(merged_pieces(base, experts, TaskArithmetic(), torch.tensor([0.5])))
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
                collected(
                    merged_pieces(base, experts, Telling(), c, check_base=False, max_memory=memory)
                )
        assert seen == [2, 6]


def test_the_tensors_of_a_linear_merge_in_its_own_precision_are_checked() -> None:
    def weights(name: str) -> dict[str, float]:
        return {"math": 0.5}

    assert len(list(merged_tensors(BASE, EXPERTS, weights, check_base=False))) == len(BASE.names)
    with pytest.raises(MergeError, match="max_memory is 1 MB"):
        merged_tensors(BASE, EXPERTS, weights, check_base=False, max_memory=1_000_000)
