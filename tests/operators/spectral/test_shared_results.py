from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.operators.spectral.shared_results import KEPT, SharedResults


def test_one_thread_makes_it_and_the_others_wait() -> None:
    shared: SharedResults[Tensor] = SharedResults()
    calls: list[int] = []

    def make() -> Tensor:
        calls.append(1)
        threading.Event().wait(0.05)
        return torch.ones(1)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: shared.get((0, 1.0), make), range(4)))
    assert len(calls) == 1
    assert all(each is found[0] for each in found)


def test_a_failure_reaches_the_caller_and_is_not_kept() -> None:
    shared: SharedResults[Tensor] = SharedResults()

    def fail() -> Tensor:
        raise MergeError("no", hint="none")

    with pytest.raises(MergeError, match="no"):
        shared.get((0, 1.0), fail)
    assert torch.equal(shared.get((0, 1.0), lambda: torch.ones(1)), torch.ones(1))


def test_few_are_kept() -> None:
    shared: SharedResults[Tensor] = SharedResults()
    for i in range(20):
        shared.get((i, 0.0), lambda: torch.zeros(1))
    assert len(shared._found) == KEPT
