"""Leave-one-out validation: how well a surrogate predicts evaluations that it has not seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from map_bo.data import Observations
from map_bo.errors import SurrogateError
from map_bo.surrogates.surrogate import Surrogate, SurrogateModel

__all__ = [
    "PIT_BINS",
    "LeavesOneOut",
    "NoiseInCommon",
    "PromisesLeaveOneOut",
    "Validation",
    "count_log_densities",
    "fitted_rows",
    "log_densities",
    "noise_covariance",
    "promises_leave_one_out",
    "validate",
]

PIT_BINS = 10
_NORMAL_975 = 1.959963984540054
_NODES = 32  # of the quadrature over a latent logit


@runtime_checkable
class LeavesOneOut(Protocol):
    """A model that can predict each of its training rows from all the others.

    An observation is ``y_i = f_i + e_i``. Where the noise ``e`` has a covariance ``N`` among the
    rows, the others tell something of ``e_i``, and only ``o_i = e_i - E[e_i | e_-i]``, of variance
    ``1 / [N^-1]_ii``, is noise of the row's *own*. It takes the place of the noise: the latent
    value is ``g_i = f_i + E[e_i | e_-i]`` then, so that in all cases the latent mean and the latent
    plus the noise variance are those of the observation given all others, ``y_i - [P y]_i / P_ii``
    and ``1 / P_ii``. With independent noise ``g_i`` is ``f_i`` and ``o_i`` is ``e_i``.
    """

    def leave_one_out(self) -> tuple[Tensor, Tensor]:
        """Return mean and variance of each latent value without its own row.

        ``n x m`` each, link scale; the noise of the row is not in the variance. The rows are
        those that the model was fitted to, in their order; NaN where a metric was not measured.
        """
        ...

    def training_targets(self) -> tuple[Tensor, Tensor]:
        """Return what was fitted and its total noise variance, ``n x m`` each, link scale.

        The noise is the row's own where it has a covariance among the rows. Rows as in
        :meth:`leave_one_out`, and NaN in the same places.
        """
        ...


@runtime_checkable
class PromisesLeaveOneOut(Protocol):
    """Settings of a surrogate that say before any fit whether its models are `LeavesOneOut`."""

    @property
    def leaves_one_out(self) -> bool:
        """Whether every model that ``fit`` returns can leave evaluations out."""
        ...


def promises_leave_one_out(surrogate: Surrogate) -> bool:
    """Return whether the models of a surrogate are known to leave evaluations out."""
    return isinstance(surrogate, PromisesLeaveOneOut) and surrogate.leaves_one_out


@runtime_checkable
class NoiseInCommon(Protocol):
    """A model that may have been fitted to rows whose noise has a covariance."""

    def noise_covariance(self) -> Tensor | None:
        """Return the covariance of the noise of the rows, ``m x n x n``, link scale.

        The misfit is part of it, on the diagonal. Rows as in :meth:`LeavesOneOut.leave_one_out`,
        with NaN where a metric was not measured. None where the noise of all rows is independent.
        """
        ...


def noise_covariance(model: SurrogateModel) -> Tensor | None:
    """Return the covariance of a model's noise among its rows, ``m x n x n``; None without any."""
    return model.noise_covariance() if isinstance(model, NoiseInCommon) else None


def fitted_rows(model: SurrogateModel, seen: Observations) -> Observations:
    """Return the rows of ``seen`` that a model was fitted to, in their order.

    They are those that have any of their metrics, the partial ones included. A surrogate from
    elsewhere that takes whole rows alone, which all may do, was fitted to those that succeeded; the
    number of its rows tells.
    """
    rows = seen.with_any()
    if isinstance(model, LeavesOneOut) and bool(seen.partial.any()):
        whole = seen.succeeded()
        if len(model.training_targets()[0]) == len(whole):
            return whole
    return rows


@dataclass(frozen=True)
class Validation:
    """Leave-one-out results of each metric, all on the link scale.

    The predictive distribution of an evaluation is a normal with the model's mean there without
    that row, and as variance that of the latent value plus that of the observation (known noise
    and fitted nugget).

    Attributes:
        metrics: Names of the ``m`` metrics.
        n: Number of evaluations that were left out, one at a time: all that the model was fitted
            to. Where some lack a metric, that metric's results are about those that have it.
            Shares of so few are coarse: with a true coverage of 95 %, the standard deviation
            of ``coverage`` is ``sqrt(.0475 / n)``, which is .04 for 30 evaluations.
        log_density: Mean log predictive density of an evaluation given all others, in nats.
            Higher is better. Comparable between surrogates only for the same targets, and so
            the same links.
        coverage: Share of evaluations inside their 95 % leave-one-out predictive interval.
        rmse: Root mean squared leave-one-out error.
        pit: For each metric how many evaluations have their probability integral transform, the
            predictive probability of a smaller value, in each tenth of ``[0, 1]``. Level where the
            surrogate is calibrated; high ends mean that it is too sure, a high middle that it
            is not sure enough, a slope that it is biased (Gneiting, Balabdaoui & Raftery,
            *Probabilistic Forecasts, Calibration and Sharpness*, 2007, section 3.1).
    """

    metrics: tuple[str, ...]
    n: int
    log_density: tuple[float, ...]
    coverage: tuple[float, ...]
    rmse: tuple[float, ...]
    pit: tuple[tuple[int, ...], ...]

    def describe(self) -> dict[str, Any]:
        """Return the results as plain data, keyed by metric; ``None`` for what is not finite."""

        def plain(value: float) -> float | None:
            return value if math.isfinite(value) else None

        return {
            "n": self.n,
            "metrics": {
                name: {
                    "log_density": plain(density),
                    "coverage": plain(coverage),
                    "rmse": plain(rmse),
                    "pit": list(pit),
                }
                for name, density, coverage, rmse, pit in zip(
                    self.metrics, self.log_density, self.coverage, self.rmse, self.pit, strict=True
                )
            },
        }


def _predictive(model: SurrogateModel, targets: Tensor | None) -> tuple[Tensor, Tensor]:
    if not isinstance(model, LeavesOneOut):
        raise SurrogateError(
            f"{type(model).__name__} cannot leave evaluations out",
            hint="give it leave_one_out() and training_targets(), or use another surrogate: "
            "quadratic, gp, hybrid, sparse or auto",
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


def count_log_densities(
    model: LeavesOneOut,
    successes: Tensor,
    counts: Tensor,
    misfit: Tensor,
    columns: Sequence[int] = (0,),
) -> Tensor:
    """Return the log probability of each count of successes given all other rows, ``n x k``.

    The latent logit is normal with the leave-one-out mean, and as variance the latent one plus
    the misfit; the number of successes is binomial given it. The integral is by Gauss-Hermite
    quadrature. Surrogates that were fitted to different stand-ins for the counts (empirical
    logits, working responses) are compared on the counts themselves, where a normal density of
    logits would favour those fitted to logits.

    Args:
        model: A fitted model that leaves evaluations out.
        successes: ``n x k`` successes; may be fractional.
        counts: ``n x k`` examples.
        misfit: ``k`` variances of the lack of fit, link scale.
        columns: Which ``k`` metrics of the model these are; their links are logits.
    """
    mean, latent = (value[:, list(columns)] for value in model.leave_one_out())
    nodes, weights = np.polynomial.hermite.hermgauss(_NODES)
    steps = torch.as_tensor(nodes, dtype=mean.dtype).view(-1, 1, 1) * math.sqrt(2)
    share = (torch.as_tensor(weights, dtype=mean.dtype) / math.sqrt(math.pi)).log()
    f = mean + (latent + misfit).clamp_min(0.0).sqrt() * steps
    logs = successes * torch.nn.functional.logsigmoid(f)
    logs = logs + (counts - successes) * torch.nn.functional.logsigmoid(-f)
    choose = counts.add(1).lgamma() - successes.add(1).lgamma()
    choose = choose - (counts - successes + 1).lgamma()
    return choose + (logs + share.view(-1, 1, 1)).logsumexp(0)


def validate(model: SurrogateModel, targets: Tensor | None = None) -> Validation:
    """Return leave-one-out density, coverage, error and PIT of a fitted model.

    Hyperparameters are those fitted with all rows, which flatters every surrogate a little.

    Args:
        model: A fitted model that leaves evaluations out.
        targets: As in :func:`log_densities`.

    Raises:
        SurrogateError: When the model cannot leave evaluations out.
    """
    error, variance = _predictive(model, targets)
    deviation = variance.sqrt()
    below = torch.special.ndtr(error / deviation)
    tenth = (PIT_BINS * below).long().clamp(0, PIT_BINS - 1)
    inside = (error.abs() <= _NORMAL_975 * deviation).to(error)

    def row(values: Tensor) -> tuple[float, ...]:
        return tuple(cast(list[float], values.tolist()))

    if bool(error.isnan().any()):
        return _of_columns(model, error, variance)
    with torch.no_grad():
        return Validation(
            metrics=tuple(metric.name for metric in model.metrics),
            n=len(error),
            log_density=row(log_densities(model, targets).mean(0)),
            coverage=row(inside.mean(0)),
            rmse=row(error.square().mean(0).sqrt()),
            pit=tuple(tuple(column.bincount(minlength=PIT_BINS).tolist()) for column in tenth.T),
        )


def _of_columns(model: SurrogateModel, error: Tensor, variance: Tensor) -> Validation:
    """Return the results of metrics that not all evaluations have."""
    columns = []
    for gap, spread in zip(error.detach().T, variance.detach().T, strict=True):
        there = ~gap.isnan()
        gap, spread = gap[there], spread[there]
        density = -0.5 * (gap.square() / spread + spread.log() + math.log(2 * math.pi))
        inside = (gap.abs() <= _NORMAL_975 * spread.sqrt()).double()
        tenth = PIT_BINS * torch.special.ndtr(gap / spread.sqrt())
        pit = tenth.long().clamp(0, PIT_BINS - 1).bincount(minlength=PIT_BINS)
        results = (density.mean(), inside.mean(), gap.square().mean().sqrt())
        columns.append((*map(float, results), tuple(pit.tolist())))
    density, coverage, rmse, pits = zip(*columns, strict=True)
    return Validation(
        tuple(metric.name for metric in model.metrics), len(error), density, coverage, rmse, pits
    )
