"""Attempts to evaluate the rows of one run: begun, recorded, and ended on whatever workers.

That an attempt begins is recorded before it does. One that ends without an outcome was interrupted
in good order, which is recorded too, or took its process along: a point at which that happens again
and again is given up instead of ending every resume. Where workers are other processes, their
deaths are outcomes, and the end of the driver says nothing about the rows that were in flight.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from torch import Generator, Tensor

from map_bo.data import Observations
from map_bo.errors import StoreError
from map_bo.examples.sets import Part
from map_bo.problems.problem import Forwards, Problem
from map_bo.rng import child
from map_bo.workers.evaluation import Remembers, TerminatedError, terminations_raise
from map_bo.workers.flights import Flights
from map_bo.workers.inline import InlineWorkers
from map_bo.workers.workers import Kind, Task

__all__ = ["Attempts", "Ended", "measure_each"]

Record = Callable[[str, Mapping[str, Any]], None]


@dataclass(frozen=True, eq=False)
class Ended:
    """An attempt that has ended.

    Attributes:
        kind: Which part of the run its row belongs to.
        row: The number of the row.
        outcome: One row, which may be a failed one.
        given_up: Whether it is not to be tried again, whatever the retries.
        worker: Who evaluated it; empty in the driver's own process.
        lost: Whether the worker was lost in it.
    """

    kind: Kind
    row: int | str
    outcome: Observations
    given_up: bool = False
    worker: str = ""
    lost: bool = False


class Attempts:
    """Begins attempts of one run, and says which have ended.

    Args:
        problem: What to evaluate; what the workers hold, or one that forwards to it.
        flights: Where they are evaluated.
        generator: That of the run; every attempt has a child of it.
        record: Appends an event to the record of the run.
        retries: How often an evaluation is tried again.
        timeout: Seconds that one may take; None means no limit.
        node: Name of the node of a nested run.
    """

    def __init__(
        self,
        problem: Problem,
        flights: Flights,
        *,
        generator: Generator,
        record: Record,
        retries: int,
        timeout: float | None,
        node: str = "",
    ) -> None:
        self.flights = flights
        self._problem, self._generator, self._record = problem, generator, record
        self._retries, self._timeout, self._node = retries, timeout, node
        self._points: dict[tuple[Kind, int | str], Tensor] = {}
        self._ended: list[Ended] = []

    @property
    def free(self) -> int:
        """How many more attempts can be begun now."""
        return max(0, self.flights.free_for(self) - len(self._ended))

    def in_flight(self, kind: Kind) -> set[int | str]:
        """Return the rows of a part of the run whose attempts have begun and not ended."""
        flying = {task.row for task in self.flights.of(self) if task.kind == kind}
        return flying | {ended.row for ended in self._ended if ended.kind == kind}

    def begin(
        self,
        kind: Kind,
        row: int | str,
        x: Tensor,
        *,
        attempt: int,
        deaths: int,
        generator: Generator | None = None,
        parts: Sequence[Part] | None = None,
        metrics: Sequence[str] | None = None,
        order: int = 0,
    ) -> None:
        """Begin an attempt.

        Args:
            kind: Which part of the run the row belongs to.
            row: Its number there.
            x: Its ``d`` coefficients.
            attempt: How often it has failed before.
            deaths: How many processes have died in it; it is given up after more than ``retries``,
                and one death alone never costs a point.
            generator: The source of chance; by default a child of the run's, named by the part of
                the run, the row and the attempt, and by where the parts begin.
            parts: Which examples to score; None for all, as the problem measures them.
            metrics: Names of the metrics that are measured on them.
            order: The seed that the orders of the examples are drawn by.

        Raises:
            StoreError: When nothing can be recorded.
        """
        problem = self._problem
        known = isinstance(problem, Remembers) and problem.remembers(x)
        if deaths > max(1, self._retries) and not known:
            reason = f"the process ended during this evaluation {deaths} times"
            failed = Observations.failed(x.unsqueeze(0), problem.metrics, reason)
            self._ended.append(Ended(kind, row, failed, given_up=True))
            return
        point, names = x, None if metrics is None else tuple(metrics)
        if isinstance(problem, Forwards) and not self.flights.workers.local:
            point, names = problem.request(x)
            if not names:
                self._ended.append(Ended(kind, row, problem.receive(x, None)))
                return
        if generator is None:
            part = "evaluate" if kind == "index" else kind
            further = [f"{one.evaluator} {one.start}" for one in parts or () if one.start]
            generator = child(self._generator, part, row, attempt, *further)
        task = Task.of(
            kind,
            row,
            attempt,
            point,
            generator=generator,
            metrics=names,
            timeout=self._timeout,
            node=self._node,
            parts=parts,
            order=order,
        )
        self._points[kind, row] = x
        with self._recorded_end(kind, row):
            if self.flights.workers.local:
                self._record("started", {kind: row, "attempt": attempt})
            else:
                self._record("started", {kind: row, "attempt": attempt, "worker": True})
            self.flights.launch(self, task)

    @contextmanager
    def _recorded_end(self, kind: Kind, row: int | str) -> Iterator[None]:
        """Record that an attempt is interrupted by what passes through the block."""
        process = os.getpid()
        try:
            with terminations_raise():
                yield
        except StoreError:
            raise  # nothing can be recorded
        except BaseException as error:
            if os.getpid() == process:  # and not a process that an evaluator has forked
                with suppress(StoreError):
                    self._record("interrupted", {kind: row})
            if isinstance(error, TerminatedError):
                raise SystemExit(128 + signal.SIGTERM) from error
            raise

    def ended(self) -> Iterator[Ended]:
        """Yield the attempts that have ended, in that order, each once.

        Those that are not taken, because the loop over them is left, are yielded the next time.

        Raises:
            MapBoError: What makes every further evaluation fail as well.
        """
        yield from self._take()
        for settled in self.flights.landed(self):
            task, outcome = settled.task, settled.outcome
            x, row = self._points.pop((task.kind, task.row)), outcome.observations
            if isinstance(self._problem, Forwards) and not self.flights.workers.local:
                row = self._problem.receive(x, row)
            ended = Ended(task.kind, task.row, row, worker=outcome.worker, lost=outcome.lost)
            self._ended.append(ended)
        yield from self._take()

    def _take(self) -> Iterator[Ended]:
        while self._ended:
            yield self._ended.pop(0)

    def interrupt(self) -> None:
        """Record that everything in flight is interrupted, because the run ends."""
        for task in self.flights.of(self):
            with suppress(StoreError):
                self._record("interrupted", {task.kind: task.row})


def measure_each(
    problem: Problem,
    kind: Kind,
    rows: Mapping[str | int, tuple[Tensor, Generator]],
    *,
    flights: Flights | None,
    record: Record,
    deaths: Callable[[str | int], int],
    retries: int,
    timeout: float | None,
) -> dict[str | int, Observations]:
    """Evaluate rows once each, and return the outcome of each.

    Args:
        problem: What to evaluate.
        kind: Which part of the run the rows belong to.
        rows: Name of a row -> its ``d`` coefficients, and its source of chance.
        flights: Where they are evaluated side by side; None evaluates them here, in their order.
        record: Appends an event to the record of the run.
        deaths: Name of a row -> how many processes have died in it.
        retries: A row is given up after more deaths than these.
        timeout: Seconds that one may take; None means no limit.

    Raises:
        MapBoError: What makes every further evaluation fail as well.
    """
    found: dict[str | int, Observations] = {}
    if not rows:
        return found
    attempts = Attempts(
        problem,
        Flights(InlineWorkers(problem)) if flights is None else flights,
        generator=next(generator for _, generator in rows.values()),  # each row has its own
        record=record,
        retries=retries,
        timeout=timeout,
    )
    waiting = list(rows)
    try:
        while len(found) < len(rows):
            while waiting and attempts.free:
                row = waiting.pop(0)
                x, generator = rows[row]
                attempts.begin(kind, row, x, attempt=0, deaths=deaths(row), generator=generator)
            attempts.flights.wait(1.0)
            found.update({ended.row: ended.outcome for ended in attempts.ended()})
    except BaseException:
        attempts.interrupt()
        raise
    return {row: found[row] for row in rows}
