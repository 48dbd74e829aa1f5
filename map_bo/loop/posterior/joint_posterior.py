"""Joint draws of the real metrics at many points, and quantities made from such draws.

The metrics are drawn independently of each other, as every surrogate models them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Generator, Tensor

from map_bo.data import Metric, to_maximisation
from map_bo.pareto.indicators import directional_hypervolume, inverse_directions
from map_bo.pareto.trust import Coverage
from map_bo.rng import child
from map_bo.scale import same_points
from map_bo.space import CoefficientSpace
from map_bo.surrogates.features import inputs
from map_bo.surrogates.links import Link, from_link
from map_bo.surrogates.surrogate import SurrogateModel, draw_signs
from map_bo.surrogates.validation import LeavesOneOut, noise_covariance

__all__ = ["DIRECTIONS", "JointPosterior", "plausible_points", "real_draws", "volumes"]

DIRECTIONS = 512
"""Directions of :func:`volumes`."""

_MISFIT_LENGTH = 0.1  # of the box, times sqrt(d): how far a misfit reaches among front points
_JITTERS = (1e-10, 1e-8, 1e-6)  # shares of the mean variance that make a covariance factorisable
_STEP = 0.06  # of the box: how far plausible points lie from the front, typically


@dataclass(frozen=True, eq=False)
class JointPosterior:
    """The Gaussian posterior of ``m`` independent metrics at ``q`` points, link scale.

    Attributes:
        mean: ``q x m``.
        covariance: ``m x q x q``; may be singular, as with more points than features.
        metrics: The ``m`` metrics.
        links: Their links.
    """

    mean: Tensor
    covariance: Tensor
    metrics: tuple[Metric, ...]
    links: tuple[Link, ...]

    @classmethod
    def of(cls, model: SurrogateModel, X: Tensor) -> JointPosterior:
        """Return the posterior of ``model`` at ``X`` (``q x d``), metric by metric."""
        with torch.no_grad():
            # A joint posterior of all metrics would have a covariance of (q m)^2 entries.
            mean, covariance = model.joint(X)
        return cls(mean, covariance, model.metrics, model.links)

    def draw(self, count: int, *, generator: Generator) -> Tensor:
        """Return ``count x q x m`` draws on the link scale."""
        m, q = len(self.metrics), len(self.mean)
        normal = torch.randn(m, q, count, generator=generator, dtype=torch.float64)
        normal = normal * draw_signs(self.metrics)[:, None, None]
        draws = [root(C) @ part for C, part in zip(self.covariance, normal, strict=True)]
        return self.mean + torch.stack(draws, -1).transpose(0, 1)

    def gains(self, F: Tensor) -> Tensor:
        """Return link-scale values (``... x m``) as metrics, larger is better in each."""
        return to_maximisation(from_link(F, self.links), self.metrics)


def root(covariance: Tensor) -> Tensor:
    """Return ``R`` with ``R R' = covariance`` (``q x q``), which may be singular.

    It is a Cholesky factor of the matrix with the smallest jitter on its diagonal that makes it
    definite, at most 1e-6 of the mean variance; failing that, the root of its positive part.
    """
    size = covariance.diagonal().mean().clamp_min(1e-300)
    eye = torch.eye(len(covariance), dtype=covariance.dtype)
    for jitter in _JITTERS:
        factor, info = torch.linalg.cholesky_ex(covariance + jitter * size * eye)
        if int(info) == 0:
            return cast(Tensor, factor)
    values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    return cast(Tensor, vectors * values.clamp_min(0.0).sqrt())


def real_draws(
    model: SurrogateModel,
    X: Tensor,
    evaluated: Tensor,
    space: CoefficientSpace,
    *,
    count: int,
    generator: Generator,
) -> tuple[Tensor, Tensor]:
    """Return draws of the real metrics at ``X`` and where evaluations succeeded.

    The real metric on the link scale is ``f(x) + e(x)``: the surrogate's function, and its misfit
    with the variance ``s`` that the surrogate gives it, as in the intervals of
    a prediction. A surrogate treats the misfit as independent from point to point. Among hundreds
    of points of one front that is untenable, because the luckiest of many neighbours would dominate
    the rest and their hypervolume would grow with their number; so over ``X`` it is drawn with the
    correlation ``exp(-|u - u'|^2 / (2 l^2))`` in the unit cube, ``l = 0.1 sqrt(d)``. At an
    evaluated point with value ``z`` and noise variance ``v`` the misfit has been seen:
    ``e | f, z ~ N(w (z - f), w v)`` with ``w = s / (s + v)``, and a point of ``X`` that was
    evaluated takes the draw of its evaluation. Where the noise of the rows has a covariance ``V``,
    ``e | f, z ~ N(s N^-1 (z - f), s I - s^2 N^-1)`` with ``N = V + s I``.

    Args:
        model: The fitted surrogate.
        X: ``k x d`` points.
        evaluated: ``n x d`` the rows that ``model`` was fitted to, in their order.
        space: The coefficients.
        count: How many draws.
        generator: Source of all randomness.

    Returns:
        ``count x k x m`` and ``count x n x m`` values, own units turned so that larger is better.
    """
    joint = JointPosterior.of(model, torch.cat([X, evaluated]))
    F = joint.draw(count, generator=child(generator, "function"))
    k = len(X)
    misfit = model.misfit_variance()
    if bool((misfit > 0).any()):
        noise = child(generator, "misfit")
        normal = torch.randn(F.shape, generator=noise, dtype=torch.float64)
        normal = normal * draw_signs(model.metrics)
        U = inputs(X, space)
        apart = torch.cdist(U, U).square() / (2 * _MISFIT_LENGTH**2 * space.d)
        error = misfit.sqrt() * normal
        error[:, :k] = misfit.sqrt() * (root(torch.exp(-apart)) @ normal[:, :k])
        if isinstance(model, LeavesOneOut):
            targets, total = model.training_targets()
            share = misfit / total.clamp_min(1e-300)
            width = (share * (total - misfit).clamp_min(0.0)).sqrt()
            told = share * (targets - F[:, k:]) + width * normal[:, k:]
            together = noise_covariance(model)
            if together is not None:
                gaps = zip(together, misfit, (targets - F[:, k:]).unbind(-1), strict=True)
                parts = zip(gaps, normal[:, k:].unbind(-1), strict=True)
                told = torch.stack([_told(*gap, drawn) for gap, drawn in parts], -1)
            # Where a metric of a partial row was not measured, nothing of the misfit was seen.
            error[:, k:] = torch.where(targets.isnan(), error[:, k:], told)
        F = F + error
    if k and len(evaluated):
        same = same_points(X, evaluated, space)
        rows = same.any(-1).nonzero().flatten()
        F[:, rows] = F[:, k + same[rows].int().argmax(-1)]
    values = joint.gains(F)
    return values[:, :k], values[:, k:]


def _told(noise: Tensor, misfit: Tensor, gap: Tensor, normal: Tensor) -> Tensor:
    """Return draws of the misfit of one metric at rows whose noise has a covariance.

    Args:
        noise: ``n x n`` covariance of noise and misfit; NaN where the metric was not measured.
        misfit: The variance of the misfit, a scalar.
        gap: ``s x n`` measured values minus the drawn function.
        normal: ``s x n`` standard normal numbers.

    Returns:
        ``s x n``; NaN where the metric was not measured.
    """
    there = ~noise.diagonal().isnan()
    solved = torch.linalg.inv(noise[there][:, there])
    left = misfit * torch.eye(len(solved), dtype=solved.dtype) - misfit.square() * solved
    drawn = torch.full_like(gap, torch.nan)
    drawn[:, there] = misfit * gap[:, there] @ solved + normal[:, there] @ root(left).mT
    return drawn


def volumes(gains: Tensor, *, generator: Generator) -> Tensor:
    """Return hypervolumes by random scalarisation, ``s`` for ``s x k x m``, reference at 0.

    All ``s`` sets share the same 512 directions, so that they can be compared.
    """
    inverse = inverse_directions(gains.shape[-1], DIRECTIONS, generator=generator)
    return gains.new_tensor([directional_hypervolume(Y, inverse) for Y in gains])


def plausible_points(
    X: Tensor,
    space: CoefficientSpace,
    coverage: Coverage | None,
    *,
    count: int,
    generator: Generator,
) -> Tensor:
    """Return ``count x d`` points near the front ``X``: points that another truth may have there.

    They are normal steps around points of the front, of three widths of about 0.06 of the box,
    and every fourth point is anywhere in the space; all are moved to where the surrogate is
    trusted.
    """
    chosen = torch.randint(len(X), (count,), generator=child(generator, "which"))
    normal = torch.randn(count, space.d, generator=child(generator, "steps"), dtype=torch.float64)
    width = _STEP * torch.tensor([0.5, 1.0, 2.5], dtype=torch.float64)
    Z = space.normalise(X[chosen]) + width[torch.arange(count) % 3].unsqueeze(-1) * normal
    points = space.project(space.unnormalise(Z))
    everywhere = space.sample(count, generator=child(generator, "everywhere"))
    points = torch.where((torch.arange(count) % 4 == 3).unsqueeze(-1), everywhere, points)
    return points if coverage is None else coverage.shrink(points)
