"""Optimal designs: the points that tell most about a quadratic, chosen before any is measured.

Exact optimal designs for a quadratic, by exchange of points.

A design of ``K`` points has the information ``P = R + F'F``: ``F`` (``K x D``) holds the features
of its points, in units of the measurement noise, and ``R`` is the precision of a weak prior. The
prior makes every criterion finite below ``K = D`` and tells which coefficients matter there, as
in DuMouchel and Jones, *A simple Bayesian modification of D-optimal designs to reduce dependence
on an assumed model* (1994): constant and slopes are taken to be there (nearly no prior), squares
and products to be possible.

- D: ``log det P``, the information about the coefficients.
- I: ``-trace(P^-1 M)``, with ``M = E[f f']`` over the space: minus the variance of the prediction,
  averaged over the space.

Both are to be maximised. All tensors are float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from map_bo.data import Observations
from map_bo.errors import SamplerError
from map_bo.rng import child, child_seed, make_generator
from map_bo.samplers.designs.space_filling import anchored, fresh_points, sobol_points
from map_bo.scale import SAME_POINT
from map_bo.space import CoefficientSpace
from map_bo.surrogates.features import centred, feature_groups, n_features, quadratic_features

__all__ = [
    "Criterion",
    "Goal",
    "OptimalDesign",
    "box_moments",
    "exchange",
    "greedy",
    "local_moves",
    "optimal_design",
    "prior_precision",
    "sample_moments",
]

Criterion = Literal["d", "i"]

_SURE, _POSSIBLE = 1e-5, 1e-3  # prior precision of constant and slopes; of squares and products
_GAIN = 1e-9  # an exchange that gains less is not worth the move


def prior_precision(d: int) -> Tensor:
    """Return the diagonal of ``R`` (``D``), in units of one measurement."""
    return torch.tensor([_SURE, _SURE, _POSSIBLE, _POSSIBLE]).double()[feature_groups(d)]


def box_moments(space: CoefficientSpace) -> Tensor:
    """Return ``E[f f']`` (``D x D``) for uniform points of the whole box, in closed form.

    With ``z`` uniform on ``[-1, 1]^d``: ``E[z_i^2] = 1/3``, ``E[z_i^4] = 1/5``,
    ``E[z_i^2 z_j^2] = 1/9``, and odd moments vanish. Constraints play no part.
    """
    d, groups = space.d, feature_groups(space.d)
    moments = torch.diag(torch.tensor([1, 1 / 3, 1 / 5, 1 / 9]).double()[groups])
    squares = (groups == 2).nonzero().flatten()
    moments[0, squares] = moments[squares, 0] = 1 / 3
    block = torch.full((d, d), 1 / 9, dtype=torch.float64)
    moments[squares.unsqueeze(-1), squares] = block.fill_diagonal_(1 / 5)
    # Coefficients of unlike importance are scaled: the upper corner is where z would be 1.
    corner = quadratic_features(centred(space.bounds[1], space))
    return moments * corner * corner.unsqueeze(-1)


def sample_moments(X: Tensor, space: CoefficientSpace) -> Tensor:
    """Return the mean of ``f f'`` (``D x D``) over the points ``X`` (``n x d``)."""
    F = quadratic_features(centred(X, space))
    return F.mT @ F / len(F)


@dataclass(frozen=True, eq=False)
class Goal:
    """What a design is judged by.

    Attributes:
        criterion: ``"d"`` or ``"i"``.
        space: The coefficients.
        moments: ``D x D`` matrix ``M`` of the I criterion; not used for D.
        apart: No new point comes nearer to another than this, as a share of every coefficient's
            range. Exact designs repeat points once they have more than their support needs;
            a repeated evaluation of a model tells little or nothing.
    """

    criterion: Criterion
    space: CoefficientSpace
    moments: Tensor
    apart: float = 0.05

    def features(self, X: Tensor) -> Tensor:
        """Return the features of ``X``: ``n x D`` for ``n x d``."""
        return quadratic_features(centred(X, self.space))

    def information(self, X: Tensor) -> Tensor:
        """Return ``P`` (``D x D``) of the design ``X`` (``K x d``)."""
        F = self.features(X)
        return F.mT @ F + torch.diag(prior_precision(self.space.d))

    def value(self, X: Tensor) -> float:
        """Return the criterion of the design ``X`` (``K x d``); larger is better."""
        lower = torch.linalg.cholesky(self.information(X))
        if self.criterion == "d":
            return float(2 * lower.diagonal().log().sum())
        return -float((torch.cholesky_inverse(lower) * self.moments).sum())

    def gains(self, P: Tensor, F: Tensor) -> Tensor:
        """Return what the criterion gains by each of ``c`` points: ``c``.

        With ``A = P^-1``, ``u = A f`` and ``v = f'Af`` a point adds ``log(1 + v)`` to the D
        criterion and ``u'Mu / (1 + v)`` to the I criterion (Sherman and Morrison).

        Args:
            P: ``D x D`` information of the design without the point.
            F: ``c x D`` features of the points.
        """
        U = F @ torch.cholesky_inverse(torch.linalg.cholesky(P))
        return self.gain_from((U * F).sum(-1), U, U @ self.moments if self.criterion == "i" else U)

    def gain_from(self, v: Tensor, U: Tensor, UM: Tensor) -> Tensor:
        """Return the ``c`` gains from ``v`` (``c``), ``u`` and ``M u`` (both ``c x D``)."""
        return v.log1p() if self.criterion == "d" else (UM * U).sum(-1) / (1 + v)

    def near(self, X: Tensor, others: Tensor) -> Tensor:
        """Return for each row of ``X`` whether it is too near to one of ``others``."""
        if not len(others):
            return torch.zeros(len(X), dtype=torch.bool)
        gaps = torch.cdist(self.space.normalise(X), self.space.normalise(others), p=torch.inf)
        return (gaps < self.apart).any(-1)


def greedy(goal: Goal, fixed: Tensor, pool: Tensor, n: int) -> Tensor:
    """Return up to ``n`` rows of ``pool`` in the order in which each gains most: ``k`` indices.

    The inverse information is only ever needed times the features of the pool, which a rank-one
    update keeps up to date; so a step costs ``O(c D)``.

    Args:
        goal: What is maximised.
        fixed: ``a x d`` points that the design has already.
        pool: ``c x d`` candidates.
        n: How many; fewer are returned when the others come too near to those.
    """
    F = goal.features(pool)
    A = torch.cholesky_inverse(torch.linalg.cholesky(goal.information(fixed)))
    U = F @ A
    UM = U @ goal.moments if goal.criterion == "i" else U
    allowed = ~goal.near(pool, fixed)
    chosen: list[int] = []
    while len(chosen) < n and bool(allowed.any()):
        v = (U * F).sum(-1)
        gain = goal.gain_from(v, U, UM)
        best = int(torch.where(allowed, gain, -torch.inf).argmax())
        chosen.append(best)
        share = (F @ U[best] / (1 + v[best])).unsqueeze(-1)
        U, UM = U - share * U[best], UM - share * UM[best]
        allowed &= ~goal.near(pool, pool[best : best + 1])
        allowed[best] = False
    return torch.tensor(chosen, dtype=torch.long)


def exchange(
    goal: Goal, fixed: Tensor, free: Tensor, pool: Tensor, *, sweeps: int, step: float = 0.25
) -> Tensor:
    """Improve the free points of a design, one at a time; the criterion never falls.

    Each sweep takes the points in turn and replaces each by the best of the pool and of moves
    around itself (Cook and Nachtsheim, 1980; along the coordinates as in Meyer and Nachtsheim,
    1995). Sweeps end when one changes nothing and the moves are small.

    Args:
        goal: What is maximised.
        fixed: ``a x d`` points that stay.
        free: ``k x d`` points to improve.
        pool: ``c x d`` candidates.
        sweeps: At most so many.
        step: First length of the moves, a share of the range; a sweep that gains little
            (a thousandth of a logarithm a point, or that share of the variance) halves it.

    Returns:
        ``k x d`` points; each in place of the one that it was made from.
    """
    space, free = goal.space, free.clone()
    F_pool = goal.features(pool)
    before = goal.value(torch.cat([fixed, free]))
    for _ in range(sweeps):
        moved = False
        P = goal.information(torch.cat([fixed, free]))
        for i in range(len(free)):
            moves = local_moves(free[i], space, step)
            options = torch.cat([free[i : i + 1], moves, pool])
            F = torch.cat([goal.features(options[: 1 + len(moves)]), F_pool])
            without = P - F[0].outer(F[0])
            gain = goal.gains(without, F)
            bar = gain[0] + _GAIN * (1 + gain[0].abs())
            others = torch.cat([fixed, free[:i], free[i + 1 :]])
            worth = (gain > bar).nonzero().flatten()
            worth = worth[~goal.near(options[worth], others)]
            if len(worth):
                best = worth[gain[worth].argmax()]
                free[i], moved, P = options[best], True, without + F[best].outer(F[best])
        after = goal.value(torch.cat([fixed, free]))
        little = after - before < 1e-3 * (len(free) if goal.criterion == "d" else abs(before))
        before = after
        if little:
            if not moved and step < 1e-3:
                break
            step /= 2
    return free


def local_moves(x: Tensor, space: CoefficientSpace, step: float) -> Tensor:
    """Return points around ``x`` (``d``) in the space, ``5 d x d``.

    Each coefficient goes up and down by ``step`` of its range, and to its lower bound, its middle
    and its upper bound; where that leaves the space, the nearest point of the space is taken.
    """
    u, eye = space.normalise(x), torch.eye(space.d, dtype=torch.float64)
    shifts = torch.cat([u + step * eye, u - step * eye])
    levels = torch.cat([u * (1 - eye) + level * eye for level in (0.0, 0.5, 1.0)])
    return space.project(space.unnormalise(torch.cat([shifts, levels]).clamp(0, 1)))


_MOST = 128  # points by default, where a quadratic has more coefficients
_PART = 16  # points that a finished design is extended by at a time
_LEVELS = 243  # candidates on the three levels of every coefficient
_SPREAD = 256  # candidates anywhere
_MOMENTS = 4096  # points for the moments of a space that constraints cut out of the box
_WORK = 1e10  # multiplications spent on one design, which bounds starts and sweeps
_MOST_STARTS, _FIRST_SWEEPS, _MOST_SWEEPS = 8, 5, 25


@dataclass(frozen=True)
class OptimalDesign:
    """An exact D- or I-optimal design for the quadratic, found by exchange from several starts.

    The design has ``points`` points, anchors included when they are on; these stay and the rest
    is chosen to go with them. See the module for the criteria and the weak
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

    fills_space: ClassVar[bool] = True

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
    repeats = (torch.cdist(U, U, p=torch.inf) <= SAME_POINT).tril(-1).any(-1)
    return found[~repeats]
