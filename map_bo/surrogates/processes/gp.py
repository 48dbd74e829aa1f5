"""Gaussian processes on the link scale: one for each metric, behind one botorch model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import gpytorch
import torch
from botorch.acquisition.objective import PosteriorTransform
from botorch.models.gp_regression import SingleTaskGP
from botorch.models.model_list_gp_regression import ModelListGP
from botorch.posteriors.posterior import Posterior
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.means import ConstantMean, Mean
from linear_operator import to_linear_operator
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.space import CoefficientSpace
from map_bo.surrogates.features import OptionColumns, inputs
from map_bo.surrogates.gradients import gradient_rows, gradient_scale
from map_bo.surrogates.links import (
    Link,
    as_fitted,
    check_enough,
    links_for,
    observed_on_link,
    target_units,
)
from map_bo.surrogates.processes.correlated_noise import (
    CorrelatedNoiseLikelihood,
    noise_matrix,
)
from map_bo.surrogates.processes.gp_gradients import (
    ConditionedKernel,
    ConditionedMean,
    GradientMean,
    ObservedGradients,
    fit_joint,
)
from map_bo.surrogates.processes.kernels import (
    OptionTrend,
    Trend,
    TrendRBFKernel,
    trend_sizes,
)
from map_bo.surrogates.processes.marginal import (
    ClosedFormMean,
    Fitted,
    Hyperparameters,
    LogPrior,
    fit,
    leave_one_out,
)
from map_bo.surrogates.quadratic import noise_on_link
from map_bo.surrogates.quadratic_model import transformed
from map_bo.surrogates.surrogate import (
    SurrogateModel,
    gaussian,
    joint_by_metric,
    stating_variances,
)

__all__ = ["GP", "GPModel", "MetricGP", "ProcessPrior", "fit_processes"]

# (mean, spread) of the log nugget of standardised targets: unknown noise (botorch's prior), and
# what is left to explain where the noise is known.
_NOISE_PRIOR = (-4.0, 1.0)
_MISFIT_PRIOR = (-7.0, 2.0)
# (mean, spread) of the log lengthscale of the column of an option, which is 0 or 1: two options are
# correlated by exp(-1/2) at its mean.
_OPTION_PRIOR = (0.5 * math.log(2.0), 1.0)
# Added to posterior variances, as a share of the metric's variance: near points of a smooth process
# are so alike that their covariance is not positive definite in float64.
_JITTER = 1e-8


@dataclass(frozen=True)
class ProcessPrior:
    """Priors on the logarithms of a process' hyperparameters, for standardised targets.

    Attributes:
        trend: Features whose weights are integrated out.
        trend_variance: Prior variance that each group of features has in all; a group's
            variance is shared out evenly over its features.
        trend_spread: Standard deviation of its logarithm.
        scale: Mean and standard deviation of the log variance of the squared-exponential part.
        lengthscale: Mean and standard deviation of the log lengthscale in one dimension, as a
            share of the box's width; the mean grows by half the logarithm of the dimension, as
            distances do (Hvarfner et al., *Vanilla Bayesian Optimization Performs Great in High
            Dimensions*, ICML 2024). The columns of options have a prior of their own.
    """

    trend: Trend
    trend_variance: float
    trend_spread: float
    scale: tuple[float, float]
    lengthscale: tuple[float, float]

    def within(self, space: CoefficientSpace) -> ProcessPrior:
        """Return the prior in a space: with a choice, its trend is one of every option."""
        columns = OptionColumns.of(space)
        if columns is None or isinstance(self.trend, OptionTrend):
            return self
        return replace(self, trend=OptionTrend(self.trend, columns))

    def _options(self) -> int:
        return len(self.trend.columns.own) if isinstance(self.trend, OptionTrend) else 0

    def on(self, d: int, *, known_noise: bool) -> LogPrior:
        """Return the prior for ``d`` inputs."""
        sizes, options = trend_sizes(self.trend, d), self._options()
        d -= options
        rows = [
            _MISFIT_PRIOR if known_noise else _NOISE_PRIOR,
            *((math.log(self.trend_variance / size), self.trend_spread) for size in sizes),
            self.scale,
            *[(self.lengthscale[0] + 0.5 * math.log(d), self.lengthscale[1])] * d,
            *[_OPTION_PRIOR] * options,
        ]
        table = torch.tensor(rows, dtype=torch.float64)
        return LogPrior(table[:, 0].clone(), table[:, 1].clone())

    def starts(self, prior: LogPrior, d: int) -> Tensor:
        """Return where to start (``2 x p``): little but the trend, and mostly the RBF."""
        groups, d = len(trend_sizes(self.trend, d)), d - self._options()
        calm, lively = prior.mean.clone(), prior.mean.clone()
        each = self.trend.each if isinstance(self.trend, OptionTrend) else self.trend
        if each == "quadratic":
            calm[1 + groups] = math.log(0.01)
        lively[1 + groups] = math.log(0.5)
        lively[2 + groups : 2 + groups + d] = math.log(0.3 * math.sqrt(d))
        return torch.stack([calm, lively])


class MetricGP(SingleTaskGP):
    """The process of one metric on its link scale; :class:`GPModel` holds one a metric.

    Inputs are scaled by the space's box and outputs by the kernel's variances, so that all
    that botorch passes around (targets, noise) is in the units of the link scale.

    Args:
        X: ``n x d`` coefficients.
        z: ``n`` values on the link scale.
        variance: ``n`` total noise variances, the nugget included, or their covariance ``n x n``.
        kernel: Covariance on the link scale.
        mean: Prior mean.
        metric: The metric.
        link: Its link.
        misfit: Fitted variance on top of known noise; 0 where the noise is unknown.
        jitter: Variance that is added to the posterior's for numerical reasons.
        note: Why the hyperparameters are not the best ones, ``None`` when they are.
        cost: Negative log posterior of the hyperparameters, up to what their priors share.
        gradients: Observed gradients on the link scale, with their total noise variances.
        rows: ``N`` booleans: which of the evaluations have the metric; all by default.
    """

    def __init__(
        self,
        X: Tensor,
        z: Tensor,
        variance: Tensor,
        *,
        kernel: TrendRBFKernel,
        mean: float,
        metric: Metric,
        link: Link,
        misfit: float,
        jitter: float,
        note: str | None,
        cost: float = math.inf,
        gradients: ObservedGradients | None = None,
        rows: Tensor | None = None,
    ) -> None:
        constant: Mean = ConstantMean()
        covariance: Kernel = kernel
        if gradients is None:
            constant.initialize(constant=mean)
        else:
            covariance = ConditionedKernel(kernel, X, gradients)
            constant = ConditionedMean(covariance, mean)
        # gpytorch rounds known noise up to 1e-6, which is for targets of unit variance.
        with gpytorch.settings.min_fixed_noise(double_value=1e-300):
            alone = variance.dim() == 1
            super().__init__(
                X,
                z.unsqueeze(-1),
                variance.unsqueeze(-1) if alone else None,
                likelihood=None if alone else CorrelatedNoiseLikelihood(variance),
                covar_module=covariance,
                mean_module=constant,
                outcome_transform=None,
            )
        self.requires_grad_(False)
        self.metric, self.link = metric, link
        self.misfit, self.jitter, self.note, self.cost = misfit, jitter, note, cost
        self.rows = rows
        self.eval()

    @property
    def noise(self) -> Tensor:
        """Noise of the rows: ``... x n`` variances, or their covariance, ``... x n x n``."""
        likelihood = self.likelihood
        if isinstance(likelihood, CorrelatedNoiseLikelihood):
            return likelihood.matrix
        found: Tensor = likelihood.noise
        return found

    @property
    def has_choice(self) -> bool:
        """Whether it is a process over a space with a choice."""
        kernel = self.covar_module
        return isinstance(kernel, TrendRBFKernel) and kernel.space.choice is not None

    def at_all_rows(self, values: Tensor) -> Tensor:
        """Return values of what it was fitted to with NaN at evaluations without the metric.

        Args:
            values: ``... x n``; those beyond the fit's own belong to further points.
        """
        if self.rows is None or bool(self.rows.all()):
            return values
        more = values.shape[-1] - int(self.rows.sum())
        rows = torch.cat([self.rows, torch.ones(more, dtype=torch.bool)])
        spread = values.new_full((*values.shape[:-1], len(rows)), torch.nan)
        spread[..., rows] = values
        return spread

    def __call__(self, *args: Any, **kwargs: Any) -> MultivariateNormal:
        """Return the prior in training, else the posterior with its jitter."""
        mvn = super().__call__(*args, **kwargs)
        if self.training:
            return mvn
        covariance = mvn.lazy_covariance_matrix.to_dense()
        covariance = covariance + self.jitter * torch.eye(covariance.shape[-1]).to(covariance)
        # As a linear operator: a dense covariance would be factorised at once, needed or not.
        return MultivariateNormal(mvn.mean, to_linear_operator(covariance))


class GPModel(ModelListGP, SurrogateModel):  # type: ignore[misc]
    """Independent Gaussian processes on the link scales, one a metric.

    It is a botorch ``ModelListGP``, so everything that botorch does with one (fantasies, cached
    roots, pathwise sampling) works; on top come the closed forms of :class:`SurrogateModel` and
    of leave-one-out validation.

    Args:
        *processes: One process a metric.
    """

    def __init__(self, *processes: MetricGP) -> None:
        super().__init__(*processes)
        self.metrics = tuple(process.metric for process in processes)
        self.links = tuple(process.link for process in processes)
        self.eval()
        self._mean: Callable[[Tensor], Tensor] | None = None

    @property
    def processes(self) -> tuple[MetricGP, ...]:
        """The process of every metric."""
        return tuple(cast(MetricGP, process) for process in self.models)

    @property
    def notes(self) -> tuple[str | None, ...]:
        """For each metric why its hyperparameters are not the best ones, ``None`` if they are."""
        return tuple(process.note for process in self.processes)

    def link_mean(self, X: Tensor) -> Tensor:
        """Return the posterior mean on the link scale, ``n x m`` for ``n x d``.

        All outputs in one batch of matrix products, from weights that are computed at the first
        call (batches of fantasies go through the posterior).
        """
        if any(process.train_targets.dim() > 1 for process in self.processes):
            return self.gaussian(X).mean
        if self._mean is None:
            parts = [
                (
                    process.covar_module,
                    process.train_inputs[0],
                    process.train_targets,
                    process.noise,
                    process.mean_module.constant,
                )
                for process in self.processes
            ]
            # One batch where it can be one: processes with gradients have as many as they have, and
            # metrics of partial rows as many values as were measured.
            apart = len({len(part[1]) for part in parts}) > 1
            if apart and all(process.has_choice for process in self.processes):
                alone = [ClosedFormMean.of([part]) for part in parts]
                self._mean = lambda X: torch.cat([mean(X) for mean in alone], -1)
            elif apart or any(isinstance(part[0], ConditionedKernel) for part in parts):
                self._mean = GradientMean.stacked(parts)
            else:
                self._mean = ClosedFormMean.of(parts)
        return self._mean(X)

    def posterior(  # type: ignore[override]  # botorch's own classes disagree, too
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: PosteriorTransform | None = None,
    ) -> Posterior:
        """Return botorch's posterior at ``X`` (``... x q x d``), with its variances as they are."""
        found = super().posterior(X, output_indices, observation_noise)
        return transformed(stating_variances(gaussian(found)), X, posterior_transform)

    def leave_one_out(self) -> tuple[Tensor, Tensor]:
        """Return mean and variance of each latent value without its own row, ``n x m`` each.

        Link scale, NaN where a metric was not measured; hyperparameters are held, noise and nugget
        are not in the variance.
        Rasmussen & Williams, 2006, equations 5.10-5.12. Where noise has a covariance, the latent
        value includes what the noise of the other rows tells of the row's own.
        """
        means, variances = [], []
        for process in self.processes:
            noise, kernel = process.likelihood.noise, process.covar_module
            X = process.train_inputs[0]
            residual = process.train_targets - process.mean_module.constant
            if isinstance(kernel, ConditionedKernel):
                mean, variance = kernel.leave_one_out(X, residual, noise)
            else:
                K = kernel(X).to_dense() + noise_matrix(process.noise)
                mean, variance = leave_one_out(K, residual, noise)
            means.append(process.at_all_rows(mean + process.mean_module.constant))
            variances.append(process.at_all_rows(variance + process.jitter))
        return torch.stack(means, -1), torch.stack(variances, -1)

    def training_targets(self) -> tuple[Tensor, Tensor]:
        """Return the targets and their total noise variance, ``n x m`` each, link scale.

        There is NaN where a metric was not measured. Where noise has a covariance, the variance is
        that of a row's own noise, see :class:`~map_bo.surrogates.validation.LeavesOneOut`.
        """
        targets = [process.at_all_rows(process.train_targets) for process in self.processes]
        noise = [process.at_all_rows(process.likelihood.noise) for process in self.processes]
        return torch.stack(targets, -1), torch.stack(noise, -1)

    def noise_covariance(self) -> Tensor | None:
        """Return that of the rows, nugget included, ``m x n x n``; None where it is independent."""
        processes = self.processes
        if not any(isinstance(one.likelihood, CorrelatedNoiseLikelihood) for one in processes):
            return None
        found = [(one, noise_matrix(one.noise)) for one in processes]
        return torch.stack([one.at_all_rows(one.at_all_rows(noise).mT).mT for one, noise in found])

    def misfit_variance(self) -> Tensor:
        """Return the fitted variance on top of known noise (``m``, link scale), else 0."""
        return torch.tensor([process.misfit for process in self.processes], dtype=torch.float64)

    def for_metrics(self, columns: Sequence[int]) -> GPModel:
        """Return the model of some metrics alone."""
        return GPModel(*[self.processes[i] for i in columns])

    def joint(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean (``q x m``) and covariance (``m x q x q``) of each metric at ``X``."""
        return joint_by_metric([self.one_metric(j) for j in range(self.num_outputs)], X)

    def subset_output(self, idcs: list[int]) -> GPModel:
        """Return the model of the given metrics alone; botorch's name for :meth:`for_metrics`."""
        return self.for_metrics(idcs)

    def condition_on_observations(
        self, X: Tensor | list[Tensor], Y: Tensor, noise: Tensor | None = None, **kwargs: Any
    ) -> GPModel:
        """Return the model that has also seen ``Y`` at ``X``, hyperparameters held.

        Args:
            X: ``... x n' x d`` coefficients, or a list of one such tensor a metric.
            Y: ``... x n' x m`` values on the link scale.
            noise: ``... x n' x m`` variances of ``Y``; by default the mean of the fit's.
            **kwargs: Passed on to gpytorch.
        """
        inputs = X if isinstance(X, list) else [X] * len(self.metrics)
        parts = []
        for j, (process, points) in enumerate(zip(self.processes, inputs, strict=True)):
            y = Y[..., j : j + 1]
            if noise is None:
                v = process.likelihood.noise.mean().expand(*points.shape[:-1], 1)
            else:
                v = noise[..., j : j + 1]
            # gpytorch extends the factorisation that a first prediction leaves behind.
            with torch.no_grad():
                process.posterior(points[..., :1, :])
            # gpytorch rounds known noise up to 1e-6, whatever the unit of the metric.
            with gpytorch.settings.min_fixed_noise(double_value=1e-300):
                more = process.condition_on_observations(points, y, noise=v, **kwargs)
            parts.append(cast(MetricGP, more))
        return GPModel(*parts)


@dataclass(frozen=True)
class GP:
    """Settings of the Gaussian process: a constant plus a squared-exponential with ARD.

    Hyperparameters are set to the mode of marginal likelihood times priors (botorch's for the
    lengthscales). The constant has a prior variance and is integrated out. Known noise
    enters as known, and a small fitted variance on top takes up what the process cannot follow;
    unknown noise is fitted. Where the noise of evaluations has a covariance, all of it enters
    (:func:`~map_bo.surrogates.quadratic.noise_on_link`); for metrics with gradients, only its
    diagonal. Observed gradients condition the process too, with noise and a nugget
    of their own (:mod:`map_bo.surrogates.processes.gp_gradients`). All is relative to the spread
    of a metric, so its unit does not matter. In a space with a choice the covariance is multiplied
    by a Hamming kernel over the options, and each has a constant of its own
    (:mod:`map_bo.surrogates.features`).

    Attributes:
        link: ``"auto"`` (logit, log, identity by the metric's kind) or ``"identity"``.
        importance: Power of the space's importances that inputs are scaled by, where the space
            has any, see :meth:`~map_bo.space.CoefficientSpace.stretched`: the lengthscales' prior
            shrinks by it. 0 takes all coefficients to matter alike.
    """

    link: Literal["auto", "identity"] = "auto"
    importance: float = 0.5
    leaves_one_out: ClassVar[bool] = True
    takes_partial_rows: ClassVar[bool] = True
    takes_choice: ClassVar[bool] = True

    def __post_init__(self) -> None:
        links_for((), kind=self.link)

    def fit(self, seen: Observations, space: CoefficientSpace) -> GPModel:
        """Fit to the evaluations that succeeded (two or more).

        Raises:
            SurrogateError: When fewer than two succeeded.
        """
        space = space.stretched(self.importance)
        return fit_processes(seen, space, link=self.link, prior=_GP_PRIOR)


_GP_PRIOR = ProcessPrior(
    trend="constant",
    trend_variance=1.0,
    trend_spread=1.0,
    scale=(0.0, 1.0),
    # The mode of botorch's LogNormal(sqrt 2 + log(d) / 2, sqrt 3) as a normal of the logarithm.
    lengthscale=(math.sqrt(2) - 3, math.sqrt(3)),
)


def fit_processes(
    seen: Observations,
    space: CoefficientSpace,
    *,
    link: Literal["auto", "identity"],
    prior: ProcessPrior,
) -> GPModel:
    """Fit one process a metric under ``prior`` to the evaluations that have it.

    Raises:
        SurrogateError: When fewer than two have it.
    """
    check_enough(seen, "a Gaussian process")
    good = as_fitted(seen)
    patterns = good.patterns()
    if len(patterns) == 1:
        return GPModel(*_processes(good, space, link, prior, None))
    found: dict[int, MetricGP] = {}
    for columns, rows in patterns:
        part = _processes(good.columns(columns, rows), space, link, prior, rows)
        found |= dict(zip(columns, part, strict=True))
    return GPModel(*[found[j] for j in range(len(found))])


def _processes(
    seen: Observations,
    space: CoefficientSpace,
    link: Literal["auto", "identity"],
    prior: ProcessPrior,
    measured: Tensor | None,
) -> list[MetricGP]:
    """Return the processes of metrics that all rows of ``seen`` have.

    Args:
        seen: The evaluations.
        space: The coefficients.
        link: Which links.
        prior: Priors of the processes.
        measured: ``N`` booleans: which of all evaluations those of ``seen`` are; None for all.
    """
    links = links_for(seen.metrics, kind=link)
    Z, variance = observed_on_link(seen, links)
    covariance = noise_on_link(seen, links, space)
    rows = gradient_rows(seen, links, space)
    U, prior = inputs(seen.X, space), prior.within(space)
    processes = []
    for j, (metric, its_link) in enumerate(zip(seen.metrics, links, strict=True)):
        z, v = Z[:, j], variance[:, j]
        known = not bool(v.isnan().any())
        v = v.nan_to_num(nan=0.0)
        shift, unit = z.mean(), z.std()
        gradients = None
        if rows is not None:
            gradients = ObservedGradients.of(rows.gradients[:, j], rows.variance[:, j])
            unit = torch.maximum(unit, gradient_scale(rows)[j])
        unit = target_units(shift, unit, (its_link,))[0]
        at = prior.on(U.shape[-1], known_noise=known)
        starts, squared = prior.starts(at, U.shape[-1]), unit.square()
        values = (z - shift) / unit, v / squared
        if covariance is not None and gradients is None:
            v = covariance[j]
            values = values[0], v / squared
        if gradients is None:
            fitted: Fitted = fit(U, *values, prior.trend, at, starts)
            nugget = misfit = fitted.hyperparameters.nugget * squared
        else:
            fitted, gradient_nugget, misfit = fit_joint(
                U, values, gradients.scaled(unit), prior.trend, at, starts
            )
            gradients = gradients.noisier(gradient_nugget * squared)
            nugget, misfit = fitted.hyperparameters.nugget * squared, misfit * squared
        hyper: Hyperparameters = fitted.hyperparameters
        processes.append(
            MetricGP(
                seen.X,
                z,
                v + nugget if v.dim() == 1 else v + torch.diag(nugget.expand(len(z))),
                kernel=TrendRBFKernel(
                    space,
                    hyper.trend * squared,
                    hyper.scale * squared,
                    hyper.lengthscale,
                    prior.trend,
                ),
                mean=float(shift),
                metric=metric,
                link=its_link,
                misfit=float(misfit) if known else 0.0,
                jitter=_JITTER * float(squared),
                note=fitted.note,
                cost=fitted.cost,
                gradients=gradients,
                rows=measured,
            )
        )
    return processes
