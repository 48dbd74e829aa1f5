"""The published fit, as its public code intends it: the baseline of every comparison.

One quadratic a metric in the raw coefficients, fitted by least squares from a vector of ones,
unregularised, the error measured after the sigmoid (accuracies) or softplus (losses); Li et al.,
*MAP*, arXiv 2406.07529. Nothing is improved here. Two places where the published code gives up
are filled in, because a baseline has to return something:

- Below ``D = (d + 1)(d + 2) / 2`` rows its Levenberg-Marquardt (MINPACK through
  ``scipy.optimize.curve_fit``) refuses to start. The trust-region method of the same function
  takes its place, from the same start.
- Where the optimiser runs out of evaluations, the published code drops the task. Here its last
  iterate is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from botorch.acquisition.objective import PosteriorTransform
from botorch.posteriors.posterior import Posterior
from scipy.optimize import least_squares, leastsq
from scipy.special import expit
from torch import Generator, Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import SurrogateError
from map_bo.moved import renamed
from map_bo.space import CoefficientSpace
from map_bo.surrogates.features import quadratic_features
from map_bo.surrogates.links import IdentityLink, Link, LogitLink, SoftplusLink
from map_bo.surrogates.quadratic_model import gaussian_posterior, transformed
from map_bo.surrogates.surrogate import SampledFunctions, SurrogateModel, joint_by_metric

__all__ = ["PublishedModel", "PublishedQuadratic"]

_Array = npt.NDArray[np.float64]
_VARIANCE = 1e-12  # link scale: "none", but botorch can still factorise it
_EVALUATIONS = 2000  # of the trust-region method, each with a numerical Jacobian


class PublishedModel(SurrogateModel):
    """Fixed quadratics: a posterior with (nearly) no variance, since the fit has none to offer.

    Its intervals mean nothing; it is here to be compared on its predictions.

    Attributes:
        metrics: The ``m`` metrics.
        links: The published links: logit, softplus or identity.
        weights: ``m x D`` coefficients of :func:`quadratic_features` of the raw ``X``.
    """

    weights: Tensor

    def __init__(
        self, metrics: tuple[Metric, ...], links: tuple[Link, ...], weights: Tensor
    ) -> None:
        super().__init__()
        self.metrics, self.links = metrics, links
        self.register_buffer("weights", weights)

    def link_mean(self, X: Tensor) -> Tensor:
        """Return the quadratics at ``X``, ``n x m`` for ``n x d``."""
        return quadratic_features(X) @ self.weights.mT

    def posterior(
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: PosteriorTransform | None = None,
    ) -> Posterior:
        """Return the quadratics at ``X`` (``... x q x d``) with a variance of 1e-12.

        ``observation_noise`` is ignored: the fit has no idea of it.
        """
        if output_indices is not None:
            return self.for_metrics(output_indices).posterior(
                X, posterior_transform=posterior_transform
            )
        mean = self.link_mean(X).mT
        covariance = torch.diag_embed(torch.full_like(mean, _VARIANCE))
        return transformed(gaussian_posterior(mean, covariance), X, posterior_transform)

    def joint(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean (``q x m``) and covariance (``m x q x q``) of each metric at ``X``."""
        return joint_by_metric([self.one_metric(j) for j in range(self.num_outputs)], X)

    def sample_functions(self, k: int, *, generator: Generator) -> SampledFunctions:
        """Return the quadratics themselves, ``k`` times: the fit knows of no other."""
        return _Known(self, k)

    def for_metrics(self, columns: Sequence[int]) -> PublishedModel:
        """Return the model of some metrics alone."""
        return PublishedModel(
            tuple(self.metrics[i] for i in columns),
            tuple(self.links[i] for i in columns),
            self.weights[list(columns)],
        )


class _Known(SampledFunctions):
    explicit = True

    def __init__(self, model: SurrogateModel, k: int) -> None:
        self._model, self._k = model, k

    def __call__(self, X: Tensor) -> Tensor:
        return self._model.link_mean(X).expand(self._k, -1, -1)


@dataclass(frozen=True)
class PublishedQuadratic:
    """Settings of the published fit: there are none.

    The noise of the evaluations plays no part in it, nor does a covariance of that noise.
    """

    certain: ClassVar[bool] = True
    takes_partial_rows: ClassVar[bool] = True

    def fit(self, seen: Observations, space: CoefficientSpace) -> PublishedModel:
        """Fit to the evaluations that succeeded.

        Raises:
            SurrogateError: When none succeeded.
        """
        total, measured = len(seen), seen.measured
        if not bool(measured.any(0).all()):
            raise SurrogateError(
                f"0 of {total} evaluations succeeded; there is nothing to fit",
                hint="look at the reasons of those that failed",
            )
        links = tuple(map(_published_link, seen.metrics))
        Phi = quadratic_features(seen.X).numpy()
        weights = np.stack(
            [
                _least_squares(Phi[rows.numpy()], seen.Y[rows, j].numpy(), link)
                for j, (link, rows) in enumerate(zip(links, measured.T, strict=True))
            ]
        )
        return PublishedModel(seen.metrics, links, torch.from_numpy(weights))


def _published_link(metric: Metric) -> Link:
    if metric.kind == "proportion":
        assert metric.lower is not None
        assert metric.upper is not None
        return LogitLink(metric.lower, metric.upper)
    if metric.kind == "loss":
        assert metric.lower is not None
        return SoftplusLink(metric.lower)
    return IdentityLink()


def _activation(f: _Array, link: Link) -> _Array:
    if isinstance(link, LogitLink):
        value = link.lower + (link.upper - link.lower) * expit(np.clip(f, -500, 500))
    elif isinstance(link, SoftplusLink):
        value = link.lower + np.logaddexp(0.0, f)
    else:
        value = f
    return np.asarray(value, dtype=np.float64)


def _least_squares(Phi: _Array, y: _Array, link: Link) -> _Array:
    start = np.ones(Phi.shape[1])

    def residual(weights: _Array) -> _Array:
        return _activation(Phi @ weights, link) - y

    # Weights that run away overflow in passing (MINPACK's covariance, unused, among them).
    with np.errstate(over="ignore", invalid="ignore"):
        if len(y) >= len(start):
            # What curve_fit calls; called itself, it hands back its last iterate on failure.
            answer: tuple[Any, ...] = leastsq(residual, start, full_output=True)
            return np.asarray(answer[0], dtype=np.float64)
        found = least_squares(residual, start, method="trf", max_nfev=_EVALUATIONS)
    return np.asarray(found.x, dtype=np.float64)


def __getattr__(name: str) -> Any:
    return renamed(__name__, name)
