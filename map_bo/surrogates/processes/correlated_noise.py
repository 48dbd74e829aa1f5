"""Noise with a covariance among the training rows, for gpytorch's exact processes.

gpytorch has known noise by row. Here it is a matrix ``N`` among the rows that a process was fitted
to; whatever it is conditioned on later (fantasies, pending points) has independent noise.

What such noise says of one row is in two parts: what the noise of the others tells of it, and the
*own* rest, of variance ``1 / [N^-1]_ii``. The own part is what rows of independent noise have, and
it is what gpytorch and botorch get to see where they ask for the noise of a row (as the typical
noise of one more measurement).
"""

from __future__ import annotations

from typing import Any

import torch
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood
from gpytorch.likelihoods.noise_models import FixedGaussianNoise
from linear_operator import LinearOperator, to_linear_operator
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Tensor

__all__ = ["CorrelatedNoiseLikelihood", "noise_matrix", "own_noise"]


def noise_matrix(noise: Tensor) -> Tensor:
    """Return noise as a matrix: of ``n`` variances the diagonal one, else ``n x n`` as it is."""
    return torch.diag(noise) if noise.dim() == 1 else noise


def own_noise(matrix: Tensor) -> Tensor:
    """Return for each row the variance of its noise given that of all others, ``n`` of ``n x n``.

    It is ``1 / [N^-1]_ii``; of a diagonal matrix the diagonal. ``N`` must be positive definite.
    """
    variance = matrix.diagonal()
    if torch.equal(matrix, torch.diag(variance)):
        return variance.clone()
    inverse: Tensor = torch.cholesky_inverse(psd_safe_cholesky(matrix))
    return inverse.diagonal().reciprocal()


class _CorrelatedNoise(FixedGaussianNoise):  # type: ignore[misc]
    """The noise model of :class:`CorrelatedNoiseLikelihood`.

    Args:
        own: ``... x n`` variances of the rows' own noise.
        matrix: ``... x n x n`` covariance of all of it.
    """

    def __init__(self, own: Tensor, matrix: Tensor) -> None:
        super().__init__(own)
        self.matrix = matrix

    def forward(
        self,
        *params: Any,
        shape: torch.Size | None = None,
        noise: Tensor | None = None,
        **kwargs: Any,
    ) -> LinearOperator:
        """Return the noise of the given variances, else that of the training rows."""
        found: LinearOperator = super().forward(*params, shape=shape, noise=noise, **kwargs)
        if noise is not None or found.shape[-1] != self.matrix.shape[-1]:
            return found
        return to_linear_operator(self.matrix)

    def _apply(self, fn: Any) -> Any:
        self.matrix = fn(self.matrix)
        return super()._apply(fn)


class CorrelatedNoiseLikelihood(FixedNoiseGaussianLikelihood):  # type: ignore[misc]
    """A Gaussian likelihood whose known noise has a covariance among the training rows.

    ``noise`` is the own part of each row, see the module; ``matrix`` is all of it. Further rows
    have independent noise.

    Args:
        matrix: ``n x n`` covariance of the noise, positive definite.
    """

    def __init__(self, matrix: Tensor) -> None:
        own = own_noise(matrix)
        super().__init__(noise=own)
        self.noise_covar = _CorrelatedNoise(own, matrix)

    @property
    def matrix(self) -> Tensor:
        """The covariance of the noise among the training rows, ``... x n x n``."""
        found: Tensor = self.noise_covar.matrix
        return found

    def get_fantasy_likelihood(self, **kwargs: Any) -> CorrelatedNoiseLikelihood:
        """Return the likelihood with further rows, whose variances are ``noise``."""
        before = self.matrix
        further = super().get_fantasy_likelihood(**kwargs)
        own = further.noise_covar.noise
        n, batch = before.shape[-1], own.shape[:-1]
        matrix = torch.diag_embed(own)
        matrix[..., :n, :n] = before.expand(*batch, n, n)
        further.noise_covar = _CorrelatedNoise(own, matrix)
        grown: CorrelatedNoiseLikelihood = further
        return grown
