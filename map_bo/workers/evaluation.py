"""One evaluation: with a time limit, and with any failure turned into a recorded reason."""

from __future__ import annotations

import dataclasses
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

from map_bo.data import Observations, is_at
from map_bo.errors import ConfigError, DataError, EvaluationError, MapBoError, StoreError
from map_bo.evaluators.isolation.global_state import World
from map_bo.evaluators.isolation.world import (
    TimeLimitExceededError,
    isolated,
    known_numerics,
    stops_the_process,
)
from map_bo.merging.vectors.live import LiveModel
from map_bo.problems.problem import Problem, on_parts, select_metrics
from map_bo.rng import child_seed
from map_bo.tracking.store import Event
from map_bo.workers.workers import Task

__all__ = [
    "Remembers",
    "TerminatedError",
    "TimeLimitExceededError",
    "deaths_of",
    "evaluate_row",
    "measuring",
    "refuse_another_problem",
    "terminations_raise",
    "time_limit",
]


# What puts things back is not interrupted half-way; the limit strikes when it has finished.
_UNINTERRUPTED = {
    method.__code__
    for method in (LiveModel.__enter__, LiveModel.__exit__, LiveModel.clean, World.restore)
}
_SOON = 0.01  # seconds until the next attempt


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise :class:`TimeLimitExceededError` in the block after ``seconds``; None means no limit.

    It uses an interval timer and a signal, so the block is interrupted between Python
    instructions: a call into native code is interrupted only when it returns.

    Raises:
        ConfigError: Outside the main thread, or where the system has no such timer.
    """
    if seconds is None:
        yield
        return
    if threading.current_thread() is not threading.main_thread() or not hasattr(
        signal, "setitimer"
    ):
        raise ConfigError(
            "a time limit needs the main thread of a POSIX process",
            hint="remove `timeout`, or limit the time inside the evaluator",
        )

    def expire(signum: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code in _UNINTERRUPTED:
                signal.setitimer(signal.ITIMER_REAL, _SOON)
                return
            frame = frame.f_back
        raise TimeLimitExceededError(f"it took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, expire)
    start = time.monotonic()
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
        if left:  # an alarm of the caller's own, which may be overdue
            passed = time.monotonic() - start
            signal.setitimer(signal.ITIMER_REAL, max(left - passed, _SOON), interval)


def measuring(problem: Problem, task: Task) -> Problem:
    """Return the problem that measures what a task asks for.

    Raises:
        DataError: When the problem does not have such metrics or examples.
    """
    if task.parts is not None:
        return on_parts(problem, task.parts, task.order)
    names = tuple(metric.name for metric in problem.metrics)
    return problem if task.metrics in (None, names) else select_metrics(problem, task.metrics or ())


@known_numerics()
def evaluate_row(
    problem: Problem, x: Tensor, *, timeout: float | None, generator: Generator
) -> Observations:
    """Evaluate one row (``d``) and return one row, which is a failed one when anything went wrong.

    The problem finds the caller's world, with global random numbers seeded by ``generator``, and
    what it changes in torch or in the process is put back; see
    :func:`map_bo.evaluators.isolation.world.isolated`.

    What stops a process (``KeyboardInterrupt`` and the like, not ``sys.exit()``) passes through,
    and so do errors of the set-up (a checkpoint that does not fit, a point outside the space),
    because they would make every further evaluation fail as well.
    """
    start = time.perf_counter()
    row = x.unsqueeze(0)
    try:
        with isolated("the problem", child_seed(generator, "world")), time_limit(timeout):
            result = problem.evaluate(row, generator=generator)
        reason = _fault(result, problem, x)
        if timeout is not None and time.perf_counter() - start > timeout:
            reason = f"it took longer than {timeout:g} s"
    except (DataError, EvaluationError) as error:
        reason = error.reason
    except MapBoError:
        raise
    except TimeLimitExceededError as error:
        reason = str(error)
    except BaseException as error:
        if stops_the_process(error):
            raise
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
    if reason is not None:
        result = Observations.failed(row, problem.metrics, reason)
    else:
        result = _ordinary(result)
        # A problem may work in another precision; what was asked for is what was evaluated.
        result = dataclasses.replace(result, X=row)
    seconds = time.perf_counter() - start
    if not bool(torch.isfinite(result.cost).all()) or not bool((result.cost > 0).all()):
        result = dataclasses.replace(result, cost=torch.tensor([seconds]))
    return result


def _ordinary(seen: Observations) -> Observations:
    """Return observations without inference tensors, which gradients could not be taken with."""
    made: dict[str, Any] = {
        part.name: value.clone()
        for part in dataclasses.fields(seen)
        if isinstance(value := getattr(seen, part.name), Tensor) and value.is_inference()
    }
    return dataclasses.replace(seen, **made) if made else seen


def _fault(result: Observations, problem: Problem, x: Tensor) -> str | None:
    if len(result) != 1 or result.metrics != problem.metrics:
        names = [metric.name for metric in problem.metrics]
        return (
            f"the problem returned {len(result)} rows of "
            f"{[metric.name for metric in result.metrics]} for one row of {names}"
        )
    if result.X.shape[-1] != len(x) or not is_at(result.X[0], x.double()):
        return f"the problem returned the outcome of another point: {result.X[0].tolist()}"
    if bool(result.incomplete.any()):
        return f"the problem returned NaN without a reason: {result.Y[0].tolist()}"
    return None


def refuse_another_problem(index: int, outcome: Observations, problem: Problem) -> None:
    """Refuse an outcome of row ``index`` that has other metrics or coefficients than ``problem``.

    Raises:
        StoreError: When it has.
    """
    if outcome.metrics != problem.metrics or outcome.X.shape[-1] != problem.space.d:
        raise StoreError(
            f"the outcome of row {index} belongs to another problem: it has "
            f"{outcome.X.shape[-1]} coefficients and metrics "
            f"{[metric.name for metric in outcome.metrics]}",
            hint=f"tell an outcome with {problem.space.d} coefficients and metrics "
            f"{[metric.name for metric in problem.metrics]}",
        )
    if bool(outcome.incomplete.any()):
        raise StoreError(
            f"the outcome of row {index} lacks metrics without a reason: {outcome.Y[0].tolist()}",
            hint="measure all metrics of a proposed row, or tell why it failed in `failures`; the "
            "values of the other metrics are kept",
        )


class TerminatedError(BaseException):
    """The process was asked to end (SIGTERM) during an evaluation.

    It is not a ``SystemExit``, which an evaluator may raise or catch.
    """


@contextmanager
def terminations_raise() -> Iterator[None]:
    """Turn SIGTERM into `TerminatedError` in the block, so that its end can be recorded.

    Where somebody else handles the signal already, and outside the main thread, nothing changes.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return

    def terminate(signum: int, frame: FrameType | None) -> None:
        raise TerminatedError("the process was asked to end")

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@runtime_checkable
class Remembers(Protocol):
    """A problem that can tell at which points it only looks up what it has measured."""

    def remembers(self, x: Tensor) -> bool:
        """Return whether evaluating ``x`` (``d``) measures nothing."""
        ...


def deaths_of(events: Iterable[Event], name: Mapping[str, Any]) -> int:
    """Return how many processes have died in the evaluation of this ``name``.

    What workers evaluated when the driver died does not count.
    """
    kinds = [
        event.kind
        for event in events
        if all(event.data.get(key) == name[key] for key in name) and not event.data.get("worker")
    ]
    return max(0, kinds.count("started") - kinds.count("interrupted"))
