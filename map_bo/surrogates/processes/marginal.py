"""Hyperparameters of a Gaussian process by its marginal likelihood, in closed form.

Model of one output, on standardised targets ``y`` and unit-cube inputs ``u``::

    y_i = f(u_i) + e_i,    e_i ~ N(0, v_i + t),
    cov f = sum_g s_g phi_g(u) . phi_g(u') + a exp(-1/2 sum_k (u_k - u'_k)^2 / l_k^2),

with trend features ``phi`` in groups ``g``, known variances ``v`` (0 where unknown) and a fitted
variance ``t``, the *nugget*: the noise where it is unknown, what the process cannot follow where
it is known. Known noise that rows have in common is a matrix ``C``, and ``e ~ N(0, C + t I)``. The
logarithms of ``t``, ``s``, ``a`` and ``l`` have Gaussian priors and are set to their posterior
mode. Value and gradient are Rasmussen & Williams, *Gaussian Processes for Machine
Learning*, 2006, equations 5.8 and 5.9, written out for this covariance, which is several times
faster than automatic differentiation; the search (L-BFGS-B from fixed starts) uses no chance and
never raises.

Closed forms of Gaussian processes: the posterior mean for a front solver, leave-one-out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from linear_operator.utils.cholesky import psd_safe_cholesky
from scipy.optimize import minimize
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from map_bo.surrogates.processes.correlated_noise import noise_matrix
from map_bo.surrogates.processes.kernels import (
    Trend,
    TrendRBFKernel,
    squared_distances,
    trend_features,
    trend_groups,
)

__all__ = [
    "LOWEST_NUGGET",
    "ClosedFormMean",
    "Fitted",
    "Hyperparameters",
    "LogPrior",
    "fit",
    "leave_one_out",
    "negative_log_posterior",
    "search",
]

# Targets are standardised, so a nugget of 2e-6 is a thousandth of their standard deviation, and
# keeps the covariance of hundreds of points far from singular.
LOWEST_NUGGET = 2e-6
_FAILED = 1e25  # what a search sees where the covariance cannot be factorised


@dataclass(frozen=True, eq=False)
class Hyperparameters:
    """What the likelihood is a function of; all positive.

    Attributes:
        nugget: Fitted noise variance, a scalar.
        trend: ``G`` prior variances of the trend's feature groups.
        scale: Variance of the squared-exponential part, a scalar.
        lengthscale: ``d`` lengthscales, in units of the box.
    """

    nugget: Tensor
    trend: Tensor
    scale: Tensor
    lengthscale: Tensor

    @classmethod
    def from_logs(cls, theta: Tensor, groups: int) -> Hyperparameters:
        """Split ``exp(theta)``: nugget, trend, scale, lengthscales."""
        value = theta.exp()
        return cls(value[0], value[1 : 1 + groups], value[1 + groups], value[2 + groups :])


@dataclass(frozen=True, eq=False)
class LogPrior:
    """Gaussian priors on the logarithms, in the order nugget, trend, scale, lengthscales.

    Attributes:
        mean: ``p`` means; also what is taken when no search succeeds.
        spread: ``p`` standard deviations.
    """

    mean: Tensor
    spread: Tensor

    def cost(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the negative log density of ``theta`` (``p``) and its gradient (``p``)."""
        away = (theta - self.mean) / self.spread
        constant = self.spread.log().sum() + 0.5 * len(theta) * math.log(2 * math.pi)
        return 0.5 * away.square().sum() + constant, away / self.spread

    def bounds(self) -> list[tuple[float, float]]:
        """Return where a search may go: five spreads either way, at most e^12 of anything."""
        reach = 5 * self.spread
        low, high = self.mean - reach, self.mean + reach
        low[0] = low[0].clamp_min(math.log(LOWEST_NUGGET))
        return list(zip(low.clamp_min(-14.0).tolist(), high.clamp_max(12.0).tolist(), strict=True))


@dataclass(frozen=True, eq=False)
class Fitted:
    """The mode that was found.

    Attributes:
        hyperparameters: The mode.
        note: Why the priors' values had to be taken instead, ``None`` when a search succeeded.
        cost: Negative log posterior at the mode; infinite where none was found.
    """

    hyperparameters: Hyperparameters
    note: str | None = None
    cost: float = math.inf


def negative_log_posterior(
    theta: Tensor, U: Tensor, y: Tensor, known: Tensor, trend: Trend, prior: LogPrior
) -> tuple[Tensor, Tensor] | None:
    """Return the negative log posterior of ``theta`` (``p``) and its gradient (``p``).

    Args:
        theta: Logarithms of the hyperparameters.
        U: ``n x d`` inputs in the unit cube.
        y: ``n`` standardised targets.
        known: ``n`` known noise variances, 0 where unknown; or their ``n x n`` covariance.
        trend: Which trend features, see :func:`trend_features`.
        prior: Prior of ``theta``.

    Returns:
        ``None`` where the covariance is not positive definite in float64.
    """
    Phi, groups = trend_features(trend, U), trend_groups(trend, U.shape[-1])
    count = int(groups.max()) + 1
    hyper = Hyperparameters.from_logs(theta, count)
    centred = U - 0.5
    A = centred / hyper.lengthscale
    smooth = hyper.scale * torch.exp(-0.5 * squared_distances(A, A))
    K = (Phi * hyper.trend[groups]) @ Phi.mT + smooth
    if known.dim() == 1:
        K.diagonal().add_(known + hyper.nugget)
    else:
        K = K + known
        K.diagonal().add_(hyper.nugget)
    lower, info = torch.linalg.cholesky_ex(K)
    if int(info) != 0:
        return None
    inverse = torch.cholesky_inverse(lower)
    alpha = inverse @ y
    value = 0.5 * (y @ alpha) + lower.diagonal().log().sum() + 0.5 * len(y) * math.log(2 * math.pi)
    # dL/dtheta = tr(G dK/dtheta) with G = (alpha alpha' - K^-1) / 2.
    G = 0.5 * (alpha.unsqueeze(-1) * alpha - inverse)
    W = G * smooth
    rows = W.sum(-1)
    spread = rows @ centred.square() - (centred * (W @ centred)).sum(0)
    by_feature = ((G @ Phi) * Phi).sum(0) * hyper.trend[groups]
    gradient = torch.cat(
        [
            (hyper.nugget * G.diagonal().sum()).view(1),
            torch.zeros(count, dtype=U.dtype).index_add_(0, groups, by_feature),
            rows.sum().view(1),
            2 * spread / hyper.lengthscale.square(),
        ]
    )
    belief, slope = prior.cost(theta)
    return value + belief, slope - gradient


def fit(
    U: Tensor,
    y: Tensor,
    known: Tensor,
    trend: Trend,
    prior: LogPrior,
    starts: Tensor,
    *,
    steps: int = 100,
) -> Fitted:
    """Return the best mode over ``starts`` (``k x p``, logarithms), or the priors' values.

    Args:
        U: ``n x d`` inputs in the unit cube.
        y: ``n`` standardised targets.
        known: ``n`` known noise variances, 0 where unknown; or their ``n x n`` covariance.
        trend: Which trend features.
        prior: Prior of the logarithms.
        starts: Where to start.
        steps: Iterations at most, from each start.
    """
    groups = int(trend_groups(trend, U.shape[-1]).max()) + 1
    bounds = prior.bounds()

    def objective(theta: Tensor) -> tuple[Tensor, Tensor] | None:
        return negative_log_posterior(theta, U, y, known, trend, prior)

    best, lowest = search(objective, starts, bounds, steps=steps)
    if best is None:
        low, high = np.array(bounds).T
        return Fitted(
            Hyperparameters.from_logs(
                torch.from_numpy(np.clip(prior.mean.numpy(), low, high)), groups
            ),
            note="the likelihood was not finite from any start; the priors' values were taken",
        )
    return Fitted(Hyperparameters.from_logs(best, groups), cost=lowest)


def search(
    objective: Callable[[Tensor], tuple[Tensor, Tensor] | None],
    starts: Tensor,
    bounds: list[tuple[float, float]],
    *,
    steps: int = 100,
) -> tuple[Tensor | None, float]:
    """Return the best point (``p``) that searches from all ``starts`` (``k x p``) came by.

    Args:
        objective: Value and gradient; None where there is no value.
        starts: Where to start.
        bounds: Where to search.
        steps: Iterations at most, from each start.

    Returns:
        The point, None when there was a value nowhere; and its value.
    """
    low, high = np.array(bounds).T
    best, lowest = None, _FAILED

    def evaluate(theta: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal best, lowest
        result = objective(torch.from_numpy(theta))
        if result is None or not bool(torch.isfinite(result[1]).all()):
            return _FAILED, np.zeros_like(theta)
        value = float(result[0])
        if value < lowest:
            best, lowest = theta.copy(), value
        return value, result[1].numpy()

    for start in starts.numpy():
        minimize(
            evaluate,
            np.clip(start, low, high),
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options={"maxiter": steps, "ftol": 1e-8, "gtol": 1e-3},
        )
    return None if best is None else torch.from_numpy(best), lowest


# Covariances held at once (8 MB): more points are taken in slices.
_ENTRIES = 2**20


def leave_one_out(K: Tensor, y: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and latent variance of each value given all others.

    With ``P = K^-1``: mean ``y_i - [P y]_i / P_ii``, variance ``1 / P_ii`` of the observation
    and so ``1 / P_ii - noise_i`` of the latent value (Rasmussen & Williams, *Gaussian Processes
    for Machine Learning*, 2006, equations 5.10-5.12). Where noise has a covariance, ``noise_i`` is
    the row's own (:func:`~map_bo.surrogates.processes.correlated_noise.own_noise`), and the latent
    value is that of the function plus what the noise of the other rows tells of the row's.

    Args:
        K: ``n x n`` covariance of the observations, noise included.
        y: ``n`` observations, prior mean subtracted.
        noise: ``n`` variances of noise that is independent of all else.
    """
    P = torch.cholesky_inverse(psd_safe_cholesky(K))
    own = P.diagonal()
    return y - (P @ y) / own, (1 / own - noise).clamp_min(0.0)


class _RadialSums(torch.autograd.Function):
    """``sum_i alpha_ji exp(-1/2 |(u - u_i) / l_j|^2)`` for every point and output ``j``.

    Value and gradient need the same exponentials: the gradient in ``u`` is
    ``sum_i alpha_ji e_ji (u_i - u) / l_j^2``, so one product with ``[alpha, alpha u_i / l_j]``
    gives both, and going backward costs next to nothing.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, U: Tensor, lengthscale: Tensor, centres: Tensor, weights: Tensor
    ) -> Tensor:
        # U: n x d; lengthscale: m x d; centres: m x N x (d + 2); weights: m x (d + 1) x N.
        n, d = U.shape
        m, N, _ = centres.shape
        sums = U.new_empty(m, d + 1, n)
        rows = max(1, _ENTRIES // N)
        for start in range(0, n, rows):
            part = slice(start, start + rows)
            for j in range(m):
                A = ((U[part] - 0.5) / lengthscale[j]).mT
                half = A.square().sum(0, keepdim=True).mul_(-0.5)
                exponent = centres[j] @ torch.cat([A, half, torch.ones_like(half)])
                sums[j, :, part] = weights[j] @ exponent.exp_()
        ctx.save_for_backward(U, lengthscale, sums)
        return sums[:, 0].mT.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        U, lengthscale, sums = ctx.saved_tensors
        A = ((U - 0.5) / lengthscale.unsqueeze(-2)).mT
        slope = (sums[:, 1:] - A * sums[:, :1]) / lengthscale.unsqueeze(-1)
        return (grad.mT.unsqueeze(-2) * slope).sum(0).mT, None, None, None


@dataclass(frozen=True, eq=False)
class ClosedFormMean:
    """Posterior mean of ``m`` processes with trend and RBF, from cached weights.

    In a space with a choice ``u`` are the inputs of its kernels, ``k`` of them in place of ``d``.

    ``mean_j(x) = c_j + phi(u) . w_j + sum_i alpha_ji k_j(u, u_i)``; differentiable once.

    Attributes:
        trend: Which trend features.
        inputs: Maps points ``n x d`` to the unit cube.
        constant: ``m`` prior means.
        trend_weights: ``D x m``: the trend's part of ``K(x, X) alpha``, collapsed.
        lengthscale: ``m x d``.
        centres: ``m x N x (d + 2)``: scaled training inputs, laid out for distances.
        weights: ``m x (d + 1) x N``: ``alpha``, and ``alpha`` times the scaled inputs.
    """

    trend: Trend
    inputs: Callable[[Tensor], Tensor]
    constant: Tensor
    trend_weights: Tensor
    lengthscale: Tensor
    centres: Tensor
    weights: Tensor

    @classmethod
    def of(
        cls, processes: Sequence[tuple[TrendRBFKernel, Tensor, Tensor, Tensor, Tensor]]
    ) -> ClosedFormMean:
        """Solve for the weights.

        Args:
            processes: For each output kernel, training inputs (``N x d``), targets (``N``),
                noise variances (``N``, or their covariance ``N x N``) and prior mean; ``N`` and the
                box are the same for all.
        """
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for kernel, X, y, noise, constant in processes:
            K = kernel(X).to_dense() + noise_matrix(noise)
            lower = psd_safe_cholesky(K)
            alpha = torch.cholesky_solve((y - constant).unsqueeze(-1), lower)  # N x 1
            U = kernel.inputs(X)
            by_feature = kernel.variances[trend_groups(kernel.trend, X.shape[-1])].unsqueeze(-1)
            trend = by_feature * (trend_features(kernel.trend, U).mT @ alpha)
            A = (U - 0.5) / kernel.lengthscales
            half = -0.5 * A.square().sum(-1, keepdim=True)
            centres = torch.cat([A, torch.ones_like(half), half], -1)
            weights = (kernel.scale * alpha * torch.cat([torch.ones_like(half), A], -1)).mT
            parts.append((trend, centres, weights))
        first = processes[0][0]
        return cls(
            trend=first.trend,
            inputs=first.inputs,
            constant=torch.stack([constant.reshape(()) for *_, constant in processes]),
            trend_weights=torch.cat([trend for trend, _, _ in parts], -1),
            lengthscale=torch.stack([kernel.lengthscales for kernel, *_ in processes]),
            centres=torch.stack([centres for _, centres, _ in parts]),
            weights=torch.stack([weights for *_, weights in parts]),
        )

    def __call__(self, X: Tensor) -> Tensor:
        """Return ``n x m`` means for ``n x d`` points."""
        U = self.inputs(X)
        radial: Tensor = _RadialSums.apply(  # type: ignore[no-untyped-call]
            U, self.lengthscale, self.centres, self.weights
        )
        return self.constant + trend_features(self.trend, U) @ self.trend_weights + radial
