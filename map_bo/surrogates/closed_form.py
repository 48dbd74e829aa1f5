"""Closed forms of Gaussian processes: the posterior mean for a front solver, leave-one-out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from map_bo.surrogates.kernels import Trend, TrendRBFKernel, trend_features, trend_groups

__all__ = ["ClosedFormMean", "leave_one_out"]

# Covariances held at once (8 MB): more points are taken in slices.
_ENTRIES = 2**20


def leave_one_out(K: Tensor, y: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and latent variance of each value given all others.

    With ``P = K^-1``: mean ``y_i - [P y]_i / P_ii``, variance ``1 / P_ii`` of the observation
    and so ``1 / P_ii - noise_i`` of the latent value (Rasmussen & Williams, *Gaussian Processes
    for Machine Learning*, 2006, equations 5.10-5.12).

    Args:
        K: ``n x n`` covariance of the observations, noise included.
        y: ``n`` observations, prior mean subtracted.
        noise: ``n`` noise variances.
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

    ``mean_j(x) = c_j + phi(u) . w_j + sum_i alpha_ji k_j(u, u_i)``; differentiable once.

    Attributes:
        trend: Which trend features.
        low: ``d`` lower bounds of the box.
        width: ``d`` widths of the box.
        constant: ``m`` prior means.
        trend_weights: ``D x m``: the trend's part of ``K(x, X) alpha``, collapsed.
        lengthscale: ``m x d``.
        centres: ``m x N x (d + 2)``: scaled training inputs, laid out for distances.
        weights: ``m x (d + 1) x N``: ``alpha``, and ``alpha`` times the scaled inputs.
    """

    trend: Trend
    low: Tensor
    width: Tensor
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
                noise variances (``N``) and prior mean; ``N`` and the box are the same for all.
        """
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for kernel, X, y, noise, constant in processes:
            K = kernel(X).to_dense() + torch.diag(noise)
            lower = psd_safe_cholesky(K)
            alpha = torch.cholesky_solve((y - constant).unsqueeze(-1), lower)  # N x 1
            U = (X - kernel.low) / kernel.width
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
            low=first.low,
            width=first.width,
            constant=torch.stack([constant.reshape(()) for *_, constant in processes]),
            trend_weights=torch.cat([trend for trend, _, _ in parts], -1),
            lengthscale=torch.stack([kernel.lengthscales for kernel, *_ in processes]),
            centres=torch.stack([centres for _, centres, _ in parts]),
            weights=torch.stack([weights for *_, weights in parts]),
        )

    def __call__(self, X: Tensor) -> Tensor:
        """Return ``n x m`` means for ``n x d`` points."""
        U = (X - self.low) / self.width
        radial: Tensor = _RadialSums.apply(  # type: ignore[no-untyped-call]
            U, self.lengthscale, self.centres, self.weights
        )
        return self.constant + trend_features(self.trend, U) @ self.trend_weights + radial
