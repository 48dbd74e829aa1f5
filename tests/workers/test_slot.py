from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from map_bo.data import Metric, Observations
from map_bo.errors import WorkersError
from map_bo.workers.child import Place
from map_bo.workers.slot import _Context, _hard_limit, _lost_at_start, _words, settle
from map_bo.workers.workers import Outcome


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-11, "died: signal 11 (SIGSEGV)"),
        (-9, "was killed: signal 9 (SIGKILL); out of memory?"),
        (0, "ended with exit code 0: it left with os._exit"),
        (1, "ended with exit code 1"),  # an exception while it began, or os._exit(1)
        (3, "ended with exit code 3: it left with os._exit"),
        (15, "was asked to end: signal 15 (SIGTERM)"),
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


def test_what_a_worker_printed_before_it_was_lost_is_told(tmp_path: Path) -> None:
    process: Any = SimpleNamespace(exitcode=-11)
    log = tmp_path / "worker-1.log"
    place = Place(b"", {}, 1, log=str(log))
    assert "it printed nothing to" in str(_lost_at_start(process, place))
    log.write_text("first\nImportError: no module named mine\n")
    error = _lost_at_start(process, place)
    assert error.message == "a worker died: signal 11 (SIGSEGV) before it was ready"
    assert "it printed last: first | ImportError: no module named mine;" in str(error)


def test_a_process_imports_nothing_heavy_for_its_own_class() -> None:
    process = _Context(script=False).Process(target=print)
    assert type(process).__module__ == "map_bo.workers.child"
