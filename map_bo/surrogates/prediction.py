"""From a surrogate's posterior on the link scale to metrics in their own units."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from botorch.acquisition.multi_objective.objective import GenericMCMultiOutputObjective
from torch import Tensor

from map_bo.data import to_maximisation
from map_bo.surrogates.links import from_link
from map_bo.surrogates.surrogate import SurrogateModel
from map_bo.surrogates.validation import LeavesOneOut

__all__ = [
    "NORMAL_975",
    "Prediction",
    "holding_probability",
    "objective",
    "observation_variance",
    "predict",
    "predicted_mean",
    "quantile",
]

_ROWS = 128  # rows a joint posterior is asked for at once: its covariance has rows^2 entries
_NODES = 20  # Gauss-Hermite nodes; exact to 1e-6 for a sigmoid of a Gaussian with sd below 2
NORMAL_975 = 1.959963984540054


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


def predict(model: SurrogateModel, X: Tensor) -> Prediction:
    """Return the predicted metrics with their uncertainty at ``X`` (``n x d``)."""
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
    half = NORMAL_975 * total.sqrt()
    return Prediction(
        mean=from_link(mean, links),
        std=_transformed_std(mean, deviation, lambda F: from_link(F, links)),
        lower=from_link(mean - half, links),
        upper=from_link(mean + half, links),
    )


def quantile(model: SurrogateModel, X: Tensor, z: float) -> Tensor:
    """Return a quantile of what would be measured at ``X``, ``n x m`` in own units.

    Args:
        model: The surrogate.
        X: ``n x d`` points; differentiable in them.
        z: The standard normal quantile, such as -1.28 for the 10 % quantile.
    """
    mean, deviation = _measurement(model, X)
    return from_link(mean + z * deviation, model.links)


def holding_probability(
    model: SurrogateModel,
    X: Tensor,
    *,
    at_least: Mapping[str, float] | None = None,
    at_most: Mapping[str, float] | None = None,
) -> Tensor:
    """Return the probability that bounds hold when the points are measured (``n``).

    Metrics are independent given the data, as the surrogate models them, so the probability that
    all bounds hold is the product over the metrics. Without bounds it is 1.

    Args:
        model: The surrogate.
        X: ``n x d`` points.
        at_least: Lower bounds by metric name, own units.
        at_most: Upper bounds by metric name, own units.
    """
    X = torch.as_tensor(X, dtype=torch.float64)
    result = torch.ones(len(X), dtype=torch.float64)
    with torch.no_grad():
        parts = [_measurement(model, X[i : i + _ROWS]) for i in range(0, len(X), _ROWS)]
        if not parts:
            return result
        mean, deviation = (torch.cat(part) for part in zip(*parts, strict=True))
        for j, (metric, link) in enumerate(zip(model.metrics, model.links, strict=True)):
            low, high = (at_least or {}).get(metric.name), (at_most or {}).get(metric.name)
            # A bound that no value can break; a link would move it inside.
            low = None if low is None or low <= _or(metric.lower, -math.inf) else low
            high = None if high is None or high >= _or(metric.upper, math.inf) else high
            below, above = (
                torch.full_like(mean[:, j], side * math.inf)
                if bound is None
                else link.forward(torch.tensor(bound, dtype=torch.float64)) - mean[:, j]
                for bound, side in ((low, -1), (high, 1))
            )
            result = result * _between(below, above, deviation[:, j])
    return result


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def _between(low: Tensor, high: Tensor, deviation: Tensor) -> Tensor:
    """Return the probability that a centred normal lies in ``[low, high]``; exact where sd is 0."""
    sure = ((low <= 0) & (high >= 0)).double()
    unit = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    likely = torch.special.ndtr(high / unit) - torch.special.ndtr(low / unit)
    return torch.where(deviation > 0, likely.clamp_min(0.0), sure)


def _measurement(model: SurrogateModel, X: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of a measurement at ``X``, link scale, ``n x m``."""
    posterior = model.gaussian(X)
    noise = torch.maximum(model.misfit_variance(), observation_variance(model))
    total = posterior.variance.clamp_min(0.0) + noise
    return posterior.mean, total.clamp_min(1e-300).sqrt()


def observation_variance(model: SurrogateModel) -> Tensor:
    """Return the typical variance of an observation about the latent metric, misfit included.

    ``m`` values on the link scale: the median over what the model was fitted to; 0 for a model
    that does not tell (:class:`LeavesOneOut` does).
    """
    if not isinstance(model, LeavesOneOut):
        return torch.zeros(len(model.metrics), dtype=torch.float64)
    return model.training_targets()[1].nanmedian(0).values


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
