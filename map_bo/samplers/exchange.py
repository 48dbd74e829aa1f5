"""Exact optimal designs for a quadratic, by exchange of points.

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

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from map_bo.space import CoefficientSpace
from map_bo.surrogates.features import centred, feature_groups, quadratic_features

__all__ = [
    "Criterion",
    "Goal",
    "box_moments",
    "exchange",
    "greedy",
    "local_moves",
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
