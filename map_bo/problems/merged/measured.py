"""What the evaluators measured on some rows, filled in one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import EvaluationError
from map_bo.evaluators.evaluator import Measurement
from map_bo.evaluators.metrics import entries_of
from map_bo.evaluators.scoring import Scored
from map_bo.examples.sets import ExampleOutcomes

__all__ = ["MeasuredRows"]


class MeasuredRows:
    """Rows of coefficients with nothing measured yet.

    Args:
        X: ``n x d`` coefficients.
        metrics: The ``m`` metrics.
        scored: The evaluators that score by example.
    """

    def __init__(
        self, X: Tensor, metrics: Sequence[Metric], scored: Mapping[str, Scored] | None = None
    ) -> None:
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
        self._scored = scored or {}
        self._examples: list[dict[str, ExampleOutcomes]] = [{} for _ in range(n)]
        self._failures: list[str | None] = [None] * n

    def put(self, i: int, found: Mapping[str, Measurement | EvaluationError]) -> list[str]:
        """Take what an evaluator measured on row ``i``; return the reasons of what failed."""
        entries, reasons = entries_of(found, self._columns)
        for name, entry in entries.items():
            j = self._columns[name][0]
            self._Y[i, j], self._Yvar[i, j], self._counts[i, j] = entry
        return reasons

    def put_outcomes(
        self, i: int, key: str, table: Tensor | None, items: Tensor | None = None
    ) -> None:
        """Take the outcomes of an evaluator's examples on row ``i``, once its metrics are there.

        Those of metrics that were not measured say nothing, and those of examples that cannot be
        scored without the others belong to no set.

        Args:
            i: The row.
            key: What the evaluator is called.
            table: ``n x k`` outcomes; None where they are not known.
            items: Their examples; None for all in order.
        """
        scored = self._scored.get(key)
        if table is None or scored is None or not scored.divisible:
            return
        columns = [self._columns[name][0] for name in scored.metrics if name in self._columns]
        if bool(self._Y[i, columns].isfinite().any()):
            self._examples[i][key] = scored.outcomes(table, items)

    def recall(
        self,
        i: int,
        key: str,
        found: Mapping[str, Measurement],
        seconds: float,
        table: Tensor | None = None,
    ) -> list[str]:
        """Take what an evaluator measured in an earlier evaluation, which took some seconds."""
        reasons = self.put(i, found)
        if key in self._scored and table is not None and len(table) == self._scored[key].size:
            self.put_outcomes(i, key, table)
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
            tuple(self._examples),
        )
