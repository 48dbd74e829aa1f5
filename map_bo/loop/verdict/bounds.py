"""Whether the bounds of a preference hold when a merge is measured."""

from __future__ import annotations

from dataclasses import replace
from statistics import NormalDist

import torch
from torch import Tensor

from map_bo.data import Metric, to_maximisation
from map_bo.pareto.preferences import Preference, shortfall
from map_bo.surrogates.prediction import (
    NORMAL_975,
    holding_probability,
    predicted_mean,
    quantile,
)
from map_bo.surrogates.surrogate import SurrogateModel

__all__ = ["holding", "holding_by_interval", "missed_bounds"]


def holding(model: SurrogateModel, X: Tensor, preference: Preference) -> Tensor:
    """Return the probability that all bounds hold when points (``n x d``) are measured (``n``)."""
    return holding_probability(model, X, at_least=preference.at_least, at_most=preference.at_most)


def holding_by_interval(
    mean: Tensor, lower: Tensor, upper: Tensor, preference: Preference, metrics: tuple[Metric, ...]
) -> Tensor:
    """Return :func:`holding` from recorded 95 % intervals, without the surrogate (``k``).

    Each metric is a normal of its own width on either side of its median.
    """
    names, result = [metric.name for metric in metrics], torch.ones(len(mean)).double()
    for bounds, side in ((preference.at_least, 1.0), (preference.at_most, -1.0)):
        for name, bound in bounds.items():
            j = names.index(name)
            inside = side * (mean[:, j] - bound)  # how far inside the bound
            towards, away = mean[:, j] - lower[:, j], upper[:, j] - mean[:, j]
            if side < 0:
                towards, away = away, towards
            width = torch.where(inside >= 0, towards, away) / NORMAL_975
            sure = (inside >= 0).double()
            likely = torch.special.ndtr(inside / torch.where(width > 0, width, 1.0))
            result = result * torch.where(width > 0, likely, sure)
    return result


def missed_bounds(
    model: SurrogateModel, X: Tensor, preference: Preference, width: Tensor
) -> Tensor:
    """Return by how much ``X`` misses the bounds at the confidence wanted (``n``, 0 for none).

    Several bounds are met together when each is met with their share of the confidence.
    """
    if not preference.bounded:
        return X.new_zeros(len(X))
    if preference.confidence is None:
        values = to_maximisation(predicted_mean(model)(X), model.metrics)
        return shortfall(values, model.metrics, preference, width=width)
    count = len(preference.at_least) + len(preference.at_most)
    z = NormalDist().inv_cdf(preference.confidence ** (1 / count))
    low, high = quantile(model, X, -z), quantile(model, X, z)
    least, most = replace(preference, at_most={}), replace(preference, at_least={})
    return shortfall(low, model.metrics, least, width=width) + shortfall(
        high, model.metrics, most, width=width
    )
