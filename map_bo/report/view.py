"""The view of a run that every table, plot and page is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from map_bo.data import Front, Metric, Observations, to_maximisation
from map_bo.errors import DataError
from map_bo.space import CoefficientSpace

__all__ = [
    "AnchorValue",
    "RunView",
    "anchor_values",
    "representative_rows",
    "scale",
    "scaled_gains",
    "search_rows",
    "verification_rows",
]

_SAME = 1e-9


@dataclass(frozen=True, eq=False)
class RunView:
    """A run as the report shows it; predicted and real values are separate fields.

    Attributes:
        title: What the run is called.
        space: The ``d`` coefficients.
        front: ``k`` predicted points, with real values where they were verified.
        seen: Every evaluation in order, failures included: the search, then the verification.
        reference_point: ``m`` values in the metrics' own units.
        reference_rule: Where the reference point comes from, such as "worst of base and experts".
        summary: Plain data, as written to ``summary.json``.

    Raises:
        DataError: When the parts have different metrics or numbers of coefficients.
    """

    title: str
    space: CoefficientSpace
    front: Front
    seen: Observations
    reference_point: Tensor
    reference_rule: str
    summary: Mapping[str, Any]

    def __post_init__(self) -> None:
        put = object.__setattr__
        point = torch.as_tensor(self.reference_point, dtype=torch.float64).detach().cpu()
        put(self, "reference_point", point)
        if self.front.metrics != self.seen.metrics or point.shape != (len(self.front.metrics),):
            raise DataError(
                f"the front has metrics {[x.name for x in self.front.metrics]}, the evaluations "
                f"{[x.name for x in self.seen.metrics]} and the reference point "
                f"{len(point.flatten())} values",
                hint="take all three from one run, so that their metrics agree",
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

    A row of ``view.seen`` is an anchor when its coefficients agree within 1e-9; of several such
    rows the first that succeeded counts. Anchors that were never measured are left out.
    """
    anchors = view.space.anchors()
    found = []
    for name, kind, x in zip(anchors.names, anchors.kinds, anchors.X, strict=True):
        rows = (_matches(view.seen.X, x) & view.seen.ok).nonzero().flatten().tolist()
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
    rows = view.seen.ok & ~verification_rows(view)
    for anchor in anchor_values(view):
        rows = rows & ~_matches(view.seen.X, view.seen.X[anchor.row])
    return rows


def _matches(X: Tensor, x: Tensor) -> Tensor:
    return (X - x).abs().amax(-1) <= _SAME


def scale(view: RunView) -> tuple[Tensor, Tensor]:
    """Return the two ends that metrics are scaled between, own units: 0 and 1.

    The first is the reference point. The second is the recorded ``reference_best``, else the best
    expert that was measured, else the best value seen. An end that is no better than the
    reference point is moved away from it, so that scaling is always defined.
    """
    metrics = view.metrics
    low = to_maximisation(view.reference_point, metrics)
    recorded = view.summary.get("reference_best") or {}
    experts = [anchor.y for anchor in anchor_values(view) if anchor.kind == "expert"]
    seen = view.seen.succeeded().Y
    known = torch.cat([to_maximisation(torch.cat([seen, view.front.mean]), metrics), low[None]])
    if all(isinstance(recorded.get(metric.name), int | float) for metric in metrics):
        best = torch.tensor([float(recorded[x.name]) for x in metrics], dtype=torch.float64)
        high = to_maximisation(best, metrics)
    elif experts:
        high = to_maximisation(torch.stack(experts), metrics).amax(0)
    else:
        high = known.amax(0)
    high = torch.where(high > low, high, torch.maximum(known.amax(0), low + 1e-9))
    return to_maximisation(low, metrics), to_maximisation(high, metrics)


def scaled_gains(values: Tensor, view: RunView) -> Tensor:
    """Scale ``... x m`` values (own units): 0 is the reference point, 1 the best expert."""
    low, high = (to_maximisation(end, view.metrics) for end in scale(view))
    return (to_maximisation(values, view.metrics) - low) / (high - low)


def representative_rows(view: RunView, count: int = 7) -> list[int]:
    """Return up to ``count`` rows of the front that represent all of it.

    Verified points come first, because they show how good the predictions are; then the most
    balanced point (largest worst scaled gain); then, again and again, the point farthest from those
    taken. The rows are returned from the best to the worst in the first metric.
    """
    front = view.front
    gains = scaled_gains(front.mean, view)
    taken = front.verified.nonzero().flatten().tolist()[:count]
    while len(taken) < min(count, len(front)):
        if not taken:
            taken.append(int(gains.amin(-1).argmax()))
            continue
        distance = torch.cdist(gains, gains[taken]).amin(-1)
        distance[taken] = -1.0
        taken.append(int(distance.argmax()))
    return sorted(taken, key=lambda row: (-float(gains[row, 0]), row))
