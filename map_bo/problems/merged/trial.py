"""Trying a merged-model problem out before a run: base and experts on a few examples of each task.

It shows whether everything loads, fits and scores, and what an evaluation costs.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from map_bo.data import Metric
from map_bo.errors import EvaluationError, MapBoError
from map_bo.evaluators.evaluator import Evaluator, ItemEvaluator
from map_bo.evaluators.examples import ExampleEvaluator
from map_bo.evaluators.kinds import refuse_all
from map_bo.evaluators.metrics import DeclaresMetrics, measure_all, metric_names
from map_bo.problems.merged.problem import MergedModelProblem

__all__ = ["TaskTrial", "Trial", "peak_memory", "try_out"]


@dataclass(frozen=True)
class TaskTrial:
    """One task, tried out.

    Attributes:
        name: The task, which is the evaluator's name.
        size: Number of its examples; None where the evaluator does not say.
        tried: How many of them were scored; None where it was called as a whole.
        seconds: What scoring all of them is expected to take, for one model.
        values: Model -> metric of the run -> its value on the examples that were scored.
    """

    name: str
    size: int | None
    tried: int | None
    seconds: float
    values: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Trial:
    """A problem, tried out.

    Attributes:
        models: ``base`` and the experts that lie in the space.
        tasks: The tasks.
        merging: Seconds of one merge; there is one for each task in an evaluation.
        memory: Peak resident memory of the process until now, in bytes.
        device_memory: Peak memory on the graphics processor, in bytes; 0 without one.
    """

    models: tuple[str, ...]
    tasks: tuple[TaskTrial, ...]
    merging: float
    memory: int
    device_memory: int

    @property
    def seconds(self) -> float:
        """Seconds that one evaluation is expected to take: merging and scoring."""
        return sum(task.seconds + self.merging for task in self.tasks)


def try_out(problem: MergedModelProblem, *, examples: int = 32) -> Trial:
    """Score base and experts on a few examples of each task, evenly spaced.

    An evaluator that does not score by example is called on the base alone. The time of a task is
    that of its fastest model, because the first ones warm up.

    Args:
        problem: The problem; it is prepared.
        examples: At most so many examples of each task.

    Raises:
        MapBoError: What evaluators refuse or cannot do, all of it together.
    """
    problem.prepare()
    anchors = problem.space.anchors()
    rows = [
        (name, x)
        for name, kind, x in zip(anchors.names, anchors.kinds, anchors.X, strict=True)
        if kind in ("base", "expert")
    ]
    wanted = {metric.name: metric for metric in problem.metrics}
    troubles: list[MapBoError] = []
    tasks: list[TaskTrial] = []
    merges: list[float] = []
    for key, evaluator in problem.evaluators.items():
        try:
            tasks.append(_try_task(problem, key, evaluator, rows, wanted, examples, merges))
        except MapBoError as error:
            troubles.append(error)
    refuse_all(troubles)
    return Trial(
        models=tuple(name for name, _ in rows),
        tasks=tuple(tasks),
        merging=statistics.median(merges),
        memory=peak_memory(),
        device_memory=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
    )


def _try_task(
    problem: MergedModelProblem,
    key: str,
    evaluator: Evaluator,
    rows: Sequence[tuple[str, Tensor]],
    wanted: Mapping[str, Metric],
    examples: int,
    merges: list[float],
) -> TaskTrial:
    names = metric_names(key, evaluator)
    metric = next(name for name in names.values() if name in wanted)
    items = isinstance(evaluator, ItemEvaluator)
    size = evaluator.size if isinstance(evaluator, ItemEvaluator) else None
    tried = None if size is None else min(size, examples)
    values: dict[str, dict[str, float]] = {}
    seconds: list[float] = []
    for model_name, x in rows if items else rows[:1]:
        begun = time.perf_counter()
        with problem.load(x, metric=metric) as model:
            merges.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            found = _values(key, evaluator, model, names, tried)
            seconds.append(time.perf_counter() - begun)
        values[model_name] = {name: value for name, value in found.items() if name in wanted}
    whole = min(seconds) if size is None or not tried else min(seconds) * size / tried
    return TaskTrial(key, size, tried, whole, values)


def _values(
    key: str, evaluator: Any, model: nn.Module, names: Mapping[str, str], tried: int | None
) -> dict[str, float]:
    """Return metric of the run -> value, on some examples or on all of them."""
    if tried is not None:
        try:
            items = _spread(tried, evaluator.size)
            outcomes = evaluator.score(model, items)
        except MapBoError as error:
            raise type(error)(f"task {key!r}: {error.message}", hint=error.hint) from error
        except Exception as error:
            raise EvaluationError(
                f"task {key!r} raised {type(error).__name__}: {error}",
                hint="call the evaluator on the base to find out why",
            ) from error
        if isinstance(evaluator, ExampleEvaluator):
            return {
                names[name]: seen.value for name, seen in evaluator.summary(outcomes, items).items()
            }
        table = outcomes.reshape(tried, -1)
        if isinstance(evaluator, DeclaresMetrics) and table.shape[1] != len(names):
            raise EvaluationError(
                f"task {key!r} has {table.shape[1]} outcomes per example, and declares "
                f"{len(names)} metrics",
                hint="return n outcomes, or n x m of m metrics",
            )
        return dict(zip(names.values(), table.mean(0).tolist(), strict=True))
    values: dict[str, float] = {}
    for name, one in measure_all(key, evaluator, model).items():
        if isinstance(one, EvaluationError):
            raise one
        values[name] = one.value
    return values


def _spread(n: int, size: int) -> Tensor:
    """Return ``n`` of ``size`` indices, of all parts of the data, ascending.

    Their distances differ: examples may be of several tasks in turn, and each is to have some.
    """
    steps = torch.arange(n)
    return steps * size // n + steps % (size // n)


def peak_memory() -> int:
    """Return the peak resident memory of this process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
