"""How good a front is: hypervolume, distances to the truth, win rates, preferences.

Every function takes values that are larger-is-better in every column
(:func:`map_bo.data.to_maximisation` makes them so).
"""

from __future__ import annotations

import math
from typing import Literal

import moocore
import torch
from torch import Generator, Tensor

from map_bo.errors import DataError
from map_bo.pareto.dominance import dominates, non_dominated
from map_bo.rng import make_generator

__all__ = [
    "directional_hypervolume",
    "epsilon_additive",
    "hypervolume",
    "hypervolume_kind",
    "igd",
    "igd_plus",
    "inverse_directions",
    "preference_weights",
    "win_rate_dominance",
    "win_rate_per_objective",
]

# Most points in front of the reference that are still measured exactly, by number of metrics.
# At these sizes the exact algorithm took at most about one second on one CPU core.
_EXACT = {6: 300, 7: 150, 8: 100, 9: 60, 10: 40, 11: 30, 12: 24}
_EXACT_BEYOND = 16
_MOST_COLUMNS = 31  # that moocore takes
_DIRECTIONS = 2**11


def hypervolume(Y: Tensor, reference: Tensor) -> float:
    """Return the volume that the points dominate in front of the reference point.

    Points that do not beat the reference in every metric contribute nothing. Exact up to five
    metrics, and beyond that up to 300, 150, 100, 60, 40, 30 and 24 non-dominated points in 6 to
    12 metrics and 16 points in more. Larger sets are approximated without randomness on 262,144
    directions (moocore ``Rphi-FWE+``), each metric first scaled to its range. The relative
    error measured on random fronts was below .4 % up to eight metrics and about 1 % up to
    twelve; beyond twelve it reaches tens of per cent and only the order of magnitude counts.
    Beyond 31 metrics, where moocore ends, it is :func:`directional_hypervolume` along 2,048
    directions, the same at every call, and at least the volume of the best single point; a single
    point is exact. :func:`hypervolume_kind` tells which of the two it is.

    Args:
        Y: ``n x m`` values, larger is better.
        reference: ``m`` values.

    Raises:
        DataError: When shapes disagree or a value is NaN or infinite.
    """
    front = _in_front(Y, reference)
    if len(front) == 0:
        return 0.0
    m = front.shape[-1]
    if m == 1:
        return float(front.max())
    if m > _MOST_COLUMNS:
        return _along_directions(front)
    if _is_exact(front):
        zero = torch.zeros(m, dtype=torch.float64).numpy()
        return float(moocore.hypervolume(front.numpy(), ref=zero, maximise=True))
    width = front.amax(0)
    share = moocore.hv_approx((front / width).numpy(), ref=[0.0] * m, maximise=True)
    return float(share) * float(width.prod())


def inverse_directions(m: int, count: int, *, generator: Generator) -> Tensor:
    """Return ``1 / u`` of directions uniform on the positive part of the sphere, ``m x count``."""
    normal = torch.randn(count, m, generator=generator, dtype=torch.float64).abs()
    inverse: Tensor = normal.norm(dim=-1) / normal.clamp_min(1e-12).mT
    return inverse


def directional_hypervolume(Y: Tensor, inverse: Tensor) -> float:
    """Return the hypervolume of ``Y`` (``k x m``, reference at 0) along directions.

    ``c E[max_i min_j (y_ij / u_j)_+^m]``, ``c = pi^(m/2) / (2^m Gamma(m/2 + 1))`` (Deng, Li &
    Zhang, *Approximating hypervolume contributions*, 2019; Zhang & Golovin, *Random hypervolume
    scalarizations for provable multi-objective black box optimization*, 2020, lemma 5).

    Args:
        Y: Values, larger is better.
        inverse: ``m x s`` of :func:`inverse_directions`.
    """
    m = Y.shape[-1]
    factor = math.exp(0.5 * m * math.log(math.pi) - m * math.log(2) - math.lgamma(m / 2 + 1))
    length = Y[:, :1] * inverse[0]
    for j in range(1, m):
        torch.minimum(length, Y[:, j : j + 1] * inverse[j], out=length)
    return factor * float(length.amax(0).clamp_min(0.0).pow(m).mean())


def _along_directions(front: Tensor) -> float:
    """Return the directional hypervolume, and no less than that of the largest single point."""
    width = front.amax(0)
    Y = front / width
    share = float(Y.prod(-1).max())
    if len(Y) > 1:
        inverse = inverse_directions(Y.shape[-1], _DIRECTIONS, generator=make_generator(0))
        share = max(share, directional_hypervolume(Y, inverse))
    return share * float(width.prod())


def hypervolume_kind(Y: Tensor, reference: Tensor) -> Literal["exact", "approximate"]:
    """Return whether :func:`hypervolume` of the same arguments is exact."""
    return "exact" if _is_exact(_in_front(Y, reference)) else "approximate"


def igd(Y: Tensor, truth: Tensor) -> float:
    """Return the inverted generational distance: mean distance from ``truth`` to ``Y``.

    Args:
        Y: ``n x m`` values of the front to judge, larger is better.
        truth: ``K x m`` values of the true front.
    """
    _check_pair(Y, truth)
    return float(moocore.igd(_numpy(Y), ref=_numpy(truth), maximise=True))


def igd_plus(Y: Tensor, truth: Tensor) -> float:
    """Return IGD+, which counts only how far ``Y`` falls short of ``truth``.

    Ishibuchi et al. 2015, eq. 18; unlike IGD it never rewards a dominated front.
    """
    _check_pair(Y, truth)
    return float(moocore.igd_plus(_numpy(Y), ref=_numpy(truth), maximise=True))


def epsilon_additive(Y: Tensor, truth: Tensor) -> float:
    """Return the smallest number that, added to all of ``Y``, makes it cover ``truth``.

    Zitzler et al. 2003; negative when ``Y`` is better than ``truth`` everywhere.
    """
    _check_pair(Y, truth)
    return float(moocore.epsilon_additive(_numpy(Y), ref=_numpy(truth), maximise=True))


def win_rate_per_objective(A: Tensor, B: Tensor) -> float:
    """Return how often a point of ``A`` beats one of ``B`` in a metric; ties count half.

    The mean of ``1[a_i > b_i] + 1/2 1[a_i = b_i]`` over all pairs ``(a, b)`` and metrics ``i``.

    Args:
        A: ``n x m`` values, larger is better.
        B: ``k x m`` values.
    """
    _check_pair(A, B)
    a, b = A.unsqueeze(1), B.unsqueeze(0)
    return float(((a > b).double() + 0.5 * (a == b).double()).mean())


def win_rate_dominance(A: Tensor, B: Tensor) -> float:
    """Return the share of pairs ``(a, b)`` in which ``a`` dominates ``b``."""
    _check_pair(A, B)
    return float(dominates(A.unsqueeze(1), B.unsqueeze(0)).double().mean())


def preference_weights(n: int, m: int, *, generator: Generator) -> Tensor:
    """Return ``n x m`` preference weights drawn uniformly from the simplex (Dirichlet(1))."""
    U = torch.rand(n, m, generator=generator, dtype=torch.float64)
    E = -torch.log1p(-U) + 1e-300  # a row of exact zeros must not divide by zero
    return E / E.sum(-1, keepdim=True)


def _in_front(Y: Tensor, reference: Tensor) -> Tensor:
    """Return the distinct non-dominated points that beat the reference, relative to it."""
    _check(Y, "values")
    if reference.shape != Y.shape[-1:]:
        raise DataError(
            f"the reference point has shape {tuple(reference.shape)} for {Y.shape[-1]} metrics",
            hint="give one value per metric",
        )
    gain = Y.detach().double().cpu() - reference.detach().double().cpu()
    gain = gain[(gain > 0).all(-1)]
    # In the order of their values: sums of floats then do not depend on the order of rows.
    gain = gain[non_dominated(gain)] if len(gain) else gain
    return torch.unique(gain, dim=0) if len(gain) else gain


def _is_exact(front: Tensor) -> bool:
    m = front.shape[-1]
    if m > _MOST_COLUMNS:
        return len(front) <= 1
    return m <= 5 or len(front) <= _EXACT.get(m, _EXACT_BEYOND)


def _check(Y: Tensor, name: str) -> None:
    if Y.dim() != 2:
        raise DataError(
            f"{name} must be a matrix, got shape {tuple(Y.shape)}",
            hint="give one row per point and one column per metric",
        )
    if not bool(torch.isfinite(Y).all()):
        raise DataError(f"{name} hold NaN or infinity", hint="leave out failed evaluations")


def _check_pair(A: Tensor, B: Tensor) -> None:
    _check(A, "values")
    _check(B, "values")
    if A.shape[-1] != B.shape[-1] or len(A) == 0 or len(B) == 0:
        raise DataError(
            f"two fronts of shapes {tuple(A.shape)} and {tuple(B.shape)} cannot be compared",
            hint="give both at least one point and the same metrics",
        )


def _numpy(Y: Tensor) -> object:
    return Y.detach().double().cpu().contiguous().numpy()
