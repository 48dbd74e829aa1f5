"""Evolutionary baselines: NSGA-II and NSGA-III under the same budget as every other sampler.

They look at no surrogate: what was measured breeds what is measured next. The first ``population``
evaluations that succeed come from a Sobol design (with the anchors in front). From then on the
best ``population`` of *everything* that succeeded survive, as the algorithm ranks them, and mate:
tournaments, simulated binary crossover (Deb and Agrawal 1995) and polynomial mutation. Asked for
as many points as the population at a time this is the usual generation, asked for fewer it is its
steady-state form. Failed evaluations never survive and never enter the design's count. Pending
points count towards the design and are not bred again; they cannot mate before they are measured.

The survival and the operators are pymoo's (Blank and Deb 2020).
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from map_bo.data import Observations, to_maximisation
from map_bo.errors import SamplerError, require
from map_bo.pareto.evolution import reference_directions
from map_bo.rng import numpy_generator
from map_bo.samplers.designs.space_filling import Sobol, is_repeat
from map_bo.space import CoefficientSpace

__all__ = ["NSGA2Sampler", "NSGA3Sampler"]

_LITTERS = 50  # matings that may bring nothing new before the design goes on


@dataclass(frozen=True)
class _Evolution:
    population: int | None = None
    anchors: bool = True
    eta: float = 20.0

    def __post_init__(self) -> None:
        require("pymoo", by="the evolutionary baseline", extra="baselines")
        if self.population is not None and self.population < 2:
            raise SamplerError(
                f"a population of {self.population} cannot mate",
                hint="give 2 or more, or None for the default",
            )
        if not self.eta > 1:
            raise SamplerError(
                f"the distribution index eta is {self.eta}",
                hint="it must be more than 1; 20 is usual",
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

        Children that leave the constraints are moved to the nearest point of the space; those
        that were seen, are pending or are already among the proposals are not used.

        Raises:
            SamplerError: When ``n`` is negative, or the evaluations are of another space.
        """
        design = Sobol(anchors=self.anchors)
        waiting = torch.zeros(0, space.d, dtype=torch.float64)
        if pending is not None:
            waiting = pending.to(torch.float64)
        good, size = seen.succeeded(), self.size(space)
        first = min(n, max(0, size - len(good) - len(waiting))) if len(good) > 1 else n
        chosen = design.propose(seen, space, first, pending=pending, generator=generator)
        if first < n:
            taken = torch.cat([seen.X, waiting, chosen])
            source = numpy_generator(generator, "children", len(seen), len(waiting))
            children = self._children(good, space, n - first, size, taken, source)
            chosen = torch.cat([chosen, children])
        # The space has hardly anything new around the survivors: the design fills up.
        waiting = torch.cat([waiting, chosen])
        rest = design.propose(seen, space, n - len(chosen), pending=waiting, generator=generator)
        return torch.cat([chosen, rest])

    def size(self, space: CoefficientSpace) -> int:
        """Return the size of the population in ``space``."""
        return max(12, len(space.experts) + 4) if self.population is None else self.population

    def _children(
        self,
        good: Observations,
        space: CoefficientSpace,
        n: int,
        size: int,
        taken: Tensor,
        source: np.random.Generator,
    ) -> Tensor:
        """Return up to ``n x d`` children of the survivors, none of them among ``taken``."""
        from pymoo.core.mating import Mating
        from pymoo.core.population import Population
        from pymoo.core.problem import Problem
        from pymoo.operators.crossover.sbx import SBX
        from pymoo.operators.mutation.pm import PM
        from pymoo.operators.selection.tournament import TournamentSelection

        problem = Problem(
            n_var=space.d,
            n_obj=len(good.metrics),
            xl=np.array(space.lower),
            xu=np.array(space.upper),
        )
        costs = -to_maximisation(good.Y, good.metrics)
        everybody = Population.new("X", good.X.numpy(), "F", costs.numpy())
        everybody.set("CV", np.zeros((len(good), 1)))
        alive = self._survival(len(good.metrics), size).do(
            problem, everybody, n_survive=min(size, len(good)), random_state=source
        )
        mating = Mating(
            TournamentSelection(func_comp=self._contest()),
            SBX(eta=self.eta, prob=0.9),
            PM(eta=self.eta),
        )
        # What pymoo's tournaments want to know of the algorithm that they are part of.
        about = SimpleNamespace(tournament_type="comp_by_dom_and_crowding", random_state=source)
        found = torch.zeros(0, space.d, dtype=torch.float64)
        for _ in range(_LITTERS):
            bred = mating.do(problem, alive, n - len(found), random_state=source, algorithm=about)
            for row in space.project(torch.from_numpy(bred.get("X").astype(float))):
                child = row.unsqueeze(0)
                if not bool(is_repeat(child, torch.cat([taken, found]), space)):
                    found = torch.cat([found, child])
            if len(found) >= n:
                break
        return found[:n]

    @abstractmethod
    def _survival(self, m: int, size: int) -> Any:
        """Return pymoo's survival for ``m`` metrics and ``size`` survivors."""

    @abstractmethod
    def _contest(self) -> Any:
        """Return the comparison that pymoo's tournaments between parents use."""


@dataclass(frozen=True)
class NSGA2Sampler(_Evolution):
    """NSGA-II (Deb, Pratap, Agarwal and Meyarivan 2002) over true evaluations.

    Survival by rank and crowding distance, parents by tournaments of dominance and crowding.

    Attributes:
        population: How many survive, and how many evaluations come from the design. ``None``:
            12, or four more than there are experts where that is more; small, as budgets are.
        anchors: Whether the design starts with the base, the experts and the uniform blend.
        eta: Distribution index of crossover and mutation.
    """

    def _survival(self, m: int, size: int) -> Any:
        from pymoo.operators.survival.rank_and_crowding import RankAndCrowding

        return RankAndCrowding()

    def _contest(self) -> Any:
        from pymoo.algorithms.moo.nsga2 import binary_tournament

        return binary_tournament


@dataclass(frozen=True)
class NSGA3Sampler(_Evolution):
    """NSGA-III (Deb and Jain 2014) over true evaluations, for any number of metrics.

    Survival by rank and by niches around reference directions; parents by chance among the
    survivors, as published. The directions are the finest Das-Dennis lattice that is no larger
    than the population, in two layers where one would have no direction inside the simplex; with
    so many metrics that even this has only the corners, they are as many directions as the
    population, spread by their Riesz energy (Blank, Deb, Dhebar, Bandaru and Seada 2021).

    Attributes:
        population: How many survive, and how many evaluations come from the design. ``None``:
            12, or four more than there are experts where that is more; small, as budgets are.
        anchors: Whether the design starts with the base, the experts and the uniform blend.
        eta: Distribution index of crossover and mutation.
    """

    def _survival(self, m: int, size: int) -> Any:
        from pymoo.algorithms.moo.nsga3 import ReferenceDirectionSurvival

        return ReferenceDirectionSurvival(_directions(m, size))

    def _contest(self) -> Any:
        from pymoo.algorithms.moo.nsga3 import comp_by_cv_then_random

        return comp_by_cv_then_random


@functools.lru_cache(maxsize=32)
def _directions(m: int, size: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return up to ``size x m`` reference directions, a property of the two numbers alone."""
    lattice: np.ndarray[Any, np.dtype[np.float64]] = reference_directions(m, size).numpy()
    if len(lattice) > m or m < 3:
        return lattice
    from pymoo.util.ref_dirs import get_reference_directions

    # The layout is one for all runs, as the lattice is; its search starts from a fixed seed.
    spread = get_reference_directions("energy", m, size, seed=1)
    return np.asarray(spread, dtype=np.float64)
