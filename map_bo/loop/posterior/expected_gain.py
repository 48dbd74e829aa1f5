"""The gain that further evaluations can still bring, by the posterior.

After a round the surrogate is fitted and drawn from, jointly over points that may belong to the
front. Under one draw the best choice is known, and the choice by the surrogate's mean, which is
what a user would choose now, falls short of it by some amount. The expectation of that amount over
draws is what knowing the truth could still add, and so an upper bound of what any further
evaluations can add. The misfit of the surrogate is left out of the draws: it is independent from
point to point, so an evaluation tells nothing about it elsewhere, and its largest values would
look like gain for ever. So where the truth is not of the surrogate's form, more is left to gain
than is expected here.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Generator, Tensor

from map_bo.data import Observations
from map_bo.loop.posterior.joint_posterior import JointPosterior, plausible_points, volumes
from map_bo.loop.recommend import of_columns
from map_bo.loop.settings import Settings
from map_bo.loop.stopping import Criterion
from map_bo.pareto.dominance import non_dominated
from map_bo.pareto.gradient import GradientSolver
from map_bo.pareto.indicators import preference_weights
from map_bo.pareto.solver import solve_front
from map_bo.pareto.trust import Coverage, guard, penalise
from map_bo.rng import child
from map_bo.scale import Scale, farthest_rows, varied_metrics
from map_bo.space import CoefficientSpace
from map_bo.surrogates.feasibility import Feasibility
from map_bo.surrogates.outliers import fit_screened
from map_bo.surrogates.prediction import predicted_mean
from map_bo.surrogates.surrogate import SurrogateModel
from map_bo.surrogates.validation import LeavesOneOut

__all__ = ["ExpectedGain", "check_stopping", "expected_gain"]

_DRAWS = 64
_WEIGHTS = 64  # preferences that the regret is averaged over
_FRONT, _POOL = 96, 480  # points of the mean's front, and plausible others
_SOLVER = GradientSolver(points=_FRONT, steps=30)


@dataclass(frozen=True)
class ExpectedGain:
    """What a check of the search found.

    Attributes:
        gain: Expected gain of the criterion if the truth were known.
        floor: The expected gain that would be left after the rest of the budget, at the noise of
            the evaluations so far; None when not asked for, or when the surrogate cannot tell.
    """

    gain: float
    floor: float | None = None


def expected_gain(
    model: SurrogateModel,
    seen: Observations,
    space: CoefficientSpace,
    scale: Scale,
    criterion: Criterion,
    *,
    guarded: bool,
    generator: Generator,
    further: int = 0,
    feasibility: Feasibility | None = None,
) -> ExpectedGain:
    """Return the expected gain in ``criterion`` that is left after ``seen``.

    For draws ``f`` of the metrics over a pool (the front of the mean and points around it) and
    preferences ``w``, with gains scaled as :meth:`map_bo.scale.Scale.gains`:

    * regret: ``E[max_x w' f(x) - w' f(x_w)]``, ``x_w`` the best of the pool under the mean;
    * hypervolume: ``E[HV(f(pool)) - HV(f(front of the mean))] / E HV(f(front of the mean))``, by
      scalarisation with common directions. A pool cannot hold the whole front of every draw, so
      this is a lower estimate, in four metrics far lower than in two; the regret, which needs
      one good point for each preference, suffers little.

    Args:
        model: The surrogate, fitted to ``seen``.
        seen: Every evaluation of the search.
        space: The coefficients.
        scale: The scale of the metrics.
        criterion: ``"regret"`` or ``"hypervolume"``.
        guarded: Whether the front is kept where the data support the surrogate.
        generator: Source of all randomness.
        further: When positive, ``floor`` is what would be left after so many further evaluations:
            the covariance over the pool is conditioned on them at points spread over the front,
            with the median variance of the evaluations so far.
        feasibility: How likely points are feasible: what is not can be chosen by nobody.
    """
    mean = predicted_mean(model)
    evaluated = seen.succeeded().X
    coverage = Coverage.of(seen.with_any().X, space) if guarded else None
    guarded_mean = mean if coverage is None else guard(mean, coverage, scale=scale.width)
    if feasibility is not None:
        guarded_mean = penalise(guarded_mean, feasibility.excess, scale=scale.width)
    ranged = scale.ranged & varied_metrics(seen)
    searched = of_columns(guarded_mean, ranged if bool(ranged.any()) else ~ranged)
    X = solve_front(_SOLVER, searched, space, generator=child(generator, "solve"))
    X = X if coverage is None else coverage.shrink(X)
    around = plausible_points(X, space, coverage, count=_POOL, generator=child(generator, "pool"))
    pool = torch.cat([X, around, evaluated])
    if feasibility is not None and bool(feasibility.allows(pool).any()):
        pool = pool[feasibility.allows(pool)]
    joint = JointPosterior.of(model, pool)
    gains = scale.gains(joint.gains(joint.mean), maximised=True)
    weights = preference_weights(_WEIGHTS, gains.shape[-1], generator=child(generator, "weights"))
    weights = scale.weights(weights)

    def left(of: JointPosterior) -> float:
        F = of.draw(_DRAWS, generator=child(generator, "draws"))
        values = scale.gains(of.gains(F), maximised=True)
        if criterion == "regret":
            # Where a draw breaks a constraint, the point is worth the reference point there.
            held = values[..., scale.constrained].amin(-1, keepdim=True) if scale.constraints else 1
            return _regret(gains, values * held, weights)
        return _missing_volume(gains, values, generator=child(generator, "directions"))

    floor = None
    if further > 0 and isinstance(model, LeavesOneOut):
        _, total = model.training_targets()
        rows = torch.tensor(sorted(farthest_rows(gains, further)))
        copies = -(-further // len(rows))
        floor = left(_conditioned(joint, rows, total.nanmedian(0).values / copies))
    return ExpectedGain(left(joint), floor)


def check_stopping(
    seen: Observations,
    before: Sequence[Mapping[str, Any]],
    space: CoefficientSpace,
    settings: Settings,
    *,
    generator: Generator,
) -> dict[str, Any]:
    """Check whether the search can stop, by ``settings.stop``.

    Args:
        seen: Every evaluation of the search so far.
        before: The earlier checks.
        space: The coefficients.
        settings: Those of the run, with a stopping rule.
        generator: That of the run; it is only read.

    Returns:
        ``evaluations``, ``gain``, ``floor`` (at the first check), ``seconds`` and ``stop``: the
        reason to stop, or None.

    Raises:
        SurrogateError: When the surrogate cannot be fitted.
    """
    assert settings.stop is not None
    start, done = time.perf_counter(), len(seen)
    screening = fit_screened(settings.run_surrogate, seen, space)
    found = expected_gain(
        screening.model,
        screening.kept,
        space,
        Scale.of(screening.kept, space, settings.reference, settings.requirements.constraints),
        settings.stop.criterion,
        guarded=settings.guard,
        generator=child(generator, "stop", done),
        further=0 if before else settings.search - done,
        feasibility=settings.requirements.given(seen, space, screening.model),
    )
    return {
        "evaluations": done,
        "gain": found.gain,
        "floor": found.floor,
        "seconds": time.perf_counter() - start,
        "stop": settings.stop.reason([*(one["gain"] for one in before), found.gain]),
    }


def _regret(mean: Tensor, values: Tensor, weights: Tensor) -> float:
    choice = (mean @ weights.mT).argmax(0)  # w
    utility = values @ weights.mT  # s x q x w
    attained = utility[:, choice, torch.arange(len(weights))]
    return float((utility.amax(1) - attained).mean())


def _missing_volume(mean: Tensor, values: Tensor, *, generator: Generator) -> float:
    own = volumes(values, generator=child(generator, "same"))
    have = volumes(values[:, non_dominated(mean)], generator=child(generator, "same"))
    base = float(have.mean())
    # Where nothing beats the reference yet, everything is still to be gained.
    return float((own - have).mean()) / base if base > 0 else 1.0


def _conditioned(joint: JointPosterior, rows: Tensor, noise: Tensor) -> JointPosterior:
    """Return ``joint`` after unbiased evaluations at ``rows`` with variances ``noise`` (``m``)."""
    C = joint.covariance
    cross = C[:, rows]  # m x r x q
    size = C.diagonal(dim1=-1, dim2=-2).mean(-1)
    noise = noise + 1e-8 * size + 1e-300
    inner = cross[:, :, rows] + torch.diag_embed(noise.unsqueeze(-1).expand(-1, len(rows)))
    less = cross.mT @ torch.linalg.solve(inner, cross)
    return replace(joint, covariance=cast(Tensor, C - (less + less.mT) / 2))
