"""Where a surrogate may be believed: the region that the data cover, and a guard outside it.

A quadratic fitted to samples from one corner of the space predicts anything far from them, and
an optimiser finds exactly the places where it predicts too much. The guard keeps every solver
inside the smallest ellipsoid of the data's own shape that holds all the data. It looks at
coefficients alone, and so works with every surrogate and every solver. Nor can anybody have what
is best where evaluations fail: :func:`penalise` keeps solvers away from there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from map_bo.errors import SurrogateError
from map_bo.space import CoefficientSpace

__all__ = ["Coverage", "guard", "penalise"]

# Prior for the spread of the data: as much as `_PRIOR` points spread uniformly over the box,
# whose variance in the unit cube is 1/12 in every direction.
_PRIOR = 1.0
# Trusted leverage, as a share of the data's largest, with several coefficients per expert. On 2 to
# 6 real experts in 4 and 6 blocks, fronts with half the leverage had 10 % less regret on average
# than fronts with all of it, and hardly any of the optimism.
_WITH_BLOCKS = 0.5
_STEEP = 2.0  # typical sizes that a point loses for each unit of its excess over a limit


@dataclass(frozen=True, eq=False)
class Coverage:
    """The ellipsoid ``h(x) <= limit`` that the data cover.

    With ``z`` the coefficients scaled to the unit cube, ``h(x) = (z - c)' S^-1 (z - c)`` where
    ``c`` is the mean of the data and ``S = (sum (z_i - c)(z_i - c)' + I / 12) / (n + 1)``: up
    to a constant the leverage of ``x`` in a ridge regression on ``[1, z]``. The ridge is worth
    one point spread over the box. With ``n <= d`` points some directions were never explored;
    there the ridge alone leaves room, ``sqrt(limit / (12 (n + 1)))`` of the box's width.

    With a choice the ellipsoid is that of the coefficients under all options together: what they
    share is what a surrogate knows of an option that it has hardly seen. A setting of one option
    is on an axis of its own, with the mean and the spread that it has where it is active.

    Attributes:
        space: The space of the coefficients.
        centre: ``d``, mean of the data in the unit cube.
        precision: ``d x d``, the inverse of ``S``.
        limit: Largest leverage that is trusted.
    """

    space: CoefficientSpace
    centre: Tensor
    precision: Tensor
    limit: float

    @classmethod
    def of(cls, X: Tensor, space: CoefficientSpace, *, slack: float | None = None) -> Coverage:
        """Return what the data cover.

        Args:
            X: ``n x d`` coefficients of the evaluations that succeeded.
            space: Their space.
            slack: Trusted leverage as a multiple of the largest leverage in the data; at 1 or
                more every data point, and all between them, is trusted. ``None`` is 1 with one
                coefficient per expert, and 1/2 with several: there the experts, far outside all
                other data, would set the limit in all of many directions, some of which the data
                hardly explored.

        Raises:
            SurrogateError: When there are no data, or ``slack`` is not positive.
        """
        if len(X) == 0:
            raise SurrogateError(
                "no evaluation has succeeded, so no region is covered",
                hint="evaluate the anchors first",
            )
        if slack is None:
            slack = _WITH_BLOCKS if space.blocks > 1 else 1.0
        if not slack > 0:
            raise SurrogateError(
                f"slack must be positive, got {slack}", hint="give None for the default"
            )
        Z = space.normalise(X.double())
        centre = Z.mean(0)
        offset = Z - centre
        eye = torch.eye(space.d, dtype=torch.float64)
        if space.placed_choice is None:
            spread = (offset.T @ offset + _PRIOR / 12 * eye) / (len(Z) + _PRIOR)
        else:
            active = space.placed_choice.active(X)
            rows = active.sum(0)
            centre = torch.where(rows > 0, (Z * active).sum(0) / rows.clamp_min(1), centre)
            offset = (Z - centre) * active
            together = (rows == len(Z)).outer(rows == len(Z)) | eye.bool()
            spread = torch.where(together, offset.T @ offset, 0.0) + _PRIOR / 12 * eye
            spread = spread / (rows.unsqueeze(-1) + _PRIOR)
        precision = torch.linalg.inv(spread)
        # One point, or equal points, have no leverage; the ridge's own unit ball stands in.
        reach = max(float(_leverage(offset, precision).max()), 1.0)
        return cls(space, centre, precision, slack * reach)

    def excess(self, X: Tensor) -> Tensor:
        """Return how far outside each row (``n x d``) lies: 0 inside, 1 at twice the radius.

        It is the length of the part of the way from the centre that lies outside, over the part
        inside; it is convex, and smooth everywhere but at the boundary.
        """
        radius = self._radius(X)
        return (radius - 1).clamp_min(0.0)

    def trusted(self, X: Tensor, tolerance: float = 1e-2) -> Tensor:
        """Return which rows (``n x d``) have an excess of at most ``tolerance``."""
        return self.excess(X) <= tolerance

    def shrink(self, X: Tensor) -> Tensor:
        """Return ``X`` (``n x d``) with rows outside drawn straight towards the centre.

        The centre is a mean of points of the space, which is convex, so no row leaves the
        space. Options stay. Differentiable but at the boundary.
        """
        factor = 1 / self._radius(X).clamp_min(1.0)
        placed = self.space.placed_choice
        if placed is None:
            centre = self.space.unnormalise(self.centre)
            return centre + (X - centre) * factor.unsqueeze(-1)
        low, high = self.space.bounds
        centre = low + self.centre * (high - low)
        return torch.where(placed.active(X), centre + (X - centre) * factor.unsqueeze(-1), X)

    def _radius(self, X: Tensor) -> Tensor:
        offset = self.space.normalise(X) - self.centre
        if self.space.placed_choice is not None:
            offset = offset * self.space.placed_choice.active(X)
        # The floor keeps the gradient of the square root finite at the centre.
        return (_leverage(offset, self.precision) / self.limit).clamp_min(1e-12).sqrt()


def guard(
    mean: Callable[[Tensor], Tensor], coverage: Coverage, *, scale: Tensor | None = None
) -> Callable[[Tensor], Tensor]:
    """Return ``mean`` with every untrusted point dominated by a trusted one.

    Outside the covered ellipsoid a point gets the value at its :meth:`Coverage.shrink`, minus
    its excess in every column. So the surrogate is never asked outside, each untrusted point is
    dominated by the one on the boundary towards the centre however wild the surrogate is, and
    the gradient leads back. What little of a front a solver leaves outside can be drawn in with
    :meth:`Coverage.shrink`, at no change of its predicted values, or filtered out with
    :meth:`Coverage.trusted`.

    Args:
        mean: Maps ``n x d`` to ``n x m``, larger is better in every column.
        coverage: What the data cover.
        scale: ``m`` typical sizes of the columns, which multiply the excess; 1 by default. It
            steers how fast a solver comes back, not where it ends.
    """

    def guarded(X: Tensor) -> Tensor:
        penalty = coverage.excess(X).unsqueeze(-1)
        if scale is not None:
            penalty = penalty * scale
        return mean(coverage.shrink(X)) - penalty

    return guarded


def penalise(
    mean: Callable[[Tensor], Tensor],
    excess: Callable[[Tensor], Tensor],
    *,
    scale: Tensor | None = None,
) -> Callable[[Tensor], Tensor]:
    """Return ``mean`` less a multiple of what each point exceeds a limit by, in every column.

    The penalty is exact: with a slope well above that of the metrics, a solver ends at the limit
    and not beyond it. What little it leaves beyond is for the caller to filter out.

    Args:
        mean: Maps ``n x d`` to ``n x m``, larger is better in every column.
        excess: Maps ``n x d`` to ``n`` values of at least 0, differentiable.
        scale: ``m`` typical sizes of the columns, which multiply the penalty; 1 by default.
    """

    def penalised(X: Tensor) -> Tensor:
        penalty = _STEEP * excess(X).unsqueeze(-1)
        return mean(X) - (penalty if scale is None else penalty * scale)

    return penalised


def _leverage(offset: Tensor, precision: Tensor) -> Tensor:
    return ((offset @ precision) * offset).sum(-1)
