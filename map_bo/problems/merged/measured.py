"""What the evaluators measured on some rows, filled in one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import EvaluationError
from map_bo.evaluators.evaluator import Measurement
from map_bo.evaluators.metrics import entries_of

__all__ = ["MeasuredRows"]


class MeasuredRows:
    """Rows of coefficients with nothing measured yet.

    Args:
        X: ``n x d`` coefficients.
        metrics: The ``m`` metrics.
    """

    def __init__(self, X: Tensor, metrics: Sequence[Metric]) -> None:
        n, m = len(X), len(metrics)
        self._X, self._metrics = X, tuple(metrics)
        self._columns = {metric.name: (j, metric) for j, metric in enumerate(metrics)}
        self._Y, self._Yvar, self._counts = (
            torch.full((n, m), torch.nan, dtype=torch.float64) for _ in range(3)
        )
        self._gradients, self._noise = (
            torch.full((n, m, X.shape[1]), torch.nan, dtype=torch.float64) for _ in range(2)
        )
        self._cost, self._saved = (torch.zeros(n, dtype=torch.float64) for _ in range(2))
        self._recalled = torch.zeros(n, m, dtype=torch.bool)
        self._failures: list[str | None] = [None] * n

    def put(self, i: int, found: Mapping[str, Measurement | EvaluationError]) -> list[str]:
        """Take what an evaluator measured on row ``i``; return the reasons of what failed."""
        entries, reasons = entries_of(found, self._columns)
        for name, entry in entries.items():
            j = self._columns[name][0]
            self._Y[i, j], self._Yvar[i, j], self._counts[i, j] = entry
        return reasons

    def recall(self, i: int, found: Mapping[str, Measurement], seconds: float) -> list[str]:
        """Take what an evaluator measured in an earlier evaluation, which took some seconds."""
        reasons = self.put(i, found)
        for name in found.keys() & self._columns.keys():
            j = self._columns[name][0]
            self._recalled[i, j] = bool(torch.isfinite(self._Y[i, j]))
        self._saved[i] += seconds
        return reasons

    def put_gradient(self, i: int, metric: str, gradient: Tensor, variance: Tensor) -> None:
        """Take a metric's ``d`` derivatives by the coefficients, and the variances of those."""
        j = self._columns[metric][0]
        self._gradients[i, j], self._noise[i, j] = gradient, variance

    def end(self, i: int, reasons: Sequence[str], seconds: float) -> None:
        """Close row ``i``: the reasons of what failed, and the seconds that it took."""
        self._failures[i] = "; ".join(reasons) or None
        self._cost[i] = seconds

    def observations(self) -> Observations:
        """Return what was measured."""
        return Observations(
            self._X,
            self._Y,
            self._metrics,
            self._Yvar,
            self._counts,
            self._cost,
            tuple(self._failures),
            self._gradients,
            self._noise,
            self._recalled,
            self._saved,
        )
