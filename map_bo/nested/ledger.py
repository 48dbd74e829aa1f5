"""Everything that a nested run has measured, by point and metric, so that nothing is paid twice.

Points are coefficients of all experts, in the full space; a node searches a part of it. The unit of
cost is one *data set*: one metric measured at one point. Every measurement is an event of its own
in the record, from which the ledger of a resumed run is rebuilt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import StoreError
from map_bo.loop.state import UNREADABLE
from map_bo.scale import SAME_POINT, Scale
from map_bo.space import CoefficientSpace
from map_bo.tracking.codec import decode_observations, encode_observations
from map_bo.tracking.store import Event

__all__ = ["MEASURED", "Ledger"]

MEASURED = "measured"
"""Kind of the events that hold one point and the metrics measured there (``names``)."""

_DIGITS = round(-math.log10(SAME_POINT))  # coefficients that agree in these are one point
_RULE = "worst of base and experts, where they were measured"


@dataclass(frozen=True)
class _Entry:
    value: float
    variance: float
    count: float
    number: int


class Ledger:
    """All measurements, in the order in which they were made.

    Args:
        metrics: The metrics of the whole problem.
        append: Adds an event to the record, durably.
        before: The events that the record already holds.
    """

    def __init__(
        self,
        metrics: Sequence[Metric],
        append: Callable[[Event], None] = lambda event: None,
        before: Iterable[Event] = (),
    ) -> None:
        self._append = append
        self.events = list(before)
        """What was recorded before, and all that was recorded through here since."""
        self.metrics = tuple(metrics)
        self._by_name = {metric.name: metric for metric in metrics}
        self._points: dict[tuple[float, ...], Tensor] = {}
        self._entries: dict[tuple[float, ...], dict[str, _Entry]] = {}
        self.spent = 0
        """Data sets measured so far, failed ones included."""
        self.measured = 0
        """Points measured so far; it marks a moment, so that later points can be told apart."""
        for event in self.events:
            if event.kind == MEASURED and "node" not in event.data:
                try:
                    own = tuple(self._by_name[name] for name in event.data["names"])
                    outcome = decode_observations(event.data["observation"], own)
                    self._keep(outcome.X[0], outcome)
                except UNREADABLE as error:
                    raise StoreError(
                        f"a measurement of the record cannot be read: {error!r}",
                        hint="see `map-bo check RUN`",
                    ) from error

    def missing(self, x: Tensor, names: Sequence[str], *, before: int | None = None) -> list[str]:
        """Return which of the metrics are not known at ``x`` (``d``).

        Args:
            x: A point.
            names: Metrics.
            before: Only this many of the first measured points count; all when None.
        """
        known = self._entries.get(_key(x), {})
        last = self.measured if before is None else before
        return [name for name in names if name not in known or known[name].number >= last]

    def add(self, outcome: Observations, *, by: str = "") -> None:
        """Record one row of the full space; what failed costs its data sets and adds no value.

        Args:
            outcome: The row.
            by: The node that it was measured for, where nodes run side by side.
        """
        names = [metric.name for metric in outcome.metrics]
        data = {"names": names, "observation": encode_observations(outcome)}
        self.record(MEASURED, {**data, "by": by} if by else data)
        self._keep(outcome.X[0], outcome)

    def record(self, kind: str, data: Mapping[str, Any]) -> None:
        """Add an event to the record."""
        event = Event(kind, data)
        self._append(event)
        self.events.append(event)

    def _keep(self, x: Tensor, outcome: Observations) -> None:
        key = _key(x)
        known = self._entries.setdefault(key, {})
        self._points.setdefault(key, x)
        self.spent += len(outcome.metrics)
        number, self.measured = self.measured, self.measured + 1
        measured = outcome.measured[0].tolist()
        for j, metric in enumerate(outcome.metrics):
            if not measured[j]:
                continue
            known[metric.name] = _Entry(
                float(outcome.Y[0, j]),
                float(outcome.Yvar[0, j]),
                float(outcome.counts[0, j]),
                number,
            )

    def rows(self, X: Tensor, names: Sequence[str]) -> Observations:
        """Return the values at the rows of ``X`` (``n x d``), where all of ``names`` are known."""
        entries = [[self._entries[_key(x)][name] for name in names] for x in X]

        def table(part: str) -> Tensor:
            found = [[getattr(entry, part) for entry in row] for row in entries]
            return torch.tensor(found, dtype=torch.float64).reshape(len(X), len(names))

        metrics = tuple(self._by_name[name] for name in names)
        return Observations(X, table("value"), metrics, table("variance"), table("count"))

    def partial(self, x: Tensor, names: Sequence[str], reason: str) -> Observations:
        """Return the failed row at ``x`` (``d``) with what is known of ``names`` there."""
        known = [name for name in names if not self.missing(x, [name])]
        metrics = tuple(self._by_name[name] for name in names)
        row = Observations.failed(x.unsqueeze(0), metrics, reason)
        if not known or len(known) == len(names):
            return row
        there = torch.tensor([[name in known for name in names]])
        found = self.rows(x.unsqueeze(0), known)

        def spread(values: Tensor) -> Tensor:
            return torch.full_like(row.Y, torch.nan).masked_scatter(there, values)

        return replace(row, Y=spread(found.Y), Yvar=spread(found.Yvar), counts=spread(found.counts))

    def whole(self, names: Sequence[str], columns: Tensor, *, before: int | None = None) -> Tensor:
        """Return the points (``n x d``) at which all ``names`` are known.

        Args:
            names: Metrics.
            columns: ``d`` booleans: points with other non-zero coefficients are left out.
            before: See :meth:`missing`.
        """
        found = [
            x
            for x in self._points.values()
            if not bool(x[~columns].any()) and not self.missing(x, names, before=before)
        ]
        return torch.stack(found) if found else torch.zeros(0, len(columns), dtype=torch.float64)

    def about(
        self, names: Sequence[str], columns: Tensor, *, before: int | None = None
    ) -> dict[str, Observations]:
        """Return all measurements of each metric where only some coefficients are not zero.

        Args:
            names: Metrics.
            columns: ``d`` booleans: which coefficients may differ from zero.
            before: See :meth:`missing`.

        Returns:
            Metric -> its measurements, in the coefficients of ``columns``.
        """
        found = {}
        for name in names:
            X = self.whole([name], columns, before=before)
            if len(X):
                known = self.rows(X, [name])
                found[name] = Observations(
                    X[:, columns], known.Y, known.metrics, known.Yvar, known.counts
                )
        return found

    def scale(
        self, space: CoefficientSpace, names: Sequence[str], *, before: int | None = None
    ) -> Scale | None:
        """Return the scale of metrics that the base and the experts give, as far as measured.

        For each metric it is :meth:`map_bo.scale.Scale.of` what was measured of that metric on
        the base and the experts.

        Args:
            space: The full space.
            names: Metrics.
            before: See :meth:`missing`.

        Returns:
            The scale; None when a metric was measured on no expert.
        """
        anchors = space.anchors()
        parts = []
        for name in names:
            rows = [
                i
                for i, kind in enumerate(anchors.kinds)
                if kind != "blend" and not self.missing(anchors.X[i], [name], before=before)
            ]
            if all(anchors.kinds[i] != "expert" for i in rows):
                return None
            parts.append(Scale.of(self.rows(anchors.X[rows], [name]), space))
        return Scale(
            tuple(self._by_name[name] for name in names),
            torch.cat([part.point for part in parts]),
            torch.cat([part.best for part in parts]),
            _RULE,
            ranged=torch.cat([part.ranged for part in parts]),
        )


def _key(x: Tensor) -> tuple[float, ...]:
    # Zero has two signs, and only one key.
    return tuple(round(value, _DIGITS) + 0.0 for value in x.tolist())
