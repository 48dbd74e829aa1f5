"""From a surrogate's posterior on the link scale to metrics in their own units."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from botorch.acquisition.multi_objective.objective import GenericMCMultiOutputObjective
from torch import Tensor

from map_bo.data import Observations, to_maximisation
from map_bo.surrogates.links import bound_distances, from_link
from map_bo.surrogates.surrogate import SurrogateModel
from map_bo.surrogates.validation import LeavesOneOut

__all__ = [
    "Prediction",
    "objective",
    "observation_variance",
    "predict",
    "predicted_mean",
]

_ROWS = 128  # rows a joint posterior is asked for at once: its covariance has rows^2 entries
_NODES = 20  # Gauss-Hermite nodes; exact to 1e-6 for a sigmoid of a Gaussian with sd below 2
_NORMAL_975 = 1.959963984540054


@dataclass(frozen=True, eq=False)
class Prediction:
    """Predicted metrics at ``n`` points, ``n x m``, own units and directions.

    What the model knows that it cannot say (:meth:`SurrogateModel.misfit_variance`) is included.

    Attributes:
        mean: Inverse link of the posterior mean, which is the posterior median.
        std: Standard deviation of the metric under the posterior, measurement noise excluded.
        lower: Lower end of the 95 % interval of what would be measured: the typical noise of the
            observations is included, as far as it differs between evaluations (see
            :mod:`map_bo.surrogates.links`). Without it, intervals cover too little.
        upper: Upper end.
    """

    mean: Tensor
    std: Tensor
    lower: Tensor
    upper: Tensor


def predict(model: SurrogateModel, X: Tensor, seen: Observations | None = None) -> Prediction:
    """Return the predicted metrics with their uncertainty at ``X`` (``n x d``).

    Args:
        model: The fitted surrogate.
        X: Coefficients.
        seen: What it was fitted to. A link never reaches a bound, but measurements do: an end of
            an interval that they do not tell from a bound is put there.
    """
    X = torch.as_tensor(X, dtype=torch.float64)
    m = len(model.metrics)
    mean, variance = X.new_zeros(len(X), m), X.new_zeros(len(X), m)
    with torch.no_grad():
        for start in range(0, len(X), _ROWS):
            rows = slice(start, start + _ROWS)
            posterior = model.gaussian(X[rows])
            mean[rows] = posterior.mean
            variance[rows] = posterior.variance.clamp_min(0.0)
    misfit = model.misfit_variance()
    total = variance + torch.maximum(misfit, observation_variance(model))
    variance = variance + misfit
    deviation = variance.sqrt()
    links = model.links
    half = _NORMAL_975 * total.sqrt()
    lower, upper = from_link(mean - half, links), from_link(mean + half, links)
    if seen is not None:
        lower, upper = _to_bounds(lower, upper, seen)
    return Prediction(
        mean=from_link(mean, links),
        std=_transformed_std(mean, deviation, lambda F: from_link(F, links)),
        lower=lower,
        upper=upper,
    )


def _to_bounds(lower: Tensor, upper: Tensor, seen: Observations) -> tuple[Tensor, Tensor]:
    ends = [
        (-math.inf if m.lower is None else m.lower, math.inf if m.upper is None else m.upper)
        for m in seen.metrics
    ]
    low, high = torch.tensor(ends, dtype=torch.float64).T
    near_low, near_high = bound_distances(seen)
    return (
        torch.where(lower - low <= near_low, low, lower),
        torch.where(high - upper <= near_high, high, upper),
    )


def observation_variance(model: SurrogateModel) -> Tensor:
    """Return the typical variance of an observation about the latent metric, misfit included.

    ``m`` values on the link scale: the median over what the model was fitted to; 0 for a model
    that does not tell (:class:`LeavesOneOut` does).
    """
    if not isinstance(model, LeavesOneOut):
        return torch.zeros(len(model.metrics), dtype=torch.float64)
    return model.training_targets()[1].median(0).values


def _transformed_std(
    mean: Tensor, deviation: Tensor, inverse: Callable[[Tensor], Tensor]
) -> Tensor:
    # E[g(f)] and Var[g(f)] for f ~ N(mean, deviation^2) by Gauss-Hermite quadrature; the
    # variance is taken about the mean, so that a nearly exact prediction does not cancel.
    nodes, weights = np.polynomial.hermite.hermgauss(_NODES)
    steps = torch.as_tensor(nodes, dtype=mean.dtype) * math.sqrt(2)
    share = torch.as_tensor(weights, dtype=mean.dtype) / math.sqrt(math.pi)
    values = inverse(mean + deviation * steps.view(-1, *[1] * mean.dim()))
    share = share.view(-1, *[1] * mean.dim())
    centre = (share * values).sum(0)
    return (share * (values - centre).square()).sum(0).sqrt()


def predicted_mean(model: SurrogateModel) -> Callable[[Tensor], Tensor]:
    """Return the function that a front solver maximises.

    It maps ``n x d`` coefficients to ``n x m`` predicted metrics, turned so that larger is
    better in every column, and is differentiable.
    """

    def mean(X: Tensor) -> Tensor:
        return to_maximisation(from_link(model.link_mean(X), model.links), model.metrics)

    return mean


def objective(model: SurrogateModel) -> GenericMCMultiOutputObjective:
    """Return the objective for botorch's acquisition functions.

    It takes posterior samples (``... x n x m``, link scale) to metric values turned so that
    larger is better in every column; a reference point has to be turned the same way.
    """
    links, metrics = model.links, model.metrics

    def transform(samples: Tensor, X: Tensor | None = None) -> Tensor:
        return to_maximisation(from_link(samples, links), metrics)

    return GenericMCMultiOutputObjective(transform)
