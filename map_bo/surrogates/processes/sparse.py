"""The sparse process: for many coefficients, of which few are expected to matter.

A Gaussian process whose inverse squared lengthscales ``rho_i`` have half-Cauchy priors of one
small scale ``tau`` (the sparse axis-aligned subspace prior, SAAS: Eriksson and Jankowiak,
*High-Dimensional Bayesian Optimization with Sparse Axis-Aligned Subspaces*, arXiv 2103.00349,
equations 5-8) leaves out what the data do not ask for and keeps what they do. The paper samples
``tau`` and the rest by Hamiltonian Monte Carlo. Here ``tau`` takes a few fixed values, everything
else is set to its posterior mode for each, and the processes are averaged with weights
proportional to prior times density at the mode. So the fit needs neither chance nor seconds, and
the posterior is still a mixture over how sparse the truth is.

In the logarithm the prior has a closed form that suits a mode search: with ``eta = log rho``,
``p(eta) = 1 / (pi cosh(eta - log tau))``, a bell whose sides fall only exponentially.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
from botorch.acquisition.objective import PosteriorTransform
from botorch.models.model import FantasizeMixin
from botorch.posteriors.posterior import Posterior
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import SurrogateError
from map_bo.space import CoefficientSpace
from map_bo.surrogates.links import Link, links_for
from map_bo.surrogates.processes.gp import GPModel, ProcessPrior, fit_processes
from map_bo.surrogates.processes.marginal import LogPrior
from map_bo.surrogates.quadratic_model import gaussian_posterior, transformed
from map_bo.surrogates.surrogate import SurrogateModel, gaussian, joint_by_metric

__all__ = ["Sparse", "SparseModel"]

_ALPHA = 0.1  # scale of the half-Cauchy prior of tau, as in the paper's experiments
_NEGLIGIBLE = 1e-3  # weight below which a process is left out of the mixture
_LENGTHS = (math.log(0.02), math.log(1e4))  # where the search for a log lengthscale stays


@dataclass(frozen=True, eq=False)
class _HalfCauchyPrior(LogPrior):
    """A log prior whose last ``d`` entries, the log lengthscales, have the SAAS prior.

    Attributes:
        log_tau: Logarithm of the global shrinkage.
        d: Number of lengthscales.
    """

    log_tau: float
    d: int

    def cost(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the negative log density of ``theta`` (``p``) and its gradient (``p``)."""
        rest = LogPrior(self.mean[: -self.d], self.spread[: -self.d])
        value, slope = rest.cost(theta[: -self.d])
        # eta = -2 log l, so that d eta = 2 |d log l|.
        away = -2 * theta[-self.d :] - self.log_tau
        size = away.abs()
        bell = size + torch.log1p((-2 * size).exp())  # log(2 cosh(away)), without overflow
        value = value + bell.sum() + self.d * (math.log(math.pi) - 2 * math.log(2))
        return value, torch.cat([slope, -2 * away.tanh()])

    def bounds(self) -> list[tuple[float, float]]:
        """Return where a search may go."""
        return super().bounds()[: -self.d] + [_LENGTHS] * self.d


@dataclass(frozen=True)
class _SparseProcess(ProcessPrior):
    """Priors of the process at one global shrinkage.

    Attributes:
        tau: The shrinkage.
    """

    tau: float = _ALPHA

    def on(self, d: int, *, known_noise: bool) -> LogPrior:
        """Return the prior in ``d`` dimensions."""
        plain = super().on(d, known_noise=known_noise)
        plain.mean[-d:] = -0.5 * math.log(self.tau)
        return _HalfCauchyPrior(plain.mean, plain.spread, math.log(self.tau), d)

    def starts(self, prior: LogPrior, d: int) -> Tensor:
        """Return where to start (``2 x p``): nothing matters yet, and everything a little."""
        lively = prior.mean.clone()
        lively[2:3] = math.log(0.5)
        lively[-d:] = math.log(0.5 * math.sqrt(d))
        return torch.stack([prior.mean, lively])


class SparseModel(SurrogateModel, FantasizeMixin):
    """A mixture of processes for each metric, summed up by its first two moments.

    The posterior is the Gaussian with the mixture's mean and covariance: where the processes
    disagree, their disagreement is part of the uncertainty.

    Args:
        processes: All processes of all metrics, as one model with an output each.
        weights: ``m x P``; row ``j`` holds the weights of the processes of metric ``j``, zero
            for those of others, and sums to 1.
    """

    weights: Tensor

    def __init__(self, processes: GPModel, weights: Tensor) -> None:
        super().__init__()
        self.processes = processes
        self.register_buffer("weights", weights)
        first = [int(row.nonzero()[0]) for row in weights]
        self.metrics: tuple[Metric, ...] = tuple(processes.metrics[p] for p in first)
        self.links: tuple[Link, ...] = tuple(processes.links[p] for p in first)
        self._first = first

    @property
    def batch_shape(self) -> torch.Size:
        """Leading dimensions of the posterior; empty unless conditioned on batches."""
        return self.processes.processes[0].batch_shape

    @property
    def likelihood(self) -> None:
        """There is no common gpytorch likelihood; botorch only asks whether there is one."""
        return None

    def _members(self, j: int) -> list[int]:
        return [int(p) for p in self.weights[j].nonzero().flatten()]

    def _mixed(self, values: Tensor) -> Tensor:
        mixed = values @ self.weights.mT
        if not bool(values.isnan().any()):
            return mixed
        # What a metric lacks is no other metric's business: 0 times NaN is NaN.
        missing = values[..., self._first].isnan()
        return (values.nan_to_num(nan=0.0) @ self.weights.mT).masked_fill(missing, torch.nan)

    def link_mean(self, X: Tensor) -> Tensor:
        """Return the posterior mean on the link scale, ``n x m`` for ``n x d``."""
        return self._mixed(self.processes.link_mean(X))

    def posterior(  # type: ignore[override]  # the mixin's own signature is not Model's
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: PosteriorTransform | None = None,
    ) -> Posterior:
        """Return the joint Gaussian posterior at ``X`` (``... x q x d``) on the link scale.

        Args:
            X: Coefficients.
            output_indices: Which metrics; all by default.
            observation_noise: Add the mean noise of the training data, or the given variances
                (``... x q x m`` or ``... x 1 x m``, link scale).
            posterior_transform: Applied to the result.
        """
        if output_indices is not None:
            part = self.for_metrics(output_indices)
            return part.posterior(X, None, observation_noise, posterior_transform)
        means, covariances = [], []
        for j in range(self.num_outputs):
            mean, covariance = self._moments(X, j)
            if observation_noise is not False:
                noise = (
                    observation_noise[..., j]
                    if isinstance(observation_noise, Tensor)
                    else self._noise()[..., j].nanmean(-1, keepdim=True)
                )
                covariance = covariance + torch.diag_embed(noise.expand(mean.shape))
            means.append(mean)
            covariances.append(covariance)
        joint = gaussian_posterior(torch.stack(means, -2), torch.stack(covariances, -3))
        return transformed(joint, X, posterior_transform)

    def _moments(self, X: Tensor, j: int) -> tuple[Tensor, Tensor]:
        members = self._members(j)
        weights = self.weights[j, members]
        found = [gaussian(self.processes.processes[p].posterior(X)).distribution for p in members]
        means = torch.stack([each.mean for each in found], -1)
        mean = means @ weights
        covariance = sum(
            weight * each.covariance_matrix for weight, each in zip(weights, found, strict=True)
        )
        apart = (means - mean.unsqueeze(-1)) * weights.sqrt()
        return mean, covariance + apart @ apart.mT

    def _noise(self) -> Tensor:
        return self._mixed(
            torch.stack(
                [one.at_all_rows(one.likelihood.noise) for one in self.processes.processes], -1
            )
        )

    def for_metrics(self, columns: Sequence[int]) -> SparseModel:
        """Return the model of some metrics alone."""
        members = [self._members(j) for j in columns]
        kept = [p for held in members for p in held]
        weights = torch.zeros(len(columns), len(kept), dtype=self.weights.dtype)
        place = 0
        for row, (j, held) in enumerate(zip(columns, members, strict=True)):
            weights[row, place : place + len(held)] = self.weights[j, held]
            place += len(held)
        return SparseModel(self.processes.for_metrics(kept), weights)

    def joint(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean (``q x m``) and covariance (``m x q x q``) of each metric at ``X``."""
        return joint_by_metric([self.one_metric(j) for j in range(self.num_outputs)], X)

    def condition_on_observations(
        self, X: Tensor, Y: Tensor, noise: Tensor | None = None, **kwargs: Any
    ) -> SparseModel:
        """Return the model that has also seen ``Y`` at ``X``, modes and weights held.

        Args:
            X: ``... x n' x d`` coefficients.
            Y: ``... x n' x m`` values on the link scale.
            noise: ``... x n' x m`` variances of ``Y``; by default the mean of the fit's.
            **kwargs: Passed on to gpytorch.
        """
        owner = (self.weights > 0).int().argmax(0)
        own = None if noise is None else noise[..., owner]
        more = self.processes.condition_on_observations(X, Y[..., owner], noise=own, **kwargs)
        return SparseModel(more, self.weights)

    def leave_one_out(self) -> tuple[Tensor, Tensor]:
        """Return mean and variance of each latent value without its own row, ``n x m`` each.

        Link scale; moments of the mixture. Modes and weights are held, noise and nugget are not
        in the variance.
        """
        means, variances = self.processes.leave_one_out()
        mean = self._mixed(means)
        return mean, (self._mixed(variances + means.square()) - mean.square()).clamp_min(0.0)

    def training_targets(self) -> tuple[Tensor, Tensor]:
        """Return the targets and their total noise variance, ``n x m`` each, link scale."""
        targets, _ = self.processes.training_targets()
        return targets[:, self._first], self._noise()

    def noise_covariance(self) -> Tensor | None:
        """Return that of the rows, ``m x n x n``; None where it is independent.

        Processes of a mixture differ in their nuggets alone; the mean of these is on the diagonal.
        """
        every = self.processes.noise_covariance()
        return None if every is None else self._mixed(every.movedim(0, -1)).movedim(-1, 0)

    def misfit_variance(self) -> Tensor:
        """Return the fitted variance on top of known noise (``m``, link scale), else 0."""
        return self._mixed(self.processes.misfit_variance())

    def shrinkage(self) -> Tensor:
        """Return the inverse squared lengthscales, averaged over the mixture, ``m x d``.

        In units of the box that the inputs were scaled by: near 0 for a coefficient that does
        not matter to a metric.
        """
        scales = [
            cast(Tensor, process.covar_module.lengthscales).square().reciprocal()
            for process in self.processes.processes
        ]
        return self.weights @ torch.stack(scales)


@dataclass(frozen=True)
class Sparse:
    """Settings of the sparse process, for many coefficients of which few matter.

    A covariance of the evaluations' noise enters as it does in the
    :class:`~map_bo.surrogates.processes.gp.GP`.

    Attributes:
        link: ``"auto"`` (logit, log, identity by the metric's kind) or ``"identity"``.
        importance: Power of the space's importances that inputs are scaled by, see
            :meth:`~map_bo.space.CoefficientSpace.stretched`.
        taus: Global shrinkages that are averaged over; small ones leave almost everything out.
    """

    link: Literal["auto", "identity"] = "auto"
    importance: float = 0.5
    taus: Sequence[float] = field(default=(1.0, 0.1, 0.01, 0.001))
    leaves_one_out: ClassVar[bool] = True
    takes_partial_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        links_for((), kind=self.link)
        object.__setattr__(self, "taus", tuple(float(tau) for tau in self.taus))
        if not self.taus or not all(0 < tau < math.inf for tau in self.taus):
            raise SurrogateError(
                f"the global shrinkages are {list(self.taus)}", hint="give positive numbers"
            )

    def fit(self, seen: Observations, space: CoefficientSpace) -> SparseModel:
        """Fit to the evaluations that succeeded (two or more).

        Raises:
            SurrogateError: When fewer than two succeeded.
        """
        space = space.stretched(self.importance)
        models = [
            fit_processes(seen, space, link=self.link, prior=_process(tau)) for tau in self.taus
        ]
        # Half-Cauchy prior of tau, per unit of its logarithm.
        prior = torch.tensor([-math.log(tau / _ALPHA + _ALPHA / tau) for tau in self.taus])
        kept, owners, shares = [], [], []
        for j in range(len(seen.metrics)):
            cost = torch.tensor([model.processes[j].cost for model in models])
            share = torch.softmax((prior - cost).nan_to_num(nan=-math.inf), 0)
            # No search found a mode at any level: the priors' values count alike.
            share = share.nan_to_num(nan=1 / len(models))
            share = torch.where(share < _NEGLIGIBLE, 0.0, share)
            for model, weight in zip(models, (share / share.sum()).tolist(), strict=True):
                if weight > 0:
                    kept.append(model.processes[j])
                    owners.append(j)
                    shares.append(weight)
        weights = torch.zeros(len(seen.metrics), len(kept), dtype=torch.float64)
        weights[owners, range(len(kept))] = torch.tensor(shares, dtype=torch.float64)
        return SparseModel(GPModel(*kept), weights)


def _process(tau: float) -> _SparseProcess:
    return _SparseProcess(
        trend="constant",
        trend_variance=1.0,
        trend_spread=1.0,
        scale=(0.0, 1.0),
        lengthscale=(0.0, 1.0),
        tau=tau,
    )
