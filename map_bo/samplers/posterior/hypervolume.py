"""Expected hypervolume improvement, up to four metrics: noisy, and with observations as they are.

The improvement needs a decomposition of the space that the front does not dominate, whose size
grows out of bounds beyond four metrics.

Log expected hypervolume improvement, with box decompositions of all samples at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar

import torch
from botorch.acquisition.acquisition import AcquisitionFunction
from botorch.acquisition.logei import qLogNoisyExpectedImprovement
from botorch.acquisition.multi_objective import logei
from botorch.acquisition.multi_objective.base import MultiObjectiveMCAcquisitionFunction
from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
from botorch.acquisition.multi_objective.objective import (
    GenericMCMultiOutputObjective,
    MCMultiOutputObjective,
)
from botorch.acquisition.multi_objective.utils import prune_inferior_points_multi_objective
from botorch.acquisition.objective import GenericMCObjective
from botorch.exceptions.errors import UnsupportedError
from botorch.models.model import Model
from botorch.sampling.base import MCSampler
from botorch.sampling.normal import SobolQMCNormalSampler
from botorch.utils.multi_objective.pareto import is_non_dominated
from botorch.utils.transforms import t_batch_mode_transform
from torch import Generator, Tensor

from map_bo.data import Metric
from map_bo.errors import SamplerError
from map_bo.rng import child_seed
from map_bo.samplers.posterior.acquisition import AcquisitionDriven
from map_bo.samplers.posterior.driven import Situation
from map_bo.surrogates.surrogate import gaussian

__all__ = [
    "MOST_METRICS",
    "LogImprovement",
    "LogNoisyImprovement",
    "QLogEHVI",
    "QLogNEHVI",
    "non_dominated_cells",
    "positive_part",
]

_SOFT = 1e-5  # width over which the positive part is smoothed


def positive_part(x: Tensor, width: float) -> Tensor:
    """Return ``(x + sqrt(x^2 + 4 w^2)) / 2``, the positive part of ``x`` smoothed over ``w``.

    Written as ``max(x, 0) + 2 w^2 / (sqrt(x^2 + 4 w^2) + |x|)``, which loses no digits on either
    side.

    Args:
        x: Any values.
        width: The width ``w``.
    """
    root = (x.square() + 4 * width**2).sqrt()
    # Maximum and modulus have kinks at 0 that cancel: both take the derivative from below there.
    size = torch.where(x > 0, x, -x)
    return x.relu() + 2 * width**2 / (root + size)


def non_dominated_cells(Y: Tensor, reference: Tensor) -> Tensor:
    """Split the space above ``reference`` that no point dominates into disjoint boxes.

    The local upper bounds of the search region are updated point by point (Lacour, Klamroth and
    Fonseca, *A box decomposition algorithm to compute the hypervolume indicator*, 2017,
    algorithm 1), for all sets in one pass. Their equation 2 cuts the dominated region into one
    column along the first metric for each local upper bound; the same column continued to the
    other side of the bound is the part of the non-dominated region beyond it, so these parts are
    the decomposition and no second pass is needed.

    Args:
        Y: ``s x n x m`` points of ``s`` sets, larger is better.
        reference: ``m`` values; points that do not beat all of them are left out.

    Returns:
        ``2 x s x c x m`` lower and upper corners; sets with fewer than ``c`` boxes are filled up
        with boxes of no size at the reference point.
    """
    s, n, m = Y.shape
    useful = (Y > reference).all(-1) & is_non_dominated(Y)
    points = -Y  # the algorithm is written for minimisation
    bounds = -reference.expand(s, m)
    defining = torch.full((s, m, m), -torch.inf, dtype=Y.dtype)
    defining.diagonal(dim1=-2, dim2=-1).copy_(bounds)
    owner = torch.arange(s)
    for i in range(n):
        point = points[owner, i]
        hit = useful[owner, i] & (bounds > point).all(-1)
        if not bool(hit.any()):
            continue
        old, old_defining, point, of = bounds[hit], defining[hit], point[hit], owner[hit]
        parts = [(bounds[~hit], defining[~hit], owner[~hit])]
        for j in range(m):
            column = old_defining[:, :, j].clone()
            column[:, j] = -torch.inf
            keep = point[:, j] >= column.amax(-1)
            new, new_defining = old[keep], old_defining[keep]
            new[:, j] = point[keep, j]
            new_defining[:, j] = point[keep]
            parts.append((new, new_defining, of[keep]))
        bounds, defining, owner = (torch.cat(part) for part in zip(*parts, strict=True))
    lower, upper = -bounds, torch.full_like(bounds, torch.inf)
    for j in range(1, m):
        upper[:, j] = -defining[:, :j, j].amax(-1)
    full = (upper > lower).all(-1)
    lower, upper, owner = lower[full], upper[full], owner[full]
    order = torch.argsort(owner, stable=True)
    counts = torch.bincount(owner, minlength=s)
    position = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner[order]]
    cells = reference.expand(2, s, int(counts.max()), m).clone()
    cells[0, owner[order], position] = lower[order]
    cells[1, owner[order], position] = upper[order]
    return cells


class LogNoisyImprovement(qLogNoisyExpectedHypervolumeImprovement):
    """Logarithm of the noisy expected hypervolume improvement of one more point.

    Daulton, Balandat and Bakshy, *Parallel Bayesian Optimization of Multiple Noisy Objectives with
    Expected Hypervolume Improvement*, 2021, for one point at a time: pending points join the
    baseline. As in Ament et al., *Unexpected Improvements to Expected Improvement for Bayesian
    Optimization*, 2023, the improvement over a box never vanishes altogether, so that its
    logarithm has a gradient everywhere: the positive part of ``x`` is
    ``(x + sqrt(x^2 + 4 t^2)) / 2`` with ``t = 1e-5``. Metrics should therefore be scaled to a
    range of about one by the objective.

    It is botorch's class with two parts of its own. All samples' decompositions come from one
    call of :func:`non_dominated_cells`; botorch spends a tenth of a second on each sample of four
    metrics with 20 points on the front. And the improvement of a single point is a sum of
    products, where botorch handles subsets of several in the logarithmic domain.
    """

    base_sampler: MCSampler | None  # type: ignore[assignment]
    objective: MCMultiOutputObjective

    def __init__(
        self,
        model: Model,
        ref_point: Tensor,
        X_baseline: Tensor,
        *,
        sampler: MCSampler,
        objective: MCMultiOutputObjective,
        X_pending: Tensor | None = None,
    ) -> None:
        with _no_compiler():
            super().__init__(
                model,
                ref_point,
                X_baseline,
                sampler=sampler,
                objective=objective,
                X_pending=X_pending,
                cache_root=False,
            )

    def _set_cell_bounds(self, num_new_points: int) -> None:
        with torch.no_grad():
            posterior = self.model.posterior(self.X_baseline)
            self.q_in = -1
            if self.base_sampler is None:
                samples = self.get_posterior_samples(posterior)
                self.base_sampler = deepcopy(self.sampler)
            else:
                samples = self.base_sampler(posterior)
            self._set_sampler(q_in=num_new_points, posterior=posterior)
            values = self.objective(samples, X=self.X_baseline)
            cells = non_dominated_cells(values, torch.as_tensor(self.ref_point))
        self.register_buffer("cell_lower_bounds", cells[0])
        self.register_buffer("cell_upper_bounds", cells[1])

    def _compute_log_qehvi(self, samples: Tensor, X: Tensor | None = None) -> Tensor:
        values = self.objective(samples, X=X)  # s x b x 1 x m
        if values.shape[-2] != 1:
            raise UnsupportedError("improvements are of one point; make the others pending")
        lower = torch.as_tensor(self.cell_lower_bounds).unsqueeze(1)  # s x 1 x c x m
        upper = torch.as_tensor(self.cell_upper_bounds).unsqueeze(1)
        return _volume_in(lower, upper, values).mean(0).log()


class LogImprovement(MultiObjectiveMCAcquisitionFunction):
    """Logarithm of the expected hypervolume improvement of one more point over a given front.

    Daulton, Balandat and Bakshy, *Differentiable Expected Hypervolume Improvement for Parallel
    Multi-Objective Bayesian Optimization*, 2020, for one point at a time, smoothed as in
    :class:`LogNoisyImprovement`. Pending points join the front at their posterior means.

    Args:
        model: The model.
        front: ``n x m`` values to improve on; the reference point is 0, larger is better.
        sampler: Samples of the posterior.
        objective: From posterior samples to values on the scale of ``front``.
        X_pending: ``p x d`` points that are being evaluated.
    """

    objective: MCMultiOutputObjective
    cell_bounds: Tensor

    def __init__(
        self,
        model: Model,
        front: Tensor,
        *,
        sampler: MCSampler,
        objective: MCMultiOutputObjective,
        X_pending: Tensor | None = None,
    ) -> None:
        super().__init__(model, sampler=sampler, objective=objective)
        self.front = front
        self.set_X_pending(X_pending)

    def set_X_pending(self, X_pending: Tensor | None = None) -> None:
        """Let pending points (``p x d``) join the front."""
        front = self.front
        if X_pending is not None and len(X_pending):
            with torch.no_grad():
                mean = gaussian(self.model.posterior(X_pending)).mean
                front = torch.cat([front, self.objective(mean.unsqueeze(0), X=X_pending)[0]])
        cells = non_dominated_cells(front.unsqueeze(0), front.new_zeros(front.shape[-1]))
        self.register_buffer("cell_bounds", cells)

    @t_batch_mode_transform(expected_q=1)  # type: ignore[arg-type]  # as botorch's own classes
    def forward(self, X: Tensor) -> Tensor:
        """Return the value at each of ``b`` points (``b x 1 x d``)."""
        samples = self.get_posterior_samples(self.model.posterior(X))
        values = self.objective(samples, X=X)  # s x b x 1 x m
        lower, upper = self.cell_bounds.unsqueeze(2)
        return _volume_in(lower, upper, values).mean(0).log()


def _volume_in(lower: Tensor, upper: Tensor, values: Tensor) -> Tensor:
    """Return the smoothed volume below each value inside the boxes, summed over these."""
    sides = torch.minimum(positive_part(values - lower, _SOFT), upper - lower)
    volume = sides[..., 0]
    for j in range(1, sides.shape[-1]):  # a product over a dimension differentiates slowly
        volume = volume * sides[..., j]
    return volume.sum(-1)


@contextmanager
def _no_compiler() -> Iterator[None]:
    # Where it finds a compiler, botorch builds a C++ kernel for this class at first use: half a
    # minute without a word, and last digits that then differ from machine to machine.
    attempted = getattr(logei, "_load_attempted", None)
    if attempted is None:
        yield
        return
    logei._load_attempted = True
    try:
        yield
    finally:
        logei._load_attempted = attempted


MOST_METRICS = 4


@dataclass(frozen=True)
class _Hypervolume(AcquisitionDriven):
    above_reference: ClassVar[bool] = True

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
    expected improvement. Pending points join the baseline. The phases and what happens on
    failures: :class:`PosteriorDriven`.
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
        zero, X = torch.zeros_like(situation.unit), situation.good.X
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
    certain, pending points included; :class:`QLogNEHVI` integrates over it. With a single metric
    both are the noisy expected improvement.
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
