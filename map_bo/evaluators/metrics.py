"""The metrics that evaluators measure: what they declare, what they return, what is kept of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from map_bo.data import Metric, check_metrics
from map_bo.errors import DataError, EvaluationError, MergeError, did_you_mean
from map_bo.evaluators.evaluator import (
    Evaluator,
    ItemEvaluator,
    Measurement,
    binomial_variance,
    called,
    measurement_of,
)

__all__ = [
    "DeclaresMetrics",
    "SeveralMetrics",
    "check_names",
    "entries_of",
    "entry_of",
    "evaluator_of",
    "evaluators_of",
    "measure_all",
    "measurements_of",
    "metric_names",
    "metrics_of",
    "own_names",
    "scores_items",
    "select_metrics",
]


@runtime_checkable
class DeclaresMetrics(Protocol):
    """An evaluator that says what it measures.

    One that declares a single metric may return a number; its metric is called like the evaluator.
    One that declares several returns a mapping from their names; they are called
    ``evaluator_metric``, so that two harnesses may both have an ``accuracy``.
    """

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics, under names of the evaluator's own."""
        ...


@dataclass(frozen=True)
class SeveralMetrics:
    """A function that measures several metrics in one call, with what they are.

    Attributes:
        function: Takes the model and returns a mapping from names to numbers or `Measurement`.
        metrics: The metrics that it returns: names, or `Metric` where more is to be said.
    """

    function: Callable[[nn.Module], Mapping[str, float | Measurement]]
    metrics: tuple[Metric, ...]

    def __init__(
        self,
        function: Callable[[nn.Module], Mapping[str, float | Measurement]],
        metrics: Sequence[str | Metric],
    ) -> None:
        put = object.__setattr__
        put(self, "function", function)
        named = [Metric(one) if isinstance(one, str) else one for one in metrics]
        put(self, "metrics", check_metrics(named))

    def __call__(self, model: nn.Module) -> Mapping[str, float | Measurement]:
        """Return what the function returns."""
        return self.function(model)


def metric_names(key: str, evaluator: object) -> dict[str, str]:
    """Return an evaluator's own name of each metric -> the name that the metric has in a run.

    Args:
        key: What the evaluator is called.
        evaluator: The evaluator.
    """
    if not isinstance(evaluator, DeclaresMetrics):
        return {key: key}
    own = [metric.name for metric in check_metrics(evaluator.metrics)]
    if len(own) == 1:
        return {own[0]: key}
    return {name: f"{key}_{name}" for name in own}


def own_names(key: str, evaluator: Evaluator) -> dict[str, str]:
    """Return the name that each metric has in a run -> one that does not depend on ``key``."""
    if not isinstance(evaluator, DeclaresMetrics):
        return {key: "value"}
    return {name: own for own, name in metric_names(key, evaluator).items()}


def measure_all(
    name: str, evaluator: Evaluator, model: nn.Module
) -> dict[str, Measurement | EvaluationError]:
    """Call an evaluator and check what it returns for each of its metrics.

    Args:
        name: The evaluator's name, for errors.
        evaluator: As for :func:`~map_bo.evaluators.evaluator.measure`, or one that declares its
            metrics and returns a mapping.
        model: The model to measure.

    Returns:
        The name that each metric has in a run (see `metric_names`) -> its measurement, or what is
        wrong with it.

    Raises:
        EvaluationError: When the evaluator raises; when it returns neither a number nor, where
            it declares several metrics, a mapping.
    """
    return measurements_of(name, evaluator, called(name, evaluator, model))


def measurements_of(
    name: str, evaluator: object, result: object
) -> dict[str, Measurement | EvaluationError]:
    """Return what an evaluator has returned as `measure_all` does.

    Raises:
        EvaluationError: When it is neither a number nor, of several metrics, a mapping.
    """
    names = metric_names(name, evaluator)
    if len(names) == 1 and not (
        isinstance(result, Mapping) and isinstance(evaluator, DeclaresMetrics)
    ):
        return {metric: measurement_of(f"evaluator {name!r}", result) for metric in names.values()}
    if not isinstance(result, Mapping):
        raise EvaluationError(
            f"evaluator {name!r} declares the metrics {', '.join(names)} and returned a "
            f"{type(result).__name__}",
            hint="return a mapping from their names to numbers",
        )
    found: dict[str, Measurement | EvaluationError] = {}
    for own, metric in names.items():
        try:
            if own not in result:
                raise EvaluationError(
                    f"evaluator {name!r} returned no {own!r}", hint=did_you_mean(own, result)
                )
            found[metric] = measurement_of(f"evaluator {name!r}, metric {own!r},", result[own])
        except EvaluationError as error:
            found[metric] = error
    return found


def metrics_of(
    evaluators: Mapping[str, Evaluator], metrics: Sequence[Metric] | None
) -> tuple[Metric, ...]:
    """Return the metrics that evaluators measure, or raise when names differ.

    Args:
        evaluators: Name -> evaluator.
        metrics: What the metrics are, by the names of `metric_names`; by default what the
            evaluators declare, else a proportion of which more is better.

    Raises:
        DataError: When there are other names, or two evaluators measure metrics of one name.
    """
    declared: dict[str, Metric] = {}
    for key, evaluator in evaluators.items():
        own = evaluator.metrics if isinstance(evaluator, DeclaresMetrics) else (Metric(key),)
        for metric, name in zip(own, metric_names(key, evaluator).values(), strict=True):
            if name in declared:
                raise DataError(
                    f"two evaluators measure a metric called {name!r}",
                    hint="call one of the evaluators something else",
                )
            declared[name] = replace(metric, name=name)
    given = tuple(declared.values()) if metrics is None else check_metrics(metrics)
    names = {metric.name for metric in given}
    if names != set(declared):
        raise DataError(
            f"metrics are {', '.join(sorted(names))}; evaluators are {', '.join(sorted(declared))}",
            hint="give one metric for each evaluator, with its name",
        )
    # An evaluator is given a model and no source of chance, so it has examples of its own to use.
    return tuple(
        replace(metric, resampling="same") if metric.resampling is None else metric
        for metric in given
    )


def evaluators_of(
    evaluators: Mapping[str, Evaluator], metrics: Sequence[Metric]
) -> dict[str, Evaluator]:
    """Return the evaluators that measure any of these metrics, in the metrics' order."""
    keys = {
        name: key
        for key, evaluator in evaluators.items()
        for name in metric_names(key, evaluator).values()
    }
    return {keys[metric.name]: evaluators[keys[metric.name]] for metric in metrics}


def evaluator_of(metric: str, evaluators: Mapping[str, Evaluator]) -> str:
    """Return the name of the evaluator that measures a metric; the metric's own if none does."""
    for key, evaluator in evaluators.items():
        if metric in metric_names(key, evaluator).values():
            return key
    return metric


def select_metrics(metrics: Sequence[Metric], names: Sequence[str]) -> tuple[Metric, ...]:
    """Return the metrics of these names, in their order.

    Raises:
        DataError: When there is no such metric.
    """
    known = {metric.name: metric for metric in metrics}
    for name in names:
        if name not in known:
            raise DataError(f"there is no metric {name!r}", hint=did_you_mean(name, known))
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


def entries_of(
    found: Mapping[str, Measurement | EvaluationError], columns: Mapping[str, tuple[int, Metric]]
) -> tuple[dict[str, tuple[float, float, float]], list[str]]:
    """Return what `Observations` keeps of an evaluator's metrics, and the reasons of failures.

    Args:
        found: What `measure_all` returned.
        columns: Metric name -> its column and the metric; metrics of no column are left out.
    """
    entries: dict[str, tuple[float, float, float]] = {}
    reasons: list[str] = []
    for name, seen in found.items():
        if name not in columns:
            continue
        try:
            if isinstance(seen, EvaluationError):
                raise seen
            entries[name] = entry_of(seen, columns[name][1])
        except EvaluationError as error:
            reasons.append(error.reason)
    return entries, reasons


def check_names(given: object, kind: str) -> None:
    """Refuse what is not a mapping from names to experts or to evaluators."""
    error = MergeError if kind == "expert" else EvaluationError
    if not isinstance(given, Mapping):
        raise error(
            f"{kind}s must be a mapping, got a {type(given).__name__}",
            hint=f"give a mapping from {kind} names to {kind}s",
        )
    if not given:
        raise error(f"there are no {kind}s", hint=f"give at least one {kind}")
    for name, value in given.items():
        if not isinstance(name, str) or not name.strip():
            raise error(
                f"the name of an {kind} must be text, got {name!r}",
                hint="give it a name that is not empty",
            )
        if kind == "evaluator" and not callable(value) and not scores_items(value):
            raise error(
                f"evaluator {name!r} is a {type(value).__name__}, which cannot be called",
                hint="give a function that takes the model and returns a number, or what has "
                "`size` and `score(model, items)`",
            )


def scores_items(evaluator: object) -> bool:
    """Return whether an evaluator scores its examples one by one, prepared or not."""
    try:
        return isinstance(evaluator, ItemEvaluator)
    except Exception:  # of a size that is not known before `prepare`
        return True
