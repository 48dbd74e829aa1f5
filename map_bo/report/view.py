"""The view of a run that every table, plot and page is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from map_bo.data import Front, Metric, Observations
from map_bo.errors import DataError
from map_bo.scale import Scale, anchor_rows, farthest_rows
from map_bo.space import CoefficientSpace

__all__ = [
    "AnchorValue",
    "RunView",
    "anchor_values",
    "representative_rows",
    "search_rows",
    "verification_rows",
]


@dataclass(frozen=True, eq=False)
class RunView:
    """A run as the report shows it; predicted and real values are separate fields.

    Attributes:
        title: What the run is called.
        space: The ``d`` coefficients.
        front: ``k`` predicted points, with real values where they were verified.
        seen: Every evaluation in order, failures included: the search, then the verification.
        scale: The reference point of the metrics, and the other end of their scale.
        summary: Plain data, as written to ``summary.json``.
        normalised: Whether to show scores normalised by each expert's own too; see
            :mod:`map_bo.report.normalised`.

    Raises:
        DataError: When the parts have different metrics or numbers of coefficients.
    """

    title: str
    space: CoefficientSpace
    front: Front
    seen: Observations
    scale: Scale
    summary: Mapping[str, Any]
    normalised: bool = False

    def __post_init__(self) -> None:
        if not self.front.metrics == self.seen.metrics == self.scale.metrics:
            raise DataError(
                f"the front has metrics {[x.name for x in self.front.metrics]}, the evaluations "
                f"{[x.name for x in self.seen.metrics]} and the scale "
                f"{[x.name for x in self.scale.metrics]}",
                hint="all three belong to one run and have the same metrics",
            )
        widths = (self.space.d, self.front.X.shape[-1], self.seen.X.shape[-1])
        if len(set(widths)) != 1:
            raise DataError(
                f"the space has {widths[0]} coefficients, the front {widths[1]} and the "
                f"evaluations {widths[2]}",
                hint="take all three from one run",
            )

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The ``m`` metrics, in the order of all columns."""
        return self.front.metrics


@dataclass(frozen=True, eq=False)
class AnchorValue:
    """A baseline (base, expert or uniform blend) and its measured metrics.

    Attributes:
        name: ``"base"``, the expert's name, or ``"uniform blend"``.
        kind: ``"base"``, ``"expert"`` or ``"blend"``.
        row: Its row in ``view.seen``.
        y: ``m`` measured metrics, own units.
    """

    name: str
    kind: str
    row: int
    y: Tensor


def anchor_values(view: RunView) -> tuple[AnchorValue, ...]:
    """Return the base, experts and uniform blend that were measured, in the space's order.

    Of several rows at one anchor (:func:`map_bo.scale.anchor_rows`) the first that succeeded
    counts. Anchors that were never measured are left out.
    """
    anchors = view.space.anchors()
    found = []
    measured = anchor_rows(view.seen.X, view.space) & view.seen.ok
    for name, kind, here in zip(anchors.names, anchors.kinds, measured, strict=True):
        rows = here.nonzero().flatten().tolist()
        if rows:
            found.append(AnchorValue(name, kind, rows[0], view.seen.Y[rows[0]]))
    return tuple(found)


def verification_rows(view: RunView) -> Tensor:
    """Return ``n`` booleans: which evaluations measured front points at the end of the run.

    They are the last ``summary["verification"]["points"]`` rows; a view without that entry has
    none.
    """
    recorded = view.summary.get("verification") or {}
    points = min(int(recorded.get("points") or 0), len(view.seen))
    return torch.arange(len(view.seen)) >= len(view.seen) - points


def search_rows(view: RunView) -> Tensor:
    """Return ``n`` booleans: successful evaluations of the search that are not anchors."""
    anchors = anchor_rows(view.seen.X, view.space).any(0)
    return view.seen.ok & ~verification_rows(view) & ~anchors


def representative_rows(view: RunView, count: int = 7) -> list[int]:
    """Return up to ``count`` rows of the front that represent all of it.

    Verified points come first, because they show how good the predictions are; then
    :func:`map_bo.scale.farthest_rows`. The rows are returned from the best to the worst in the
    first metric.
    """
    front = view.front
    gains = view.scale.gains(front.mean)
    taken = farthest_rows(gains, count, first=front.verified.nonzero().flatten().tolist())
    return sorted(taken, key=lambda row: (-float(gains[row, 0]), row))
