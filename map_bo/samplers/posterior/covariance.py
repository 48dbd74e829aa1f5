"""What a measurement would tell about other points: posterior covariances, less what is pending.

Posterior draws at a baseline, and at any other point jointly with it.
"""

from __future__ import annotations

import torch
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Generator, Tensor

from map_bo.surrogates.prediction import observation_variance
from map_bo.surrogates.surrogate import SurrogateModel, draw_signs

__all__ = ["Covariances", "JointDraws", "measurement_noise"]

_RIDGE = 1e-9  # of a variance: keeps the covariance of near-equal pending points invertible


class Covariances:
    """Posterior covariances between fixed target points and any other point, link scale.

    Pending points count as measured: what they will tell is taken off, which for a Gaussian
    posterior depends on where they are and not on what will be measured there.

    Args:
        model: The fitted surrogate.
        targets: ``p x d`` points.
        noise: ``m`` variances of a measurement on the link scale.
        pending: ``k x d`` points that are being measured.
    """

    def __init__(
        self, model: SurrogateModel, targets: Tensor, noise: Tensor, pending: Tensor | None = None
    ) -> None:
        self.targets, self.noise = targets, noise
        self._pending = targets[:0] if pending is None else pending
        self._posterior = model.covariances_with(torch.cat([targets, self._pending]))
        self._gain: Tensor | None = None
        if len(self._pending):
            p = len(targets)
            with torch.no_grad():
                joint = self._posterior.among()
            block = joint[:, p:, p:]
            eye = torch.eye(len(self._pending), dtype=block.dtype)
            size = block.diagonal(dim1=-1, dim2=-2).mean(-1)[:, None, None]
            block = block + (noise[:, None, None] + _RIDGE * size + 1e-300) * eye
            self._inverse = torch.linalg.inv(block)
            self._gain = joint[:, :p, p:] @ self._inverse  # m x p x k

    def to(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Return the covariances of ``X`` (``b x d``) with the targets, and its variances.

        Returns:
            ``m x b x p`` covariances and ``m x b`` variances, differentiable in ``X``.
        """
        p = len(self.targets)
        cross, variance = self._posterior.to(X)
        if self._gain is None:
            return cross, variance.clamp_min(0.0)  # rounding may leave less than nothing
        toward = cross[..., p:]  # m x b x k
        taken = (toward @ self._inverse * toward).sum(-1)
        return cross[..., :p] - toward @ self._gain.mT, (variance - taken).clamp_min(0.0)


def measurement_noise(model: SurrogateModel, X: Tensor) -> Tensor:
    """Return the typical variance (``m``, link scale) of one more measurement, misfit included.

    It is at least 1e-9 of the variance of the predictions at ``X`` (``n x d``, evaluated points).
    """
    with torch.no_grad():
        least = _RIDGE * model.link_mean(X).var(0, correction=0)
    return torch.maximum(observation_variance(model), least)


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
                (joint + joint.mT) / 2 + (_JITTER * size + 1e-300) * eye
            )
            normal = torch.randn(m, len(baseline), draws, generator=source, dtype=torch.float64)
            normal = normal * draw_signs(model.metrics)[:, None, None]
            offset = self._cholesky @ normal  # m x p x s
            self._pull = torch.cholesky_solve(offset, self._cholesky)
            self.baseline = (model.link_mean(baseline).T.unsqueeze(-1) + offset).permute(2, 1, 0)
        own = torch.randn(draws, 1, m, generator=source, dtype=torch.float64)
        self._own = own * draw_signs(model.metrics)

    def at(self, X: Tensor) -> Tensor:
        """Return the draws at ``X`` (``b x d``) on the link scale, ``s x b x m``.

        Different rows of ``X`` share the number that is a draw's own, so they are joint with the
        baseline, and not with each other.
        """
        cross, variance = self._covariances.to(X)  # m x b x p, m x b
        moved = (cross @ self._pull).permute(2, 1, 0)
        known = torch.linalg.solve_triangular(self._cholesky, cross.mT, upper=False)
        left = (variance - known.square().sum(-2)).clamp_min(1e-300).sqrt()
        draws: Tensor = self.model.link_mean(X) + moved + left.T * self._own
        return draws
