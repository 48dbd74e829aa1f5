"""A design for spaces with several coefficients an expert: blocks together first, then apart.

With one coefficient an expert and block of layers there are ``N B`` of them, and points that fill
such a space say little about any part of it. But the experts' coefficients still do most of the
work: moving all blocks of an expert together is the ``N``-dimensional search, embedded. So the
design searches that subspace first, and then around it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Generator, Tensor

from map_bo.data import Observations
from map_bo.errors import SamplerError, SpaceError
from map_bo.rng import child
from map_bo.samplers.designs.space_filling import fresh_points, sobol_points
from map_bo.space import CoefficientSpace, LinearConstraint

__all__ = ["TiedSobol", "tied_space"]


@dataclass(frozen=True)
class TiedSobol:
    """Anchors, tied points, then tied points with a deviation of every block's own.

    A *tied* point gives all blocks of an expert the same coefficient ``c_n``; ``c`` follows a
    scrambled Sobol sequence of ``N`` dimensions. A later point is ``c_n + spread w v_nb`` with
    the box's width ``w`` and ``v`` a scrambled Sobol sequence in ``[-1, 1]^(N B)``, moved to the
    nearest point of the space. In a space with one coefficient an expert, and in one whose bounds
    share no tied point, it is the Sobol sampler.

    The deviations are small by default because corners are far away in many dimensions: on
    block-wise merges of real experts (12 and 24 coefficients, 30 and 60 evaluations) a spread of
    0.15 to 0.2 gave fronts with less regret on average than 0.5, and than points that fill the
    box; the latter were ahead with 60 evaluations of two experts, and 30 of six.

    Attributes:
        anchors: Whether the base, the experts and the uniform blend come first.
        tied: How many tied points come before those that deviate; ``None`` is one an expert.
        spread: Largest deviation, as a share of the box's width.
    """

    fills_space: ClassVar[bool] = True
    takes_choice: ClassVar[bool] = True

    anchors: bool = True
    tied: int | None = None
    spread: float = 0.2

    def __post_init__(self) -> None:
        if self.tied is not None and self.tied < 0:
            raise SamplerError(
                f"tied is {self.tied}", hint="give 0 or more, or None for one point an expert"
            )
        if not 0 < self.spread <= 1:
            raise SamplerError(
                f"spread is {self.spread}", hint="a share of the box's width is in (0, 1]"
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
        """Return the next ``n x d`` points of the sequence; see :class:`Sampler`.

        Raises:
            SamplerError: When the space has more coefficients than the sequence has dimensions.
        """
        return fresh_points(self._points(space, generator), seen, space, n, pending=pending)

    def _points(self, space: CoefficientSpace, generator: Generator) -> Iterator[Tensor]:
        if self.anchors:
            yield space.anchors().X
        tied = tied_space(space)
        if tied is None:
            yield from sobol_points(space, generator=generator)
            return
        owner = torch.tensor(space.groups)
        rest = len(space.experts) if self.tied is None else self.tied
        low, high = space.bounds
        cube = CoefficientSpace(space.names, (-1.0,) * space.d, (1.0,) * space.d)
        deviations = sobol_points(cube, generator=child(generator, "deviations"))
        for C in sobol_points(tied, generator=child(generator, "tied")):
            X = C[:, owner]
            if rest > 0:
                yield X[:rest]
                X, rest = X[rest:], max(0, rest - len(X))
            V = next(deviations)[: len(X)]
            if space.placed_choice is not None:  # an option is no distance from another
                V[:, space.placed_choice.column] = 0.0
            yield space.project(X + self.spread * (high - low) * V)


def tied_space(space: CoefficientSpace) -> CoefficientSpace | None:
    """Return the space of the experts' shared coefficients, ``N`` of them, and the settings.

    Their bounds and constraints are those that all blocks meet together.

    Returns:
        ``None`` when there is nothing to tie, or no tied point lies in the space.
    """
    if space.blocks == 1:
        return None
    names = (*space.experts, *space.settings)
    owner, count = torch.tensor(space.groups), len(names)
    low, high = space.bounds
    members = [owner == i for i in range(count)]
    constraints = {
        LinearConstraint(
            tuple(float(torch.tensor(c.weights)[rows].sum()) for rows in members),
            c.bound,
            c.equality,
        )
        for c in space.constraints
    }
    try:
        tied = CoefficientSpace(
            names,
            tuple(float(low[rows].max()) for rows in members),
            tuple(float(high[rows].min()) for rows in members),
            tuple(sorted(constraints, key=repr)),
        )
        if space.choice is None:
            return tied
        return replace(
            tied,
            owner=(*range(len(space.experts)), *(-1 for _ in space.settings)),
            experts=space.experts,
            defaults=space.defaults,
            choice=space.choice,
        )
    except SpaceError:
        return None
