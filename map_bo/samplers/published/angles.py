"""Directions of the positive orthant, as angles and as a cube in which they are even."""

from __future__ import annotations

import torch
from scipy.special import betainc, betaincinv
from torch import Tensor

from map_bo.space import CoefficientSpace

__all__ = ["angles_of", "directions_of", "evenly", "from_evenly", "reach"]

_FLAT = 1e-12  # a ray this nearly parallel to a constraint never meets its bound


def angles_of(V: Tensor) -> tuple[Tensor, Tensor]:
    """Return radius (``n``) and hyperspherical angles (``n x (d - 1)``) of vectors ``n x d``.

    ``theta_k = atan2(|v_{k+1..d}|, v_k)``, in ``[0, pi/2]`` where no entry is negative; a negative
    entry but the last counts as 0. The zero vector has angles of 0.
    """
    V = V.clamp_min(0.0)
    tails = V.square().flip(-1).cumsum(-1).flip(-1).sqrt()
    return tails[:, 0], torch.atan2(tails[:, 1:], V[:, :-1])


def directions_of(theta: Tensor) -> Tensor:
    """Return unit vectors (``n x d``) with the given angles (``n x (d - 1)``)."""
    one = theta.new_ones(len(theta), 1)
    sines = torch.cat([one, theta.sin()], -1).cumprod(-1)
    return sines * torch.cat([theta.cos(), one], -1)


def evenly(theta: Tensor) -> Tensor:
    """Return angles (``n x (d - 1)``) as points of the unit cube in which directions are even.

    On the sphere ``sin^2(theta_k)`` has a beta distribution with ``(d - k) / 2`` and ``1 / 2``
    degrees (the squares of normal variables in order), and its distribution function makes it
    uniform. So the volume of a box in this cube is the share of directions that lie in it.
    """
    return torch.from_numpy(betainc(_degrees(theta).numpy(), 0.5, theta.sin().square().numpy()))


def from_evenly(U: Tensor) -> Tensor:
    """Return the angles of points of the cube; the inverse of :func:`evenly`."""
    squares = torch.from_numpy(betaincinv(_degrees(U).numpy(), 0.5, U.numpy()))
    return squares.clamp(0.0, 1.0).sqrt().asin()


def _degrees(theta: Tensor) -> Tensor:
    return torch.arange(theta.shape[-1], 0, -1, dtype=torch.float64) / 2


def reach(space: CoefficientSpace, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Return between which radii rays from the lower corner of the box are in the space.

    Args:
        space: The space.
        directions: ``n x d`` vectors without negative entries, in shares of the box's widths.

    Returns:
        ``n`` smallest and ``n`` largest radii; a ray that misses the space has a smallest radius
        above its largest.
    """
    low, width = space.bounds[0], space.bounds[1] - space.bounds[0]
    shortest, longest = torch.zeros(len(directions)).double(), 1 / directions.amax(-1)
    for constraint in space.constraints:
        weights = torch.tensor(constraint.weights, dtype=torch.float64)
        slope, room = directions @ (weights * width), constraint.bound - weights @ low
        flat = slope.abs() <= _FLAT
        bound = room / torch.where(flat, 1.0, slope)
        never = torch.full_like(slope, torch.inf)
        # A ray along the bound is inside it all the way or not at all.
        inside = (room.abs() if constraint.equality else -room) <= _FLAT
        upper = torch.where((slope > 0) | constraint.equality, bound, never)
        lower = torch.where((slope < 0) | constraint.equality, bound, torch.zeros_like(slope))
        longest = torch.where(flat, longest, torch.minimum(longest, upper))
        shortest = torch.where(flat, shortest, torch.maximum(shortest, lower))
        shortest = torch.where(flat & ~inside, never, shortest)
    return shortest, longest
