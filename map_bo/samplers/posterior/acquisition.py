"""Samplers that maximise an acquisition function: one point after the other, from many starts."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from botorch.acquisition.acquisition import AcquisitionFunction
from botorch.optim.initializers import initialize_q_batch
from botorch.optim.optimize import optimize_acqf
from torch import Generator, Tensor
from torch.overrides import TorchFunctionMode

from map_bo.errors import SamplerError
from map_bo.rng import child, make_generator
from map_bo.samplers.designs.space_filling import is_repeat, sobol_points
from map_bo.samplers.posterior.driven import NEAREST, PosteriorDriven, Situation
from map_bo.scale import widths
from map_bo.space import CoefficientSpace
from map_bo.surrogates.feasibility import Feasibility

__all__ = ["AcquisitionDriven", "Chance", "Weighted", "first_points", "of_each_option"]

_DRAWS = {torch.multinomial, torch.randperm, torch.rand, torch.randn, torch.randint}
_NEAR = 0.1  # standard deviation of starts around good observations, share of the box


class Chance(TorchFunctionMode):
    """Makes a library that takes no generator draw from this one, in this thread.

    It would draw from torch's global generator, which other threads draw from and seed.

    Args:
        generator: What to draw from.
    """

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self._generator = generator

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch, with the generator where it draws and was given none."""
        given = dict(kwargs or {})
        if func in _DRAWS and given.get("generator") is None:
            given["generator"] = self._generator
        return func(*args, **given)


@dataclass(frozen=True)
class AcquisitionDriven(PosteriorDriven):
    """Base of the samplers that maximise an acquisition function of the posterior.

    Points of one call are chosen one after the other, each with those before it pending. In a space
    with a choice the optimiser runs for each option, with its share of the starts and at least
    two, and the best is taken.

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
        chance = Chance(make_generator(situation.seed))
        with chance:  # botorch draws seeds of its own here and there
            acquisition = self.acquisition(situation, situation.taken, situation.generator)
        for i in range(n):
            source = child(situation.generator, i)
            if i:
                pending = torch.cat([situation.taken, found])
                with chance:
                    acquisition = self.renewed(acquisition, situation, pending, source)
            starts = self._raw_samples(situation, source)
            known = torch.cat([situation.known, found])
            weighted = self.weighted(acquisition, situation)
            point = self._best(weighted, starts, situation.space, known, chance)
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
        chance: Chance,
    ) -> Tensor:
        """Return the best new point found, ``1 x d``, or ``0 x d`` when there is none."""
        with torch.no_grad():
            values = torch.cat([acquisition(part.unsqueeze(1)) for part in torch.split(starts, 32)])
        if not bool(torch.isfinite(values).any()):
            raise ArithmeticError("the acquisition is nowhere finite")
        values = values.nan_to_num(nan=-math.inf)
        parts = of_each_option(starts, space)
        restarts = self.restarts if len(parts) == 1 else max(2, -(-self.restarts // len(parts)))
        climbed = [
            self._climb(acquisition, starts[rows], values[rows], part, chance, restarts=restarts)
            for part, rows in parts
            if bool(torch.isfinite(values[rows]).any())
        ]
        points = torch.cat([*(found for found, _ in climbed), starts])
        values = torch.cat([*(at for _, at in climbed), values])
        order = values.argsort(descending=True, stable=True)
        new = order[~is_repeat(points[order], known, space, tolerance=NEAREST)]
        return points[new[:1]]

    def _climb(
        self,
        acquisition: AcquisitionFunction,
        starts: Tensor,
        values: Tensor,
        space: CoefficientSpace,
        chance: Chance,
        *,
        restarts: int,
    ) -> tuple[Tensor, Tensor]:
        """Return where the optimiser ends that begins at the best of ``starts``, and the values."""
        finite = torch.isfinite(values)
        count = min(restarts, int(finite.sum()))
        with chance:
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
        at = torch.as_tensor(found_values).nan_to_num(nan=-math.inf)
        return space.project(found.squeeze(1)), at


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


def of_each_option(X: Tensor, space: CoefficientSpace) -> list[tuple[CoefficientSpace, Tensor]]:
    """Return the space of each option, and which rows of ``X`` (``n x d``) are in it.

    Acquisitions are climbed in each of them alone. Without a choice it is the space and all rows.
    """
    if space.placed_choice is None or len(space.by_option) == 1:
        return [(space, torch.ones(len(X), dtype=torch.bool))]
    codes = space.placed_choice.codes(X)
    return [(part, codes == code) for code, part in enumerate(space.by_option)]


def first_points(points: Iterator[Tensor], n: int) -> Tensor:
    """Return the first ``n`` points of a sequence of chunks, ``n x d``."""
    found = [next(points)]
    while sum(map(len, found)) < n:
        found.append(next(points))
    return torch.cat(found)[:n]
