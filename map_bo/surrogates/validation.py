"""Leave-one-out validation: how well a surrogate predicts evaluations that it has not seen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from map_bo.errors import SurrogateError
from map_bo.surrogates.surrogate import SurrogateModel

__all__ = ["LeavesOneOut", "Validation", "log_densities", "validate"]

_NORMAL_975 = 1.959963984540054


@runtime_checkable
class LeavesOneOut(Protocol):
    """A model that can predict each of its training rows from all the others."""

    def leave_one_out(self) -> tuple[Tensor, Tensor]:
        """Return mean and variance of each latent value without its own row.

        ``n x m`` each, link scale; the noise of the row is not in the variance.
        """
        ...

    def training_targets(self) -> tuple[Tensor, Tensor]:
        """Return what was fitted and its total noise variance, ``n x m`` each, link scale."""
        ...


@dataclass(frozen=True)
class Validation:
    """Leave-one-out results, one number a metric, all on the link scale.

    Attributes:
        metrics: Names of the ``m`` metrics.
        n: Number of evaluations.
        log_density: Mean log predictive density of an evaluation given all others, in nats.
            Higher is better. Comparable between surrogates only for the same targets, and so
            the same links.
        coverage: Share of evaluations inside their 95 % leave-one-out predictive interval.
        rmse: Root mean squared leave-one-out error.
    """

    metrics: tuple[str, ...]
    n: int
    log_density: tuple[float, ...]
    coverage: tuple[float, ...]
    rmse: tuple[float, ...]

    def describe(self) -> dict[str, Any]:
        """Return the results as plain data, keyed by metric."""
        return {
            "n": self.n,
            "metrics": {
                name: {"log_density": density, "coverage": coverage, "rmse": rmse}
                for name, density, coverage, rmse in zip(
                    self.metrics, self.log_density, self.coverage, self.rmse, strict=True
                )
            },
        }


def _predictive(model: SurrogateModel, targets: Tensor | None) -> tuple[Tensor, Tensor]:
    if not isinstance(model, LeavesOneOut):
        raise SurrogateError(
            f"{type(model).__name__} cannot leave evaluations out",
            hint="give it leave_one_out() and training_targets(), or use quadratic, gp or hybrid",
        )
    mean, latent = model.leave_one_out()
    own, noise = model.training_targets()
    targets = own if targets is None else targets
    if targets.shape != mean.shape:
        raise SurrogateError(
            f"targets have shape {tuple(targets.shape)}, the model's {tuple(mean.shape)}",
            hint="give the link-scale values of the rows that the model was fitted to",
        )
    return targets - mean, latent + noise


def log_densities(model: SurrogateModel, targets: Tensor | None = None) -> Tensor:
    """Return the log predictive density of each evaluation given all others, ``n x m``.

    The density is that of a normal with the leave-one-out mean, and the latent variance plus the
    variance that the model gives to the observation (known noise and fitted nugget).

    Args:
        model: A fitted model that leaves evaluations out.
        targets: ``n x m`` link-scale values to score; by default what the model was fitted to.
            Surrogates may fit transformed targets (the binomial quadratic fits working
            responses), so a comparison has to pass the same values to all.

    Raises:
        SurrogateError: When the model cannot leave evaluations out.
    """
    error, variance = _predictive(model, targets)
    return -0.5 * (error.square() / variance + variance.log() + math.log(2 * math.pi))


def validate(model: SurrogateModel, targets: Tensor | None = None) -> Validation:
    """Return leave-one-out density, coverage and error of a fitted model.

    Hyperparameters are those fitted with all rows, which flatters every surrogate a little.

    Args:
        model: A fitted model that leaves evaluations out.
        targets: As in :func:`log_densities`.

    Raises:
        SurrogateError: When the model cannot leave evaluations out.
    """
    error, variance = _predictive(model, targets)
    inside = (error.abs() <= _NORMAL_975 * variance.sqrt()).to(error)

    def row(values: Tensor) -> tuple[float, ...]:
        return tuple(cast(list[float], values.tolist()))

    with torch.no_grad():
        return Validation(
            metrics=tuple(metric.name for metric in model.metrics),
            n=len(error),
            log_density=row(log_densities(model, targets).mean(0)),
            coverage=row(inside.mean(0)),
            rmse=row(error.square().mean(0).sqrt()),
        )
