"""Estimates of metrics on whole sets of examples, from the outcomes of some, with their noise.

A row that was scored on 100 of 797 examples has an accuracy on these. What a search wants is the
one on all 797, and how sure it is of the differences between rows. How both follow from the
outcomes is in :mod:`map_bo.examples.regression`; how good they are is measured by
``python -m benchmarks.quality.estimation``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import DataError
from map_bo.examples.regression import ScoredExamples, errors_of_means, regressed
from map_bo.examples.sets import ExampleOutcomes
from map_bo.examples.sharing import DIFFERS, differing_share

__all__ = ["Method", "estimated"]

Method = Literal["auto", "regression", "plain"]

_SMALLEST = 1e-12  # of variances, beside the largest


def estimated(
    seen: Observations,
    *,
    sizes: Mapping[str, int] | None = None,
    method: Method = "auto",
    roughness: bool = True,
) -> Observations:
    """Return observations with estimates of the metrics on whole sets, and their joint noise.

    Rows that cover all examples of an evaluator keep its values, and so do values that come without
    outcomes of examples. Observations in which no value was measured on a part of its examples are
    returned as they are. Else the result has a covariance, with these variances in ``Yvar`` too:

    - of a metric that is the mean of its outcomes: the regression estimate, with its covariance,
      within the bounds that the metric has whatever the other examples give;
    - of any other metric (a macro F1, a rank correlation): the value as measured. Its variance is
      the recorded one times ``1 - n/M``, and rows correlate as their outcomes do;
    - of a value without outcomes, or on the whole set: independent of the others.

    On top of that, each value has the *roughness* that also a measurement on the whole set has:
    the share of its sampling variance that differs from row to row and that no smooth function
    follows (:func:`~map_bo.examples.sharing.differing_share`). So a row that covers more and more
    of its examples ends where one that covers all of them is.

    A failed example (NaN) is left out; the estimate is of the mean over those that do not fail.

    Args:
        seen: What was measured, with outcomes of examples.
        sizes: Evaluator -> how many of its examples count as all of them; ``ExampleOutcomes.size``
            for those that are not named.
        method: ``"regression"``, or ``"plain"``: values as measured, with their covariance.
            ``"auto"`` is the regression.
        roughness: Whether to add it. Without it the covariance is that of the differences between
            estimates and metrics on the whole set, which intervals of the latter take.

    Raises:
        DataError: When the outcomes of an evaluator do not belong to one set.
    """
    if method not in ("auto", "regression", "plain"):
        raise DataError(
            f"method must be 'auto', 'regression' or 'plain', got {method!r}",
            hint="leave it out for the regression",
        )
    columns = [_outcomes_of(seen, j, sizes or {}) for j in range(len(seen.metrics))]
    if all(found is None or bool(found[1].whole.all()) for found in columns):
        return seen
    shares = differing_share(seen)
    Y, Yvar = seen.Y.clone(), seen.Yvar.clone()
    covariance = torch.zeros(len(seen.metrics), len(seen), len(seen), dtype=torch.float64)
    for j, (metric, outcomes) in enumerate(zip(seen.metrics, columns, strict=True)):
        share = DIFFERS if bool(shares[j].isnan()) else float(shares[j])
        variance = _recorded_variance(seen, j)
        if outcomes is None and metric.resampling != "same":
            errors, rough = torch.diag(variance.nan_to_num(nan=0.0)), 0 * variance
        else:
            errors, rough = torch.zeros_like(covariance[j]), share * variance
        if outcomes is not None:
            at, one, mean = outcomes
            if mean and not bool(one.whole.all()):
                Y[at, j], found = _estimates(one, seen.Y[at, j], metric, method)
                errors[at.unsqueeze(-1), at] = found
            elif not mean:
                errors[at.unsqueeze(-1), at] = _as_measured(one, variance[at])
            own = share * one.variance / (one.size + 1)
            rough[at] = torch.where(one.whole & rough[at].isfinite(), rough[at], own)
        if roughness:
            errors.diagonal().add_(rough.nan_to_num(nan=0.0))
        there = seen.measured[:, j]
        covariance[j] = errors * there * there.unsqueeze(-1)
        Yvar[:, j] = torch.where(there & rough.isfinite(), errors.diagonal(), Yvar[:, j])
    return dataclasses.replace(seen, Y=Y, Yvar=Yvar, covariance=covariance)


def _outcomes_of(
    seen: Observations, column: int, sizes: Mapping[str, int]
) -> tuple[Tensor, ScoredExamples, bool] | None:
    """Return which rows have outcomes of a metric, these, and whether the metric is their mean.

    None where there are none of a set of two examples or more.
    """
    metric = seen.metrics[column]
    found: dict[int, tuple[str, ExampleOutcomes, int]] = {}
    for i in seen.measured[:, column].nonzero().flatten().tolist():
        for evaluator, one in seen.examples[i].items():
            k = one.columns(evaluator).get(metric.name)
            if k is not None and one.size > 1 and bool(one.values[:, k].isfinite().any()):
                found[i] = evaluator, one, k
    if not found:
        return None
    kinds = {(evaluator, one.size, one.means[k]) for evaluator, one, k in found.values()}
    if len(kinds) > 1:
        raise DataError(
            f"the outcomes of metric {metric.name!r} are of different sets: "
            f"{', '.join(f'{size} examples of {name!r}' for name, size, _ in sorted(kinds))}",
            hint="the data of an evaluator must stay the same throughout a run",
        )
    evaluator, whole, mean = kinds.pop()
    outcomes = torch.full((len(found), whole), torch.nan, dtype=torch.float64)
    scored = torch.zeros(len(found), whole, dtype=torch.bool)
    for row, (_, one, k) in enumerate(found.values()):
        outcomes[row, one.items] = one.values[:, k]
        scored[row, one.items] = True
    used, rows = scored.any(0), torch.tensor(list(found))
    result = ScoredExamples(
        seen.X[rows],
        outcomes[:, used],
        scored[:, used],
        _variances(outcomes[:, used], metric),
        max(sizes.get(evaluator, whole), int(scored.sum(-1).max())),
    )
    return rows, result, mean


def _variances(outcomes: Tensor, metric: Metric) -> Tensor:
    """Return the variance of each row's outcomes with one example more than there is, ``r``.

    Between two bounds, one half of that example is at each, so for outcomes of 0 and 1 a mean has
    the variance of :func:`~map_bo.evaluators.evaluator.binomial_variance`. Else it deviates as
    examples of all rows do on average. It is never 0.
    """
    counts = outcomes.isfinite().sum(-1)
    means = outcomes.nanmean(-1)
    low, high = _bounds(outcomes, metric)
    if math.isfinite(low) and math.isfinite(high):
        width = high - low
        u = (outcomes - low) / width
        first, second = ((x.nansum(-1) + 0.5) / (counts + 1) for x in (u, u.square()))
        found = width**2 * (second - first.square())
    else:
        squares = (outcomes - means.unsqueeze(-1)).square().nansum(-1)
        found = (squares + (squares / counts).mean()) / (counts + 1)
    largest = float(torch.maximum(found.max(), means.square().max()))
    return found.clamp_min(_SMALLEST * (largest or 1.0))


def _bounds(outcomes: Tensor, metric: Metric) -> tuple[float, float]:
    """Return the least and the most that an outcome can be; infinite where that is not known.

    They are the metric's own bounds, but where a single outcome is beyond, as the terms of some
    averages are.
    """
    known = outcomes[outcomes.isfinite()]
    low = -math.inf if metric.lower is None else metric.lower
    high = math.inf if metric.upper is None else metric.upper
    return (
        low if float(known.min()) >= low else -math.inf,
        high if float(known.max()) <= high else math.inf,
    )


def _recorded_variance(seen: Observations, column: int) -> Tensor:
    """Return the variances of a metric's values as recorded, or as counts say, ``n``."""
    metric, y, n = seen.metrics[column], seen.Y[:, column], seen.counts[:, column]
    if metric.kind != "proportion":
        return seen.Yvar[:, column].clone()
    assert metric.lower is not None
    assert metric.upper is not None
    width = metric.upper - metric.lower
    p = (n * ((y - metric.lower) / width).clamp(0, 1) + 0.5) / (n + 1)
    binomial = width**2 * p * (1 - p) / (n + 1)
    return torch.where(seen.Yvar[:, column].isnan(), binomial, seen.Yvar[:, column])


def _as_measured(one: ScoredExamples, variance: Tensor) -> Tensor:
    """Return the covariance of the errors of values that are not means of outcomes, ``r x r``.

    Args:
        one: The outcomes.
        variance: ``r`` variances as recorded; where they are unknown, those of the outcomes' means.
    """
    _, _, covariance = regressed(one)
    spread = torch.where(variance.isnan(), one.variance, variance * one.counts).sqrt()
    size = covariance.diagonal().sqrt()
    correlation = covariance / (size.unsqueeze(-1) * size).clamp_min(1e-300)
    return errors_of_means(one, correlation * spread.unsqueeze(-1) * spread)


def _estimates(
    one: ScoredExamples, measured: Tensor, metric: Metric, method: Method
) -> tuple[Tensor, Tensor]:
    """Return estimates of a metric that is the mean of its outcomes (``r``), and their covariance.

    Args:
        one: The outcomes.
        measured: ``r`` values as measured.
        metric: What they are of.
        method: How to estimate.
    """
    means, errors, covariance = regressed(one)
    if method == "plain":
        return measured, errors_of_means(one, covariance)
    done, left = 1 - one.left, one.left
    low, high = _bounds(one.outcomes, metric)
    # What the other examples give at worst and at best. (0 times infinity is not a number.)
    least = torch.where(left > 0, done * one.means + left * low, -torch.inf)
    most = torch.where(left > 0, done * one.means + left * high, torch.inf)
    found = (measured + (means - one.means)).clamp(least, most)
    if metric.lower is not None or metric.upper is not None:
        found = found.clamp(metric.lower, metric.upper)
    return torch.where(one.whole, measured, found), errors
