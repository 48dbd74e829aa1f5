"""What a measurement would tell about other points: posterior covariances, less what is pending."""

from __future__ import annotations

from typing import cast

import torch
from botorch.posteriors.gpytorch import GPyTorchPosterior
from torch import Tensor

from map_bo.surrogates.prediction import observation_variance
from map_bo.surrogates.quadratic_model import QuadraticModel
from map_bo.surrogates.surrogate import SurrogateModel

__all__ = ["Covariances", "measurement_noise"]

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
        self._model, self.targets, self.noise = model, targets, noise
        self._parts = (
            None
            if isinstance(model, QuadraticModel)
            else [cast(SurrogateModel, model.subset_output([i])) for i in range(len(noise))]
        )
        self._pending = targets[:0] if pending is None else pending
        self._fixed = torch.cat([targets, self._pending])
        self._half: Tensor | None = None
        if isinstance(model, QuadraticModel):
            self._half = model.features(self._fixed) @ model.root  # m x (p + k) x D
        self._gain: Tensor | None = None
        if len(self._pending):
            p = len(targets)
            with torch.no_grad():
                joint = self._among_fixed()
            block = joint[:, p:, p:]
            eye = torch.eye(len(self._pending), dtype=block.dtype)
            size = block.diagonal(dim1=-1, dim2=-2).mean(-1)[:, None, None]
            block = block + (noise[:, None, None] + _RIDGE * size + 1e-30) * eye
            self._inverse = torch.linalg.inv(block)
            self._gain = joint[:, :p, p:] @ self._inverse  # m x p x k

    def _among_fixed(self) -> Tensor:
        if self._half is not None:
            return self._half @ self._half.mT
        return self._joint(self._fixed)

    def _joint(self, X: Tensor) -> Tensor:
        assert self._parts is not None
        # All surrogates are Gaussian; botorch types `posterior` by its base class.
        posteriors = [cast(GPyTorchPosterior, part.posterior(X)) for part in self._parts]
        return torch.stack([one.distribution.covariance_matrix for one in posteriors])

    def to(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Return the covariances of ``X`` (``b x d``) with the targets, and its variances.

        Returns:
            ``m x b x p`` covariances and ``m x b`` variances, differentiable in ``X``.
        """
        p, b = len(self.targets), len(X)
        if self._half is not None:
            model = cast(QuadraticModel, self._model)
            half = model.features(X) @ model.root  # m x b x D
            cross = half @ self._half.mT
            variance = half.square().sum(-1)
        else:
            joint = self._joint(torch.cat([self._fixed, X]))
            cross = joint[:, -b:, :-b]
            variance = joint[:, -b:, -b:].diagonal(dim1=-1, dim2=-2)
        if self._gain is None:
            return cross, variance.clamp_min(0.0)  # rounding may leave less than nothing
        toward = cross[..., p:]  # m x b x k
        taken = (toward @ self._inverse * toward).sum(-1)
        return cross[..., :p] - toward @ self._gain.mT, (variance - taken).clamp_min(0.0)


def measurement_noise(model: SurrogateModel) -> Tensor:
    """Return the typical variance (``m``, link scale) of one more measurement, misfit included."""
    return observation_variance(model).clamp_min(_RIDGE)
