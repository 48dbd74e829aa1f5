from __future__ import annotations

import os
import threading
import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.vectors.kernel import Kernel, KernelMerge, SpanKernel, check_coefficients
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.operator import Deltas
from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.operators.sparse import Della, Ties
from tests.contracts.operator_contract import example_vectors
from tests.operators.cases import hard_vectors


class Sum(SpanKernel):
    def weights(self, slot: int, c: Tensor) -> Tensor:
        return torch.cat([c.new_ones(1), c])


class Recording(Sum):
    """Sums, and remembers its pieces."""

    def __init__(self, unit: int = 1, whole: tuple[int, ...] = ()) -> None:
        self.seen: list[tuple[int, int, int]] = []
        self._unit, self._whole = unit, whole

    def unit(self, slot: int) -> int:
        return self._unit

    def whole(self, slot: int) -> bool:
        return slot in self._whole

    def piece(self, rows: Tensor, slot: int, start: int, c: Tensor) -> Tensor:
        assert rows.dtype == torch.float32
        self.seen.append((slot, start, rows.shape[1]))
        return super().piece(rows, slot, start, c)


def merged(
    vectors: TaskVectors, kernel: Kernel, c: list[float], chunk: int | None = None
) -> Tensor:
    out = torch.full((vectors.layout.size,), torch.nan)
    blocks = (0,) * len(vectors.layout.slots)
    KernelMerge(vectors, kernel, blocks, chunk=chunk).write(torch.tensor(c), out)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [None, 1, 10, 64])
def test_is_task_arithmetic(dtype: torch.dtype, chunk: int | None) -> None:
    vectors = example_vectors(dtype=dtype)
    expected = torch.empty(vectors.layout.size)
    TaskArithmetic().prepare(vectors).write(torch.tensor([2.0, -0.4, 0.7]), expected)
    found = merged(vectors, Sum(), [2.0, -0.4, 0.7], chunk)
    assert torch.allclose(found, expected, atol=1e-6)  # variances that are floored included


def test_pieces_cover_every_tensor_at_its_units() -> None:
    vectors = hard_vectors()
    kernel = Recording(unit=6, whole=(0,))
    merged(vectors, kernel, [0.1, 0.2, 0.3], chunk=20)
    pieces = sorted(kernel.seen)
    for slot, where in enumerate(vectors.layout.slots):
        own = [(start, size) for s, start, size in pieces if s == slot]
        assert sum(size for _, size in own) == where.numel
        if slot == 0:
            assert own == [(0, where.numel)]
        else:
            assert [start for start, _ in own] == list(range(0, where.numel, 18))


def test_padding_is_zero_and_zero_coefficients_copy_the_base() -> None:
    vectors = hard_vectors()
    vectors.rows[0, 0] = -0.0
    kernel = Recording()
    found = merged(vectors, kernel, [0.0, 0.0, 0.0])
    assert not kernel.seen  # nothing is computed
    assert str(found[0].item()) == "-0.0"
    inside = torch.zeros(vectors.layout.size, dtype=torch.bool)
    for slot in vectors.layout.slots:
        assert torch.equal(slot.of(found), slot.of(vectors.base))
        slot.of(inside).fill_(True)
    assert bool((found[~inside] == 0).all())


def test_results_stay_valid_when_sinks_copy() -> None:
    vectors = hard_vectors()
    merge = Ties().prepare(vectors)
    kept: dict[tuple[int, int], Tensor] = {}
    c = torch.tensor([0.5, 0.2, 0.9])
    merge.run(
        c,
        lambda slot, start, piece: kept.update({(slot, start): piece.clone()}),
    )
    out = torch.empty(vectors.layout.size)
    merge.write(c, out)
    before = out.clone()
    merge.write(torch.tensor([-1.0, 0.3, 0.0]), torch.empty_like(out))  # uses the same memory
    assert torch.equal(out, before)
    for (slot, start), piece in kept.items():
        first = vectors.layout.slots[slot].offset + start
        assert torch.equal(out[first : first + len(piece)], piece)
    assert sum(map(len, kept.values())) == sum(slot.numel for slot in vectors.layout.slots)


class FromFiles:
    """Deltas that are read anew each time, into the room that is given or not."""

    def __init__(self, vectors: TaskVectors, use_room: bool) -> None:
        self._vectors, self._use_room = vectors, use_room
        self.experts, self.layout = vectors.experts, vectors.layout
        self.device, self.resident, self.in_place = vectors.device, False, False
        self.threads: int | None = None

    def read(self, slot: int, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        part = self._vectors.read(slot, start, stop)
        return part.clone() if out is None or not self._use_room else out.copy_(part)

    def floor_piece(self, slot: int, start: int, piece: Tensor) -> None:
        self._vectors.floor_piece(slot, start, piece)


@pytest.mark.parametrize("use_room", [True, False])
@pytest.mark.parametrize("operator", [Ties(trim="tensor"), Ties(search=["density"]), Della()])
def test_deltas_that_are_not_resident_give_the_same(operator: Ties | Della, use_room: bool) -> None:
    vectors = hard_vectors()
    on_disk = FromFiles(vectors, use_room)
    assert isinstance(on_disk, Deltas)
    c = torch.tensor([0.5, 0.2, 0.9, *([0.4] if operator.search else [])])
    outs = [torch.empty(vectors.layout.size) for _ in range(2)]
    operator.prepare(vectors).write(c, outs[0])
    operator.prepare(on_disk).write(c, outs[1])
    assert torch.equal(*outs)


@pytest.mark.parametrize("threads", [1, 3])
def test_two_writes_at_once(threads: int) -> None:
    # To the bit: threads share out whole pieces, and no two entries of a piece are added up.
    vectors = hard_vectors(shapes={"a": (40, 50), "b": (300,)})
    prepared = Ties(search=["density"]).prepare(vectors)
    prepared._chunk = 100
    rows = torch.tensor([[0.5, 0.2, 0.9, 0.3], [1.0, -0.5, 0.1, 0.8]], dtype=torch.float64)
    expected = [torch.empty(vectors.layout.size) for _ in rows]
    for c, out in zip(rows, expected, strict=True):
        prepared.write(c, out)
    wrong: list[int] = []

    def call(who: int) -> None:
        out = torch.empty(vectors.layout.size)
        for _ in range(20):
            prepared.write(rows[who], out.fill_(torch.nan))
            if not torch.equal(out, expected[who]):
                wrong.append(who)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        callers = [threading.Thread(target=call, args=(who,)) for who in (0, 1)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    finally:
        torch.set_num_threads(before)
    assert not wrong


def test_an_exception_in_a_sink_propagates_and_the_next_write_works() -> None:
    vectors = hard_vectors()
    prepared = Ties().prepare(vectors)
    prepared._chunk = 10
    c = torch.tensor([0.5, 0.2, 0.9])

    def full(slot: int, start: int, piece: Tensor) -> None:
        raise OSError("no space left")

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(OSError, match="no space left"):
            prepared.run(c, full)
        out, again = torch.empty(vectors.layout.size), torch.empty(vectors.layout.size)
        prepared.write(c, out)
    finally:
        torch.set_num_threads(before)
    prepared.write(c, again)
    assert torch.equal(out, again)


@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_callers_in_inference_mode_and_with_gradients(order: tuple[bool, bool]) -> None:
    vectors = example_vectors()
    found = []
    for inference in order:
        with torch.inference_mode(inference):
            prepared = Della().prepare(vectors)
        c = torch.tensor([0.5, 0.2, 0.9], requires_grad=True)
        out = torch.empty(vectors.layout.size)
        with torch.inference_mode(inference):
            prepared.write(c, out)
        prepared.write(c, out)
        assert not out.requires_grad
        found.append(out)
    assert torch.equal(*found)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_can_merge() -> None:
    vectors = hard_vectors()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        prepared = Ties().prepare(vectors)
        prepared._chunk = 20
        c, out = torch.tensor([0.5, 0.2, 0.9]), torch.empty(vectors.layout.size)
        prepared.write(c, out)
        child = os.fork()
        if not child:
            code = 1
            try:
                again = torch.empty(vectors.layout.size)
                prepared.write(c, again)
                code = 0 if torch.equal(out, again) else 2
            finally:
                os._exit(code)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                assert os.waitstatus_to_exitcode(status) == 0
                return
            time.sleep(0.01)
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    finally:
        torch.set_num_threads(before)


def test_outputs_that_do_not_fit_are_refused() -> None:
    vectors = hard_vectors()
    prepared = Ties().prepare(vectors)
    size = vectors.layout.size
    for out in (torch.empty(size + 1), torch.empty(2, size)[:, :1], torch.empty(size * 2)[::2]):
        with pytest.raises(MergeError, match="would be written to"):
            prepared.write(torch.ones(3), out)


def test_checked_coefficients() -> None:
    c = torch.tensor([1, 2], dtype=torch.int64)
    assert check_coefficients(c, 2).dtype == torch.float64
    with pytest.raises(MergeError, match=r"shape \(2,\), got \(1, 2\)") as caught:
        check_coefficients(c[None], 2)
    assert "not a batch" in str(caught.value.hint)
    with pytest.raises(MergeError, match="must be finite"):
        check_coefficients(torch.tensor([float("inf"), 0.0]), 2)


def test_variances_are_floored_in_every_piece() -> None:
    vectors = replace(example_vectors())
    whole = merged(vectors, Sum(), [5.0, 5.0, -8.0])
    cut = merged(vectors, Sum(), [5.0, 5.0, -8.0], chunk=3)
    assert torch.equal(whole, cut)
    [(where, floor)] = vectors.floors
    assert bool((whole[where] >= floor).all())
