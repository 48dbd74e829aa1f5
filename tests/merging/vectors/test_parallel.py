from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from map_bo.merging.vectors.parallel import Arena, arena, parallel_for


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def nothing() -> None:
    return None


@pytest.mark.parametrize("threads", [None, 1, 2, 5])
def test_every_item_is_done_once(threads: int | None) -> None:
    done: list[int] = []
    parallel_for(lambda item, _: done.append(item), range(1000), nothing, threads=threads)
    assert sorted(done) == list(range(1000))
    assert torch.get_num_threads() == 3
    parallel_for(lambda item, _: done.append(item), [], nothing, threads=threads)
    assert len(done) == 1000


def test_every_thread_has_a_state_of_its_own() -> None:
    made: list[int] = []
    owners: dict[int, set[int]] = {}

    def state() -> int:
        made.append(len(made))
        return threading.get_ident()

    def work(item: int, own: int) -> None:
        owners.setdefault(own, set()).add(threading.get_ident())
        time.sleep(0.001)

    parallel_for(work, range(50), state)
    assert len(made) == 3
    assert all(own == {ident} for ident, own in zip(owners, owners.values(), strict=True))


def test_an_operation_within_uses_one_thread() -> None:
    seen: list[int] = []
    parallel_for(lambda item, _: seen.append(torch.get_num_threads()), range(20), nothing)
    assert set(seen) == {1}
    assert torch.get_num_threads() == 3


class Broken(Exception):
    pass


@pytest.mark.parametrize("threads", [None, 1])
def test_an_exception_stops_the_others_and_the_next_call_works(threads: int | None) -> None:
    done: list[int] = []

    def work(item: int, _: None) -> None:
        if item == 10:
            raise Broken("at 10")
        time.sleep(0.0005)
        done.append(item)

    with pytest.raises(Broken, match="at 10"):
        parallel_for(work, range(10_000), nothing, threads=threads)
    assert len(done) < 1000
    again: list[int] = []
    parallel_for(lambda item, _: again.append(item), range(100), nothing, threads=threads)
    assert len(again) == 100

    def refuse() -> None:
        raise Broken("no memory")

    with pytest.raises(Broken, match="no memory"):
        parallel_for(work, range(10), refuse, threads=threads)


def test_nothing_is_done_after_an_interrupt() -> None:
    done: list[int] = []

    def work(item: int, _: None) -> None:
        if item == 5:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.01)
        done.append(item)

    with pytest.raises(KeyboardInterrupt):
        parallel_for(work, range(2000), nothing)
    count = len(done)
    assert count < 1500
    time.sleep(0.05)
    assert len(done) == count


@pytest.mark.parametrize("inference", [False, True])
def test_modes_of_the_caller_hold_in_the_threads(inference: bool) -> None:
    seen: list[tuple[bool, bool]] = []

    def work(item: int, _: None) -> None:
        seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))

    with torch.inference_mode(inference):
        parallel_for(work, range(10), nothing)
    assert set(seen) == {(inference, False)}


def test_two_callers_at_once() -> None:
    found: dict[int, list[int]] = {0: [], 1: []}

    def call(who: int) -> None:
        for _ in range(20):
            parallel_for(lambda item, _: found[who].append(item), range(50), nothing)

    callers = [threading.Thread(target=call, args=(who,)) for who in found]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(30)
    for done in found.values():
        assert sorted(done) == sorted(list(range(50)) * 20)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own() -> None:
    parallel_for(lambda item, _: None, range(10), nothing)  # threads that do not survive
    child = os.fork()
    if not child:
        code = 1
        try:
            done: list[int] = []
            parallel_for(lambda item, _: done.append(item), range(10), nothing)
            code = 0 if sorted(done) == list(range(10)) else 2
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


def test_tensors_do_not_overlap_and_are_used_again() -> None:
    made = Arena()
    shapes: list[tuple[int, ...]] = [(3, 5), (7,), (0, 4), (), (100,)]
    kinds = [torch.float32, torch.int16, torch.int64, torch.bool, torch.float64]
    places: list[list[int]] = []
    for round_ in range(4):
        made.reset()
        tensors = [made.empty(*s, dtype=k) for s, k in zip(shapes, kinds, strict=True)]
        for i, (tensor, shape, kind) in enumerate(zip(tensors, shapes, kinds, strict=True)):
            assert tensor.shape == shape
            assert tensor.dtype == kind
            assert tensor.is_contiguous()
            tensor.fill_(i % 2)
        for i, tensor in enumerate(tensors):
            assert bool((tensor == i % 2).all())
        places.append([tensor.data_ptr() for tensor in tensors if tensor.numel()])
        if round_ > 1:
            assert places[-1] == places[-2]  # the memory is known by then
            assert all(place % 64 == places[-1][0] % 64 for place in places[-1])


def test_a_larger_wish_is_met() -> None:
    made = Arena()
    small = made.empty(4).fill_(1.0)
    large = made.empty(10_000).fill_(2.0)
    assert bool((small == 1).all())
    made.reset()
    again = [made.empty(10_000).fill_(3.0), made.empty(4).fill_(4.0)]
    assert bool((large == 2).all())  # it never was in the arena
    assert again[0].untyped_storage().data_ptr() == again[1].untyped_storage().data_ptr()


def test_threads_have_memory_of_their_own() -> None:
    arena.reset()
    mine = arena.empty(1000).fill_(1.0)

    def other() -> None:
        arena.reset()
        arena.empty(1000).fill_(2.0)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert bool((mine == 1).all())


@pytest.mark.parametrize("first", [True, False])
def test_inference_mode_does_not_stay_in_the_memory(first: bool) -> None:
    made = Arena()
    for inference in (first, not first):
        made.reset()
        with torch.inference_mode(inference):
            tensor = made.empty(5).fill_(1.0).mul_(2.0).add_(1.0)
            torch.add(tensor, 0.0, out=made.empty(5))
        assert tensor.tolist() == [3.0] * 5
