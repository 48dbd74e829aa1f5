"""Chosen points, measured for real: what was promised beside what is.

A choice rests on a prediction, or on measurements that it was chosen by; both are too good on
average. Confirming measures it, and base, experts and uniform blend beside it, on examples that
the search never saw where there are such: the last share of every order (``loop.holdout``), or the
evaluators of another problem. What that shows is the optimism of the search, measured instead of
estimated, and a verdict that nothing has to be corrected for but the number of comparisons.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from map_bo.data import Metric, Observations, directions
from map_bo.errors import DataError, EvaluationError, MapBoError, StoreError
from map_bo.evaluators.isolation.world import callers_world
from map_bo.examples.sets import ExampleOutcomes, Part, searched
from map_bo.loop.verdict.verdict import Verdict
from map_bo.problems.problem import HasExamples, Preparable, Problem
from map_bo.rng import child
from map_bo.tracking.codec import (
    decode_observations,
    decode_tensor,
    encode_observations,
    encode_tensor,
)
from map_bo.tracking.store import Event
from map_bo.workers.inline import InlineWorkers
from map_bo.workers.workers import Task, Workers

__all__ = [
    "CHOSEN",
    "CONFIRMED",
    "HELD_OUT",
    "SEARCHED",
    "Confirmation",
    "confirmations",
    "held_out_parts",
    "measure_points",
    "searched_parts",
]

CONFIRMED = "confirmed"
"""Kind of the event that holds a confirmation."""
CHOSEN = "the chosen merge"
HELD_OUT = "held-out examples"
SEARCHED = "the examples of the search"


@dataclass(frozen=True, eq=False)
class Confirmation:
    """Points that were measured for real, beside what the search said of them.

    Attributes:
        where: What they were measured on, in words.
        held_out: Whether the search never saw these examples.
        names: Names of the ``n`` points: :data:`CHOSEN` first, then the anchors.
        search: ``n x m`` what the search says of them: the prediction that the choice was made
            by, and what was measured at the anchors; NaN where nothing was.
        measured: The ``n`` measurements.
        verdict: What they say.
        choice: The choice as plain data.
    """

    where: str
    held_out: bool
    names: tuple[str, ...]
    search: Tensor
    measured: Observations
    verdict: Verdict
    choice: Mapping[str, Any]

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The ``m`` metrics."""
        return self.measured.metrics

    def optimism(self) -> dict[str, float | None]:
        """Return how much better the search's value of the chosen merge is, by metric.

        Positive means that it was too good, whatever the metric's direction; None where it is not
        known.
        """
        gap = (self.search[0] - self.measured.Y[0]) * directions(self.metrics)
        return {
            metric.name: value if math.isfinite(value) else None
            for metric, value in zip(self.metrics, gap.tolist(), strict=True)
        }

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return header and rows of a table: for each metric what the search says, and what is.

        What was scored on fewer examples than the chosen merge was not measured there: the search
        has an estimate.
        """
        head = ["merge"]
        for metric in self.metrics:
            head += [f"{metric.name}: search", f"{metric.name}: measured"]
        rows = []
        measured = self.measured.Y.masked_fill(self._short, math.nan)
        for name, said, found in zip(
            self.names, self.search.tolist(), measured.tolist(), strict=True
        ):
            cells = [cell for pair in zip(said, found, strict=True) for cell in map(_said, pair)]
            rows.append([name, *cells])
        return head, rows

    def lines(self) -> list[str]:
        """Return it in words: the verdict, and by how much the search was too good."""
        gaps = [f"{name} {gap:+.3f}" for name, gap in self.optimism().items() if gap is not None]
        short = "; -: on some of them alone, so the search has an estimate"
        said = [f"measured on {self.where}{short if bool(self._short.any()) else ''}"]
        said += self.verdict.lines()
        if gaps:
            said.append(f"optimism of the search (promised less measured): {', '.join(gaps)}")
        return said

    @property
    def _short(self) -> Tensor:
        """``n x m`` whether a point was scored on fewer examples than the chosen merge."""
        scored = [_scored(examples) for examples in self.measured.examples]
        return torch.tensor(
            [
                [row.get(one.name, 0) < scored[0].get(one.name, 0) for one in self.metrics]
                if row
                else [False] * len(self.metrics)
                for row in scored
            ]
        )

    def describe(self) -> dict[str, Any]:
        """Return it as the data of an event ``confirmed``; :meth:`read` reads it back."""
        return {
            "where": self.where,
            "held_out": self.held_out,
            "names": list(self.names),
            "search": encode_tensor(self.search),
            "observations": encode_observations(self.measured),
            "optimism": self.optimism(),
            "verdict": self.verdict.describe(),
            "choice": dict(self.choice),
        }

    def summary(self) -> dict[str, Any]:
        """Return what a summary shows of it: all but coefficients and examples."""
        head, rows = self.table()
        return {
            "where": self.where,
            "held_out": self.held_out,
            "optimism": self.optimism(),
            "verdict": self.verdict.describe(),
            "table": [head, *rows],
        }

    @classmethod
    def read(cls, data: Mapping[str, Any], metrics: Sequence[Metric]) -> Confirmation:
        """Return a confirmation from the data of its event.

        Args:
            data: The data.
            metrics: Those of the run.

        Raises:
            StoreError: When it is something else.
        """
        try:
            measured = decode_observations(data["observations"], metrics)
            names, search = tuple(map(str, data["names"])), decode_tensor(data["search"])
            search = search.reshape(-1, len(metrics))
            if not len(names) == len(measured) == len(search):
                raise DataError(f"{len(names)} names are of {len(measured)} points")
            return cls(
                str(data["where"]),
                bool(data["held_out"]),
                names,
                search,
                measured,
                Verdict.read(data["verdict"]),
                dict(data["choice"]),
            )
        except (
            MapBoError, KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError,
        ) as error:  # fmt: skip
            raise StoreError(
                f"a recorded confirmation cannot be read: {error!r}",
                hint="see `map-bo check RUN`; if it was edited by hand, restore it from a copy",
            ) from error


def confirmations(events: Iterable[Event], metrics: Sequence[Metric]) -> list[Confirmation]:
    """Return the confirmations of a record, in their order."""
    return [Confirmation.read(one.data, metrics) for one in events if one.kind == CONFIRMED]


def held_out_parts(problem: Problem, holdout: float) -> tuple[Part, ...] | None:
    """Return the examples of a problem that a search with this share held out never sees.

    Args:
        problem: The problem; it is prepared.
        holdout: Share of the examples, as in the settings of the run.

    Returns:
        One part per evaluator; what cannot be divided is measured as a whole. None where nothing
        is held out.
    """
    if not holdout > 0 or not isinstance(problem, HasExamples):
        return None
    if isinstance(problem, Preparable):
        with callers_world():
            problem.prepare()
    parts = []
    for name, one in problem.example_sets.items():
        seen = searched(one.size, holdout) if one.divisible else one.size
        parts.append(Part(name, seen if seen < one.size else 0, one.size))
    return tuple(parts)


def searched_parts(problem: Problem, holdout: float) -> tuple[Part, ...] | None:
    """Return the examples that a search with this share held out uses; None for all of them."""
    if not holdout > 0 or not isinstance(problem, HasExamples):
        return None
    if isinstance(problem, Preparable):
        with callers_world():
            problem.prepare()
    sets = problem.example_sets.items()
    return tuple(
        Part(name, 0, searched(one.size, holdout) if one.divisible else one.size)
        for name, one in sets
    )


def measure_points(
    problem: Problem,
    X: Tensor,
    *,
    generator: Generator,
    parts: Sequence[Part] | None = None,
    order: int = 0,
    timeout: float | None = None,
    workers: Workers | None = None,
) -> Observations:
    """Measure points for real, side by side where workers are.

    Args:
        problem: The problem.
        X: ``n x d`` points.
        generator: Source of any randomness of the measurements.
        parts: Which examples to score; None for all.
        order: The seed that the orders of the examples are drawn by.
        timeout: Seconds that one may take.
        workers: Who evaluates; None evaluates here.

    Returns:
        ``n`` rows; one that failed says why, unless it is the first.

    Raises:
        EvaluationError: When the first point, the chosen one, cannot be measured.
        MapBoError: What makes every evaluation fail, such as a checkpoint that is gone.
    """
    here = InlineWorkers(problem) if workers is None else workers
    if here.local and isinstance(problem, Preparable):
        with callers_world():
            problem.prepare()
    names = None
    if parts is not None and isinstance(problem, HasExamples):
        sets = problem.example_sets
        named = {name for part in parts for name in sets[part.evaluator].metrics}
        names = [metric.name for metric in problem.metrics if metric.name in named]
    tasks = [
        Task.of(
            "probe",
            f"confirm {i}",
            0,
            x,
            generator=child(generator, "confirm", i),
            metrics=names,
            timeout=timeout,
            parts=parts,
            order=order,
        )
        for i, x in enumerate(X)
    ]
    futures = [here.submit(task) for task in tasks]
    wait(futures)
    rows = [future.result().observations for future in futures]
    reason = rows[0].failures[0]
    if reason is not None:
        raise EvaluationError(
            f"the chosen merge could not be measured: {reason}",
            hint="evaluate it again, or choose another point",
        )
    found = Observations.joined(rows, X.shape[-1], problem.metrics)
    return dataclasses.replace(found, X=X)


def _scored(examples: Mapping[str, ExampleOutcomes]) -> dict[str, int]:
    """Return how many examples each metric of a row was scored on, where that is known."""
    return {
        name: len(outcomes)
        for evaluator, outcomes in examples.items()
        for name in outcomes.metrics or (evaluator,)
    }


def _said(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "-"
