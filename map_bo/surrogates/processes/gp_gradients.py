"""Gaussian processes that are conditioned on observed gradients.

The derivative of a Gaussian process is one too, jointly with it: ``cov(f(z), df/dz'_k)`` and
``cov(df/dz_j, df/dz'_k)`` are derivatives of the covariance (Rasmussen & Williams, *Gaussian
Processes for Machine Learning*, 2006, equation 9.1), here for a trend plus a squared-exponential.
Hyperparameters maximise the joint marginal likelihood of values and gradients.

Given its gradients a process is again a Gaussian process, with mean ``k_g(x)' (K_gg + N)^-1 g`` and
covariance ``k(x, x') - k_g(x)' (K_gg + N)^-1 k_g(x')``. With these as its prior, the values are
ordinary data, and whatever botorch does with a process (posteriors, fantasies) stays as it is.

With about as many evaluations as coefficients the lengthscales are found from gradients at too few
places, and the process is too sure: on merges of digit experts its 95 % intervals covered .5 to
.9 of unseen points, and a Bayesian quadratic with the same gradients predicted better. From twice
as many on the process predicted better; its intervals covered .95 to .99 for an MLP and .83 to
.89 for a CNN with ReLU. A fit costs the cube of the number of values and gradients.

Gradients are per half width of the box, as in :mod:`map_bo.surrogates.gradients`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gpytorch.kernels import Kernel
from gpytorch.means import Mean
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Tensor

from map_bo.surrogates.features import quadratic_feature_gradients
from map_bo.surrogates.gradients import STEEPNESS
from map_bo.surrogates.processes.correlated_noise import noise_matrix
from map_bo.surrogates.processes.kernels import (
    Trend,
    TrendRBFKernel,
    squared_exponential,
    trend_features,
    trend_groups,
)
from map_bo.surrogates.processes.marginal import Fitted, Hyperparameters, LogPrior, search

__all__ = ["ConditionedKernel", "ConditionedMean", "GradientMean", "ObservedGradients", "fit_joint"]


@dataclass(frozen=True, eq=False)
class ObservedGradients:
    """The ``G`` observed gradient components of one process.

    Attributes:
        owner: ``G`` indices of the evaluations that they belong to.
        axis: ``G`` indices of the coefficients.
        values: ``G`` components.
        variance: ``G`` noise variances.
        unknown: Whether the variance of one is unknown; it is 0 then.
    """

    owner: Tensor
    axis: Tensor
    values: Tensor
    variance: Tensor
    unknown: bool = False

    @classmethod
    def of(cls, gradients: Tensor, variance: Tensor) -> ObservedGradients | None:
        """Collect the gradients that are there.

        Args:
            gradients: ``n x d``, NaN where there is none.
            variance: ``n x d``, NaN where unknown.
        """
        owner, axis = (~gradients.isnan()).nonzero().unbind(-1)
        if not len(owner):
            return None
        noise = variance[owner, axis]
        unknown = bool(noise.isnan().any())
        return cls(owner, axis, gradients[owner, axis], noise.nan_to_num(nan=0.0), unknown)

    def scaled(self, unit: Tensor) -> ObservedGradients:
        """Return them in another unit of the values."""
        values, variance = self.values / unit, self.variance / unit.square()
        return ObservedGradients(self.owner, self.axis, values, variance, self.unknown)

    def noisier(self, nugget: Tensor) -> ObservedGradients:
        """Return them with ``nugget`` added to their noise variances."""
        return ObservedGradients(
            self.owner, self.axis, self.values, self.variance + nugget, self.unknown
        )


@dataclass(frozen=True, eq=False)
class _Covariance:
    """A trend plus a squared-exponential, with the covariances of its gradients.

    Attributes:
        trend: Which trend features.
        variances: ``D`` prior variances, one a feature.
        scale: Variance of the squared-exponential part.
        lengthscale: ``d`` lengthscales in the unit cube.
    """

    trend: Trend
    variances: Tensor
    scale: Tensor
    lengthscale: Tensor

    def values(self, U: Tensor, V: Tensor) -> Tensor:
        """Return the covariance of values, ``... x n x k``."""
        first = trend_features(self.trend, U) * self.variances
        smooth = self.scale * squared_exponential(U, V, self.lengthscale)
        return first @ trend_features(self.trend, V).mT + smooth

    def mixed(self, U: Tensor, V: Tensor, axis: Tensor) -> Tensor:
        """Return that of values at ``U`` (``... x n x d``) and gradients at ``V``.

        Returns:
            ``... x n x G``.
        """
        here = V.gather(-1, axis.unsqueeze(-1)).squeeze(-1)
        pull = 0.5 * (U[..., axis] - here) / self.lengthscale[axis].square()
        smooth = self.scale * squared_exponential(U, V, self.lengthscale) * pull
        if self.trend == "constant":
            return smooth
        first = trend_features(self.trend, U) * self.variances
        return smooth + first @ self._jacobian(V, axis).mT

    def gradients(self, V: Tensor, axis: Tensor) -> Tensor:
        """Return that of gradients along ``axis`` (``G``) at ``V`` (``G x d``), ``G x G``."""
        at = V[:, axis]  # row g, column g': the coordinate of point g along the axis of g'
        own = at.diagonal()
        square = self.lengthscale[axis].square()
        one = (own.unsqueeze(-1) - at.mT) / square.unsqueeze(-1)
        other = (at - own) / square
        same = (axis.unsqueeze(-1) == axis).to(V) / square
        smooth = self.scale * squared_exponential(V, V, self.lengthscale)
        smooth = 0.25 * smooth * (same - one * other)
        if self.trend == "constant":
            return smooth
        J = self._jacobian(V, axis)
        return smooth + (J * self.variances) @ J.mT

    def joint(self, U: Tensor, gradients: ObservedGradients) -> Tensor:
        """Return the covariance of values at ``U`` and gradients, ``(n + G) x (n + G)``."""
        V = U[gradients.owner]
        cross = self.mixed(U, V, gradients.axis)
        top = torch.cat([self.values(U, U), cross], -1)
        return torch.cat([top, torch.cat([cross.mT, self.gradients(V, gradients.axis)], -1)])

    def _jacobian(self, V: Tensor, axis: Tensor) -> Tensor:
        every = quadratic_feature_gradients(2 * V - 1)
        return every[torch.arange(len(axis)), axis]


def _of_kernel(kernel: TrendRBFKernel) -> _Covariance:
    groups = trend_groups(kernel.trend, len(kernel.low))
    return _Covariance(kernel.trend, kernel.variances[groups], kernel.scale, kernel.lengthscales)


def fit_joint(
    U: Tensor,
    values: tuple[Tensor, Tensor],
    gradients: ObservedGradients,
    trend: Trend,
    prior: LogPrior,
    starts: Tensor,
) -> tuple[Fitted, Tensor, Tensor]:
    """Return the mode of the hyperparameters, the gradients' nugget, and the misfit of values.

    Gradients have a nugget of their own: the unknown noise, else what the process cannot follow;
    its prior is that of the values', :data:`~map_bo.surrogates.gradients.STEEPNESS` times larger.
    The misfit is the larger of the values' nugget and what that of the gradients implies where its
    noise is known, as in :func:`~map_bo.surrogates.gradients.fit_with_gradients`.

    Args:
        U: ``n x d`` inputs in the unit cube.
        values: ``n`` standardised targets and their known noise variances, 0 where unknown.
        gradients: Standardised gradients.
        trend: Which trend features.
        prior: Prior of the logarithms of the other hyperparameters (``p``).
        starts: ``k x p`` where to start.
    """
    y, known = values
    n, groups = len(y), trend_groups(trend, U.shape[-1])
    count = int(groups[-1]) + 1
    target = torch.cat([y, gradients.values])
    noise = torch.cat([known, gradients.variance])
    steeper = prior.mean[0] + math.log(STEEPNESS)
    spread = prior.spread[0]

    def objective(theta: Tensor) -> tuple[Tensor, Tensor] | None:
        theta = theta.clone().requires_grad_(True)
        with torch.enable_grad():
            hyper = Hyperparameters.from_logs(theta[:-1], count)
            covariance = _Covariance(trend, hyper.trend[groups], hyper.scale, hyper.lengthscale)
            nuggets = torch.cat([hyper.nugget.expand(n), theta[-1].exp().expand(len(target) - n)])
            K = covariance.joint(U, gradients) + torch.diag(noise + nuggets)
        lower, info = torch.linalg.cholesky_ex(K.detach())
        if int(info) != 0:
            return None
        inverse = torch.cholesky_inverse(lower)
        alpha = inverse @ target
        value = 0.5 * (target @ alpha) + lower.diagonal().log().sum()
        # As in Rasmussen & Williams' equation 5.9, through the entries of K alone.
        (slope,) = torch.autograd.grad(
            K, theta, grad_outputs=0.5 * (inverse - alpha.unsqueeze(-1) * alpha)
        )
        belief, by_belief = prior.cost(theta[:-1].detach())
        away = (theta[-1].detach() - steeper) / spread
        value = value + 0.5 * len(target) * math.log(2 * math.pi) + belief + 0.5 * away.square()
        return value, slope + torch.cat([by_belief, (away / spread).view(1)])

    low, high = prior.bounds()[0]
    shift = math.log(STEEPNESS)
    begin = torch.cat([starts, starts[:, :1] + shift], -1)
    best, cost = search(objective, begin, [*prior.bounds(), (low + shift, high + shift)])
    note = None
    if best is None:
        best, cost = torch.cat([prior.mean, steeper.view(1)]), math.inf
        note = "the likelihood was not finite from any start; the priors' values were taken"
    fitted = Fitted(Hyperparameters.from_logs(best[:-1], count), note, cost)
    nugget, steep = fitted.hyperparameters.nugget, best[-1].exp()
    misfit = nugget if gradients.unknown else torch.maximum(nugget, steep / STEEPNESS)
    return fitted, steep, misfit


class ConditionedKernel(Kernel):  # type: ignore[misc]
    """The covariance of a process given its gradients.

    Args:
        prior: Covariance without them.
        X: ``n x d`` coefficients of the evaluations.
        gradients: Gradients on the link scale; their variance is the total, nugget included.
    """

    has_lengthscale = False
    points: Tensor
    lower: Tensor

    def __init__(self, prior: TrendRBFKernel, X: Tensor, gradients: ObservedGradients) -> None:
        super().__init__()
        self.prior, self.observed = prior, gradients
        U = (X - prior.low) / prior.width
        K = _of_kernel(prior).gradients(U[gradients.owner], gradients.axis) + torch.diag(
            gradients.variance
        )
        self.register_buffer("points", U[gradients.owner])
        self.register_buffer("lower", psd_safe_cholesky(K))

    @property
    def dtype(self) -> torch.dtype:
        """The buffers' type; gpytorch looks at parameters, of which there are none."""
        return self.points.dtype

    @property
    def device(self) -> torch.device:
        """The buffers' device."""
        return self.points.device

    @property
    def lengthscales(self) -> Tensor:
        """``d`` lengthscales as shares of the box's widths."""
        return self.prior.lengthscales

    def with_gradients(self, x: Tensor) -> Tensor:
        """Return the prior covariance of values at ``x`` with the gradients, ``... x n x G``."""
        U = (x - self.prior.low) / self.prior.width
        return _of_kernel(self.prior).mixed(U, self.points, self.observed.axis)

    def solve(self, right: Tensor) -> Tensor:
        """Return ``(K_gg + N)^-1 right`` for ``right`` of ``G x k``."""
        solved: Tensor = torch.cholesky_solve(right, self.lower)
        return solved

    def _whitened(self, x: Tensor) -> Tensor:
        right = self.with_gradients(x).mT
        solved: Tensor = torch.linalg.solve_triangular(self.lower, right, upper=False)
        return solved.mT

    def forward(
        self, x1: Tensor, x2: Tensor, diag: bool = False, last_dim_is_batch: bool = False, **_: Any
    ) -> Tensor:
        """Return the covariance of ``x1`` (``... x n x d``) and ``x2`` (``... x k x d``)."""
        first, second = self._whitened(x1), self._whitened(x2)
        plain: Tensor = self.prior.forward(x1, x2, diag=diag)
        return plain - ((first * second).sum(-1) if diag else first @ second.mT)

    def joint(self, X: Tensor, noise: Tensor) -> Tensor:
        """Return the prior covariance of observed values and gradients, noise included."""
        U = (X - self.prior.low) / self.prior.width
        K = _of_kernel(self.prior).joint(U, self.observed)
        return K + torch.diag(torch.cat([noise, self.observed.variance]))

    def leave_one_out(self, X: Tensor, y: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and latent variance of each value without its evaluation's gradients too.

        By the block form of Rasmussen & Williams' equations 5.10-5.12.

        Args:
            X: ``n x d`` coefficients.
            y: ``n`` values, prior mean subtracted.
            noise: ``n`` noise variances.
        """
        n = len(y)
        target = torch.cat([y, self.observed.values])
        P = torch.cholesky_inverse(psd_safe_cholesky(self.joint(X, noise)))
        alpha = P @ target
        means, variances = [], []
        for i in range(n):
            rows = [i, *(n + (self.observed.owner == i).nonzero().flatten()).tolist()]
            block = torch.linalg.inv(P[rows][:, rows])
            means.append(y[i] - block[0] @ alpha[rows])
            variances.append(block[0, 0] - noise[i])
        return torch.stack(means), torch.stack(variances).clamp_min(0.0)


class ConditionedMean(Mean):  # type: ignore[misc]
    """The mean of a process given its gradients.

    Args:
        kernel: The covariance, which has the gradients.
        constant: Mean of the values without them.
    """

    constant: Tensor
    weights: Tensor

    def __init__(self, kernel: ConditionedKernel, constant: float) -> None:
        super().__init__()
        self.kernel = kernel
        weights = kernel.solve(kernel.observed.values.unsqueeze(-1)).squeeze(-1)
        self.register_buffer("constant", torch.tensor(constant, dtype=weights.dtype))
        self.register_buffer("weights", weights)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean at ``x`` (``... x n x d``), ``... x n``."""
        return self.constant + self.kernel.with_gradients(x) @ self.weights


@dataclass(frozen=True, eq=False)
class GradientMean:
    """Posterior means of processes some of which have gradients, from weights computed once.

    Attributes:
        parts: For each process its covariance without gradients, its prior mean, the inputs of its
            values (``n x d``, unit cube), the weights of the covariances with them (``n``), and
            the same of its gradients: kernel given them and weights (``G``), None without any.
        low: ``d`` lower bounds of the box.
        width: ``d`` widths of the box.
    """

    parts: tuple[
        tuple[_Covariance, Tensor, Tensor, Tensor, tuple[ConditionedKernel, Tensor] | None], ...
    ]
    low: Tensor
    width: Tensor

    @classmethod
    def stacked(
        cls,
        processes: Sequence[
            tuple[TrendRBFKernel | ConditionedKernel, Tensor, Tensor, Tensor, Tensor]
        ],
    ) -> GradientMean:
        """Solve for the weights.

        Args:
            processes: For each output covariance, coefficients (``n x d``), values (``n``), noise
                variances (``n``; without gradients also their covariance, ``n x n``) and prior
                mean; the box is the same for all.
        """
        parts = []
        for kernel, X, y, noise, constant in processes:
            target = y - constant
            if isinstance(kernel, ConditionedKernel):
                plain, K = kernel.prior, kernel.joint(X, noise)
                target = torch.cat([target, kernel.observed.values])
            else:
                plain, K = kernel, kernel(X).to_dense() + noise_matrix(noise)
            lower = psd_safe_cholesky(K)
            weights = torch.cholesky_solve(target.unsqueeze(-1), lower).squeeze(-1)
            own, other = weights[: len(y)], weights[len(y) :]
            given = (kernel, other) if isinstance(kernel, ConditionedKernel) else None
            U = (X - plain.low) / plain.width
            parts.append((_of_kernel(plain), constant.reshape(()), U, own, given))
        return cls(tuple(parts), plain.low, plain.width)

    def __call__(self, X: Tensor) -> Tensor:
        """Return the means at ``X`` (``n x d``), ``n x m``; differentiable."""
        U = (X - self.low) / self.width
        columns = []
        for covariance, constant, V, weights, given in self.parts:
            mean = constant + covariance.values(U, V) @ weights
            if given is not None:
                mean = mean + given[0].with_gradients(X) @ given[1]
            columns.append(mean)
        return torch.stack(columns, -1)
