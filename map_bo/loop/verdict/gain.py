"""What a point gains over the uniform blend, by the posterior: the ground of the default choice.

The uniform blend costs no search. Another point is worth its place only if it is better beyond
doubt, so a choice is the blend unless the posterior probability that the other is better reaches
:data:`SURE`. Both ends of the difference are drawn together: what the surrogate does not know of
the function is common to near points and cancels, and at the blend, which every run measures, the
surrogate's misfit has been seen (:func:`map_bo.loop.posterior.joint_posterior.real_draws`).
"""

from __future__ import annotations

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
from map_bo.surrogates.surrogate import SurrogateModel
from map_bo.surrogates.validation import LeavesOneOut, fitted_rows

__all__ = [
    "SURE",
    "PosteriorGain",
    "joint_draws",
    "measured_blend",
    "posterior_gain",
    "value_draws",
]

SURE = 0.9
"""Probability of being better from which another point is chosen instead of the blend."""

DRAWS = 1024


@dataclass(frozen=True)
class PosteriorGain:
    """The posterior of what a point gains over another, in units of the scale.

    Attributes:
        mean: Expected gain; 1 is the distance from the reference point to the best expert.
        lower: Lower end of its 95 % interval.
        upper: Upper end.
        probability: Probability that it is positive.
    """

    mean: float
    lower: float
    upper: float
    probability: float

    @classmethod
    def of(cls, draws: Tensor) -> PosteriorGain:
        """Return what draws of a gain (``count``) say; draws of 0 count half."""
        low, high = draws.quantile(draws.new_tensor([0.025, 0.975])).tolist()
        better = (draws > 0).double().mean() + (draws == 0).double().mean() / 2
        return cls(float(draws.mean()), low, high, float(better))

    def __str__(self) -> str:
        """Return it in words."""
        return (
            f"{self.mean:+.3f} [{self.lower:+.3f}, {self.upper:+.3f}] of the experts' range, "
            f"positive with probability {self.probability:.2f}"
        )

    def describe(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "mean": self.mean,
            "lower": self.lower,
            "upper": self.upper,
            "probability": self.probability,
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
    values: Tensor, point: int, blend: int, preference: Preference, scale: Scale
) -> PosteriorGain:
    """Return what a point gains over the blend for a preference.

    Args:
        values: ``count x k x m`` joint draws, own units; see :func:`joint_draws`.
        point: Which of the ``k`` is the point.
        blend: Which of them is the blend.
        preference: Weights and rule.
        scale: The scale of the metrics.
    """
    ours = utility(values[:, point], preference, scale)
    return PosteriorGain.of(ours - utility(values[:, blend], preference, scale))
