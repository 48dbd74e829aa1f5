"""Measures of an answer against the truth, all on scaled gains: 0 the reference, 1 the best expert.

What one cell can know by itself (:func:`measures`) and what needs the best that anybody found on
the same case (:class:`Known`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from map_bo.pareto.dominance import non_dominated
from map_bo.pareto.gradient import thin
from map_bo.pareto.indicators import hypervolume, hypervolume_kind, igd_plus, preference_weights
from map_bo.rng import child, make_generator

__all__ = [
    "MOST",
    "PREFERENCES",
    "Known",
    "attained",
    "best_attained",
    "choices",
    "coverage",
    "front_of",
    "measures",
    "representatives",
    "weights_of",
]

MOST = 100  # points of an answer that are scored, the size of the populations compared with
PREFERENCES = 60
_DIRECTIONS = 2048
_FRONT = 500  # points of the best known front that IGD+ is measured to


def weights_of(seed: int, m: int) -> Tensor:
    """Return the preferences of a seed, ``60 x m``: the same for every method."""
    return preference_weights(PREFERENCES, m, generator=child(make_generator(seed), "weights"))


def representatives(predicted: Tensor, most: int = MOST) -> Tensor:
    """Return which rows of ``predicted`` (``n x m`` gains) stand for all, at most ``most``.

    Each next row adds most to the predicted hypervolume of those taken. Spreading rows evenly
    instead keeps mostly the ends of a front: with eight metrics two thirds of the hypervolume went
    with them, however good the front. The hypervolume is measured along 2,048 directions ``w``
    of the positive orthant as the mean of ``max_y min_i(y_i / w_i)^m`` (Zhang and Golovin
    2020), which makes it submodular, so the greedy choice has at least ``1 - 1/e`` of the best
    possible. Rows that add nothing, being behind the reference, are taken spread out.

    Args:
        predicted: ``n x m`` gains, 0 at the reference.
        most: Number of rows.
    """
    n, m = predicted.shape
    if n <= most:
        return torch.arange(n)
    source = child(make_generator(0), "directions")
    W = torch.randn(_DIRECTIONS, m, generator=source, dtype=torch.float64).abs()
    W = W / W.norm(dim=-1, keepdim=True)
    reach = torch.full((n, _DIRECTIONS), math.inf, dtype=torch.float64)
    for i in range(m):
        torch.minimum(reach, predicted[:, i : i + 1].clamp_min(0) / W[:, i], out=reach)
    reach.pow_(m)
    covered = torch.zeros(_DIRECTIONS, dtype=torch.float64)
    bounds = reach.sum(-1)  # gains only fall as others are taken, so old gains are upper bounds
    taken: list[int] = []
    while len(taken) < most:
        row = int(bounds.argmax())
        if not float(bounds[row]) > 0:
            break
        gain = (reach[row] - covered).clamp_min(0).sum()
        bounds[row] = gain
        if bool(gain >= bounds.amax()):
            taken.append(row)
            covered = torch.maximum(covered, reach[row])
            bounds[row] = -1.0
    rest = torch.tensor(sorted(set(range(n)) - set(taken)))
    if len(taken) < most:
        spread = thin(rest.unsqueeze(-1), predicted[rest], most - len(taken)).flatten()
        taken += spread.tolist()
    return torch.tensor(sorted(taken))


def choices(predicted: Tensor, weights: Tensor) -> Tensor:
    """Return for each preference (``w x m``) the row of ``predicted`` that promises most."""
    return (weights @ predicted.T).argmax(-1)


def attained(chosen: Tensor, weights: Tensor) -> Tensor:
    """Return what each choice (``w x m`` true gains) is worth to its preference, ``w``."""
    return (weights * chosen).sum(-1)


def best_attained(gains: Tensor, weights: Tensor) -> Tensor:
    """Return the best that any row of ``gains`` (``n x m``) is worth to each preference, ``w``."""
    best: Tensor = (weights @ gains.T).amax(-1)
    return best


def coverage(real: Tensor, lower: Tensor, upper: Tensor) -> float:
    """Return the share of values (``k x m``) inside their intervals."""
    return float(((real >= lower) & (real <= upper)).double().mean())


def measures(
    predicted: Tensor, real: Tensor, chosen: Tensor, solved: Tensor | None, weights: Tensor
) -> dict[str, float]:
    """Return what an answer scores by itself.

    Args:
        predicted: ``k x m`` predicted gains of the answer's points.
        real: ``k x m`` true gains.
        chosen: ``w x m`` true gains of the choice for each preference.
        solved: The same with the surrogate solved for each preference, or ``None``.
        weights: ``w x m`` preferences.

    Returns:
        ``hypervolume`` (reference 0), ``exact`` (1 when it is), ``utility`` and, where there is
        one, ``utility_solved`` (mean over preferences of what the choice is worth), ``optimism``
        (mean of predicted minus real).
    """
    zero = torch.zeros(real.shape[-1], dtype=torch.float64)
    numbers = {
        "hypervolume": hypervolume(real, zero),
        "exact": float(hypervolume_kind(real, zero) == "exact"),
        "utility": float(attained(chosen, weights).mean()),
        "optimism": float((predicted - real).mean()),
    }
    if solved is not None:
        numbers["utility_solved"] = float(attained(solved, weights).mean())
    return numbers


def front_of(parts: Iterable[Tensor]) -> Tensor:
    """Return the rows of all parts (``n x m`` each) that no other row dominates, at most 500."""
    best = torch.cat([part[non_dominated(part)] for part in parts if len(part)])
    distinct: Tensor = torch.unique(best[non_dominated(best)], dim=0)
    return thin(distinct, distinct, _FRONT)


@dataclass(frozen=True, eq=False)
class Known:
    """The best that is known on a case, over all methods and the direct search.

    Attributes:
        hypervolume: Largest hypervolume of any answer of at most 100 points.
        best: By seed, ``w`` best values for the preferences of that seed.
        front: ``k x m`` gains to measure IGD+ to: the analytic front or the best known one;
            ``None`` when no answers are at hand.
    """

    hypervolume: float
    best: Mapping[int, Tensor]
    front: Tensor | None = None

    def share(self, volume: float) -> float:
        """Return a hypervolume as a share of the best known; 1 when nothing beats the reference."""
        return volume / self.hypervolume if self.hypervolume > 0 else 1.0

    def regret(self, seed: int, utility: float) -> float:
        """Return the mean regret over the preferences of a seed, never negative."""
        return max(float(self.best[seed].mean()) - utility, 0.0)  # rounding aside

    def distance(self, real: Tensor) -> float | None:
        """Return IGD+ of an answer (``k x m`` true gains), ``None`` without a front."""
        return None if self.front is None else igd_plus(real, self.front)
