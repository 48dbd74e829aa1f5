"""CMA-ES on scalarisations: a baseline that searches a few trade-offs one by one.

Several weightings of the metrics each have a covariance matrix adaptation evolution strategy of
their own (Hansen, *The CMA Evolution Strategy: A Tutorial*, 2016), in the implementation of the
``cma`` package. They take turns, one generation each.

The sampler keeps no state: at every call the searches are replayed. Their random numbers come from
the generator alone, so each asks again for the points that it asked for before; those are found
among what was seen and told, and the first generation with points that were not measured yet is
what is proposed. Points that no search has asked for (another design, other samplers) do no harm:
the first of them set the scale and the starts, later ones are passed over.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from map_bo.data import Observations, to_maximisation
from map_bo.errors import SamplerError, require
from map_bo.rng import numpy_generator
from map_bo.samplers.designs.space_filling import Sobol, is_repeat
from map_bo.scale import widths
from map_bo.space import CoefficientSpace

__all__ = ["CMAES", "chebyshev_cost"]

_SPARE = 100  # generations without a new point, beyond one an evaluation, before the design goes on


@dataclass(frozen=True)
class CMAES:
    """CMA-ES on several augmented Chebyshev scalarisations, in turn.

    The first ``initial`` evaluations that succeed come from a Sobol design. They alone set the
    ideal point and the range of every metric, and each search starts at the one of them that is
    best for its weights; so later evaluations change nothing of what was asked before. The first
    weights are equal, the others are drawn uniformly from the simplex.

    A search works in the unit cube; what leaves the constraints is moved to the nearest point of
    the space, and its squared distance to it is added to the cost. Failed evaluations are left
    out of the ranking; a generation of which fewer succeeded than are selected is asked anew. A
    search that has converged starts again at a random point.

    Points asked for while every search waits for pending ones come from the Sobol design, and so
    do those asked for while one of the first ``initial`` evaluations is on its way. So the order
    in which outcomes arrive changes no search: a generation that is complete is told as a whole.

    Attributes:
        weights: How many weightings are searched; with a single metric there is one.
        population: Points a generation; ``None`` is ``4 + 3 ln d``, rounded down.
        step: Initial standard deviation, as a share of a coefficient's range.
        initial: Evaluations that succeeded before the first generation. ``None``: as many as a
            box has anchors (base, ``N`` experts, uniform blend) and ``max(2, N // 2)`` more.
        anchors: Whether the design starts with the base, the experts and the uniform blend.
    """

    weights: int = 4
    population: int | None = None
    step: float = 0.3
    initial: int | None = None
    anchors: bool = True

    def __post_init__(self) -> None:
        require("cma", by="CMA-ES", extra="baselines")
        least = {"weights": 1, "population": 4, "initial": 1}
        for name, limit in least.items():
            value = getattr(self, name)
            if value is not None and value < limit:
                raise SamplerError(f"{name} is {value}", hint=f"{name} must be at least {limit}")
        if not 0 < self.step <= 1:
            raise SamplerError(
                f"the initial step is {self.step}",
                hint="it is a share of each coefficient's range, more than 0 and at most 1",
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
        """Return ``n x d`` points to evaluate next; see :class:`Sampler`.

        Raises:
            SamplerError: When ``n`` is negative, or the evaluations are of another space.
        """
        design = Sobol(anchors=self.anchors)
        waiting = torch.zeros(0, space.d, dtype=torch.float64)
        if pending is not None:
            waiting = pending.to(torch.float64)
        # Nothing yet, but it refuses a negative number and evaluations of another space.
        found = design.propose(seen, space, min(n, 0), pending=pending, generator=generator)
        if self._is_founded(seen, space, waiting, generator):
            with warnings.catch_warnings():
                # What the package warns of (few solutions told, flat costs) is expected here.
                warnings.simplefilter("ignore")
                found = self._next(seen, space, n, waiting, generator)
        waiting = torch.cat([waiting, found])
        rest = design.propose(seen, space, n - len(found), pending=waiting, generator=generator)
        return torch.cat([found, rest])

    def initial_points(self, space: CoefficientSpace) -> int:
        """Return how many evaluations must succeed before the first generation."""
        experts = len(space.experts)
        return experts + 2 + max(2, experts // 2) if self.initial is None else self.initial

    def _is_founded(
        self, seen: Observations, space: CoefficientSpace, waiting: Tensor, source: Generator
    ) -> bool:
        """Return whether the evaluations that set scale and starts are settled.

        They are the first that succeed, in the order in which they were proposed. An outcome that
        is still on its way could come between them, and every search would have asked for other
        points: while a point of the design is pending that comes before one of them, the design
        goes on.
        """
        good = seen.succeeded()
        if len(good) < self.initial_points(space):
            return False
        if not len(waiting):
            return True
        nothing, count = seen.select([]), len(seen) + len(waiting)
        design = Sobol(anchors=self.anchors).propose(nothing, space, count, generator=source)
        founding = _rows(good.X[: self.initial_points(space)], design, space)
        pending = _rows(waiting, design, space)
        return not bool(((pending >= 0) & (pending < founding.max())).any())

    def _next(
        self,
        seen: Observations,
        space: CoefficientSpace,
        n: int,
        waiting: Tensor,
        source: Generator,
    ) -> Tensor:
        """Replay the searches and return up to ``n x d`` points that they ask for and lack."""
        good, failed = seen.succeeded(), seen.X[~seen.ok]
        founding = good.select(range(self.initial_points(space)))
        gains = to_maximisation(founding.Y, founding.metrics)
        ideal, unit = gains.amax(0), widths(gains.amin(0), gains.amax(0))
        regrets = (ideal - to_maximisation(good.Y, good.metrics)) / unit
        starts = space.normalise(founding.X).clamp(0.0, 1.0)
        searches = []
        for i, weights in enumerate(self._weightings(len(good.metrics), source)):
            costs = chebyshev_cost(regrets, weights)
            best = starts[costs[: len(founding)].argmin()]
            random = numpy_generator(source, "cma", i)
            searches.append((_Search(best.numpy(), self.step, self.population, random), costs))
        found = torch.zeros(0, space.d, dtype=torch.float64)
        blocked = [n == 0] * len(searches)
        for _ in range(len(seen) + _SPARE):
            for i, (search, costs) in enumerate(searches):
                if blocked[i] or len(found) == n:
                    continue
                U = torch.from_numpy(search.ask())
                X = space.project(space.unnormalise(U))
                rows = _rows(X, good.X, space)
                missing = (rows < 0) & ~is_repeat(X, failed, space)
                blocked[i] = bool(missing.any())
                if not blocked[i]:
                    away = (space.normalise(X) - U).square().sum(-1)
                    search.tell(rows >= 0, (costs[rows] + away).numpy())
                    continue
                for row in X[missing]:
                    point, taken = row.unsqueeze(0), torch.cat([waiting, found])
                    if len(found) < n and not bool(is_repeat(point, taken, space)):
                        found = torch.cat([found, point])
            if all(blocked) or len(found) == n:
                break
        return found

    def _weightings(self, m: int, source: Generator) -> Tensor:
        """Return ``k x m`` weights with mean 1: equal ones, then random ones."""
        if m == 1:
            return torch.ones(1, 1, dtype=torch.float64)
        drawn = numpy_generator(source, "weights").dirichlet([1.0] * m, self.weights - 1)
        return m * torch.cat([torch.full((1, m), 1.0 / m).double(), torch.from_numpy(drawn)])


class _Search:
    """One CMA-ES in the unit cube, which starts again when it has converged."""

    def __init__(
        self,
        start: np.ndarray[Any, Any],
        step: float,
        population: int | None,
        random: np.random.Generator,
    ) -> None:
        self._step, self._random, self._options = (
            step,
            random,
            {} if population is None else {"popsize": population},
        )
        self._strategy = self._begin(start)
        self._asked: list[np.ndarray[Any, Any]] = []

    def ask(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return the next generation, points of the unit cube."""
        self._asked = self._strategy.ask()
        return np.array(self._asked, dtype=np.float64)

    def tell(self, rows: Tensor, costs: np.ndarray[Any, Any]) -> None:
        """Tell the costs (lower is better) of those of the last generation that have one."""
        kept = rows.nonzero().flatten().tolist()
        if len(kept) < max(3, self._strategy.sp.weights.mu):
            return  # too few to select from: the next generation comes from the same distribution
        self._strategy.tell([self._asked[i] for i in kept], [float(costs[i]) for i in kept])
        if self._strategy.stop():
            self._strategy = self._begin(self._random.random(len(self._asked[0])))

    def _begin(self, start: np.ndarray[Any, Any]) -> Any:
        quiet = {"verbose": -9, "verb_log": 0, "verb_disp": 0}
        # The package would draw from numpy's global generator, and seed it, without these two.
        own = {"randn": lambda *shape: self._random.standard_normal(shape), "seed": np.nan}
        options = {"bounds": [0, 1], **quiet, **own, **self._options}
        import cma

        return cma.CMAEvolutionStrategy(start, self._step, options)


def chebyshev_cost(regrets: Tensor, weights: Tensor) -> Tensor:
    """Return the augmented Chebyshev scalarisation, lower is better (Wierzbicki 1980).

    ``max_i w_i r_i + 0.05 sum_i w_i r_i``; the sum keeps weakly dominated points behind.

    Args:
        regrets: ``n x m`` distances to the ideal point, scaled, smaller is better; negative where
            a point is better than it.
        weights: ``m`` weights.

    Returns:
        ``n`` costs.
    """
    weighted = regrets * weights
    return weighted.amax(-1) + 0.05 * weighted.sum(-1)


def _rows(X: Tensor, known: Tensor, space: CoefficientSpace) -> Tensor:
    """Return for each row of ``X`` (``n x d``) the row of ``known`` that is the same, or -1."""
    found = torch.full((len(X),), -1)
    for i, row in enumerate(X):
        same = is_repeat(known, row.unsqueeze(0), space).nonzero().flatten()
        if len(same):
            found[i] = same[0]
    return found
