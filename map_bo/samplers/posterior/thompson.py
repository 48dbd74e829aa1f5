"""Posterior sampling of whole fronts."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from map_bo.errors import SamplerError
from map_bo.pareto.dominance import non_dominated
from map_bo.pareto.gradient import GradientSolver
from map_bo.pareto.solver import solve_front
from map_bo.rng import child, child_seed
from map_bo.samplers.designs.space_filling import is_repeat
from map_bo.samplers.posterior.driven import NEAREST, PosteriorDriven, Situation
from map_bo.samplers.posterior.scalarised import log_improvements, ray_lengths, sphere_directions

__all__ = ["ThompsonFronts"]


@dataclass(frozen=True)
class ThompsonFronts(PosteriorDriven):
    """Draws a function from the posterior, solves it for its whole front, and takes one point.

    Thompson sampling for several metrics (Bradford, Schweidtmann and Lapkin, *Efficient
    Multiobjective Optimization Employing Gaussian Processes, Spectral Sampling and a Genetic
    Algorithm*, 2018): of the drawn front it is the point that would add most hypervolume to what
    was observed, by :func:`~map_bo.samplers.posterior.scalarised.log_improvements` over rays, and
    so for any number of metrics. Every point of a proposal has a draw of its own, and the points
    before it and the pending ones count as observed at their drawn values.

    Draws in closed form are solved for their fronts; others are drawn over a pool of points,
    which includes the front of the mean.

    Attributes:
        solver: Solves a drawn function for its front.
        pool: Random points of the pool.
        rays: Directions that the hypervolume is measured along.
    """

    solver: GradientSolver = field(default_factory=lambda: GradientSolver(points=64, steps=40))
    pool: int = 256
    rays: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("pool", "rays"):
            if getattr(self, name) < 1:
                raise SamplerError(
                    f"{name} is {getattr(self, name)}", hint=f"{name} must be at least 1"
                )

    def choose(self, situation: Situation, n: int) -> Tensor:
        """Return up to ``n`` new points, ``k x d``, the best first."""
        m = len(situation.good.metrics)
        found = situation.taken[:0]
        for i in range(n):
            source = child(situation.generator, i)
            waiting = torch.cat([situation.taken, found])
            X, gains, expected = self._drawn_front(situation, waiting, source)
            new = ~is_repeat(
                X, torch.cat([situation.known, found]), situation.space, tolerance=NEAREST
            )
            X, gains = X[new], gains[new]
            if not len(X):
                break
            rays = sphere_directions(self.rays, m, seed=child_seed(source, "rays"))
            so_far = torch.cat([situation.observed, expected])
            best = ray_lengths(so_far.unsqueeze(1), rays).amax(0).clamp_min(0.0)
            lengths = ray_lengths(gains.unsqueeze(1), rays)
            value = log_improvements(lengths, best, m).logsumexp(-1)
            if situation.feasibility is not None:
                value = value + situation.feasibility.log_probability(X)
            found = torch.cat([found, X[value.argmax()].unsqueeze(0)])
        return found

    def _drawn_front(
        self, situation: Situation, waiting: Tensor, source: Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return a drawn front, its gains, and the draw's gains at the points ``waiting``."""
        model, space = situation.model, situation.space
        gains = situation.gains()
        function = model.sample_functions(1, generator=child(source, "function"))

        def drawn(X: Tensor) -> Tensor:
            return gains(function(X)[0], None)

        if function.explicit:
            solved = situation.allowed(drawn)
            X = solve_front(self.solver, solved, space, generator=child(source, "front"))
            with torch.no_grad():
                return X, drawn(X), drawn(waiting)
        allowed = situation.allowed(situation.mean_gains)
        mean_front = solve_front(self.solver, allowed, space, generator=child(source, "front"))
        pool = torch.cat(
            [waiting, mean_front, space.sample(self.pool, generator=child(source, "pool"))]
        )
        with torch.no_grad():
            values = drawn(pool)
        q = len(waiting)
        X, drawn_gains = pool[q:], values[q:]
        front = non_dominated(drawn_gains)
        return X[front], drawn_gains[front], values[:q]
