"""Bayesian linear regression whose prior and noise are set by the evidence.

Model, for each of ``m`` outputs alone: ``y = Phi w + e``, ``w_j ~ N(0, s_g(j))`` with one prior
variance for each of ``G`` groups of features, and ``e_i ~ N(0, v_i + t)`` with ``v_i`` the known
variance of row ``i`` (0 where it is unknown) and ``t`` a fitted variance, the *nugget*: the
noise where it is unknown, the misfit of the model where it is known. (Rows of several kinds, each
with a nugget of its own, are in :mod:`map_bo.surrogates.gradients`.) Known noise that rows have in
common, ``e ~ N(0, C + t I)``, is the same regression on other rows (:class:`Rotation`).

The log variances ``theta = (log t, log s_1 .. log s_G)`` maximise the evidence (type-II maximum
likelihood; MacKay, *Bayesian Interpolation*, Neural Computation 4(3), 1992, section 4) times
weak log-normal priors. Gradient and Hessian have closed forms, so a safeguarded Newton
iteration, batched over outputs and starting points but independent for each, reaches the
optimum in about ten steps. Nothing depends on the order of rows, on the other outputs, or on
chance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = [
    "Hyperprior",
    "InRowSpace",
    "InWeightSpace",
    "Regression",
    "Rotation",
    "Whitened",
    "maximise_evidence",
    "regression",
]

# Log variances of standardised targets outside these bounds mean "none" and "anything".
_LOWEST, _HIGHEST = -16.0, 10.0
_LONGEST_STEP = 3.0
_STARTS = ((-6.0, 1.0), (-2.0, -1.0))  # (log nugget, log prior variances)


@dataclass(frozen=True, eq=False)
class Hyperprior:
    """Log-normal priors on the variances of standardised targets.

    Attributes:
        mean: ``m x (1 + G)`` means of the log variances (nugget, then groups).
        spread: ``m x (1 + G)`` their standard deviations.
    """

    mean: Tensor
    spread: Tensor


class Regression(Protocol):
    """The regression of ``m`` outputs on features, as a function of ``theta``."""

    def cost(self, theta: Tensor) -> Tensor:
        """Return the negative log evidence, ``...`` for ``... x (1 + G)``."""
        ...

    def derivatives(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return gradient and Hessian of the cost."""
        ...

    def fitted(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the posterior mean at the rows, ``... x n``, and ``w' S^-1 w`` there, ``...``."""
        ...


def regression(Phi: Tensor, y: Tensor, known: Tensor, groups: Tensor) -> Regression:
    """Return the regression in whichever space is smaller.

    Args:
        Phi: ``n x D`` features that the outputs share, or ``m x n x D`` with those of each.
        y: ``m x n`` standardised targets.
        known: ``m x n`` known variances, 0 where unknown.
        groups: ``D`` index of each feature's group.
    """
    rows, features = Phi.shape[-2:]
    kind = InWeightSpace if features <= rows else InRowSpace
    return kind(Phi, y, known, groups)


@dataclass(frozen=True, eq=False)
class Rotation:
    """Rows whose noise has a covariance, turned so that it is independent.

    With ``C = U L U'`` the rows ``U' y``, ``U' Phi`` have the noise ``L + t I``, which is diagonal
    whatever the nugget. Weights, evidence and their derivatives are those of the rows themselves.

    Attributes:
        axes: ``m x n x n``, ``U``.
        known: ``m x n``, the diagonal of ``L``.
    """

    axes: Tensor
    known: Tensor

    @classmethod
    def of(cls, covariance: Tensor) -> Rotation:
        """Return that of ``m x n x n`` covariances; what is below 0 by rounding becomes 0."""
        values, axes = torch.linalg.eigh(covariance)
        return cls(axes, values.clamp_min(0.0))

    def select(self, outputs: Tensor) -> Rotation:
        """Return that of some outputs (``m`` booleans)."""
        return Rotation(self.axes[outputs], self.known[outputs])

    def rows(self, Phi: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return features (``m x n x D``), targets and known variances of the turned rows.

        Args:
            Phi: ``n x D`` features.
            y: ``m x n`` targets.
        """
        return self.axes.mT @ Phi, _times(self.axes.mT, y), self.known


def _membership(theta: Tensor, groups: Tensor) -> Tensor:
    return (groups.unsqueeze(-1) == torch.arange(theta.shape[-1] - 1)).to(theta)  # D x G


def _bordered(corner: Tensor, border: Tensor, block: Tensor) -> Tensor:
    top = torch.cat([corner[..., None, None], border.unsqueeze(-2)], -1)
    return torch.cat([top, torch.cat([border.unsqueeze(-1), block], -1)], -2)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


# Both spaces use the same derivatives. With K = N + A A', A = Phi S^(1/2), P = K^-1, a = P y and
# K_i = dK / dtheta_i:
#   dcost / dtheta_i             = (tr(P K_i) - a' K_i a) / 2
#   d2cost / dtheta_i dtheta_j   = -tr(P K_i P K_j) / 2 + a' K_i P K_j a, plus dcost / dtheta_i
#                                  where i = j, as K_i is linear in exp(theta_i).


@dataclass(frozen=True, eq=False)
class Whitened:
    """The solution at given variances, in weights divided by their prior deviations.

    Attributes:
        design: ``... x n x D``, ``A = Phi S^(1/2)``.
        noise: ``... x n`` total variance of each row, the diagonal of ``N``.
        cholesky: ``... x D x D`` factor of ``B = I + A' N^-1 A``.
        weights: ``... x D`` posterior mean ``u``; the weights proper are ``S^(1/2) u``.
        scale: ``... x D`` prior deviations, the diagonal of ``S^(1/2)``.
        residual: ``... x n``, ``y - A u``.
    """

    design: Tensor
    noise: Tensor
    cholesky: Tensor
    weights: Tensor
    scale: Tensor
    residual: Tensor


@dataclass(frozen=True, eq=False)
class InWeightSpace:
    """:class:`Regression` through ``D x D`` matrices; the arguments are :func:`regression`'s."""

    Phi: Tensor
    y: Tensor
    known: Tensor
    groups: Tensor

    def variances(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return total noise variances (``... x n``) and log prior variances (``... x G``)."""
        return self.known + theta[..., :1].exp(), theta[..., 1:]

    def solve(self, theta: Tensor) -> Whitened:
        """Return the posterior of the weights at ``theta``."""
        noise, by_group = self.variances(theta)
        scale = (by_group / 2).exp()[..., self.groups]
        design = self.Phi * scale.unsqueeze(-2)
        weighted = design / noise.unsqueeze(-1)
        eye = torch.eye(design.shape[-1], dtype=design.dtype)
        cholesky = torch.linalg.cholesky(eye + weighted.mT @ design)
        target = _times(weighted.mT, self.y.expand(noise.shape)).unsqueeze(-1)
        weights = torch.cholesky_solve(target, cholesky).squeeze(-1)
        residual = self.y - _times(design, weights)
        return Whitened(design, noise, cholesky, weights, scale, residual)

    def cost(self, theta: Tensor) -> Tensor:
        """Return the negative log evidence."""
        at = self.solve(theta)
        # y' P y = r' N^-1 r + u' u, which does not cancel when the fit is nearly exact.
        misfit = (at.residual.square() / at.noise).sum(-1) + at.weights.square().sum(-1)
        logdet = at.noise.log().sum(-1)
        logdet = logdet + 2 * at.cholesky.diagonal(dim1=-1, dim2=-2).log().sum(-1)
        return 0.5 * (misfit + logdet + self.y.shape[-1] * math.log(2 * math.pi))

    def derivatives(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return gradient and Hessian of the cost.

        For groups ``g, h``: ``A_g' P A_h`` is the block of ``T = I - B^-1``, and ``A_g' a`` is
        that of ``u``.
        """
        at = self.solve(theta)
        A, N, u = at.design, at.noise, at.weights
        member = _membership(theta, self.groups)
        inverse = torch.cholesky_inverse(at.cholesky)
        T = torch.eye(A.shape[-1], dtype=A.dtype) - inverse
        weighted = A / N.unsqueeze(-1)
        Q = inverse @ weighted.mT  # A' P
        # P = N^-1 - weighted Q, whose n x n entries are never written out.
        taken = (weighted * Q.mT).sum(-1)
        gram = inverse @ (weighted.mT @ weighted)
        P_norm = (N.reciprocal() * (N.reciprocal() - 2 * taken)).sum(-1)
        P_norm = P_norm + (gram * gram.mT).sum((-1, -2))
        a = at.residual / N
        t = theta[..., 0].exp()
        by_group = 0.5 * (T.diagonal(dim1=-1, dim2=-2) - u.square()) @ member
        by_nugget = 0.5 * t * (1 / N - taken - a.square()).sum(-1)
        gradient = torch.cat([by_nugget.unsqueeze(-1), by_group], -1)
        block = member.mT @ (u.unsqueeze(-1) * T * u.unsqueeze(-2) - 0.5 * T.square()) @ member
        Qa = _times(Q, a)
        border = t.unsqueeze(-1) * ((u * Qa - 0.5 * Q.square().sum(-1)) @ member)
        corner = (a * (a / N - _times(weighted, Qa))).sum(-1) - 0.5 * P_norm
        hessian = _bordered(t.square() * corner, border, block)
        return gradient, hessian + torch.diag_embed(gradient)

    def fitted(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the posterior mean at the rows and its penalty."""
        at = self.solve(theta)
        return _times(at.design, at.weights), at.weights.square().sum(-1)


@dataclass(frozen=True, eq=False)
class InRowSpace:
    """:class:`Regression` through ``n x n`` matrices; the arguments are :func:`regression`'s."""

    Phi: Tensor
    y: Tensor
    known: Tensor
    groups: Tensor

    def _kernels(self, theta: Tensor) -> Tensor:
        """Return ``dK / dtheta`` for the groups, ``... x G x n x n``."""
        member = _membership(theta, self.groups)
        Phi = self.Phi if self.Phi.dim() == 2 else self.Phi.unsqueeze(-3)
        parts = Phi * member.mT.unsqueeze(-2)
        return theta[..., 1:].exp()[..., None, None] * (parts @ Phi.mT)

    def _solve(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kernels = self._kernels(theta)
        noise = self.known + theta[..., :1].exp()
        cholesky = torch.linalg.cholesky(kernels.sum(-3) + torch.diag_embed(noise))
        y = self.y.expand(noise.shape).unsqueeze(-1)
        return kernels, cholesky, torch.cholesky_solve(y, cholesky).squeeze(-1)

    def cost(self, theta: Tensor) -> Tensor:
        """Return the negative log evidence."""
        _, cholesky, a = self._solve(theta)
        logdet = 2 * cholesky.diagonal(dim1=-1, dim2=-2).log().sum(-1)
        return 0.5 * ((self.y * a).sum(-1) + logdet + self.y.shape[-1] * math.log(2 * math.pi))

    def derivatives(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return gradient and Hessian of the cost."""
        kernels, cholesky, a = self._solve(theta)
        n = a.shape[-1]
        t = theta[..., :1, None, None].exp()
        eye = torch.eye(n, dtype=a.dtype)
        P = torch.cholesky_inverse(cholesky)
        every = torch.cat([(t * eye).expand(*kernels.shape[:-3], 1, n, n), kernels], -3)
        half = P.unsqueeze(-3) @ every  # P K_i
        toward = _times(every, a.unsqueeze(-2))  # K_i a
        first = half.diagonal(dim1=-1, dim2=-2).sum(-1) - (toward * a.unsqueeze(-2)).sum(-1)
        gradient = 0.5 * first
        traces = half.flatten(-2) @ half.mT.flatten(-2).mT
        hessian = toward @ P @ toward.mT - 0.5 * traces
        return gradient, hessian + torch.diag_embed(gradient)

    def fitted(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the posterior mean at the rows and its penalty."""
        kernels, _, a = self._solve(theta)
        line = _times(kernels.sum(-3), a)
        return line, (line * a).sum(-1)


def maximise_evidence(
    problem: Regression,
    hyper: Hyperprior,
    *,
    start: Tensor | None = None,
    steps: int = 60,
    tolerance: float = 1e-7,
    nuggets: int = 1,
) -> Tensor:
    """Return the log variances (``m x (1 + G)``) of highest evidence times prior.

    Args:
        problem: The regression of ``m`` outputs.
        hyper: Priors on the variances.
        start: ``m x (1 + G)`` where to start; by default two starts, little noise and little
            signal, of which the better end is kept.
        steps: Newton steps at most.
        tolerance: Stop when every output's gradient is below it.
        nuggets: How many of the variances, the first ones, are nuggets.
    """
    m, size = hyper.mean.shape
    if start is None:
        begin = torch.tensor(
            [[t] * nuggets + [s] * (size - nuggets) for t, s in _STARTS], dtype=torch.float64
        )
        theta = begin.unsqueeze(1).expand(-1, m, -1)
    else:
        theta = start.unsqueeze(0)

    def cost(theta: Tensor) -> Tensor:
        return problem.cost(theta) + 0.5 * ((theta - hyper.mean) / hyper.spread).square().sum(-1)

    belief = hyper.spread.square().reciprocal()
    theta = theta.clamp(_LOWEST, _HIGHEST)
    value = cost(theta)
    active = torch.ones_like(value, dtype=torch.bool)
    for _ in range(steps):
        gradient, hessian = problem.derivatives(theta)
        gradient = gradient + (theta - hyper.mean) * belief
        stuck = ((theta <= _LOWEST) & (gradient > 0)) | ((theta >= _HIGHEST) & (gradient < 0))
        gradient = gradient.masked_fill(stuck, 0.0)
        active = active & (gradient.abs().amax(-1) > tolerance)
        if not bool(active.any()):
            break
        # Newton in the metric of |H|: downhill also where the surface curves the wrong way.
        curvature, axes = torch.linalg.eigh(hessian + torch.diag_embed(belief))
        step = -_times(axes, _times(axes.mT, gradient) / curvature.abs().clamp_min(1e-3))
        step = step * (_LONGEST_STEP / step.norm(dim=-1, keepdim=True).clamp_min(_LONGEST_STEP))
        waiting, length = active.clone(), 1.0
        for _ in range(12):
            trial = (theta + length * step).clamp(_LOWEST, _HIGHEST)
            trial = torch.where(waiting.unsqueeze(-1), trial, theta)
            trial_value = cost(trial)
            better = waiting & (trial_value < value)
            theta = torch.where(better.unsqueeze(-1), trial, theta)
            value = torch.where(better, trial_value, value)
            waiting = waiting & ~better
            if not bool(waiting.any()):
                break
            length /= 4
        active = active & ~waiting  # no descent left in float64: as good as converged
    return theta[value.argmin(0), torch.arange(m)]
