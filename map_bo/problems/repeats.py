"""What is left as noise when one row is measured again: by chance, and by other batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from map_bo.errors import DataError, EvaluationError
from map_bo.evaluators.evaluator import Measurement
from map_bo.examples.sets import ExampleOutcomes
from map_bo.problems.problem import HasExamples, SummarisesExamples
from map_bo.rng import child, make_generator
from map_bo.values import whole_number

__all__ = ["RepeatNoise", "repeat_noise"]

_NOTICEABLE = 1e-4  # of an outcome, and at least of 1: rounding in float32 is none


@dataclass(frozen=True)
class RepeatNoise:
    """How far one metric of one row changes when it is measured again.

    Attributes:
        examples: How many examples there are.
        repeated: The most examples whose outcome changed when the same batches were scored again.
        regrouped: The most examples whose outcome changed when they were scored in other batches.
        deviation: Standard deviation of the metric over all these measurements, in its own unit.
    """

    examples: int
    repeated: int
    regrouped: int
    deviation: float


def repeat_noise(
    problem: HasExamples, x: Tensor, times: int = 3, *, seed: int = 0
) -> dict[str, RepeatNoise]:
    """Measure a row again and again, and tell what changes.

    All examples are scored ``2 * times`` times: first ``times`` times in the same batches, then
    in others each time. Nothing is taken from a cache of evaluations.

    Args:
        problem: A problem that scores examples.
        x: ``d`` coefficients.
        times: How many measurements of each kind, at least 2.
        seed: Seed of the batches, and of what evaluators draw.

    Returns:
        Name of the metric -> what changes. Metrics of evaluators that cannot score a part of their
        examples are left out.

    Raises:
        DataError: When ``times`` is not possible, or no evaluator scores by example.
        EvaluationError: When a measurement fails.
    """
    times = whole_number("times", times, least=2, error=DataError)
    sets = {k: one for k, one in problem.example_sets.items() if one.divisible and one.size > 1}
    if not sets:
        raise DataError(
            "no evaluator scores its examples one by one",
            hint="give some that do: map_bo.Items(score, size=...), or one of the ready ones",
        )
    source = make_generator(seed)
    kept: dict[str, list[ExampleOutcomes]] = {name: [] for name in sets}
    for turn in range(2 * times):
        # The same halves until they are to differ.
        orders = {
            name: torch.randperm(
                one.size, generator=child(source, "batches", name, max(0, turn - times + 1))
            )
            for name, one in sets.items()
        }
        for name, outcomes in _measured(problem, x, orders, child(source, "turn", turn)).items():
            kept[name].append(outcomes)
    found: dict[str, RepeatNoise] = {}
    for name, rows in kept.items():
        changed = [_changes(rows[0], row) for row in rows]
        values = [_values(problem, name, row) for row in rows]
        for j, metric in enumerate(rows[0].columns(name)):
            if metric in sets[name].metrics:
                series = torch.tensor([one[metric] for one in values], dtype=torch.float64)
                found[metric] = RepeatNoise(
                    examples=sets[name].size,
                    repeated=max(int(one[j]) for one in changed[:times]),
                    regrouped=max(int(one[j]) for one in changed[times:]),
                    deviation=float((series - series[0]).std()),
                )
    return found


def _measured(
    problem: HasExamples, x: Tensor, orders: Mapping[str, Tensor], generator: Generator
) -> dict[str, ExampleOutcomes]:
    """Score all examples in two halves, as what is whole may be known already."""
    found: dict[str, ExampleOutcomes] = {}
    for half in range(2):
        wanted = {name: order.tensor_split(2)[half] for name, order in orders.items()}
        seen = problem.on_examples(wanted).evaluate(x.reshape(1, -1), generator=generator)
        if seen.failures[0] is not None:
            raise EvaluationError(f"a measurement failed: {seen.failures[0]}", hint=None)
        for name, outcomes in seen.examples[0].items():
            found[name] = found[name].joined(outcomes) if name in found else outcomes
    return found


def _changes(one: ExampleOutcomes, other: ExampleOutcomes) -> Tensor:
    """Return for each metric how many outcomes differ noticeably, or failed in one alone."""
    size = one.values.abs().clamp(min=1)
    far = (one.values - other.values).abs() > _NOTICEABLE * size
    return (far | (one.values.isnan() != other.values.isnan())).sum(0)


def _values(problem: HasExamples, name: str, outcomes: ExampleOutcomes) -> dict[str, float]:
    if isinstance(problem, SummarisesExamples):
        return {
            metric: seen.value if isinstance(seen, Measurement) else torch.nan
            for metric, seen in problem.summarise(name, outcomes).items()
        }
    means = outcomes.values.nanmean(0).tolist()
    return dict(zip(outcomes.columns(name), means, strict=True))
