"""Samplers that maximise an acquisition function: one point after the other, from many starts."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from botorch.acquisition.acquisition import AcquisitionFunction
from botorch.optim.initializers import initialize_q_batch
from botorch.optim.optimize import optimize_acqf
from torch import Generator, Tensor

from map_bo.errors import SamplerError
from map_bo.rng import child
from map_bo.samplers.designs.space_filling import is_repeat, sobol_points
from map_bo.samplers.posterior.driven import NEAREST, PosteriorDriven, Situation
from map_bo.scale import widths
from map_bo.space import CoefficientSpace
from map_bo.surrogates.feasibility import Feasibility

__all__ = ["AcquisitionDriven", "Weighted", "first_points"]

_NEAR = 0.1  # standard deviation of starts around good observations, share of the box


@dataclass(frozen=True)
class AcquisitionDriven(PosteriorDriven):
    """Base of the samplers that maximise an acquisition function of the posterior.

    Points of one call are chosen one after the other, each with those before it pending.

    Attributes:
        restarts: Starts of the optimiser.
        raw_samples: Points that the starts are chosen from: half of them cover the space, half
            lie around the observations on the front.
        mc_samples: Samples of the posterior.
        steps: Steps of the optimiser from each start.
    """

    above_reference: ClassVar[bool] = False
    """Whether the acquisition itself counts nothing that does not beat the reference point."""

    restarts: int = 4
    raw_samples: int = 64
    mc_samples: int = 32
    steps: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("restarts", "raw_samples", "mc_samples", "steps"):
            if getattr(self, name) < 1:
                raise SamplerError(
                    f"{name} is {getattr(self, name)}", hint=f"{name} must be at least 1"
                )

    @abstractmethod
    def acquisition(
        self, situation: Situation, pending: Tensor, generator: Generator
    ) -> AcquisitionFunction:
        """Return the function to maximise.

        Args:
            situation: What is known.
            pending: ``p x d`` points to count as known up to the posterior: ``situation.taken``
                and the points of this call so far.
            generator: A source for this point alone.
        """

    def renewed(
        self,
        acquisition: AcquisitionFunction,
        situation: Situation,
        pending: Tensor,
        source: Generator,
    ) -> AcquisitionFunction:
        """Return the function for the next point of the same call; by default the same one."""
        acquisition.set_X_pending(pending)
        return acquisition

    def weighted(
        self, acquisition: AcquisitionFunction, situation: Situation
    ) -> AcquisitionFunction:
        """Return the acquisition times the probability that a point is worth something."""
        likely = situation.feasibility if self.above_reference else situation.worth
        return acquisition if likely is None else Weighted(acquisition, likely)

    def choose(self, situation: Situation, n: int) -> Tensor:
        """Return up to ``n`` new points, ``k x d``, the best first.

        An acquisition is multiplied by the probability that a point is feasible, as in constrained
        expected improvement (Gardner et al., *Bayesian Optimization with Inequality Constraints*,
        2014): in logarithms, which all acquisitions here are, but for upper bounds.
        """
        found = situation.taken[:0]
        acquisition = self.acquisition(situation, situation.taken, situation.generator)
        for i in range(n):
            source = child(situation.generator, i)
            if i:
                pending = torch.cat([situation.taken, found])
                acquisition = self.renewed(acquisition, situation, pending, source)
            starts = self._raw_samples(situation, source)
            known = torch.cat([situation.known, found])
            weighted = self.weighted(acquisition, situation)
            point = self._best(weighted, starts, situation.space, known)
            if not len(point):
                break
            found = torch.cat([found, point])
        return found

    def _raw_samples(self, situation: Situation, source: Generator) -> Tensor:
        """Return the starts to choose from, ``raw_samples x d`` and no more."""
        space, gains = situation.space, situation.observed
        near = self.raw_samples // 2
        spread = first_points(sobol_points(space, generator=source), self.raw_samples - near)
        # The observations that are best for some weighting are on the front; which, is left to
        # chance, so that starts differ from call to call.
        weights = torch.rand(near, gains.shape[-1], generator=source, dtype=gains.dtype)
        scaled = (gains - gains.amin(0)) / widths(gains.amin(0), gains.amax(0))
        rows = (scaled.unsqueeze(0) / weights.clamp_min(1e-3).unsqueeze(1)).amin(-1).argmax(-1)
        step = torch.randn(near, space.d, generator=source, dtype=torch.float64) * _NEAR
        best = space.normalise(situation.good.X[rows])
        return torch.cat([spread, space.project(space.unnormalise(best + step))])

    def _best(
        self,
        acquisition: AcquisitionFunction,
        starts: Tensor,
        space: CoefficientSpace,
        known: Tensor,
    ) -> Tensor:
        """Return the best new point found, ``1 x d``, or ``0 x d`` when there is none."""
        with torch.no_grad():
            values = torch.cat([acquisition(part.unsqueeze(1)) for part in torch.split(starts, 32)])
        if not bool(torch.isfinite(values).any()):
            raise ArithmeticError("the acquisition is nowhere finite")
        values = values.nan_to_num(nan=-math.inf)
        finite = torch.isfinite(values)
        count = min(self.restarts, int(finite.sum()))
        chosen, _ = initialize_q_batch(starts[finite].unsqueeze(1), values[finite], n=count)
        inequalities, equalities = _constraints(space)
        found, found_values = optimize_acqf(
            acquisition,
            bounds=space.bounds,
            q=1,
            num_restarts=count,
            batch_initial_conditions=chosen,
            inequality_constraints=inequalities,
            equality_constraints=equalities,
            options={"maxiter": self.steps},
            return_best_only=False,
            retry_on_optimization_warning=False,
        )
        points = torch.cat([space.project(found.squeeze(1)), starts])
        values = torch.cat([torch.as_tensor(found_values).nan_to_num(nan=-math.inf), values])
        order = values.argsort(descending=True, stable=True)
        new = order[~is_repeat(points[order], known, space, tolerance=NEAREST)]
        return points[new[:1]]


class Weighted(AcquisitionFunction):
    """An acquisition in logarithms, times the probability that a point is feasible.

    Args:
        acquisition: Takes ``b x 1 x d``.
        feasibility: How likely points are feasible.
    """

    def __init__(self, acquisition: AcquisitionFunction, feasibility: Feasibility) -> None:
        super().__init__(acquisition.model)
        self.acquisition, self.feasibility = acquisition, feasibility

    def forward(self, X: Tensor) -> Tensor:
        """Return the value at each of ``b`` points (``b x 1 x d``)."""
        value: Tensor = self.acquisition(X)
        return value + self.feasibility.log_probability(X.squeeze(-2))


def _constraints(
    space: CoefficientSpace,
) -> tuple[list[tuple[Tensor, Tensor, float]] | None, list[tuple[Tensor, Tensor, float]] | None]:
    """Return the constraints as botorch wants them: ``sum_i a_i x_i >= b``, and ``== b``."""
    inequalities, equalities = [], []
    for constraint in space.constraints:
        weights = torch.tensor(constraint.weights, dtype=torch.float64)
        indices = weights.nonzero().flatten()
        if constraint.equality:
            equalities.append((indices, weights[indices], constraint.bound))
        else:
            inequalities.append((indices, -weights[indices], -constraint.bound))
    return inequalities or None, equalities or None


def first_points(points: Iterator[Tensor], n: int) -> Tensor:
    """Return the first ``n`` points of a sequence of chunks, ``n x d``."""
    found = [next(points)]
    while sum(map(len, found)) < n:
        found.append(next(points))
    return torch.cat(found)[:n]
