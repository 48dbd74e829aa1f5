"""The model behind the Bayesian quadratic: a botorch model in weight space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from botorch.acquisition.objective import PosteriorTransform
from botorch.models.model import FantasizeMixin
from botorch.posteriors.posterior import Posterior
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from linear_operator import to_linear_operator
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Generator, Tensor

from map_bo.data import Metric
from map_bo.space import CoefficientSpace
from map_bo.surrogates.features import space_features
from map_bo.surrogates.links import Link
from map_bo.surrogates.surrogate import (
    LinkPosterior,
    PointCovariances,
    SampledFunctions,
    SurrogateModel,
    draw_signs,
    joint_by_metric,
    same_state,
)

__all__ = [
    "LinkPosterior",
    "QuadraticFunctions",
    "QuadraticModel",
    "gaussian_posterior",
    "spread_matrix",
    "transformed",
]


def gaussian_posterior(mean: Tensor, covariance: Tensor) -> LinkPosterior:
    """Return the posterior of ``m`` independent outputs.

    Args:
        mean: ``... x m x q``.
        covariance: ``... x m x q x q``; may be singular, as it is when ``q`` exceeds the number
            of features. One part in 1e9 of its mean diagonal is added, so that it can be
            factorised in silence.
    """
    variance = covariance.diagonal(dim1=-1, dim2=-2)
    jitter = 1e-9 * variance.mean(-1)[..., None, None] + 1e-300
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype)
    covariance = covariance + jitter * eye
    shape = torch.broadcast_shapes(  # type: ignore[no-untyped-call]
        mean.shape[:-1], covariance.shape[:-2]
    )
    mean = mean.expand(*shape, mean.shape[-1])
    variance = variance.expand(mean.shape).mT
    covariance = covariance.expand(*shape, *covariance.shape[-2:])
    # gpytorch factorises a dense covariance at once, and raises when it is singular; a linear
    # operator waits until samples are drawn.
    if mean.shape[-2] == 1:
        alone = MultivariateNormal(mean.squeeze(-2), to_linear_operator(covariance.squeeze(-3)))
        return LinkPosterior(alone, variance)
    together = MultitaskMultivariateNormal.from_batch_mvn(
        MultivariateNormal(mean, to_linear_operator(covariance)), task_dim=-1
    )
    return LinkPosterior(together, variance)


def transformed(posterior: Posterior, X: Tensor, transform: PosteriorTransform | None) -> Posterior:
    """Return ``posterior`` after botorch's ``transform``, if there is one."""
    return posterior if transform is None else cast(Posterior, transform(posterior, X=X))


_OF_ROWS = ("_targets", "_target_variance", "_loo_mean", "_loo_variance")


def spread_matrix(matrix: Tensor, rows: Tensor) -> Tensor:
    """Return a matrix among some rows (``n`` booleans) as one among all, NaN at the others."""
    at = rows.nonzero().flatten()
    spread = matrix.new_full((*matrix.shape[:-2], len(rows), len(rows)), torch.nan)
    spread[..., at.unsqueeze(-1), at] = matrix
    return spread


class QuadraticModel(SurrogateModel, FantasizeMixin):
    """Posterior over ``m`` quadratics, exact and Gaussian on the link scale.

    ``posterior`` is that of the quadratics alone. What a quadratic cannot say, the misfit, is
    independent from point to point; it is kept apart (:meth:`misfit_variance`) because no
    acquisition can learn it, and added to the intervals of a prediction.

    Attributes:
        metrics: The ``m`` metrics.
        links: One link per metric.
        space: The space whose box the features are scaled by.
        weights: ``... x m x D`` posterior mean of the coefficients.
        root: ``... x m x D x D``; ``root root'`` is their posterior covariance.
        shift: ``m`` prior mean of the metrics, link scale.
        scale: ``m`` unit in which the targets were standardised, link scale.
        log_variances: ``m x 5`` fitted log nugget and log prior variances of the groups
            (constant, linear, square, cross), in units of the standardised targets; ``m x 9`` in a
            space with a choice, where the deviations of the options have groups of their own.
    """

    def __init__(
        self,
        metrics: tuple[Metric, ...],
        links: tuple[Link, ...],
        space: CoefficientSpace,
        tensors: dict[str, Tensor],
    ) -> None:
        super().__init__()
        self.metrics, self.links, self.space = metrics, links, space
        self._fields = tuple(tensors)
        for name, value in tensors.items():
            self.register_buffer(name, value)

    weights: Tensor
    root: Tensor
    shift: Tensor
    scale: Tensor
    log_variances: Tensor
    _precision: Tensor
    _information: Tensor
    _noise: Tensor
    _misfit: Tensor
    _targets: Tensor
    _target_variance: Tensor
    _loo_mean: Tensor
    _loo_variance: Tensor
    _noise_matrix: Tensor

    @property
    def batch_shape(self) -> torch.Size:
        """Leading dimensions of the posterior; empty unless conditioned on batches."""
        return self.weights.shape[:-2]

    @property
    def likelihood(self) -> None:
        """There is no gpytorch likelihood; botorch only asks whether it is one of its own."""
        return None

    def features(self, X: Tensor) -> Tensor:
        """Return the features of ``X``: ``... x D`` for ``... x d``."""
        return space_features(X, self.space)

    def link_mean(self, X: Tensor) -> Tensor:
        """Return the posterior mean on the link scale, ``n x m`` for ``n x d``."""
        return self.features(X) @ self.weights.mT

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
            observation_noise: Add the median noise of the training data, or the given
                variances (``... x q x m`` or ``... x 1 x m``, link scale).
            posterior_transform: Applied to the result.
        """
        if output_indices is not None:
            part = self.for_metrics(output_indices)
            return part.posterior(X, None, observation_noise, posterior_transform)
        phi = self.features(self.transform_inputs(X)).unsqueeze(-3)
        mean = (phi @ self.weights.unsqueeze(-1)).squeeze(-1)
        half = phi @ self.root
        covariance = half @ half.mT
        if observation_noise is not False:
            noise = (
                observation_noise.mT
                if isinstance(observation_noise, Tensor)
                else self._noise.unsqueeze(-1)
            )
            covariance = covariance + torch.diag_embed(noise.expand(mean.shape))
        return transformed(gaussian_posterior(mean, covariance), X, posterior_transform)

    def for_metrics(self, columns: Sequence[int]) -> QuadraticModel:
        """Return the model of some metrics alone."""
        index = torch.as_tensor(list(columns), dtype=torch.long)
        axis = {"weights": -2, "_information": -2, "root": -3, "_precision": -3}
        tensors = {
            name: getattr(self, name).index_select(axis.get(name, 0), index)
            for name in self._fields
        }
        return QuadraticModel(
            tuple(self.metrics[i] for i in index.tolist()),
            tuple(self.links[i] for i in index.tolist()),
            self.space,
            tensors,
        )

    def at_rows(self, rows: Tensor) -> QuadraticModel:
        """Return the model as fitted to some rows of more: there is NaN at the others.

        Args:
            rows: ``n`` booleans: which rows it was fitted to.
        """
        tensors = {name: getattr(self, name) for name in self._fields}
        for name in _OF_ROWS:
            spread = tensors[name].new_full((len(tensors[name]), len(rows)), torch.nan)
            spread[:, rows] = tensors[name]
            tensors[name] = spread
        if "_noise_matrix" in tensors:
            tensors["_noise_matrix"] = spread_matrix(tensors["_noise_matrix"], rows)
        return QuadraticModel(self.metrics, self.links, self.space, tensors)

    @classmethod
    def side_by_side(
        cls, parts: Sequence[QuadraticModel], columns: Sequence[Sequence[int]]
    ) -> QuadraticModel:
        """Return models of some metrics each, fitted in the same space, as one of all of them.

        Args:
            parts: The models, not conditioned on batches.
            columns: For each model the positions of its metrics; together all of them.
        """
        order = torch.tensor([j for held in columns for j in held]).argsort()
        metrics = [metric for part in parts for metric in part.metrics]
        links = [link for part in parts for link in part.links]
        return cls(
            tuple(metrics[i] for i in order.tolist()),
            tuple(links[i] for i in order.tolist()),
            parts[0].space,
            {
                name: torch.cat([getattr(part, name) for part in parts])[order]
                for name in parts[0]._fields
            },
        )

    def condition_on_observations(
        self, X: Tensor, Y: Tensor, noise: Tensor | None = None, **kwargs: Any
    ) -> QuadraticModel:
        """Return the model that has also seen ``Y`` at ``X``, variances held.

        Exact: it equals a fit to all rows at these variances. The leave-one-out results stay
        those of the fit.

        Args:
            X: ``... x n' x d`` coefficients.
            Y: ``... x n' x m`` values on the link scale.
            noise: ``... x n' x m`` variances of ``Y``; by default the median of the fit's.
            **kwargs: Ignored; botorch passes options of its own models.
        """
        phi = self.features(self.transform_inputs(X)).unsqueeze(-3)
        y = Y.mT
        v = self._noise.unsqueeze(-1) if noise is None else noise.mT
        weighted = phi.mT / v.unsqueeze(-2).expand(*v.shape[:-1], 1, phi.shape[-2])
        precision = self._precision + weighted @ phi
        information = self._information + (weighted @ y.unsqueeze(-1)).squeeze(-1)
        size = precision.diagonal(dim1=-1, dim2=-2).rsqrt()
        scaled = size.unsqueeze(-1) * precision * size.unsqueeze(-2)
        lower = psd_safe_cholesky(scaled)
        eye = torch.eye(lower.shape[-1], dtype=lower.dtype)
        inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
        root = size.unsqueeze(-1) * inverse.mT
        shape = torch.broadcast_shapes(  # type: ignore[no-untyped-call]
            root.shape[:-2], information.shape[:-1]
        )
        root = root.expand(*shape, *root.shape[-2:])
        weights = (root @ (root.mT @ information.unsqueeze(-1))).squeeze(-1)
        tensors = {name: getattr(self, name) for name in self._fields}
        tensors |= {
            "weights": weights,
            "root": root,
            "_precision": precision.expand(*shape, *precision.shape[-2:]),
            "_information": information,
        }
        return QuadraticModel(self.metrics, self.links, self.space, tensors)

    def misfit_variance(self) -> Tensor:
        """Return the variance (``m``, link scale) of what the quadratics cannot say.

        0 for metrics whose noise is unknown, where noise and misfit cannot be told apart.
        """
        return self._misfit

    def training_targets(self) -> tuple[Tensor, Tensor]:
        """Return the targets and their total variance in the fit, both ``n x m``, link scale.

        There is NaN where a metric was not measured. The variance is noise plus misfit. For
        binomial metrics both are those of the working responses. Where noise has a covariance, it
        is that of a row's own noise, see :class:`~map_bo.surrogates.validation.LeavesOneOut`.
        """
        return self._targets.mT, self._target_variance.mT

    def leave_one_out(self) -> tuple[Tensor, Tensor]:
        """Return mean and variance of the quadratics at each row, fitted without that row.

        ``n x m`` each, link scale, NaN where a metric was not measured; variances of
        prior and noise are held, noise and misfit are not in the variance. Closed form by rank-one
        downdates. Where noise has a covariance, what the noise of the other rows tells of the row's
        own is part of the value.
        """
        return self._loo_mean.mT, self._loo_variance.mT

    def noise_covariance(self) -> Tensor | None:
        """Return that of the rows, misfit included, ``m x n x n``; None where it is independent."""
        return self._noise_matrix if "_noise_matrix" in self._fields else None

    def joint(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean (``q x m``) and covariance (``m x q x q``) of each metric at ``X``."""
        return joint_by_metric([self.one_metric(j) for j in range(self.num_outputs)], X)

    def covariances_with(self, points: Tensor) -> PointCovariances:
        """Return the posterior covariances of other points with ``points`` (``p x d``), exactly."""
        return _WeightCovariances(self, points)

    def sample_functions(self, k: int, *, generator: Generator) -> QuadraticFunctions:
        """Draw ``k`` functions of all metrics, as quadratics."""
        shape = (k, *self.weights.shape, 1)
        source = same_state(generator)
        normal = torch.randn(shape, generator=source, dtype=self.weights.dtype)
        normal = normal * draw_signs(self.metrics)[:, None, None]
        return QuadraticFunctions(self, self.weights + (self.root @ normal).squeeze(-1))


class QuadraticFunctions(SampledFunctions):
    """Drawn quadratics.

    Args:
        model: The model that they were drawn from.
        weights: ``k x m x D`` weights on its features.
    """

    explicit = True

    def __init__(self, model: QuadraticModel, weights: Tensor) -> None:
        self._model, self.weights = model, weights

    def __call__(self, X: Tensor) -> Tensor:
        """Return the values of all functions, ``k x n x m`` for ``n x d``."""
        phi = self._model.features(X)
        if len(self.weights) == 1:
            return (phi @ self.weights[0].T).unsqueeze(0)
        return phi @ self.weights.mT

    def each(self, X: Tensor, which: Tensor) -> Tensor:
        """Return the value of one function per row of ``X`` (``n x d``), ``n x m``."""
        return (self.weights[which] @ self._model.features(X).unsqueeze(-1)).squeeze(-1)


class _WeightCovariances(PointCovariances):
    """Covariances of quadratics, through the root of the covariance of their weights."""

    def __init__(self, model: QuadraticModel, points: Tensor) -> None:
        self._model = model
        self._half = model.features(points) @ model.root  # m x p x D

    def among(self) -> Tensor:
        return self._half @ self._half.mT

    def to(self, X: Tensor) -> tuple[Tensor, Tensor]:
        half = self._model.features(X) @ self._model.root  # m x b x D
        return half @ self._half.mT, half.square().sum(-1)
