"""A design of points that are known already, before a sampler goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Generator, Tensor

from map_bo.data import Observations
from map_bo.samplers.sampler import Sampler, proposed
from map_bo.space import CoefficientSpace

__all__ = ["Seeded"]


@dataclass(frozen=True, eq=False)
class Seeded:
    """Proposes given points first, one after another, and then what a sampler says.

    Attributes:
        points: ``n x d`` points to begin with.
        sampler: Goes on after them.
    """

    points: Tensor
    sampler: Sampler

    def __repr__(self) -> str:
        return f"Seeded({len(self.points)} points, {self.sampler!r})"

    def propose(
        self,
        seen: Observations,
        space: CoefficientSpace,
        n: int,
        *,
        pending: Tensor | None = None,
        generator: Generator,
    ) -> Tensor:
        """Return ``n x d`` points to evaluate next; see :class:`Sampler`.

        Fewer where the given points come to their end, so that the sampler sees them all.
        """
        return self.propose_and_tell(seen, space, n, pending=pending, generator=generator)[0]

    def propose_and_tell(
        self,
        seen: Observations,
        space: CoefficientSpace,
        n: int,
        *,
        pending: Tensor | None = None,
        generator: Generator,
    ) -> tuple[Tensor, Mapping[str, Any]]:
        """Return the points and what the sampler tells of its fit; see :class:`TellsFit`."""
        count = len(seen) + (0 if pending is None else len(pending))
        if count < len(self.points):
            return space.project(self.points[count : count + n]), {}
        return proposed(self.sampler, seen, space, n, pending=pending, generator=generator)
