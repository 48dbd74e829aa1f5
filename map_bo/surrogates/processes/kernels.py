"""Covariance functions: a trend with a prior variance for each group of features, plus an RBF.

The *quadratic* trend has the features of :mod:`map_bo.surrogates.features` (constant, linear,
square and cross products of centred coefficients), so a process with this covariance alone is
the Bayesian quadratic, seen in function space. The *constant* trend is the first of them: a mean
that is integrated out instead of fitted.
"""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
from botorch.sampling.pathwise.features.generators import GenKernelFeatures, gen_kernel_features
from botorch.sampling.pathwise.features.maps import FeatureMap
from gpytorch.kernels import Kernel, RBFKernel
from torch import Tensor

from map_bo.space import CoefficientSpace
from map_bo.surrogates.features import feature_groups, quadratic_features

__all__ = [
    "QuadraticKernel",
    "Trend",
    "TrendRBFKernel",
    "squared_distances",
    "squared_exponential",
    "trend_features",
    "trend_groups",
]

Trend = Literal["constant", "quadratic"]


def trend_features(trend: Trend, U: Tensor) -> Tensor:
    """Return the trend's features (``... x D``) of ``U`` (``... x d``, in the unit cube)."""
    if trend == "constant":
        return torch.ones_like(U[..., :1])
    return quadratic_features(2 * U - 1)


def trend_groups(trend: Trend, d: int) -> Tensor:
    """Return for each of the ``D`` features the index of its group."""
    if trend == "constant":
        return torch.zeros(1, dtype=torch.long)
    return feature_groups(d)


def squared_exponential(U: Tensor, V: Tensor, lengthscale: Tensor) -> Tensor:
    """Return ``exp(-1/2 |(u - v) / l|^2)``, ``... x n x k``; differentiable any number of times.

    Args:
        U: ``... x n x d`` in the unit cube.
        V: ``... x k x d`` in the unit cube.
        lengthscale: ``d`` lengthscales.
    """
    A, B = (U - 0.5) / lengthscale, (V - 0.5) / lengthscale
    # Matrix products have the right derivatives, but as a value |a|^2 + |b|^2 - 2 a.b cancels: for
    # coincident points it is a rounding error whose size and sign depend on the BLAS, and a clamp
    # at 0 would take the derivatives away with it. So the value is taken from the differences.
    squares = A.square().sum(-1).unsqueeze(-1) + B.square().sum(-1).unsqueeze(-2)
    products = squares - 2 * A @ B.mT
    distance = squared_distances(A.detach(), B.detach()) + (products - products.detach())
    return torch.exp(-0.5 * distance)


def squared_distances(A: Tensor, B: Tensor) -> Tensor:
    """Return ``|a - b|^2``, ``... x n x k``, from differences: 0 exactly for coincident points.

    As values alone: the root within has no derivative at 0.

    Args:
        A: ``... x n x d``.
        B: ``... x k x d``.
    """
    if A.dim() > B.dim() == 2:  # all rows as one batch, else each batch would have a copy of B
        return squared_distances(A.flatten(0, -2), B).view(*A.shape[:-1], len(B))
    return torch.cdist(A, B, compute_mode="donot_use_mm_for_euclid_dist").square()


class QuadraticKernel(Kernel):  # type: ignore[misc]
    """``k(x, x') = sum_g s_g phi_g(x) . phi_g(x')`` over the groups of the trend's features.

    Its hyperparameters are buffers: :mod:`map_bo.surrogates.processes.marginal` fits them.

    Args:
        space: The space whose box the features are scaled by.
        variances: ``G`` prior variances, one a group (4 for the quadratic trend: constant,
            linear, square, cross; 1 for the constant one).
        trend: Which features.
    """

    has_lengthscale = False
    low: Tensor
    width: Tensor
    variances: Tensor

    def __init__(
        self, space: CoefficientSpace, variances: Tensor, trend: Trend = "quadratic"
    ) -> None:
        super().__init__()
        self.trend = trend
        self.register_buffer("low", space.bounds[0])
        self.register_buffer("width", space.width)
        self.register_buffer("variances", variances)

    @property
    def dtype(self) -> torch.dtype:
        """The buffers' type; gpytorch looks at parameters, of which there are none."""
        return self.low.dtype

    @property
    def device(self) -> torch.device:
        """The buffers' device."""
        return self.low.device

    def weighted_features(self, X: Tensor) -> Tensor:
        """Return ``sqrt(s_g) phi_g(x)``, ``... x D``: their products are the covariance."""
        U = (X - self.low) / self.width
        groups = trend_groups(self.trend, X.shape[-1])
        return trend_features(self.trend, U) * self.variances.sqrt()[groups]

    def forward(
        self, x1: Tensor, x2: Tensor, diag: bool = False, last_dim_is_batch: bool = False, **_: Any
    ) -> Tensor:
        """Return the covariance of ``x1`` (``... x n x d``) and ``x2`` (``... x k x d``)."""
        first, second = self.weighted_features(x1), self.weighted_features(x2)
        return (first * second).sum(-1) if diag else first @ second.mT


class TrendRBFKernel(QuadraticKernel):
    """A trend plus ``a exp(-1/2 |(x - x') / (l width)|^2)``: all the surrogates' covariance.

    Args:
        space: The space whose box the inputs are scaled by.
        variances: ``G`` prior variances of the trend's groups.
        scale: Variance ``a`` of the squared-exponential part, a scalar tensor.
        lengthscale: ``d`` lengthscales as shares of the box's widths.
        trend: Which features.
    """

    scale: Tensor
    lengthscales: Tensor

    def __init__(
        self,
        space: CoefficientSpace,
        variances: Tensor,
        scale: Tensor,
        lengthscale: Tensor,
        trend: Trend = "quadratic",
    ) -> None:
        super().__init__(space, variances, trend)
        self.register_buffer("scale", scale)
        self.register_buffer("lengthscales", lengthscale)

    def forward(
        self, x1: Tensor, x2: Tensor, diag: bool = False, last_dim_is_batch: bool = False, **_: Any
    ) -> Tensor:
        """Return the covariance of ``x1`` (``... x n x d``) and ``x2`` (``... x k x d``)."""
        trend = super().forward(x1, x2, diag=diag)
        U, V = (x1 - self.low) / self.width, (x2 - self.low) / self.width
        if diag:
            away = ((U - V) / self.lengthscales).square().sum(-1)
            return trend + self.scale * torch.exp(-0.5 * away)
        return trend + self.scale * squared_exponential(U, V, self.lengthscales)


class _TrendRBFFeatures(FeatureMap):
    """Features whose products are the trend exactly and the RBF approximately (Fourier)."""

    def __init__(self, kernel: TrendRBFKernel, fourier: FeatureMap) -> None:
        super().__init__()
        self.kernel, self.fourier = kernel, fourier
        self.input_transform = None
        self.output_transform = None

    def forward(self, x: Tensor) -> Tensor:
        wave = self.kernel.scale.sqrt() * self.fourier(x)
        return torch.cat([self.kernel.weighted_features(x), wave], -1)

    @property
    def num_outputs(self) -> int:  # type: ignore[override]
        groups = trend_groups(self.kernel.trend, len(self.kernel.low))
        return len(groups) + int(self.fourier.num_outputs)

    @property
    def batch_shape(self) -> torch.Size:  # type: ignore[override]
        return cast(torch.Size, self.kernel.batch_shape)


@GenKernelFeatures.register(TrendRBFKernel)  # type: ignore[untyped-decorator]
def _pathwise_features(
    kernel: TrendRBFKernel, *, num_inputs: int, num_outputs: int
) -> _TrendRBFFeatures:
    rbf = RBFKernel(ard_num_dims=num_inputs).to(kernel.low)
    rbf.lengthscale = kernel.lengthscales * kernel.width
    rbf.requires_grad_(False)
    features = gen_kernel_features(
        rbf, num_inputs=num_inputs, num_outputs=2 * math.ceil(num_outputs / 2)
    )
    return _TrendRBFFeatures(kernel, features)
