"""One order of coefficients and metrics, whatever the order in which a problem names them.

Random numbers are drawn by position, so a proposal would depend on the order in which experts and
metrics were given, which means nothing. What draws is handed everything in the order of the names,
and what it returns is put back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.space import CoefficientSpace

__all__ = ["Ordering"]


@dataclass(frozen=True)
class Ordering:
    """The order of the names: experts and metrics by the alphabet.

    The coefficients of an expert, one per block, keep their order, and so do the settings of the
    operator, which come last: neither order is the caller's.

    Attributes:
        columns: For each place in the order of the names, the coefficient that is there.
        metrics: For each place, the metric that is there.
    """

    columns: tuple[int, ...]
    metrics: tuple[int, ...]

    @classmethod
    def of(cls, space: CoefficientSpace, metrics: Sequence[Metric]) -> Ordering:
        """Return the order of the names of a space and of metrics."""

        def place(column: int) -> tuple[bool, str]:
            owner = space.owner[column]
            return owner < 0, "" if owner < 0 else space.experts[owner]

        return cls(
            tuple(sorted(range(space.d), key=place)),
            tuple(sorted(range(len(metrics)), key=lambda j: metrics[j].name)),
        )

    @property
    def is_given(self) -> bool:
        """Whether everything is in that order as it is."""
        return list(self.columns) == sorted(self.columns) and list(self.metrics) == sorted(
            self.metrics
        )

    def points(self, X: Tensor) -> Tensor:
        """Return points (``... x d``) in the order of the names."""
        return X[..., list(self.columns)]

    def back(self, X: Tensor) -> Tensor:
        """Return points (``... x d``) in the order of the names in that of the problem."""
        return X[..., sorted(range(len(self.columns)), key=self.columns.__getitem__)]

    def values(self, Y: Tensor) -> Tensor:
        """Return values of the metrics (``... x m``) in the order of the names."""
        return Y[..., list(self.metrics)]

    def space(self, space: CoefficientSpace) -> CoefficientSpace:
        """Return the same space in the order of the names."""
        experts = sorted(range(len(space.experts)), key=lambda i: space.experts[i])
        place = {expert: i for i, expert in enumerate(experts)}

        def moved(values: Sequence[float]) -> tuple[float, ...]:
            return tuple(values[i] for i in self.columns) if values else ()

        return replace(
            space,
            names=tuple(space.names[i] for i in self.columns),
            lower=moved(space.lower),
            upper=moved(space.upper),
            constraints=tuple(replace(c, weights=moved(c.weights)) for c in space.constraints),
            owner=tuple(place.get(space.owner[i], -1) for i in self.columns),
            experts=tuple(space.experts[i] for i in experts),
            importance=moved(space.importance),
        )

    def observations(self, seen: Observations) -> Observations:
        """Return the same evaluations in the order of the names."""
        kept = list(self.metrics)

        def slopes(G: Tensor | None) -> Tensor | None:
            return None if G is None else G[:, kept][..., list(self.columns)]

        return replace(
            seen,
            X=self.points(seen.X),
            Y=self.values(seen.Y),
            metrics=tuple(seen.metrics[j] for j in kept),
            Yvar=self.values(seen.Yvar),
            counts=self.values(seen.counts),
            gradients=slopes(seen.gradients),
            gradient_variance=slopes(seen.gradient_variance),
        )
