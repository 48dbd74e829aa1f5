r"""Acquisitions through scalarisations, for any number of metrics.

The hypervolume that a set ``Y`` of gains dominates above the reference point 0 is an expectation
over directions ``l`` uniform on the positive part of the unit sphere (Deng and Zhang,
*Approximating Hypervolume and Hypervolume Contributions Using Polar Coordinate*, 2019; Golovin and
Zhang, *Random Hypervolume Scalarizations for Provable Multi-Objective Black Box Optimization*,
2020, lemma 5):

    HV(Y) = c_m E_l [ max_(y in Y) s_l(y)^m ],   s_l(y) = min_i (y_i / l_i)_+,
    c_m = pi^(m/2) / (2^m Gamma(m/2 + 1)).

For a ray from the reference point in direction ``l``, ``max_y s_l(y)`` is the distance at which it
leaves the dominated set, and the volume of a star-shaped set in polar coordinates is the mean of
the ``m``-th power of that distance times the volume ``c_m`` of the positive part of the unit ball.
The improvement by one more point is therefore ``c_m E_l [(s_l(y)^m - b_l^m)_+]`` with ``b_l`` the
distance so far: no decomposition of the space, at a cost that is linear in the number of metrics.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from botorch.acquisition.acquisition import AcquisitionFunction
from botorch.acquisition.multi_objective.objective import GenericMCMultiOutputObjective
from botorch.acquisition.multi_objective.parego import qLogNParEGO
from botorch.sampling.normal import SobolQMCNormalSampler
from botorch.utils.transforms import t_batch_mode_transform
from torch import Generator, Tensor
from torch.quasirandom import SobolEngine

from map_bo.errors import SamplerError
from map_bo.pareto.indicators import preference_weights
from map_bo.rng import child, child_seed
from map_bo.samplers.designs.space_filling import sobol_points
from map_bo.samplers.posterior.acquisition import AcquisitionDriven, first_points
from map_bo.samplers.posterior.covariance import Covariances, JointDraws, measurement_noise
from map_bo.samplers.posterior.driven import Situation
from map_bo.samplers.posterior.hypervolume import positive_part

__all__ = [
    "HypervolumeScalarised",
    "QLogNParEGO",
    "ScalarisedImprovement",
    "ScalarisedUCB",
    "log_improvements",
    "ray_lengths",
    "sphere_directions",
    "unit_volume",
]

_REDRAWS = 16  # of weights whose best point is pending already
_SOFT = 1e-4  # width over which the positive part of an improvement is smoothed


def sphere_directions(n: int, m: int, *, seed: int) -> Tensor:
    """Return ``n x m`` unit vectors, uniform on the positive part of the sphere (Sobol)."""
    U = SobolEngine(m, scramble=True, seed=seed).draw(n, dtype=torch.float64)  # type: ignore[no-untyped-call]
    normal = torch.special.ndtri(U.clamp(1e-9, 1 - 1e-9)).abs().clamp_min(1e-9)
    return torch.nn.functional.normalize(normal, dim=-1)


def ray_lengths(gains: Tensor, directions: Tensor) -> Tensor:
    """Return ``min_i y_i / l_i``, how far a point reaches along rays; negative below the reference.

    Args:
        gains: ``... x m`` gains over the reference point.
        directions: ``... x m`` directions that broadcast against them.
    """
    return (gains / directions).amin(-1)


def unit_volume(m: int) -> float:
    """Return ``c_m``, the volume of the positive part of the unit ball."""
    return math.exp(m / 2 * math.log(math.pi) - m * math.log(2) - math.lgamma(m / 2 + 1))


def log_improvements(lengths: Tensor, best: Tensor, m: int) -> Tensor:
    """Return ``log(t^m - b^m)`` for ray lengths ``t`` over the best so far ``b``, smoothed.

    The positive part of ``t - b`` is smoothed over 1e-4, so that there is a gradient where nothing
    is gained; powers stay in logarithms, since with 16 metrics they span a hundred orders of
    magnitude.
    """
    b = best.clamp_min(1e-9)  # below it the difference of powers would cancel
    ratio = (positive_part(lengths - b, _SOFT) / b).log1p()
    return m * b.log() + m * ratio + (-torch.expm1(-m * ratio)).log()


@dataclass(frozen=True)
class HypervolumeScalarised(AcquisitionDriven):
    """Hypervolume-scalarised noisy expected improvement: any number of metrics; see the module.

    Draws of the metrics, joint over the evaluated and pending points and the candidate, come in
    pairs with directions, and the logarithm of the mean improvement is maximised. With a single
    metric it is noisy expected improvement. The phases and what happens on failures:
    :class:`PosteriorDriven`.

    Attributes:
        rays: Directions, each with a draw of its own.
    """

    above_reference: ClassVar[bool] = True

    rays: int = 128

    def acquisition(
        self, situation: Situation, pending: Tensor, generator: Generator
    ) -> AcquisitionFunction:
        """Return the logarithm of the expected improvement of the hypervolume."""
        m = len(situation.good.metrics)
        directions = sphere_directions(self.rays, m, seed=child_seed(generator, "rays"))
        return ScalarisedImprovement(situation, directions, pending, child(generator, "draws"))


class ScalarisedImprovement(AcquisitionFunction):
    """Logarithm of the expected hypervolume improvement, through rays.

    Args:
        situation: What is known.
        directions: ``s x m`` rays, each with a draw of its own.
        pending: ``q x d`` points that count as part of the baseline.
        generator: Source of the draws; read, never advanced.
    """

    def __init__(
        self, situation: Situation, directions: Tensor, pending: Tensor, generator: Generator
    ) -> None:
        super().__init__(situation.model)
        self.situation, self.directions, self.generator = situation, directions, generator
        self.set_X_pending(pending)

    def set_X_pending(self, X_pending: Tensor | None = None) -> None:
        """Let pending points (``q x d``) join the baseline."""
        good = self.situation.good.X
        baseline = good if X_pending is None else torch.cat([good, X_pending])
        self.draws = JointDraws(
            self.situation.model, baseline, len(self.directions), generator=self.generator
        )
        lengths = self._lengths(self.draws.baseline)
        self.best = lengths.amax(-1).clamp_min(0.0)  # s

    def _lengths(self, samples: Tensor) -> Tensor:
        return ray_lengths(self.situation.gains()(samples, None), self.directions.unsqueeze(1))

    @t_batch_mode_transform(expected_q=1)  # type: ignore[arg-type]  # as botorch's own classes
    def forward(self, X: Tensor) -> Tensor:
        """Return the value at each of ``b`` points (``b x 1 x d``)."""
        lengths = self._lengths(self.draws.at(X.squeeze(-2)))  # s x b
        m = self.directions.shape[-1]
        logs = log_improvements(lengths, self.best.unsqueeze(-1), m)
        mean: Tensor = logs.logsumexp(0) - math.log(len(logs))
        return mean + math.log(unit_volume(m))


@dataclass(frozen=True)
class QLogNParEGO(AcquisitionDriven):
    """Noisy expected improvement of augmented Chebyshev scalarisations with random weights.

    Knowles, *ParEGO*, 2006; Daulton et al., 2021, section 5.2, in botorch's logarithmic form. Each
    point has weights of its own, uniform on the simplex. Any number of metrics. A pending point
    joins the candidate: what counts is the better of both. The phases and what happens on
    failures: :class:`PosteriorDriven`.
    """

    def acquisition(
        self, situation: Situation, pending: Tensor, generator: Generator
    ) -> AcquisitionFunction:
        """Return botorch's acquisition for weights drawn from ``generator``."""
        m = len(situation.good.metrics)
        weights = preference_weights(1, m, generator=child(generator, "weights"))[0]
        seed = child_seed(generator, "noise")
        return qLogNParEGO(
            situation.model,
            X_baseline=situation.good.X,
            scalarization_weights=weights,
            sampler=SobolQMCNormalSampler(torch.Size([self.mc_samples]), seed=seed),
            objective=GenericMCMultiOutputObjective(situation.gains()),
            X_pending=pending if len(pending) else None,
            prune_baseline=True,
            cache_root=False,
        )

    def renewed(
        self,
        acquisition: AcquisitionFunction,
        situation: Situation,
        pending: Tensor,
        source: Generator,
    ) -> AcquisitionFunction:
        """Return the acquisition for other weights."""
        return self.acquisition(situation, pending, source)


@dataclass(frozen=True)
class ScalarisedUCB(AcquisitionDriven):
    """Upper confidence bound of a scalarisation with random weights, new ones for each point.

    Every metric takes its upper bound, posterior mean plus ``beta`` deviations on the link scale,
    and the scalarisation of these gains is maximised: a weighted sum with weights uniform on the
    simplex, or the length of a ray (:func:`ray_lengths`) uniform on the sphere (Paria, Kandasamy
    and Poczos, *A Flexible Framework for Multi-Objective Bayesian Optimization using Random
    Scalarizations*, 2019). Any number of metrics. The phases and what happens on failures:
    :class:`PosteriorDriven`.

    Pending points lower the deviations around them (Desautels, Krause and Burdick, *Parallelizing
    Exploration-Exploitation Tradeoffs in Gaussian Process Bandit Optimization*, 2014). That alone
    moves a well-known optimum hardly at all, and many weights share one at an end of the front:
    weights for which a pending point is better than anything known or drawn at random are drawn
    again.

    Attributes:
        beta: Deviations above the mean.
        scalarisation: ``"chebyshev"`` or ``"linear"``.
    """

    beta: float = 1.0
    scalarisation: Literal["chebyshev", "linear"] = "chebyshev"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta >= 0:
            raise SamplerError(f"beta is {self.beta}", hint="give 0 or more")
        if self.scalarisation not in ("chebyshev", "linear"):
            raise SamplerError(
                f"there is no scalarisation {self.scalarisation!r}",
                hint="scalarisations are 'chebyshev' and 'linear'",
            )

    def acquisition(
        self, situation: Situation, pending: Tensor, generator: Generator
    ) -> AcquisitionFunction:
        """Return the upper bound for a scalarisation drawn from ``generator``."""
        weights = self._weights(situation, generator)
        bound = UpperBound(
            situation, weights, self.beta, pending, rays=self.scalarisation != "linear"
        )
        waiting = pending[situation.failed :]
        if len(waiting) and len(weights) > 1:
            pool = sobol_points(situation.space, generator=child(generator, "pool"))
            others = torch.cat([first_points(pool, self.raw_samples), situation.good.X])
            for i in range(_REDRAWS):
                if bound.is_better_among(others, waiting):
                    return bound
                bound.weights = self._weights(situation, child(generator, "again", i))
            bound.weights = weights
        return bound

    def _weights(self, situation: Situation, generator: Generator) -> Tensor:
        m = len(situation.good.metrics)
        if self.scalarisation == "linear":
            return preference_weights(1, m, generator=child(generator, "weights"))[0]
        return sphere_directions(1, m, seed=child_seed(generator, "weights"))[0]

    def renewed(
        self,
        acquisition: AcquisitionFunction,
        situation: Situation,
        pending: Tensor,
        source: Generator,
    ) -> AcquisitionFunction:
        """Return the acquisition for another scalarisation."""
        return self.acquisition(situation, pending, source)


class UpperBound(AcquisitionFunction):
    """A scalarisation of every metric's upper confidence bound.

    Args:
        situation: What is known.
        weights: ``m`` weights of a sum, or direction of a ray.
        beta: Deviations above the mean.
        pending: ``q x d`` points that count as measured.
        rays: Whether ``weights`` is a direction.
    """

    def __init__(
        self, situation: Situation, weights: Tensor, beta: float, pending: Tensor, *, rays: bool
    ) -> None:
        super().__init__(situation.model)
        self.situation, self.weights, self.beta, self.rays = situation, weights, beta, rays
        self.noise = measurement_noise(situation.model, situation.good.X)
        self.set_X_pending(pending)

    def set_X_pending(self, X_pending: Tensor | None = None) -> None:
        """Let pending points (``q x d``) count as measured."""
        model = self.situation.model
        self.covariances = Covariances(model, self.situation.good.X[:1], self.noise, X_pending)

    def is_better_among(self, X: Tensor, others: Tensor) -> bool:
        """Return whether the best of ``X`` (``n x d``) is better than all ``others``."""
        with torch.no_grad():
            return bool(self(X.unsqueeze(1)).amax() > self(others.unsqueeze(1)).amax())

    @t_batch_mode_transform(expected_q=1)  # type: ignore[arg-type]  # as botorch's own classes
    def forward(self, X: Tensor) -> Tensor:
        """Return the value at each of ``b`` points (``b x 1 x d``)."""
        points = X.squeeze(-2)
        _, variance = self.covariances.to(points)
        mean = self.situation.model.link_mean(points)
        half = self.beta * (variance.T + 1e-300).sqrt()
        gains = self.situation.gains()
        upper = torch.maximum(gains(mean + half, None), gains(mean - half, None))
        if self.rays:
            return ray_lengths(upper, self.weights)
        return (upper * self.weights).sum(-1)
