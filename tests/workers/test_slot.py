from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from map_bo.data import Metric, Observations
from map_bo.errors import WorkersError
from map_bo.workers.slot import _hard_limit, _words, settle
from map_bo.workers.workers import Outcome


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-11, "died: signal 11 (SIGSEGV)"),
        (-9, "was killed: signal 9 (SIGKILL); out of memory?"),
        (0, "ended with exit code 0: it left with os._exit"),
        (3, "ended with exit code 3: it left with os._exit"),
        (-200, "died: signal 200 (unknown)"),
        (None, "went out of reach"),
    ],
)
def test_it_is_told_how_a_process_ended(code: int | None, words: str) -> None:
    process: Any = SimpleNamespace(exitcode=code)
    assert _words(process) == words


@pytest.mark.parametrize(("seconds", "least", "most"), [(0.1, 0.5, 2), (600, 601, 630)])
def test_a_worker_has_a_moment_to_heed_its_limit(seconds: float, least: float, most: float) -> None:
    assert least < _hard_limit(seconds) < most


def test_a_late_outcome_changes_nothing() -> None:
    future: Future[Outcome] = Future()
    row = Observations.failed(torch.zeros(1, 2), (Metric("m"),), "first")
    first = Outcome(("", "index", 0, 0, 1), row)
    settle(future, first)
    settle(future, Outcome(first.key, row))
    settle(future, error=WorkersError("gone"))
    assert future.result() is first
