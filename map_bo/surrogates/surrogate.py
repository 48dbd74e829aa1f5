"""What a surrogate is: settings with a ``fit`` that returns a botorch model with links.

The smallest model has ``metrics``, ``links`` and a Gaussian ``posterior``; everything that a run
asks of it besides has a default here, so that whatever can be fitted can be searched, solved,
verified and chosen from. Models that know more (weights, closed forms) override the defaults.
Abilities that cannot have a default are protocols of their own:
:class:`map_bo.surrogates.validation.LeavesOneOut` and :class:`DescribesSelection`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from botorch.acquisition.objective import PosteriorTransform
from botorch.models.model import Model
from botorch.posteriors.gpytorch import GPyTorchPosterior
from botorch.posteriors.posterior import Posterior
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from linear_operator import to_linear_operator
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Generator, Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import SurrogateError
from map_bo.space import CoefficientSpace

if TYPE_CHECKING:
    from map_bo.surrogates.links import Link

__all__ = [
    "DescribesSelection",
    "PointCovariances",
    "SampledFunctions",
    "Surrogate",
    "SurrogateModel",
    "TakesPartialRows",
    "WithoutUncertainty",
    "fits_partial_rows",
    "gaussian",
    "has_uncertainty",
    "joint_by_metric",
    "same_state",
]

_JITTER = 1e-8  # of a variance: keeps covariances of near-equal points invertible


def gaussian(posterior: Posterior) -> GPyTorchPosterior:
    """Return ``posterior`` as the Gaussian that every surrogate's posterior is.

    Raises:
        SurrogateError: When it is of another kind, which has no covariance.
    """
    if not isinstance(posterior, GPyTorchPosterior):
        raise SurrogateError(
            f"the surrogate's posterior is a {type(posterior).__name__}, which is not Gaussian",
            hint="let `posterior` return a GPyTorchPosterior on the link scale",
        )
    return posterior


class SampledFunctions(ABC):
    """``k`` functions of all metrics, drawn from a posterior, on the link scale.

    Attributes:
        explicit: Whether the functions have a closed form: cheap, exact and differentiable at any
            number of points. Otherwise they are drawn where they are asked for, jointly with all
            that was asked before, and are not to be climbed.
    """

    explicit: bool = False

    @abstractmethod
    def __call__(self, X: Tensor) -> Tensor:
        """Return the values of all functions, ``k x n x m`` for ``n x d``."""

    def each(self, X: Tensor, which: Tensor) -> Tensor:
        """Return the value of one function per row of ``X`` (``n x d``), ``n x m``.

        Args:
            X: Points.
            which: ``n`` numbers of functions.
        """
        return self(X)[which, torch.arange(len(X))]


class PointCovariances(ABC):
    """Posterior covariances of each metric among fixed points, and of other points with these."""

    @abstractmethod
    def among(self) -> Tensor:
        """Return the covariances of the ``p`` fixed points, ``m x p x p``."""

    @abstractmethod
    def to(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Return the covariances of ``X`` (``b x d``) with the fixed points, and its variances.

        Returns:
            ``m x b x p`` covariances and ``m x b`` variances, differentiable in ``X``.
        """


class SurrogateModel(Model):
    """A botorch model of all metrics on their link scales, each in its own direction.

    ``posterior(X)`` is the Gaussian posterior on the link scale (logit for a proportion, log for
    a loss, identity else), so every botorch acquisition works with it; the links belong in the
    acquisition's objective and in prediction. It has botorch's signature and returns a
    ``GPyTorchPosterior``.

    A model has to have ``metrics``, ``links`` and ``posterior``. The rest is derived from the
    posterior, metric by metric, as every surrogate here models metrics independently.

    Attributes:
        metrics: The ``m`` metrics, in the order of the outputs.
        links: One link per metric.
    """

    metrics: tuple[Metric, ...]
    links: tuple[Link, ...]
    _alone: tuple[SurrogateModel, ...] | None = None

    @property
    def num_outputs(self) -> int:
        """The number ``m`` of metrics."""
        return len(self.metrics)

    @property
    def batch_shape(self) -> torch.Size:
        """Leading dimensions of the posterior: none, unless a model is conditioned on batches."""
        return torch.Size()

    def subset_output(self, idcs: list[int]) -> Model:
        """Return the model of the given metrics alone; botorch's name for :meth:`for_metrics`."""
        return self.for_metrics(idcs)

    def gaussian(self, X: Tensor) -> GPyTorchPosterior:
        """Return ``posterior(X)``, which is Gaussian.

        Raises:
            SurrogateError: When it is of another kind.
        """
        return gaussian(self.posterior(X))

    def link_mean(self, X: Tensor) -> Tensor:
        """Return the posterior mean on the link scale, ``n x m`` for ``n x d``.

        It equals ``posterior(X).mean`` and is differentiable in ``X``. A front solver calls it
        hundreds of times, so a model that has a closed form from cached quantities (no covariance,
        no solve) should override it.
        """
        return self.gaussian(X).mean

    def for_metrics(self, columns: Sequence[int]) -> SurrogateModel:
        """Return the model of some metrics alone.

        Args:
            columns: Positions of the metrics, in the order that they are wanted in.
        """
        return _Columns(self, columns)

    def one_metric(self, column: int) -> SurrogateModel:
        """Return the model of one metric alone; the same object at every call."""
        if self._alone is None:
            self._alone = tuple(self.for_metrics([i]) for i in range(len(self.metrics)))
        return self._alone[column]

    def joint(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean (``q x m``) and covariance (``m x q x q``) of each metric at ``X``.

        Differentiable in ``X`` (``q x d``). The covariance may be singular, as with more points
        than features. By default it is cut out of the joint posterior of all metrics, which has
        ``(q m)^2`` entries; a model of many metrics should have :func:`joint_by_metric` here.
        """
        posterior, m = self.gaussian(X), len(self.metrics)
        alone = [_marginal(posterior, [i]).distribution for i in range(m)]
        return posterior.mean, torch.stack([one.covariance_matrix for one in alone])

    def covariances_with(self, points: Tensor) -> PointCovariances:
        """Return the posterior covariances of other points with ``points`` (``p x d``)."""
        return _JointCovariances(self, points)

    def sample_functions(self, k: int, *, generator: Generator) -> SampledFunctions:
        """Draw ``k`` functions from the posterior.

        By default a function is drawn where it is asked for: the values of the first call are a
        joint draw over its points, and those of later calls are drawn given all before.

        Args:
            k: How many.
            generator: Source of all randomness; read, never advanced.
        """
        return _FunctionsOnDemand(self, k, same_state(generator))

    def misfit_variance(self) -> Tensor:
        """Return the variance of the lack of fit (``m``, link scale) that the posterior leaves out.

        What the model knows that it cannot say, independent from point to point: no acquisition
        can learn it, and predictions add it. 0 unless a model says otherwise.
        """
        return torch.zeros(len(self.metrics), dtype=torch.float64)


class _Columns(SurrogateModel):
    """Some metrics of a model, by the marginals of its posterior."""

    def __init__(self, whole: SurrogateModel, columns: Sequence[int]) -> None:
        super().__init__()
        self.whole, self.columns = whole, tuple(columns)
        self.metrics = tuple(whole.metrics[i] for i in self.columns)
        self.links = tuple(whole.links[i] for i in self.columns)

    @property
    def batch_shape(self) -> torch.Size:
        return self.whole.batch_shape

    def for_metrics(self, columns: Sequence[int]) -> SurrogateModel:
        return self.whole.for_metrics([self.columns[i] for i in columns])

    def posterior(
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: PosteriorTransform | None = None,
    ) -> Posterior:
        wanted = range(len(self.columns)) if output_indices is None else output_indices
        if isinstance(observation_noise, Tensor):  # of these metrics; the whole wants all
            noise = observation_noise.new_zeros(
                *observation_noise.shape[:-1], len(self.whole.metrics)
            )
            noise[..., list(self.columns)] = observation_noise
            observation_noise = noise
        # Not by output_indices: botorch's own models fail on these after an outcome transform.
        whole = gaussian(self.whole.posterior(X, observation_noise=observation_noise))
        found = _marginal(whole, [self.columns[i] for i in wanted])
        if posterior_transform is None:
            return found
        transformed: Posterior = posterior_transform(found, X=X)
        return transformed

    def misfit_variance(self) -> Tensor:
        return self.whole.misfit_variance()[list(self.columns)]


class _JointCovariances(PointCovariances):
    """Covariances from joint posteriors over the fixed points and the others."""

    def __init__(self, model: SurrogateModel, points: Tensor) -> None:
        self._model, self._points = model, points

    def among(self) -> Tensor:
        return self._model.joint(self._points)[1]

    def to(self, X: Tensor) -> tuple[Tensor, Tensor]:
        b = len(X)
        _, joint = self._model.joint(torch.cat([self._points, X]))
        return joint[:, -b:, :-b], joint[:, -b:, -b:].diagonal(dim1=-1, dim2=-2)


class _FunctionsOnDemand(SampledFunctions):
    """Functions that are drawn at the points of each call, given their values at all before."""

    def __init__(self, model: SurrogateModel, k: int, source: Generator) -> None:
        self._model, self._k, self._source = model, k, source
        self._X: Tensor | None = None
        self._values = torch.zeros(k, 0, len(model.metrics), dtype=torch.float64)

    def __call__(self, X: Tensor) -> Tensor:
        with torch.no_grad():
            values = self._first(X) if self._X is None else self._further(X, self._X)
        self._X = X.detach() if self._X is None else torch.cat([self._X, X.detach()])
        self._values = torch.cat([self._values, values], 1)
        return values

    def _first(self, X: Tensor) -> Tensor:
        posterior = self._model.gaussian(X)
        size = torch.Size([self._k])
        noise = self._normal(size + posterior.base_sample_shape)
        return posterior.rsample_from_base_samples(size, noise)

    def _further(self, X: Tensor, known: Tensor) -> Tensor:
        mean, joint = self._model.joint(torch.cat([known, X]))
        p = len(known)
        known_root, cross = _root(joint[:, :p, :p]), joint[:, p:, :p]
        gap = (self._values - mean[:p]).permute(2, 1, 0)  # m x p x k
        moved = cross @ torch.cholesky_solve(gap, known_root)
        taken = torch.linalg.solve_triangular(known_root, cross.mT, upper=False)
        left = _root(joint[:, p:, p:] - taken.mT @ taken)
        drawn = moved + left @ self._normal(moved.shape)
        return mean[p:] + drawn.permute(2, 1, 0)

    def _normal(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(*shape, generator=self._source, dtype=torch.float64)


def _marginal(posterior: GPyTorchPosterior, columns: list[int]) -> GPyTorchPosterior:
    """Return the posterior of some of its outputs."""
    joint = posterior.distribution
    if not isinstance(joint, MultitaskMultivariateNormal):
        return posterior  # there is one output
    q, m = joint.mean.shape[-2:]
    row, column = torch.arange(q).unsqueeze(-1), torch.tensor(columns)
    # botorch asks for the order of the entries in the same way; gpytorch's own indexing goes
    # through sparse matrices once there is a gradient.
    at = row * m + column if joint._interleaved else column * q + row
    covariance = joint.covariance_matrix[..., at.flatten(), :][..., at.flatten()]
    kept = to_linear_operator(covariance)  # which is not factorised before samples are drawn
    if len(columns) == 1:
        return GPyTorchPosterior(MultivariateNormal(joint.mean[..., columns[0]], kept))
    return GPyTorchPosterior(MultitaskMultivariateNormal(joint.mean[..., columns], kept))


def joint_by_metric(models: Sequence[SurrogateModel], X: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (``q x m``) and covariance (``m x q x q``) of ``m`` models of one metric each."""
    alone = [model.gaussian(X) for model in models]
    mean = torch.cat([one.mean for one in alone], -1)
    return mean, torch.stack([one.distribution.covariance_matrix for one in alone])


def same_state(generator: Generator) -> Generator:
    """Return another generator in the state of ``generator``, to draw from without advancing it."""
    source = torch.Generator(device=generator.device)
    source.set_state(generator.get_state())
    return source


def _root(covariance: Tensor) -> Tensor:
    size = covariance.diagonal(dim1=-1, dim2=-2).mean(-1).clamp_min(0.0)[:, None, None]
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype)
    root: Tensor = psd_safe_cholesky(
        (covariance + covariance.mT) / 2 + (_JITTER * size + 1e-30) * eye
    )
    return root


@runtime_checkable
class DescribesSelection(Protocol):
    """A model that was chosen among others, metric by metric, and says why."""

    def describe_selection(self) -> list[dict[str, Any]]:
        """Return the choice of every metric as plain data."""
        ...


@runtime_checkable
class WithoutUncertainty(Protocol):
    """Settings of a surrogate that say whether its fits have no uncertainty to offer."""

    @property
    def certain(self) -> bool:
        """Whether the variance of the posterior means nothing, so that no sampler can use it."""
        ...


def has_uncertainty(surrogate: Surrogate) -> bool:
    """Return whether the posterior of a surrogate has an uncertainty to look at."""
    return not (isinstance(surrogate, WithoutUncertainty) and surrogate.certain)


@runtime_checkable
class TakesPartialRows(Protocol):
    """Settings of a surrogate that say whether each metric is fitted to all rows that have it.

    Its fits then use what was measured of failed rows (``seen.measured``), and where they leave
    evaluations out (:class:`map_bo.surrogates.validation.LeavesOneOut`), they do so for the rows of
    ``seen.with_any()``, with NaN where a metric was not measured. Without this, a surrogate is
    fitted to whole rows alone (``seen.succeeded()``).
    """

    @property
    def takes_partial_rows(self) -> bool:
        """Whether partial rows are fitted to."""
        ...


def fits_partial_rows(surrogate: Surrogate) -> bool:
    """Return whether a surrogate fits each metric to all rows that have it."""
    return isinstance(surrogate, TakesPartialRows) and surrogate.takes_partial_rows


@runtime_checkable
class Surrogate(Protocol):
    """Settings of a surrogate; frozen, so that the same settings can fit many data sets."""

    def fit(self, seen: Observations, space: CoefficientSpace) -> SurrogateModel:
        """Fit to the evaluations that succeeded; see also :class:`TakesPartialRows`.

        Raises:
            SurrogateError: When too few evaluations succeeded to fit anything.
        """
        ...
