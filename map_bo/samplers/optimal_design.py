"""Optimal designs: the points that tell most about a quadratic, chosen before any is measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Generator, Tensor

from map_bo.data import Observations
from map_bo.errors import SamplerError
from map_bo.rng import child, child_seed, make_generator
from map_bo.samplers.exchange import (
    Criterion,
    Goal,
    box_moments,
    exchange,
    greedy,
    sample_moments,
)
from map_bo.samplers.space_filling import anchored, fresh_points, sobol_points
from map_bo.space import CoefficientSpace
from map_bo.surrogates.features import n_features

__all__ = ["OptimalDesign", "optimal_design"]

_MOST = 128  # points by default, where a quadratic has more coefficients
_PART = 16  # points that a finished design is extended by at a time
_LEVELS = 243  # candidates on the three levels of every coefficient
_SPREAD = 256  # candidates anywhere
_MOMENTS = 4096  # points for the moments of a space that constraints cut out of the box
_SAME = 1e-9  # of the range: candidates nearer than that are one
_WORK = 1e10  # multiplications spent on one design, which bounds starts and sweeps
_MOST_STARTS, _FIRST_SWEEPS, _MOST_SWEEPS = 8, 5, 25


@dataclass(frozen=True)
class OptimalDesign:
    """An exact D- or I-optimal design for the quadratic, found by exchange from several starts.

    The design has ``points`` points, anchors included when they are on; these stay and the rest
    is chosen to go with them. See :mod:`map_bo.samplers.exchange` for the criteria and the weak
    prior that makes them work below as many points as a quadratic has coefficients. Points of
    one design keep a twentieth of the range apart: where an exact design would repeat a point,
    this one takes a neighbour. They are proposed in the order in which each gains most, so that
    the first few are of use too.

    When more points are asked for, the design is extended, 16 at a time, each time by the best
    points to go with all before. When no more fit into the space, Sobol points follow. As with
    the space-filling samplers it is one sequence fixed by the generator's seed; what else was
    evaluated changes nothing, and points seen or pending are left out.

    Exchange is a local search. Up to 8 starts are improved a little and the best of them until
    nothing gains; both are cut short for large designs, so that one takes seconds, and in more
    than about 20 dimensions the greedy choice is all there is.

    Attributes:
        criterion: ``"d"`` for the coefficients, ``"i"`` for the prediction averaged over the
            space.
        points: Size of the design; ``None`` is ``D = (d + 1) (d + 2) / 2``, at most 128.
        anchors: Whether base, experts and uniform blend come first.
    """

    criterion: Criterion = "d"
    points: int | None = None
    anchors: bool = True

    def __post_init__(self) -> None:
        if self.criterion not in ("d", "i"):
            raise SamplerError(
                f"there is no criterion {self.criterion!r}",
                hint="criteria are 'd' (the coefficients) and 'i' (the prediction)",
            )
        if self.points is not None and self.points < 1:
            raise SamplerError(
                f"an optimal design has {self.points} points",
                hint="give the number of evaluations of the run, or None",
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
        points = anchored(self.anchors, space, self._points(space, generator))
        return fresh_points(points, seen, space, n, pending=pending)

    def _points(self, space: CoefficientSpace, generator: Generator) -> Iterator[Tensor]:
        seed, index = child_seed(generator, "optimal design"), 0
        while len(part := _part(self.criterion, self.points, self.anchors, space, seed, index)):
            yield part
            index += 1
        yield from sobol_points(space, generator=generator)


def optimal_design(goal: Goal, fixed: Tensor, n: int, *, generator: Generator) -> Tensor:
    """Return up to ``n`` points to go with ``fixed``, in the order in which each gains most.

    Args:
        goal: What is maximised.
        fixed: ``a x d`` points that the design has already.
        n: How many; fewer are returned when no more fit.
        generator: Source of candidates and starts.

    Returns:
        ``k x d`` points.
    """
    pool = _pool(goal.space, max(_SPREAD, 4 * n), child(generator, "pool"))
    found = [pool[greedy(goal, fixed, pool, n)]]
    k, size = len(found[0]), n_features(goal.space.d)
    sweep = max(1, k) * ((len(pool) + 5 * goal.space.d) * size**2 + size**3)
    affordable = int(_WORK / sweep)  # sweeps, all starts together
    starts = min(_MOST_STARTS, max(1, affordable // (2 * _FIRST_SWEEPS)))
    for i in range(1, starts):
        # A start from a random half of the candidates is nearly as good, and another one.
        half = torch.randperm(len(pool), generator=child(generator, "start", i))[: len(pool) // 2]
        start = pool[half][greedy(goal, fixed, pool[half], k)]
        found += [start] if len(start) == k else []
    first = min(_FIRST_SWEEPS, affordable)
    designs = [exchange(goal, fixed, start, pool, sweeps=first) for start in found]
    best = max(designs, key=lambda free: goal.value(torch.cat([fixed, free])))
    rest = min(_MOST_SWEEPS, affordable - len(designs) * first)
    best = exchange(goal, fixed, best, pool, sweeps=rest)
    return best[greedy(replace(goal, apart=0.0), fixed, best, k)]


# A design takes seconds and is needed at every proposal; what is remembered is what would be
# computed again.
@lru_cache(maxsize=64)
def _part(
    criterion: Criterion,
    points: int | None,
    anchors: bool,
    space: CoefficientSpace,
    seed: int,
    index: int,
) -> Tensor:
    """Return the design behind the anchors (``index`` 0), or the ``index``-th extension of it."""
    source = child(make_generator(seed), index)
    goal = Goal(criterion, space, _moments(criterion, space))
    fixed = space.anchors().X[: None if anchors else 0]
    total = min(n_features(space.d), _MOST) if points is None else points
    if index == 0:
        # A part that is empty ends the sequence, so the design behind the anchors never is.
        return optimal_design(goal, fixed, max(1, total - len(fixed)), generator=source)
    before = [_part(criterion, points, anchors, space, seed, i) for i in range(index)]
    return optimal_design(goal, torch.cat([fixed, *before]), _PART, generator=source)


def _moments(criterion: Criterion, space: CoefficientSpace) -> Tensor:
    if criterion == "d":
        return torch.zeros(0, 0, dtype=torch.float64)
    if not space.constraints:
        return box_moments(space)
    # The moments belong to the space, not to the run: they are the same for every seed.
    points = sobol_points(space, generator=make_generator(0))
    found = torch.zeros(0, space.d, dtype=torch.float64)
    while len(found) < _MOMENTS:
        found = torch.cat([found, next(points)])
    return sample_moments(found, space)


def _pool(space: CoefficientSpace, spread: int, source: Generator) -> Tensor:
    """Return distinct candidates: points on three levels of each coefficient, and Sobol points."""
    d = space.d
    if 3**d <= _LEVELS:
        U = torch.cartesian_prod(*[torch.tensor([0.0, 0.5, 1.0]).double()] * d).reshape(-1, d)
    else:
        # Optimal designs are mostly at the ends.
        draws = torch.rand(_LEVELS, d, generator=child(source, "levels"), dtype=torch.float64)
        U = (draws > 0.4).double() / 2 + (draws > 0.6).double() / 2
    points = sobol_points(space, generator=source)
    found = space.project(space.unnormalise(U))
    while len(found) < len(U) + spread:
        found = torch.cat([found, next(points)])
    U = space.normalise(found)
    repeats = (torch.cdist(U, U, p=torch.inf) <= _SAME).tril(-1).any(-1)
    return found[~repeats]
