"""The driver's own process as the one worker: each row is evaluated when it is submitted."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

from map_bo.problems.problem import Problem
from map_bo.rng import make_generator
from map_bo.workers.evaluation import evaluate_row, measuring
from map_bo.workers.workers import Outcome, Task

__all__ = ["InlineWorkers"]


class InlineWorkers:
    """Evaluates rows here, one after another, by the problem of the run itself.

    An exception that ends the run (an interrupt, an error of the set-up) passes through
    :meth:`submit`.

    Args:
        problem: What to evaluate.
    """

    size = 1
    local = True

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def submit(self, task: Task) -> Future[Outcome]:
        """Evaluate the task, and return its future with the outcome in it."""
        future: Future[Outcome] = Future()
        row = evaluate_row(
            measuring(self._problem, task),
            task.point,
            timeout=task.timeout,
            generator=make_generator(task.seed),
        )
        future.set_result(Outcome(task.key, row))
        return future

    def running(self) -> Sequence[tuple[str, Task, float]]:
        """Return nothing: whoever asks is the process that would be evaluating."""
        return []

    def close(self, *, abandon: bool = False) -> None:
        """Do nothing."""
