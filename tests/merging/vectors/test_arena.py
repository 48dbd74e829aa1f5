from __future__ import annotations

import threading

import pytest
import torch

from map_bo.merging.vectors.parallel import Arena, arena


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
