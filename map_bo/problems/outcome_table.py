"""Problems whose rows are known by the outcome of every example: to replay, and to compare methods.

What an allocation of examples costs and gains can be tried on them as often as one likes: scoring
an example is looking it up.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from map_bo.data import Metric, Observations, check_metrics
from map_bo.errors import DataError, EvaluationError
from map_bo.evaluators.evaluator import Measurement
from map_bo.evaluators.isolation.world import known_numerics
from map_bo.evaluators.items import means_over_scored, numbered
from map_bo.evaluators.metrics import entry_of, select_metrics
from map_bo.examples.sets import ExampleOutcomes, ExampleSet
from map_bo.problems.problem import check_wanted
from map_bo.space import CoefficientSpace
from map_bo.values import real_number

__all__ = ["OutcomeProblem", "OutcomeTable"]


class OutcomeProblem(ABC):
    """A problem that tells the outcome of any example at any row; each metric is their mean."""

    @property
    @abstractmethod
    def space(self) -> CoefficientSpace:
        """The coefficients."""

    @property
    @abstractmethod
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics, one per task and called like it."""

    @property
    @abstractmethod
    def example_sets(self) -> Mapping[str, ExampleSet]:
        """The examples of each task."""

    @abstractmethod
    def outcomes_at(self, X: Tensor, task: str) -> Tensor:
        """Return the outcomes of all examples of a task, ``n x size``, at ``X`` (``n x d``)."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return plain data by which the same problem is recognised."""

    def reasons_at(self, X: Tensor) -> list[str | None]:
        """Return for each row of ``X`` why it cannot be evaluated; None where it can."""
        return [None] * len(X)

    def true_values(self, X: Tensor) -> Tensor:
        """Return the metrics on all examples, ``n x m``, at ``X`` (``n x d``)."""
        X = torch.as_tensor(X, dtype=torch.float64)
        return torch.stack([self.outcomes_at(X, one.name).nanmean(-1) for one in self.metrics], -1)

    @known_numerics()
    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        """Score all examples at every row of ``X`` (``n x d``).

        Nothing is drawn: ``generator`` is not used.

        Raises:
            SpaceError: When a row lies outside the space.
        """
        return self.observe(X, dict.fromkeys(self.example_sets))

    def observe(self, X: Tensor, wanted: Mapping[str, Tensor | None]) -> Observations:
        """Return what some examples say at every row of ``X`` (``n x d``).

        Args:
            X: The rows.
            wanted: Task -> indices of its examples; None for all.

        Raises:
            SpaceError: When a row lies outside the space.
        """
        X = self.space.check(X)
        metrics = tuple(metric for metric in self.metrics if metric.name in wanted)
        failures = self.reasons_at(X)
        entries = torch.full((3, len(X), len(metrics)), torch.nan, dtype=torch.float64)
        examples: list[dict[str, ExampleOutcomes]] = [{} for _ in X]
        for j, metric in enumerate(metrics):
            which = wanted[metric.name]
            size = self.example_sets[metric.name].size
            items = torch.arange(size) if which is None else which
            table = self.outcomes_at(X, metric.name)[:, items]
            for i, values in enumerate(table.unsqueeze(-1)):
                if failures[i] is not None and not examples[i] and bool(values.isnan().all()):
                    continue
                try:
                    seen = means_over_scored(values, [metric], metric.name, {metric.name})
                    entries[:, i, j] = torch.tensor(entry_of(seen[metric.name], metric))
                except EvaluationError as error:
                    failures[i] = f"{failures[i]}; {error.reason}" if failures[i] else error.reason
                    continue
                kept = ExampleOutcomes(items, values, size, (True,), (metric.name,))
                examples[i][metric.name] = kept
        Y, Yvar, counts = entries
        return Observations(
            X, Y, metrics, Yvar, counts, failures=tuple(failures), examples=tuple(examples)
        )

    def summarise(
        self, evaluator: str, outcomes: ExampleOutcomes
    ) -> dict[str, Measurement | EvaluationError]:
        """Return the mean of a task's outcomes, or that too many examples failed."""
        [metric] = select_metrics(self.metrics, [evaluator])
        try:
            return dict(means_over_scored(outcomes.values, [metric], evaluator, {evaluator}))
        except EvaluationError as error:
            return {evaluator: error}

    def on_examples(self, wanted: Mapping[str, Tensor]) -> _Part:
        """Return the problem that scores these examples alone; see `HasExamples`.

        Raises:
            DataError: When there is no such task or example.
        """
        return _Part(self, check_wanted(wanted, self.example_sets))

    def restricted(self, names: Sequence[str]) -> _Part:
        """Return the problem with these metrics alone.

        Raises:
            DataError: When there is no such metric.
        """
        chosen = select_metrics(self.metrics, names)
        return _Part(self, dict.fromkeys((metric.name for metric in chosen), None))


@dataclass(frozen=True, eq=False)
class _Part:
    """Some tasks of a problem, or some of their examples.

    Attributes:
        whole: The problem.
        wanted: Task -> indices of its examples; None for all.
    """

    whole: OutcomeProblem
    wanted: Mapping[str, Tensor | None]

    @property
    def space(self) -> CoefficientSpace:
        return self.whole.space

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return tuple(metric for metric in self.whole.metrics if metric.name in self.wanted)

    @property
    def example_sets(self) -> Mapping[str, ExampleSet]:
        return {k: one for k, one in self.whole.example_sets.items() if k in self.wanted}

    @known_numerics()
    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        return self.whole.observe(X, self.wanted)

    def summarise(
        self, evaluator: str, outcomes: ExampleOutcomes
    ) -> dict[str, Measurement | EvaluationError]:
        return self.whole.summarise(evaluator, outcomes)

    def on_examples(self, wanted: Mapping[str, Tensor]) -> _Part:
        return _Part(self.whole, check_wanted(wanted, self.example_sets))

    def restricted(self, names: Sequence[str]) -> _Part:
        chosen = select_metrics(self.metrics, names)
        return _Part(self.whole, {metric.name: self.wanted[metric.name] for metric in chosen})

    def describe(self) -> dict[str, Any]:
        return self.whole.describe()


class OutcomeTable(OutcomeProblem):
    """Recorded outcomes of examples as a problem.

    Args:
        X: ``r x d`` rows; where one comes twice, the first counts.
        outcomes: Task -> ``r x size`` outcomes, such as 0 and 1, or losses; NaN where an example
            failed.
        space: The coefficients; every row lies in it.
        metrics: What the tasks measure; by default one proportion each.
        labels: Task -> labels of its examples, one of any kind for each.
        tolerance: A point is a recorded one when their Euclidean distance is at most this.
        nearest: Take the nearest row, however far it is. The observations that come back have the
            coefficients that were asked for, so that any sampler can be tried on a table.

    Raises:
        DataError: When shapes or names disagree.
        SpaceError: When a row lies outside the space.
    """

    def __init__(
        self,
        X: Tensor,
        outcomes: Mapping[str, Tensor],
        space: CoefficientSpace,
        *,
        metrics: Sequence[Metric] | None = None,
        labels: Mapping[str, Any] | None = None,
        tolerance: float = 1e-6,
        nearest: bool = False,
    ) -> None:
        self.X = torch.as_tensor(X, dtype=torch.float64)
        tables = {k: torch.as_tensor(one).double() for k, one in outcomes.items()}
        if self.X.dim() != 2 or not len(self.X) or not tables:
            raise DataError(
                f"a table of outcomes has X of shape {tuple(self.X.shape)} and {len(tables)} tasks",
                hint="give at least one row, r x d, and one task",
            )
        if self.X.shape[1] != space.d:
            raise DataError(
                f"the table has {self.X.shape[1]} coefficients and the space {space.d}",
                hint="give the space that the table was recorded in",
            )
        for task, one in tables.items():
            shaped = one.dim() == 2 and len(one) == len(self.X) and one.shape[1] > 0
            if not shaped or bool(one.isinf().any()):
                raise DataError(
                    f"the outcomes of {task!r} have shape {tuple(one.shape)} for {len(self.X)} "
                    "rows" + (", and some are infinite" if shaped else ""),
                    hint="give r x size outcomes, NaN where an example failed",
                )
        self.tolerance = real_number("tolerance", tolerance, least=0, error=DataError)
        self.nearest = nearest
        given = check_metrics([Metric(k) for k in tables] if metrics is None else metrics)
        labels = {} if labels is None else labels
        if {metric.name for metric in given} != set(tables) or not set(labels) <= set(tables):
            names = ", ".join([*(metric.name for metric in given), *labels])
            raise DataError(
                f"metrics and labels are of {names}; tasks are {', '.join(tables)}",
                hint="give one metric per task, with its name, and labels by the names of tasks",
            )
        space.check(self.X)
        self._space = space
        self._metrics = tuple(
            replace(one, resampling="same") if one.resampling is None else one for one in given
        )
        self._tables = {metric.name: tables[metric.name] for metric in given}
        self._sets = {
            task: ExampleSet(
                (task,),
                one.shape[1],
                hashlib.sha256(one.contiguous().numpy().tobytes()).hexdigest(),
                numbered(labels[task], one.shape[1], DataError) if task in labels else None,
            )
            for task, one in self._tables.items()
        }

    @property
    def space(self) -> CoefficientSpace:
        """The coefficients."""
        return self._space

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics."""
        return self._metrics

    @property
    def example_sets(self) -> Mapping[str, ExampleSet]:
        """The examples of each task."""
        return self._sets

    def rows_at(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Return the row of the table for each row of ``X`` (``n x d``), and its distance."""
        # Not by matrix product: that would lose the digits that the tolerance is about.
        distance = torch.cdist(X, self.X, compute_mode="donot_use_mm_for_euclid_dist")
        # numpy's argmin takes the first of equals; torch's promises nothing.
        rows = torch.from_numpy(distance.numpy().argmin(-1))
        return rows, distance.amin(-1)

    def reasons_at(self, X: Tensor) -> list[str | None]:
        """Return for each row of ``X`` that it is not in the table; None where it is."""
        _, gaps = self.rows_at(X)
        return [
            None
            if self.nearest or gap <= self.tolerance
            else f"this point is not in the table; the nearest is {gap:.3g} away"
            for gap in gaps.tolist()
        ]

    def outcomes_at(self, X: Tensor, task: str) -> Tensor:
        """Return the outcomes of all examples of a task, ``n x size``; NaN off the table."""
        rows, gaps = self.rows_at(X)
        found = self._tables[task][rows]
        absent = gaps > (math.inf if self.nearest else self.tolerance)
        return found.masked_fill(absent.unsqueeze(-1), torch.nan)

    def describe(self) -> dict[str, Any]:
        """Return plain data by which the same problem is recognised."""
        rows = hashlib.sha256(self.X.contiguous().numpy().tobytes()).hexdigest()
        return {
            "kind": "outcome_table",
            "rows": rows,
            "examples": {task: one.digest for task, one in self._sets.items()},
            "tolerance": self.tolerance,
            "nearest": self.nearest,
        }
