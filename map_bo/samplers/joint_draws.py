"""Posterior draws at a baseline, and at any other point jointly with it."""

from __future__ import annotations

import torch
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Generator, Tensor

from map_bo.samplers.covariance import Covariances
from map_bo.surrogates.surrogate import SurrogateModel

__all__ = ["JointDraws"]

_JITTER = 1e-7  # of a variance: near points of a smooth function are nearly dependent


class JointDraws:
    """Draws of all metrics at a baseline and, conditionally on these, at other points.

    A draw at ``x`` is the posterior mean there, moved by what the draw was at the baseline, plus
    what the baseline leaves open times a normal number of the draw's own. So each draw at each
    ``x`` is joint with the baseline and differentiable in ``x``, and no factorisation is repeated.

    Args:
        model: The fitted surrogate.
        baseline: ``p x d`` points.
        draws: How many draws ``s``.
        generator: Source of all randomness; read, never advanced.
    """

    def __init__(
        self, model: SurrogateModel, baseline: Tensor, draws: int, *, generator: Generator
    ) -> None:
        self.model = model
        m = len(model.metrics)
        source = torch.Generator().manual_seed(generator.initial_seed())
        self._covariances = Covariances(model, baseline, torch.zeros(m, dtype=torch.float64))
        with torch.no_grad():
            joint, variance = self._covariances.to(baseline)
            size = variance.mean(-1)[:, None, None]
            eye = torch.eye(len(baseline), dtype=torch.float64)
            self._cholesky = psd_safe_cholesky(
                (joint + joint.mT) / 2 + (_JITTER * size + 1e-30) * eye
            )
            normal = torch.randn(m, len(baseline), draws, generator=source, dtype=torch.float64)
            offset = self._cholesky @ normal  # m x p x s
            self._pull = torch.cholesky_solve(offset, self._cholesky)
            self.baseline = (model.link_mean(baseline).T.unsqueeze(-1) + offset).permute(2, 1, 0)
        self._own = torch.randn(draws, 1, m, generator=source, dtype=torch.float64)

    def at(self, X: Tensor) -> Tensor:
        """Return the draws at ``X`` (``b x d``) on the link scale, ``s x b x m``.

        Different rows of ``X`` share the number that is a draw's own, so they are joint with the
        baseline, and not with each other.
        """
        cross, variance = self._covariances.to(X)  # m x b x p, m x b
        moved = (cross @ self._pull).permute(2, 1, 0)
        known = torch.linalg.solve_triangular(self._cholesky, cross.mT, upper=False)
        left = (variance - known.square().sum(-2)).clamp_min(1e-30).sqrt()
        draws: Tensor = self.model.link_mean(X) + moved + left.T * self._own
        return draws
