"""Covariance functions: a trend with a prior variance for each group of features, plus an RBF.

The *quadratic* trend has the features of :mod:`map_bo.surrogates.features` (constant, linear,
square and cross products of centred coefficients), so a process with this covariance alone is
the Bayesian quadratic, seen in function space. The *constant* trend is the first of them: a mean
that is integrated out instead of fitted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from botorch.sampling.pathwise.features.generators import GenKernelFeatures, gen_kernel_features
from botorch.sampling.pathwise.features.maps import FeatureMap
from gpytorch.kernels import Kernel, RBFKernel
from torch import Tensor

from map_bo.space import CoefficientSpace
from map_bo.surrogates.features import (
    GROUPS,
    OptionColumns,
    feature_groups,
    inputs,
    quadratic_features,
)

__all__ = [
    "OptionTrend",
    "QuadraticKernel",
    "Trend",
    "TrendRBFKernel",
    "squared_distances",
    "squared_exponential",
    "trend_features",
    "trend_groups",
    "trend_sizes",
]


@dataclass(frozen=True)
class OptionTrend:
    """A trend in a space with a choice: one that all options share, and the deviation of each.

    Attributes:
        each: What they all are.
        columns: Which inputs they are made of.
    """

    each: Literal["constant", "quadratic"]
    columns: OptionColumns

    @property
    def count(self) -> int:
        """How many groups of features there are without a choice."""
        return 1 if self.each == "constant" else len(GROUPS)

    def features_of(self, U: Tensor) -> Tensor:
        """Return the features of one of them, of some columns."""
        return trend_features(self.each, U)

    def groups_of(self, d: int) -> Tensor:
        """Return the groups of the features of one of them, of ``d`` columns."""
        return trend_groups(self.each, d)


Trend = Literal["constant", "quadratic"] | OptionTrend


def trend_sizes(trend: Trend, d: int) -> list[float]:
    """Return by what the prior variance of each group of features is divided."""
    if isinstance(trend, OptionTrend):
        found: list[float] = trend.columns.sizes(trend.groups_of, trend.count).tolist()
        return found
    return torch.bincount(trend_groups(trend, d)).clamp_min(1).tolist()


def trend_features(trend: Trend, U: Tensor) -> Tensor:
    """Return the trend's features (``... x D``) of ``U`` (``... x d``, in the unit cube)."""
    if isinstance(trend, OptionTrend):
        return trend.columns.features(U, trend.features_of)
    if trend == "constant":
        return torch.ones_like(U[..., :1])
    return quadratic_features(2 * U - 1)


def trend_groups(trend: Trend, d: int) -> Tensor:
    """Return for each of the ``D`` features the index of its group."""
    if isinstance(trend, OptionTrend):
        return trend.columns.groups(trend.groups_of, trend.count)
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
        self.space = space
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

    def inputs(self, X: Tensor) -> Tensor:
        """Return ``X`` (``... x d``) in the unit cube; see :func:`~.features.inputs`."""
        if self.space.choice is None:
            return (X - self.low) / self.width
        return inputs(X, self.space)

    def weighted_features(self, X: Tensor) -> Tensor:
        """Return ``sqrt(s_g) phi_g(x)``, ``... x D``: their products are the covariance."""
        U = self.inputs(X)
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
        lengthscale: ``d`` lengthscales as shares of the box's widths; in a space with a choice
            one for each of its inputs.
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
        U, V = self.inputs(x1), self.inputs(x2)
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
        # Its lengthscales are per unit of x, or of the inputs where these are others.
        seen = x if self.kernel.space.choice is None else self.kernel.inputs(x)
        wave = self.kernel.scale.sqrt() * self.fourier(seen)
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
    if kernel.space.choice is not None:
        num_inputs = len(kernel.lengthscales)
    rbf = RBFKernel(ard_num_dims=num_inputs).to(kernel.low)
    of_inputs = kernel.space.choice is not None
    rbf.lengthscale = kernel.lengthscales if of_inputs else kernel.lengthscales * kernel.width
    rbf.requires_grad_(False)
    features = gen_kernel_features(
        rbf, num_inputs=num_inputs, num_outputs=2 * math.ceil(num_outputs / 2)
    )
    return _TrendRBFFeatures(kernel, features)
