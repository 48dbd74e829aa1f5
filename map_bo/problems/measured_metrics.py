"""Named evaluators: their metrics, and what a measurement of one is kept as."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from map_bo.data import Metric, check_metrics
from map_bo.errors import DataError, EvaluationError, MergeError
from map_bo.problems.evaluators import Evaluator, Measurement, binomial_variance

__all__ = ["check_names", "entry_of", "metrics_of", "named_metrics"]


def metrics_of(
    evaluators: Mapping[str, Evaluator], metrics: Sequence[Metric] | None
) -> tuple[Metric, ...]:
    """Return one metric for each evaluator, or raise when names differ."""
    if metrics is None:
        return tuple(Metric(name, examples="same") for name in evaluators)
    given = check_metrics(metrics)
    names = {metric.name for metric in given}
    if names != set(evaluators):
        raise DataError(
            f"metrics are {', '.join(sorted(names))}; evaluators are "
            f"{', '.join(sorted(evaluators))}",
            hint="give one metric for each evaluator, with its name",
        )
    # An evaluator is given a model and no source of chance, so it has examples of its own to use.
    return tuple(
        replace(metric, examples="same") if metric.examples is None else metric for metric in given
    )


def named_metrics(metrics: Sequence[Metric], names: Sequence[str]) -> tuple[Metric, ...]:
    """Return the metrics of these names, in their order.

    Raises:
        DataError: When there is no such metric.
    """
    known = {metric.name: metric for metric in metrics}
    for name in names:
        if name not in known:
            raise DataError(f"there is no metric {name!r}", hint=f"metrics are {', '.join(known)}")
    return tuple(known[name] for name in names)


def entry_of(seen: Measurement, metric: Metric) -> tuple[float, float, float]:
    """Return value, variance and count as `Observations` keeps them, or raise out of bounds."""
    low = -torch.inf if metric.lower is None else metric.lower
    high = torch.inf if metric.upper is None else metric.upper
    slack = 1e-6 * max([1.0, *(abs(x) for x in (low, high) if math.isfinite(x))])
    if not low - slack <= seen.value <= high + slack:
        raise EvaluationError(
            f"evaluator {metric.name!r} returned {seen.value}, outside the metric's bounds "
            f"[{low}, {high}]",
            hint="give the metric its own kind and bounds: metrics=[Metric(name, ...)]",
        )
    value = min(max(seen.value, low), high)
    variance = torch.nan if seen.variance is None else seen.variance
    count = torch.nan
    if seen.count is not None and metric.kind == "proportion":
        count = float(seen.count)
        if seen.variance is None:
            variance = binomial_variance(value, count, lower=low, upper=high)
    return value, variance, count


def check_names(given: object, kind: str) -> None:
    """Refuse what is no mapping from names to experts or to evaluators."""
    error = MergeError if kind == "expert" else EvaluationError
    if not isinstance(given, Mapping):
        raise error(
            f"{kind}s are a {type(given).__name__}",
            hint=f"give a mapping from {kind} names to {kind}s",
        )
    if not given:
        raise error(f"there are no {kind}s", hint=f"give at least one {kind}")
    for name, value in given.items():
        if not isinstance(name, str) or not name.strip():
            raise error(f"an {kind} has the name {name!r}", hint="names are text")
        if kind == "evaluator" and not callable(value):
            raise error(
                f"evaluator {name!r} is a {type(value).__name__}, which cannot be called",
                hint="give a function that takes the model and returns a number",
            )
