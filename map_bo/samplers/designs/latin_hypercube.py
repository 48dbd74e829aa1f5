"""Latin hypercubes one after the other: every ``size`` points are stratified in each coefficient.

The laws are those of :mod:`map_bo.samplers.designs.space_filling`: one endless sequence fixed by
the generator's seed, anchors in front of it, constraints through the same maps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from scipy.stats import qmc
from torch import Generator, Tensor

from map_bo.data import Observations
from map_bo.errors import SamplerError
from map_bo.rng import child_seed
from map_bo.samplers.designs.space_filling import anchored, fresh_points, spread_in_space
from map_bo.space import CoefficientSpace

__all__ = ["LatinHypercube", "latin_hypercube_points"]

_SMALLEST = 8  # points of a hypercube by default, however few the coefficients


@dataclass(frozen=True)
class LatinHypercube:
    """Anchors, then consecutive Latin hypercubes (McKay, Beckman and Conover, 1979).

    Of each hypercube's ``size`` points exactly one lies in each of ``size`` equal intervals of
    every coefficient. That holds in the box; constraints leave points out, or bend the cube over
    a simplex.

    Attributes:
        anchors: Whether the base, the experts and the uniform blend come first.
        size: Points of one hypercube. ``None``: twice as many as coefficients, at least 8. The
            best size is the number of evaluations of the run that anchors leave.
        optimised: Lower the centred discrepancy of each hypercube by random exchanges of
            coordinates, which keep it a Latin hypercube.
    """

    fills_space: ClassVar[bool] = True
    takes_choice: ClassVar[bool] = True

    anchors: bool = True
    size: int | None = None
    optimised: bool = True

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise SamplerError(
                f"a Latin hypercube has {self.size} points",
                hint="give 1 or more, or None for twice as many as coefficients",
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
        """Return the next ``n x d`` points of the sequence; see :class:`Sampler`."""
        size = max(_SMALLEST, 2 * space.d) if self.size is None else self.size
        points = latin_hypercube_points(space, size, optimised=self.optimised, generator=generator)
        return fresh_points(anchored(self.anchors, space, points), seen, space, n, pending=pending)


def latin_hypercube_points(
    space: CoefficientSpace, size: int, *, optimised: bool = True, generator: Generator
) -> Iterator[Tensor]:
    """Yield consecutive Latin hypercubes of the space, chunks of at most ``size x d``."""

    def cube(dimension: int) -> Iterator[Tensor]:
        index = 0
        while True:
            seed = child_seed(generator, "latin hypercube", index)
            yield _hypercube(dimension, size, optimised, seed).clone()
            index += 1

    return spread_in_space(cube, space)


# The sequence is walked from its start at every proposal, and an optimised hypercube takes a
# tenth of a second; what is remembered is what would be computed again.
@lru_cache(maxsize=256)
def _hypercube(dimension: int, size: int, optimised: bool, seed: int) -> Tensor:
    source = np.random.default_rng(seed)
    # A single point has no coordinates to exchange.
    optimisation = "random-cd" if optimised and size > 1 else None
    engine = qmc.LatinHypercube(dimension, optimization=optimisation, rng=source)
    return torch.from_numpy(engine.random(size))
