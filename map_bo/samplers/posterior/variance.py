r"""Measure where it lowers the posterior variance most: everywhere, or at given targets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from botorch.acquisition.acquisition import AcquisitionFunction
from botorch.utils.transforms import t_batch_mode_transform
from torch import Generator, Tensor

from map_bo.rng import child
from map_bo.samplers.designs.space_filling import sobol_points
from map_bo.samplers.posterior.acquisition import AcquisitionDriven, first_points
from map_bo.samplers.posterior.covariance import Covariances, measurement_noise
from map_bo.samplers.posterior.driven import Situation

__all__ = ["IntegratedVariance", "VarianceReduction", "gain_slopes"]

_LEAST = 1e-30  # of squared gains: keeps the logarithm finite where nothing can be learned


@dataclass(frozen=True)
class IntegratedVariance(AcquisitionDriven):
    """Chooses the measurements that most lower the variance of the gains over the whole space.

    Cohn, *Neural Network Exploration Using Optimal Experiment Design*, 1996, section 3; for the
    quadratic it is I-optimal design under the fitted prior and noise, one point at a time. Any
    number of metrics. Pending points count as measured. The phases and what happens on failures:
    :class:`PosteriorDriven`.

    Attributes:
        targets: Sobol points that stand for the space.
    """

    targets: int = 256

    def acquisition(
        self, situation: Situation, pending: Tensor, generator: Generator
    ) -> AcquisitionFunction:
        """Return the drop of the mean variance by one measurement."""
        points = sobol_points(situation.space, generator=child(generator, "targets"))
        targets = first_points(points, self.targets)
        weights = gain_slopes(situation, targets).square() / len(targets)
        return VarianceReduction(situation, targets, weights, pending)


class VarianceReduction(AcquisitionFunction):
    r"""Logarithm of the drop of weighted posterior variance at target points by one measurement.

    Measuring ``x`` lowers the variance of metric ``i`` at ``t`` by
    ``Cov[f_i(t), f_i(x)]^2 / (Var[f_i(x)] + v_i)`` with ``v_i`` the noise of a measurement; the
    drops are summed with the weights.

    Args:
        situation: What is known.
        targets: ``p x d`` points.
        weights: ``p x m`` weights of the variances on the link scale.
        pending: ``q x d`` points that count as measured.
    """

    def __init__(
        self, situation: Situation, targets: Tensor, weights: Tensor, pending: Tensor
    ) -> None:
        super().__init__(situation.model)
        self.situation, self.targets, self.weights = situation, targets, weights
        self.noise = measurement_noise(situation.model, situation.good.X)
        self.set_X_pending(pending)

    def set_X_pending(self, X_pending: Tensor | None = None) -> None:
        """Let pending points (``q x d``) count as measured."""
        self.pending = self.targets[:0] if X_pending is None else X_pending
        self.covariances = Covariances(self.situation.model, self.targets, self.noise, X_pending)

    def moves(self, X: Tensor) -> Tensor:
        """Return how far one standard outcome at ``X`` (``b x d``) moves the means.

        Returns:
            ``m x b x p`` standard deviations of the change at the targets, with their sign.
        """
        cross, variance = self.covariances.to(X)
        deviation = (variance + self.noise.unsqueeze(-1)).clamp_min(1e-300).sqrt()
        return cross / deviation.unsqueeze(-1)

    def drop(self, moves: Tensor) -> Tensor:
        """Return the drop of the weighted variance, ``b``, from :meth:`moves`."""
        total: Tensor = (self.weights.T.unsqueeze(1) * moves.square()).sum((0, -1))
        return total

    @t_batch_mode_transform(expected_q=1)  # type: ignore[arg-type]  # as botorch's own classes
    def forward(self, X: Tensor) -> Tensor:
        """Return the value at each of ``b`` points (``b x 1 x d``)."""
        return (self.drop(self.moves(X.squeeze(-2))) + _LEAST).log()


def gain_slopes(situation: Situation, X: Tensor) -> Tensor:
    """Return the size of the derivatives of the gains over the link values, ``n x m``.

    At the posterior mean of ``X`` (``n x d``); for minimised metrics the sign is dropped.
    """
    with torch.no_grad():
        mean = situation.model.link_mean(X)
    links = situation.model.links
    slopes = torch.stack([link.slope(mean[:, i]) for i, link in enumerate(links)], -1)
    return (slopes / situation.unit) * situation.scale.ranged
