"""The published design: one-hots and a random part of a regular grid.

Li, Zhang, Bu et al., *MAP: Low-compute Model Merging with Amortized Pareto Fronts via Quadratic
Approximation*, arXiv 2406.07529, as its public code intends it; a baseline to compare with.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from map_bo.data import Observations
from map_bo.errors import SamplerError
from map_bo.rng import child
from map_bo.samplers.space_filling import fresh_points, uniform_points
from map_bo.space import CoefficientSpace

__all__ = ["ReferenceDesign"]

_ENUMERATED = 2**16  # grids up to this size are shuffled whole, larger ones are drawn from
_CHUNK = 64


@dataclass(frozen=True)
class ReferenceDesign:
    """``N`` one-hots, then a random subset of the regular grid on ``[0, 1]^N``.

    The grid has the fewest levels ``g`` with ``g^N >= 2 m`` for the ``m = points - N`` points that
    the one-hots leave, that is ``g = ceil((2 m)^(1/N))``. One-hots, points whose coordinates sum
    to exactly 1 and the diagonal are left out, and so is what lies outside the space; the grid
    stays in ``[0, 1]^N`` however large the box is. After ``points`` points the proposals go on
    through the rest of the grid in the same random order, then with uniform points of the space.

    In a space with blocks a one-hot is an expert (1 in all its blocks) and ``N`` counts
    coefficients. The grid of an operator's setting is over its bounds.

    Attributes:
        points: Size of the whole design; ``None`` is ``(N + 1) (N + 2)``, the published default.
        anchors: Whether the base, the experts and the uniform blend come first, in place of the
            one-hots alone. The published design has neither base nor blend. They come on top:
            the levels of the grid stay as they are.
    """

    points: int | None = None
    anchors: bool = False

    def __post_init__(self) -> None:
        if self.points is not None and self.points < 1:
            raise SamplerError(
                f"the reference design has {self.points} points",
                hint="give the number of evaluations of the run, or None for (N + 1) (N + 2)",
            )

    def propose(
        self,
        seen: Observations,
        space: CoefficientSpace,
        n: int,
        *,
        pending: Tensor | None = None,
        generator: Generator,
    ) -> Tensor:
        """Return the next ``n x d`` points of the design; see :class:`Sampler`."""
        points = self._points(space, generator)
        return fresh_points(points, seen, space, n, pending=pending)

    def levels(self, d: int) -> int:
        """Return the number of levels ``g`` of the grid over ``d`` coefficients."""
        total = (d + 1) * (d + 2) if self.points is None else self.points
        # Counted in integers: a root in floating point may come out just above a whole number.
        return next(g for g in itertools.count(2) if g**d >= 2 * max(total - d, 1))

    def _points(self, space: CoefficientSpace, generator: Generator) -> Iterator[Tensor]:
        anchors, moving = space.anchors(), torch.tensor(space.owner) >= 0
        yield anchors.X[[self.anchors or kind == "expert" for kind in anchors.kinds]]
        for indices in _shuffled(self.levels(space.d), space.d, child(generator, "grid")):
            top = self.levels(space.d) - 1
            weights = indices[:, moving]
            keep = (weights.sum(-1) != top) & (weights != weights[:, :1]).any(-1)
            X = indices[keep].double() / top
            X[:, ~moving] = space.unnormalise(X)[:, ~moving]
            yield X[space.contains(X)]
        yield from uniform_points(space, generator=generator)


def _shuffled(g: int, d: int, source: Generator) -> Iterator[Tensor]:
    """Yield chunks of level indices (``c x d``) of the grid in random order."""
    if g**d <= _ENUMERATED:
        order = torch.randperm(g**d, generator=source)
        powers = torch.tensor([g**i for i in range(d)])
        for chunk in torch.split(order, _CHUNK):
            yield chunk.unsqueeze(-1) // powers % g
        return
    # Too many to list, and many more than a run takes: repeats are rare and are skipped.
    for _ in range(_ENUMERATED // _CHUNK):
        yield torch.randint(g, (_CHUNK, d), generator=source)
