"""How far the measured points of a run have come, evaluation by evaluation."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from map_bo.data import Observations
from map_bo.loop.recommend import Reference, reference_of, scaled_gains
from map_bo.pareto.indicators import hypervolume
from map_bo.space import CoefficientSpace

__all__ = ["ObservedVolume"]


class ObservedVolume:
    """Hypervolume of the measured points (real) after each evaluation, as in a run's summary.

    It begins when base and experts have been tried, for then no later evaluation moves the scale;
    hypervolumes before would not compare. A run whose design leaves them out has none.

    Args:
        space: The space of the run.
        given: The reference point of the settings, if any.
    """

    def __init__(self, space: CoefficientSpace, given: Mapping[str, float] | None = None) -> None:
        self._space, self._given = space, given
        self._reference: Reference | None = None

    def after(self, seen: Observations) -> dict[str, float]:
        """Return ``hypervolume`` of all that was ``seen``; nothing before the scale is known."""
        if self._reference is None:
            self._reference = self._settled(seen)
        if self._reference is None:
            return {}
        gains = scaled_gains(seen.succeeded().Y, seen.metrics, self._reference)
        zero = torch.zeros(gains.shape[-1], dtype=torch.float64)
        return {"hypervolume": hypervolume(gains, zero)}

    def _settled(self, seen: Observations) -> Reference | None:
        anchors = self._space.anchors()
        ends = anchors.X[[kind in ("base", "expert") for kind in anchors.kinds]]
        if not bool(seen.ok.any()):
            return None
        if bool((torch.cdist(ends, seen.X, p=torch.inf).amin(-1) > 1e-9).any()):
            return None
        found = reference_of(seen, self._space, self._given)
        return None if found.rule.startswith("worst observed") else found
