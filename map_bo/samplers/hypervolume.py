"""Expected hypervolume improvement, up to four metrics: noisy, and with observations as they are.

The improvement needs a decomposition of the space that the front does not dominate, whose size
grows out of bounds beyond four metrics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from botorch.acquisition.acquisition import AcquisitionFunction
from botorch.acquisition.logei import qLogNoisyExpectedImprovement
from botorch.acquisition.multi_objective.objective import GenericMCMultiOutputObjective
from botorch.acquisition.multi_objective.utils import prune_inferior_points_multi_objective
from botorch.acquisition.objective import GenericMCObjective
from botorch.sampling.normal import SobolQMCNormalSampler
from torch import Generator, Tensor

from map_bo.data import Metric
from map_bo.errors import SamplerError
from map_bo.rng import child_seed
from map_bo.samplers.acquisition import AcquisitionDriven
from map_bo.samplers.improvement import LogImprovement, LogNoisyImprovement
from map_bo.samplers.posterior import Situation

__all__ = ["MOST_METRICS", "QLogEHVI", "QLogNEHVI"]

MOST_METRICS = 4


@dataclass(frozen=True)
class _Hypervolume(AcquisitionDriven):
    def check(self, metrics: tuple[Metric, ...]) -> None:
        """Refuse more than four metrics.

        Raises:
            SamplerError: With the samplers for any number of metrics in its hint.
        """
        super().check(metrics)
        if len(metrics) > MOST_METRICS:
            raise SamplerError(
                f"{type(self).__name__} takes up to {MOST_METRICS} metrics and there are "
                f"{len(metrics)}",
                hint="use sampler=adaptive, hvs_nei, qlognparego or front_uncertainty, which take "
                "any number",
            )


def _single(
    situation: Situation, pending: Tensor, sampler: SobolQMCNormalSampler
) -> AcquisitionFunction:
    gains = situation.gains()

    def only(samples: Tensor, X: Tensor | None = None) -> Tensor:
        return gains(samples, X)[..., 0]

    return qLogNoisyExpectedImprovement(
        situation.model,
        X_baseline=situation.good.X,
        sampler=sampler,
        objective=GenericMCObjective(only),
        X_pending=pending if len(pending) else None,
        prune_baseline=True,
        cache_root=False,
    )


@dataclass(frozen=True)
class QLogNEHVI(_Hypervolume):
    """Maximises the noisy expected hypervolume improvement over the surrogate's posterior.

    Each point maximises the logarithm of the expected improvement of the noisy hypervolume
    (Daulton, Balandat and Bakshy, 2021; Ament et al., 2023). With a single metric it is the noisy
    expected improvement. The phases and what happens on failures: :class:`PosteriorDriven`.
    """

    def acquisition(
        self, situation: Situation, pending: Tensor, generator: Generator
    ) -> AcquisitionFunction:
        """Return the logarithm of the noisy expected hypervolume improvement."""
        seed = child_seed(generator, "noise")
        sampler = SobolQMCNormalSampler(torch.Size([self.mc_samples]), seed=seed)
        if len(situation.good.metrics) == 1:
            return _single(situation, pending, sampler)
        # Metrics are scaled by their observed range: botorch's smoothing has absolute widths.
        gains = GenericMCMultiOutputObjective(situation.gains())
        zero, X = torch.zeros_like(situation.reference), situation.good.X
        # Points that are on the front of no sample change nothing but the time it takes.
        baseline = prune_inferior_points_multi_objective(
            situation.model, X, ref_point=zero, objective=gains, num_samples=2 * self.mc_samples
        )
        return LogNoisyImprovement(
            situation.model,
            ref_point=zero,
            X_baseline=baseline if len(baseline) else X[:1],
            sampler=sampler,
            objective=gains,
            X_pending=pending if len(pending) else None,
        )


@dataclass(frozen=True)
class QLogEHVI(_Hypervolume):
    """Maximises the expected hypervolume improvement over the posterior mean of what was observed.

    Daulton, Balandat and Bakshy, *Differentiable Expected Hypervolume Improvement for Parallel
    Multi-Objective Bayesian Optimization*, NeurIPS 2020, in the logarithmic form of Ament et al.,
    2023. The front to improve on is that of the posterior mean at the evaluated points, taken as
    certain; :class:`QLogNEHVI` integrates over it. With a single metric both are the noisy
    expected improvement.
    """

    def acquisition(
        self, situation: Situation, pending: Tensor, generator: Generator
    ) -> AcquisitionFunction:
        """Return the logarithm of the expected hypervolume improvement."""
        seed = child_seed(generator, "noise")
        sampler = SobolQMCNormalSampler(torch.Size([self.mc_samples]), seed=seed)
        if len(situation.good.metrics) == 1:
            return _single(situation, pending, sampler)
        with torch.no_grad():
            front = situation.mean_gains(situation.good.X)
        return LogImprovement(
            situation.model,
            front=front,
            sampler=sampler,
            objective=GenericMCMultiOutputObjective(situation.gains()),
            X_pending=pending if len(pending) else None,
        )
