from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from map_bo.errors import CheckpointError, MergeError
from map_bo.merging.adapters.adapter import AdapterCheckpoint
from map_bo.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from map_bo.merging.vectors.on_disk import OnDiskVectors
from map_bo.merging.vectors.operator import Deltas
from map_bo.merging.vectors.task_vectors import TaskVectors
from tests.merging.adapter_files import small_adapters, small_base
from tests.merging.hard_checkpoints import EXPERTS, hard_family, hard_tensors, opened, threads

FP8 = torch.float8_e5m2


def vectors(
    base: torch.dtype = torch.float32,
    experts: torch.dtype = torch.float32,
    ties: Mapping[str, str] | None = None,
) -> OnDiskVectors:
    return OnDiskVectors(
        open_checkpoint(hard_tensors("base", base)),
        {name: open_checkpoint(hard_tensors(name, experts)) for name in EXPERTS},
        ties=ties,
        check_base=False,
    )


def by_hand(name: str, base: torch.dtype, experts: torch.dtype) -> Tensor:
    pre = hard_tensors("base", base)[name].float().flatten()
    tuned = [hard_tensors(e, experts)[name].float().flatten() for e in EXPERTS]
    return torch.stack([pre, *(value - pre for value in tuned)])


@pytest.mark.parametrize(
    ("base", "experts"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (FP8, torch.float32),
        (torch.float16, FP8),
    ],
)
def test_rows_are_base_and_task_vectors(base: torch.dtype, experts: torch.dtype) -> None:
    deltas = vectors(base, experts)
    assert isinstance(deltas, Deltas)
    assert deltas.experts == EXPERTS
    assert (deltas.resident, deltas.in_place, deltas.device.type) == (False, False, "cpu")
    for slot, each in enumerate(deltas.layout.slots):
        assert torch.equal(deltas.read(slot, 0, each.numel), by_hand(each.name, base, experts))


CUT = vectors(torch.bfloat16, torch.bfloat16)


@given(data=st.data())
def test_any_piece_is_that_of_the_whole(data: st.DataObject) -> None:
    slot = data.draw(st.integers(0, len(CUT.layout.slots) - 1))
    count = CUT.layout.slots[slot].numel
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    whole = CUT.read(slot, 0, count)
    out = torch.full((4, stop - start), torch.nan)
    found = CUT.read(slot, start, stop, out)
    assert torch.equal(found, whole[:, start:stop])
    assert torch.equal(out, found)
    assert torch.equal(CUT.read(slot, start, stop), found)


def test_threads_do_not_share_what_they_read_into() -> None:
    deltas = vectors(torch.bfloat16, torch.bfloat16)
    slots = range(len(deltas.layout.slots))
    expected = [deltas.read(slot, 0, deltas.layout.slots[slot].numel) for slot in slots]
    wrong: list[int] = []

    def read(slot: int) -> None:
        for _ in range(30):
            found = deltas.read(slot, 0, deltas.layout.slots[slot].numel)
            if not torch.equal(found, expected[slot]):
                wrong.append(slot)

    workers = [threading.Thread(target=read, args=(slot,)) for slot in slots]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_variances_are_at_least_the_least_of_the_models() -> None:
    deltas = vectors()
    names = [slot.name for slot in deltas.layout.slots]
    for name, floored in (("block.0.norm.running_var", True), ("block.1.fc.bias", False)):
        slot = names.index(name)
        rows = by_hand(name, torch.float32, torch.float32)
        least = torch.cat([rows[:1], rows[1:] + rows[:1]]).amin(0)
        piece = torch.full((3,), -100.0)
        deltas.floor_piece(slot, 1, piece)
        expected = least[1:4] if floored else torch.full((3,), -100.0)
        torch.testing.assert_close(piece, expected)


class TestAdapters:
    @pytest.fixture
    def family(self, tmp_path: Path) -> tuple[Checkpoint, dict[str, AdapterCheckpoint]]:
        base = small_base(torch.bfloat16)
        return base, small_adapters(tmp_path, base)

    def test_their_task_vectors_are_what_they_add_to_the_last_digit(
        self, family: tuple[Checkpoint, dict[str, AdapterCheckpoint]]
    ) -> None:
        on_disk, resident = OnDiskVectors(*family), TaskVectors.load(*family)
        for slot, each in enumerate(on_disk.layout.slots):
            for start, stop in ((0, each.numel), (each.numel // 3, each.numel // 2)):
                found = on_disk.read(slot, start, stop)
                expected = resident.read(slot, start, stop)
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)

    def test_of_full_values_no_more_is_read_than_the_piece(
        self,
        family: tuple[Checkpoint, dict[str, AdapterCheckpoint]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        base, experts = family
        adapter = experts["chat"].adapter
        on_disk = OnDiskVectors(base, experts)
        slot = [each.name for each in on_disk.layout.slots].index("layers.1.fc.weight")
        whole = on_disk.read(slot, 0, 280)
        real, sizes = adapter.reader.read, []

        def read(name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
            sizes.append(stop - start)
            return real(name, start, stop, out)

        monkeypatch.setattr(adapter.reader, "read", read)
        monkeypatch.setattr(adapter.reader, "load", lambda name: pytest.fail("read whole"))
        assert torch.equal(on_disk.read(slot, 10, 17)[3], whole[3, 10:17])
        assert sizes == [7]


class TestRefusals:
    def test_no_experts(self) -> None:
        with pytest.raises(MergeError, match="there are no experts"):
            OnDiskVectors(open_checkpoint(hard_tensors("base")), {})

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
    def test_nan_and_infinity(self, value: float, dtype: torch.dtype) -> None:
        tensors = hard_tensors("math", dtype)
        tensors["scalar"] = torch.tensor(value).to(dtype)
        deltas = OnDiskVectors(
            open_checkpoint(hard_tensors("base", dtype)),
            {"math": open_checkpoint(tensors)},
            check_base=False,
        )
        slot = [each.name for each in deltas.layout.slots].index("scalar")
        with pytest.raises(MergeError, match="'scalar' of expert 'math' holds NaN or infinity"):
            deltas.read(slot, 0, 1)

    def test_an_unrelated_base_is_seen_in_threads_too(self) -> None:
        generator = torch.Generator().manual_seed(0)
        pre, other = (torch.randn(60, 60, generator=generator) for _ in range(2))
        experts = {"good": {"w": pre + 0.1}, "bad": {"w": other}}
        with threads(2), pytest.raises(MergeError, match="'bad' does not look fine-tuned"):
            OnDiskVectors(
                open_checkpoint({"w": pre}),
                {name: open_checkpoint(tensors) for name, tensors in experts.items()},
            )

    def test_a_file_that_has_gone(self, tmp_path: Path) -> None:
        deltas = OnDiskVectors(*opened(*hard_family(tmp_path)), check_base=False)
        (tmp_path / "code" / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"code/model\.safetensors cannot be read"):
            deltas.read(0, 0, 1)

    def test_ties_that_a_checkpoint_breaks(self) -> None:
        same = torch.ones(3, 2)
        base = open_checkpoint({"a": same, "b": same.clone()})
        broken = open_checkpoint({"a": same, "b": same + 1})
        OnDiskVectors(base, {"e": base}, ties={"b": "a"}).require_consistent()
        for pre, tuned, label in ((base, broken, "expert 'e'"), (broken, base, "the base")):
            deltas = OnDiskVectors(pre, {"e": tuned}, ties={"b": "a"})
            with pytest.raises(MergeError, match=f"'a' and 'b' are one tensor .* {label}"):
                deltas.require_consistent()
            OnDiskVectors(pre, {"e": tuned}).require_consistent()
