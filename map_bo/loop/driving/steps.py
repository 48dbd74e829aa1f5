"""Several runs on the same workers, in one process: each does a step whenever it can."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TypeAlias, TypeVar

from map_bo.loop.progress import Reporter, ShowsWorkers
from map_bo.problems.problem import Problem
from map_bo.workers.evaluation import TerminatedError, terminations_raise
from map_bo.workers.flights import Flights
from map_bo.workers.workers import Workers, WorkerSettings

__all__ = ["Steps", "closing_workers", "open_workers", "together"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
Steps: TypeAlias = Generator[None, None, T]
"""The work of a run: it yields whenever it waits for evaluations, and returns what it found."""

_LOOK = 1.0  # seconds between two looks at the workers, for whoever watches


def together(runs: Sequence[Steps[T]], flights: Flights, report: Reporter) -> list[T]:
    """Do all the steps of several runs side by side, and return what each returned.

    Where one of them fails, the others are interrupted.

    Args:
        runs: The work of each.
        flights: Where all of them evaluate.
        report: Is shown what the workers do.
    """
    found: dict[int, T] = {}
    waiting = dict(enumerate(runs))
    ended = nullcontext() if flights.workers.local else _terminations_end()
    try:
        with ended:
            while waiting:
                flights.sharing = len(waiting)
                for number, steps in list(waiting.items()):
                    try:
                        next(steps)
                    except StopIteration as end:
                        found[number] = end.value
                        del waiting[number]
                if waiting:
                    _watch(flights, report)
    finally:
        for steps in waiting.values():
            steps.close()
    return [found[number] for number in range(len(runs))]


def _watch(flights: Flights, report: Reporter) -> None:
    """Wait for an evaluation to end, and show meanwhile what the workers do."""
    while not flights.wait(_LOOK):
        if isinstance(report, ShowsWorkers):
            report.working(flights.running(), flights.queued)


@contextmanager
def _terminations_end() -> Iterator[None]:
    """Let SIGTERM end the block in good order."""
    try:
        with terminations_raise():
            yield
    except TerminatedError as error:
        raise SystemExit(128 + signal.SIGTERM) from error


def open_workers(settings: WorkerSettings, problem: Problem) -> Workers:
    """Open workers, and tell so in the log, since that may take minutes."""
    begun = time.monotonic()
    logger.info("starting the workers: each builds the problem and reads its files")
    workers = settings.open(problem)
    logger.info("%d workers ready after %.1f s", workers.size, time.monotonic() - begun)
    return workers


@contextmanager
def closing_workers(workers: Workers) -> Iterator[None]:
    """Close workers after the block: at once where it fails."""
    try:
        yield
    except BaseException:
        workers.close(abandon=True)
        raise
    workers.close()
