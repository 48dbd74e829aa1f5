"""What a point gains over the uniform blend, by the posterior: the ground of the default choice.

The uniform blend costs no search, so another point has to be worth its place. What the surrogate
promises is not enough. Early in a run it rests on hardly more than base, experts and blend, and
where these do not conflict, it is sure that going on in the same direction gains more: after six
evaluations of a plateau it was, with a probability above .99 each time, and it was wrong.

So a promise counts for no more than the best that was measured, metric by metric, and that for no
more than the blend where it exceeds the blend by less than the best of so many measurements does by
noise alone. What can be gained is then large where the blend lies far below the experts, and
nothing on a plateau. Another point is chosen where the median of what is left is a gain.

The rule was settled on cases of its own (``benchmarks.quality.plateau_choice.SETTLED``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from map_bo.data import Observations, to_maximisation
from map_bo.loop.posterior.joint_posterior import JointPosterior, real_draws
from map_bo.pareto.preferences import Preference, utility
from map_bo.rng import child
from map_bo.scale import Scale, anchor_rows
from map_bo.space import CoefficientSpace
from map_bo.surrogates.links import as_fitted
from map_bo.surrogates.surrogate import SurrogateModel
from map_bo.surrogates.validation import LeavesOneOut, fitted_rows

__all__ = [
    "PosteriorGain",
    "joint_draws",
    "measured_blend",
    "most_counted",
    "posterior_gain",
    "value_draws",
]

_ROUNDING = 1e-9  # of the experts' range: a gain below it is none
DRAWS = 1024


@dataclass(frozen=True)
class PosteriorGain:
    """The posterior of what a point gains over the blend, in units of the scale.

    Attributes:
        median: Median gain; 1 is the distance from the reference point to the best expert.
        lower: Lower end of its 95 % interval.
        upper: Upper end.
    """

    median: float
    lower: float
    upper: float

    @property
    def counts(self) -> bool:
        """Whether it is a gain more likely than not."""
        return self.median > _ROUNDING

    def __str__(self) -> str:
        """Return it in words."""
        return f"{self.median:+.3f} [{self.lower:+.3f}, {self.upper:+.3f}] of the experts' range"

    def describe(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "median": self.median,
            "lower": self.lower,
            "upper": self.upper,
        }


def measured_blend(seen: Observations, space: CoefficientSpace) -> int | None:
    """Return the row of the uniform blend among evaluations; None where it has not all metrics.

    Of a space with several options it is the blend of the default one, where that was measured.
    """
    if not len(seen):
        return None
    kinds = space.anchors().kinds
    for kind, rows in zip(kinds, anchor_rows(seen.X, space) & seen.ok, strict=True):
        if kind == "blend" and bool(rows.any()):
            return int(rows.nonzero()[-1])
    return None


def value_draws(mean: Tensor, std: Tensor, *, count: int = DRAWS, generator: Generator) -> Tensor:
    """Return independent draws of metrics, ``count x k x m``, where there is no surrogate.

    Args:
        mean: ``k x m`` predicted or measured metrics, own units.
        std: ``k x m`` standard deviations; NaN counts as 0.
        count: How many draws.
        generator: Source of all randomness.
    """
    normal = torch.randn(count, *mean.shape, generator=generator, dtype=torch.float64)
    return mean + std.nan_to_num(0.0) * normal


def joint_draws(
    model: SurrogateModel,
    X: Tensor,
    seen: Observations,
    space: CoefficientSpace,
    *,
    count: int = DRAWS,
    generator: Generator,
) -> Tensor:
    """Return joint draws of the real metrics at ``X`` (``k x d``), ``count x k x m``, own units.

    Args:
        model: The fitted surrogate.
        X: Points.
        seen: What it was fitted to, outliers taken back.
        space: The coefficients.
        count: How many draws.
        generator: Source of all randomness.
    """
    evaluated = fitted_rows(model, seen).X
    if isinstance(model, LeavesOneOut) and len(model.training_targets()[0]) != len(evaluated):
        # Fitted to other rows than these, whose misfit is then not known.
        joint = JointPosterior.of(model, X)
        F = joint.draw(count, generator=child(generator, "function"))
        normal = torch.randn(F.shape, generator=child(generator, "misfit"), dtype=torch.float64)
        values = joint.gains(F + model.misfit_variance().sqrt() * normal)
    else:
        values, _ = real_draws(model, X, evaluated, space, count=count, generator=generator)
    return to_maximisation(values, model.metrics)


def posterior_gain(
    values: Tensor, seen: Observations, blend: int, preference: Preference, scale: Scale
) -> PosteriorGain:
    """Return what a point gains over the measured blend for a preference.

    Args:
        values: ``count x m`` draws of the point's metrics, own units; see :func:`joint_draws`.
        seen: Everything that was measured.
        blend: Row of the blend in it.
        preference: Weights and rule.
        scale: The scale of the metrics.
    """
    metrics = scale.metrics
    least = torch.minimum(to_maximisation(values, metrics), most_counted(seen, blend))
    blended = utility(seen.Y[blend : blend + 1], preference, scale)
    gains = utility(to_maximisation(least, metrics), preference, scale) - blended
    low, middle, high = gains.quantile(gains.new_tensor([0.025, 0.5, 0.975])).tolist()
    return PosteriorGain(middle, low, high)


def most_counted(seen: Observations, blend: int) -> Tensor:
    """Return the most that a prediction may count for, ``m``, larger is better.

    It is the best measured value less what the best of ``K`` measurements exceeds the blend's by
    where nothing differs: about the ``K / (K + 1)`` quantile of the normal, and at least one
    standard error of a difference. It is not below the blend.
    """
    upward = to_maximisation(seen.Y, seen.metrics).masked_fill(~seen.measured, -math.inf)
    others = (seen.measured.sum(0) - 1).clamp_min(1).double()
    errors = torch.special.ndtri(others / (others + 1)).clamp_min(1.0)
    fitted, rows = as_fitted(seen), seen.measured.any(-1)
    at = int(rows[:blend].sum())
    noise = 2 * fitted.Yvar[at].expand(len(fitted), -1)
    if fitted.covariance is not None:  # what two rows have in common cancels
        shared = fitted.covariance[:, at].mT
        noise = fitted.Yvar + fitted.Yvar[at] - 2 * shared
    best: Tensor = upward[rows] - errors * noise.nan_to_num(0.0).clamp_min(0.0).sqrt()
    return torch.maximum(best.amax(0), upward[blend])
