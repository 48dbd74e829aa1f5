"""Which examples a driver has scored next, and what a row is worth once more of them are scored."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Generator

from map_bo.data import Metric, Observations
from map_bo.errors import ConfigError, EvaluationError
from map_bo.evaluators.evaluator import Measurement
from map_bo.evaluators.examples import mean_of
from map_bo.evaluators.isolation.world import callers_world
from map_bo.evaluators.metrics import entries_of
from map_bo.examples.sets import ExampleOutcomes, ExampleSet, Part, searched
from map_bo.loop.progress import CountsCost, Reporter
from map_bo.loop.settings import Settings
from map_bo.loop.state import RunState
from map_bo.observed import joined_examples
from map_bo.problems.problem import HasExamples, Preparable, Problem, SummarisesExamples
from map_bo.rng import child
from map_bo.samplers.allocation.allocation import Action, Allocation, Standing
from map_bo.tracking.codec import encode_observations, encode_parts

__all__ = ["Scoring", "tell_cost"]

logger = logging.getLogger(__name__)


class Scoring:
    """What a run scores by example.

    Args:
        problem: What is evaluated; it is prepared now.
        settings: Those of the run.

    Raises:
        ConfigError: When the problem cannot score some of its examples alone.
    """

    def __init__(self, problem: Problem, settings: Settings) -> None:
        if not isinstance(problem, HasExamples):
            word = "items" if settings.items != "full" else "holdout"
            raise ConfigError(
                f"loop.{word} is {getattr(settings, word)!r}, and {type(problem).__name__} does "
                "not score its examples one by one",
                hint=f"leave loop.{word} out, or give evaluators that do: map_bo.Items(score, "
                "size=...), or one of the ready ones",
            )
        if isinstance(problem, Preparable):
            with callers_world():
                problem.prepare()
        self._problem, self._settings = problem, settings
        self.sets: Mapping[str, ExampleSet] = problem.example_sets
        if not any(one.divisible for one in self.sets.values()):
            raise ConfigError(
                f"none of the evaluators scores example by example: {', '.join(self.sets)}",
                hint="leave loop.items and loop.holdout out, or wrap one: map_bo.Items(score, "
                "size=len(data))",
            )
        self.sizes = {
            name: searched(one.size, settings.holdout) if one.divisible else one.size
            for name, one in self.sets.items()
        }
        self._refuse_small()
        self.allocation: Allocation = settings.allocation
        self.flying: dict[int, tuple[Part, ...]] = {}

    def _refuse_small(self) -> None:
        """Refuse a holdout that leaves the search a single example, of which no spread is known."""
        for name, left in self.sizes.items():
            whole = self.sets[name].size
            if left < min(2, whole):
                raise ConfigError(
                    f"loop.holdout is {self._settings.holdout:g}, which leaves {left} of the "
                    f"{whole} examples of {name} for the search",
                    hint="hold fewer out, such as 0.3, or give more examples",
                )

    @property
    def order(self) -> int:
        """The seed that the orders of the examples are drawn by."""
        return self._settings.seed

    def metrics(self, parts: Iterable[Part]) -> tuple[str, ...]:
        """Return the metrics that are measured on parts, in the order of the problem."""
        named = {name for part in parts for name in self.sets[part.evaluator].metrics}
        return tuple(one.name for one in self._problem.metrics if one.name in named)

    @property
    def everything(self) -> tuple[Part, ...]:
        """All examples that are not held out."""
        return tuple(Part(name, 0, size) for name, size in self.sizes.items())

    def standing(self, state: RunState) -> Standing:
        """Return where the search stands, with everything in flight."""
        covered: dict[int, dict[str, int]] = {}
        for row in state.outcomes:  # what was told, or comes from elsewhere, is whole
            covered[row] = dict(state.covered.get(row, self.sizes))
        for row, parts in self.flying.items():
            covered[row] = {
                **covered.get(row, {}),
                **{part.evaluator: part.stop for part in parts},
            }
        rows = sorted(state.outcomes)
        return Standing(
            seen=state.seen,
            rows=tuple(rows),
            X=state.X,
            space=self._problem.space,
            sets=self.sets,
            sizes=self.sizes,
            covered=covered,
            busy=frozenset(self.flying) | state.closed | _lacking(state),
            budget=self._settings.search,
        )

    def next(self, state: RunState, generator: Generator) -> Action | None:
        """Return what to score next; None when the budget has room for nothing more."""
        standing = self.standing(state)
        if standing.left < min(standing.weights.values()) / max(self.sizes.values()):
            return None
        return self.allocation.next(standing, generator=child(generator, "allocate"))

    def first(self, state: RunState, row: int) -> tuple[Part, ...]:
        """Return what a row without an outcome is measured on."""
        return state.planned.get(row) or self.allocation.first(self.standing(state))

    def share(self, parts: tuple[Part, ...], state: RunState) -> float:
        """Return what parts cost, in full evaluations."""
        return self.standing(state).cost(parts)

    def more(
        self, row: int, state: RunState, outcome: Observations, *, again: bool
    ) -> tuple[str, dict[str, Any]]:
        """Return the event of a row that was measured on further examples, or of its failure.

        Args:
            row: The row, which has its outcome.
            state: Where the run stands.
            outcome: Some of its metrics on the further examples.
            again: Whether it may be tried again, if it failed.
        """
        parts = self.flying.pop(row)
        data = {"index": row, "parts": encode_parts(parts), "share": self.share(parts, state)}
        reason = outcome.failures[0]
        if reason is None:
            whole = self.with_more(state.outcomes[row], outcome)
            reason = whole.failures[0]
            if reason is None:
                return "scored", {**data, "observation": encode_observations(whole)}
        if again:
            return "attempt", {"index": row, "parts": data["parts"], "reason": reason}
        logger.warning("evaluation %d gets no more examples: %s", row + 1, reason)
        return "scored", {**data, "reason": reason}

    def with_more(self, before: Observations, more: Observations) -> Observations:
        """Return a row (one) by all of its examples, with the outcomes of the further ones alone.

        Args:
            before: The row as it was measured.
            more: Some of its metrics on further examples.
        """
        [merged] = joined_examples(before.examples, more.examples)
        found: dict[str, Measurement | EvaluationError] = {}
        for evaluator in more.examples[0]:
            found |= self._summarise(evaluator, merged[evaluator])
        columns = {metric.name: (j, metric) for j, metric in enumerate(before.metrics)}
        entries, reasons = entries_of(found, columns)
        Y, Yvar, counts = before.Y.clone(), before.Yvar.clone(), before.counts.clone()
        for name, entry in entries.items():
            j = columns[name][0]
            Y[0, j], Yvar[0, j], counts[0, j] = entry
        return dataclasses.replace(
            before,
            Y=Y,
            Yvar=Yvar,
            counts=counts,
            cost=before.cost + more.cost,
            failures=("; ".join(reasons) or None,),
            examples=more.examples,
            gradients=None,
            gradient_variance=None,
        )

    def _summarise(
        self, evaluator: str, outcomes: ExampleOutcomes
    ) -> Mapping[str, Measurement | EvaluationError]:
        if isinstance(self._problem, SummarisesExamples):
            return self._problem.summarise(evaluator, outcomes)
        of: dict[str, Metric] = {metric.name: metric for metric in self._problem.metrics}
        return {
            name: mean_of(column[column.isfinite()], of[name])
            for name, column in zip(
                self.sets[evaluator].metrics, outcomes.values.unbind(-1), strict=True
            )
        }

    def describe(self, state: RunState) -> dict[str, Any]:
        """Return what search and verification have spent, as plain data for the summary."""
        standing, checks = self.standing(state), len(state.verified)
        scored = {
            name: sum(covered.get(name, 0) for covered in standing.covered.values())
            + checks * self.sizes[name]  # front points are measured on everything
            for name in self.sets
        }
        rows = torch.tensor(
            [[row.get(name, 0) for name in self.sets] for row in standing.covered.values()]
        )
        return {
            "examples": {
                name: {
                    "scored": scored[name],
                    "full": self.sizes[name],
                    "held_out": self.sets[name].size - self.sizes[name],
                    "median": float(rows[:, i].double().median()) if len(rows) else 0.0,
                }
                for i, name in enumerate(self.sets)
            },
            "full_evaluations": round(standing.spent + checks, 6),
        }


def tell_cost(report: Reporter, scoring: Scoring | None, state: RunState) -> None:
    """Tell a reporter how many full evaluations were spent, where rows may cost less than one."""
    if scoring is not None and isinstance(report, CountsCost):
        report.paid(state.spent + len(state.verified))


def _lacking(state: RunState) -> frozenset[int]:
    """Return the rows that were measured on examples whose outcomes a repair has left out.

    Their values stand; with more examples they would be replaced by those of the new ones alone.
    """
    return frozenset(
        row
        for row, covered in state.covered.items()
        if row in state.outcomes
        and state.outcomes[row].failures[0] is None
        and any(
            name not in state.outcomes[row].examples[0]
            or len(state.outcomes[row].examples[0][name]) < count
            for name, count in covered.items()
        )
    )
