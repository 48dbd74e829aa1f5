"""Metrics that are no mean over examples, with their variances: macro F1 and correlations."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from map_bo.errors import EvaluationError
from map_bo.evaluators.evaluator import Measurement

__all__ = ["correlation", "macro_f1"]

_LEAST = 4  # examples, for a variance of a rank correlation


def macro_f1(predicted: Tensor, true: Tensor) -> Measurement:
    """Return the mean, over the classes that the examples have, of their F1 scores.

    ``F1 = 2 tp / (2 tp + fp + fn)`` of a class. The variance is that of the delete-one jackknife
    (Efron and Stein 1981): ``(n - 1) / n`` times the sum of squared deviations of the scores with
    one example left out; examples with the same answer and the same truth leave out the same.

    Args:
        predicted: ``n`` predicted classes.
        true: ``n`` true classes.
    """
    n = len(true)
    size = int(max(predicted.max(), true.max())) + 1
    both = torch.stack([true.long(), predicted.long()])
    pairs, counts = torch.unique(both, dim=1, return_counts=True)
    table = torch.zeros(size, size, dtype=torch.float64)
    table[pairs[0], pairs[1]] = counts.double()
    present = table.sum(1) > 0
    value = float(_f1(table)[present].mean())
    if n < 2:
        return Measurement(value)
    left = []
    for i, j in pairs.T.tolist():
        table[i, j] -= 1
        left.append(_f1(table)[present].mean())
        table[i, j] += 1
    scores, weights = torch.stack(left), counts.double()
    mean = (scores * weights).sum() / n
    return Measurement(value, variance=float((n - 1) / n * (weights * (scores - mean) ** 2).sum()))


def _f1(table: Tensor) -> Tensor:
    """Return the F1 score of each class from counts by truth and answer; 0 where there are none."""
    double = 2 * table.diagonal()
    scores: Tensor = double / (table.sum(0) + table.sum(1)).clamp(min=1)
    return scores


def correlation(x: Tensor, y: Tensor, kind: Literal["pearson", "spearman"]) -> Measurement:
    """Return the correlation of two series of numbers, in [-1, 1].

    The variance of Pearson's is that of the delete-one jackknife. The variance of Spearman's is
    ``(1 - r^2)^2 (1 + r^2 / 2) / (n - 3)``, from Fisher's transform with the standard error of
    Bonett and Wright 2000, equation 3; ties have their mean rank.

    Args:
        x: ``n`` predictions.
        y: ``n`` true numbers.
        kind: Of the numbers, or of their ranks.

    Raises:
        EvaluationError: When one of the two is constant, so that there is none.
    """
    x, y = x.double(), y.double()
    for series, what in ((x, "predictions"), (y, "true numbers")):
        if len(series) < 2 or bool((series == series[0]).all()):
            raise EvaluationError(
                f"all {len(series)} {what} are {float(series[0]):g}, and have no correlation",
                hint="a merge that tells no two examples apart is broken; narrow the bounds"
                if what == "predictions"
                else "choose examples whose numbers differ",
            )
    n = len(x)
    if kind == "spearman":
        value = float(_pearson(_ranks(x), _ranks(y)))
        square = value**2
        variance = (1 - square) ** 2 * (1 + square / 2) / (n - 3) if n >= _LEAST else None
        return Measurement(value, variance=variance)
    value = float(_pearson(x, y))
    return Measurement(value, variance=_jackknife(x, y))


def _pearson(x: Tensor, y: Tensor) -> Tensor:
    x, y = x - x.mean(), y - y.mean()
    product = torch.linalg.vector_norm(x) * torch.linalg.vector_norm(y)
    found: Tensor = (x @ y) / product
    return found.clamp(-1, 1)


def _jackknife(x: Tensor, y: Tensor) -> float | None:
    """Return the delete-one variance of Pearson's correlation; None where it is not defined."""
    n = len(x)
    if n < _LEAST:
        return None
    x, y = x - x.mean(), y - y.mean()
    # Sums without one example, about the mean without it: S - n / (n - 1) d^2.
    part = n / (n - 1)
    xx, yy, xy = x @ x - part * x * x, y @ y - part * y * y, x @ y - part * x * y
    product = xx * yy
    if bool((product <= 0).any()):
        return None
    scores = xy / product.sqrt()
    return float((n - 1) / n * ((scores - scores.mean()) ** 2).sum())


def _ranks(x: Tensor) -> Tensor:
    """Return the rank of each number from 1; equal ones share the mean of theirs."""
    _, places, counts = torch.unique(x, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    ranks: Tensor = (ends - (counts.double() - 1) / 2)[places]
    return ranks
