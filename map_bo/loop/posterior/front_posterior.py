"""How certain a front is: probabilities of dominance, hypervolume, and expected optimism.

Everything rests on joint draws of the metrics at many points (:mod:`joint_posterior`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from map_bo.data import Front, Metric, Observations, to_maximisation
from map_bo.loop.posterior.joint_posterior import (
    DIRECTIONS,
    JointPosterior,
    plausible_points,
    real_draws,
    root,
    volumes,
)
from map_bo.loop.recommend import Recommendation, objectives
from map_bo.loop.settings import Settings
from map_bo.pareto.dominance import non_dominated
from map_bo.pareto.indicators import hypervolume, hypervolume_kind
from map_bo.pareto.trust import Coverage
from map_bo.rng import child
from map_bo.scale import Scale, broken, farthest_rows
from map_bo.space import CoefficientSpace
from map_bo.surrogates.links import from_link
from map_bo.surrogates.surrogate import SurrogateModel, draw_signs
from map_bo.surrogates.validation import LeavesOneOut, fitted_rows, noise_covariance

__all__ = [
    "FrontUncertainty",
    "assess",
    "expected_optimism",
    "front_probabilities",
    "hypervolume_interval",
    "left_out_optimism",
    "with_uncertainty",
]

_DRAWS = 128
_MOST_POINTS = 1500  # covariances have at most this many rows: 18 MB per metric
_EXACT_METRICS = 4  # hypervolumes of up to this many metrics are exact
_EXACT_POINTS = {1: 1500, 2: 1500}  # number of points of exact hypervolumes, by metrics
_FEWER_POINTS = 500
_POOL = 256  # points that the front of a simulated truth may take


def front_probabilities(values: Tensor, evaluated: Tensor) -> Tensor:
    """Return for each point the share of draws in which nothing dominates it, ``k``.

    Args:
        values: ``s x k x m`` draws at the points, larger is better.
        evaluated: ``s x n x m`` draws at the evaluated points; they may dominate too.
    """
    k = values.shape[1]
    everything = torch.cat([values, evaluated], 1)
    hits = torch.zeros(k, dtype=torch.float64)
    for draw in everything:
        hits += non_dominated(draw)[:k]
    return hits / len(values)


def hypervolume_interval(
    values: Tensor, predicted: Tensor, *, generator: Generator
) -> dict[str, Any]:
    """Return the posterior of the real hypervolume of a set of points, as plain data.

    With up to four metrics the hypervolume of each draw is exact, on up to 1500 points with one or
    two metrics and 500 points spread over the front with more (``points``).
    With more metrics it is scalarised (:func:`volumes`) on all points, and multiplied by the one
    factor that makes the scalarised hypervolume of the prediction itself exact.

    Args:
        values: ``s x k x m`` draws of the real metrics, scaled, reference at 0.
        predicted: ``k x m`` the prediction, scaled alike.
        generator: Source of all randomness.

    Returns:
        ``median``, ``lower``, ``upper`` (95 %), ``predicted`` (of the same points), ``draws``,
        ``points`` and ``kind``: ``"exact"`` or how it was approximated.
    """
    s, k, m = values.shape
    zero = torch.zeros(m, dtype=torch.float64)
    most = _EXACT_POINTS.get(m, _FEWER_POINTS)
    if m <= _EXACT_METRICS:
        rows = sorted(farthest_rows(predicted, most))
        found = torch.tensor([hypervolume(draw, zero) for draw in values[:, rows]])
        own, points, kind = hypervolume(predicted[rows], zero), len(rows), "exact"
    else:
        sets = torch.cat([values, predicted.unsqueeze(0)])
        scalarised = volumes(sets, generator=generator)
        own, points = hypervolume(predicted, zero), k
        right = own / float(scalarised[-1]) if float(scalarised[-1]) > 0 else 1.0
        found = right * scalarised[:-1]
        kind = f"scalarised on {DIRECTIONS} directions, calibrated at the prediction ("
        kind += f"{hypervolume_kind(predicted, zero)})"
    levels = torch.tensor([0.025, 0.5, 0.975], dtype=torch.float64)
    lower, median, upper = found.double().quantile(levels).tolist()
    return {
        "median": median,
        "lower": lower,
        "upper": upper,
        "predicted": own,
        "draws": s,
        "points": points,
        "kind": kind,
    }


def expected_optimism(
    model: SurrogateModel,
    front: Tensor,
    evaluated: Tensor,
    pool: Tensor,
    *,
    generator: Generator,
    count: int = 64,
) -> tuple[Tensor, Tensor] | None:
    """Return the optimism that a front like this one is expected to have, without verification.

    The winner's curse, by simulation. A truth ``f`` is drawn from the posterior; evaluations
    ``z' = f(X) + e`` are simulated with the noise and misfit of the real ones; the surrogate is
    fitted to them, hyperparameters held; its own front over ``front`` and ``pool`` is taken;
    and its predictions there are compared with the drawn truth. With ``V`` the covariance of the
    noise of the evaluations and ``S`` the joint posterior covariance, the refitted mean is
    ``mu + S(x, X) V^-1 (z' - z)``, because ``k(x, X) (K + V)^-1 = S(x, X) V^-1``; so nothing is
    fitted again.

    It cannot see what the surrogate does not model: wrong hyperparameters, or a truth whose
    deviations have another form than the misfit. So it is the optimism of a surrogate that is
    right; :func:`left_out_optimism` is the check on that.

    Args:
        model: The fitted surrogate.
        front: ``k x d`` points of the front.
        evaluated: ``n x d`` the rows that ``model`` was fitted to, in their order.
        pool: ``p x d`` further points that a front may take.
        generator: Source of all randomness.
        count: How many truths are drawn.

    Returns:
        ``m`` mean optimism (predicted minus real, positive when predicted too well whatever the
        direction, own units) and ``m`` standard deviations over the truths; or None when the
        model does not say what it was fitted to (:class:`LeavesOneOut`).
    """
    if not isinstance(model, LeavesOneOut):
        return None
    targets, total = model.training_targets()
    misfit = model.misfit_variance()
    at = torch.cat([front, pool])
    q = len(at)
    joint = JointPosterior.of(model, torch.cat([at, evaluated]))
    F = joint.draw(count, generator=child(generator, "truths"))
    noise = torch.randn(
        count, *total.shape, generator=child(generator, "noise"), dtype=torch.float64
    )
    signs = draw_signs(model.metrics)
    change = F[:, q:] + total.sqrt() * (noise * signs) - targets  # z' - z
    weights = change / total.clamp_min(1e-300)  # V^-1 (z' - z)
    weights = weights.nan_to_num(nan=0.0)  # what was not measured has no weight
    together = noise_covariance(model)
    if together is not None:
        for j, V in enumerate(together):
            there = ~V.diagonal().isnan()
            V = V[there][:, there]
            drawn = (noise * signs)[:, there, j] @ root(V).mT
            change = F[:, q:][:, there, j] + drawn - targets[there, j]
            weights[:, there, j] = torch.linalg.solve(V, change.mT).mT
    moved = torch.einsum("jqn,snj->sqj", joint.covariance[:, :q, q:], weights)
    predicted = joint.gains(joint.mean[:q] + moved)
    error = misfit.sqrt() * torch.randn(
        count, q, len(misfit), generator=child(generator, "misfit"), dtype=torch.float64
    )
    error = error * signs
    gap = predicted - joint.gains(F[:, :q] + error)
    means = torch.stack([gap[i][non_dominated(predicted[i])].mean(0) for i in range(count)])
    return means.mean(0), means.std(0)


def left_out_optimism(model: SurrogateModel, seen: Observations) -> tuple[Tensor, Tensor] | None:
    """Return the optimism of predicting each evaluation from all the others.

    It is the mean over evaluations of the leave-one-out prediction minus the measurement. It
    detects a surrogate that is wrong, but it is about the evaluated points and not about the
    front: where evaluations are few for their dimension, predicting an expert from all others is
    an extrapolation, unlike the front, and the result is several times the front's optimism.

    Returns:
        ``m`` means (as of :func:`expected_optimism`) and ``m`` standard errors; None when the model
        cannot leave evaluations out.
    """
    if not isinstance(model, LeavesOneOut):
        return None
    seen = fitted_rows(model, seen)
    mean, _ = model.leave_one_out()
    gap = to_maximisation(from_link(mean, model.links) - seen.Y, seen.metrics)
    if bool(gap.isnan().any()):
        columns = [column[~column.isnan()] for column in gap.T]
        each = [(column.mean(), column.std(0) / math.sqrt(len(column))) for column in columns]
        return torch.stack([mean for mean, _ in each]), torch.stack([se for _, se in each])
    return gap.mean(0), gap.std(0) / math.sqrt(len(gap))


@dataclass(frozen=True, eq=False)
class FrontUncertainty:
    """What the posterior says about a front.

    Attributes:
        front: The front with its probabilities.
        hypervolume: See :func:`hypervolume_interval`.
        left_out: Metric name -> ``mean`` and ``se`` of :func:`left_out_optimism`.
        simulated: Metric name -> ``mean`` and ``sd`` of :func:`expected_optimism`. All are None
            where the surrogate cannot leave evaluations out.
    """

    front: Front
    hypervolume: Mapping[str, Any]
    left_out: Mapping[str, Mapping[str, float | None]]
    simulated: Mapping[str, Mapping[str, float | None]]

    def describe(self) -> dict[str, Any]:
        """Return all but the front as plain data."""
        return {
            "hypervolume": dict(self.hypervolume),
            "optimism": {"left_out": dict(self.left_out), "simulated": dict(self.simulated)},
        }


def assess(
    front: Front,
    model: SurrogateModel,
    seen: Observations,
    space: CoefficientSpace,
    scale: Scale,
    *,
    guarded: bool,
    generator: Generator,
    draws: int = _DRAWS,
) -> FrontUncertainty:
    """Assess how certain a predicted front is.

    Of a front with more than 1,500 points, that many are drawn; the others have no probability.

    Args:
        front: The predicted front.
        model: The surrogate that predicted it.
        seen: What the surrogate was fitted to.
        space: The coefficients.
        scale: The scale of the metrics.
        guarded: Whether the front was kept where the data support the surrogate.
        generator: Source of all randomness.
        draws: How many posterior draws.
    """
    metrics, fitted = seen.metrics, fitted_rows(model, seen)
    evaluated = fitted.X
    generator = child(generator, "uncertainty")
    rows = torch.arange(len(front))
    if len(rows) > _MOST_POINTS:
        order = torch.randperm(len(rows), generator=child(generator, "rows"))
        rows = order[:_MOST_POINTS].sort().values
    X = front.X[rows]
    values, known = real_draws(
        model, X, evaluated, space, count=draws, generator=child(generator, "draws")
    )
    probability = torch.full((len(front),), torch.nan, dtype=torch.float64)
    counted = objectives(seen, scale)
    whole = known if bool(fitted.ok.all()) else known[:, fitted.ok]
    if scale.constraints:  # what breaks a constraint dominates nothing
        missed = broken(to_maximisation(whole, metrics), metrics, scale.constraints)
        whole = whole.masked_fill((missed > 0).any(-1, keepdim=True), -math.inf)
    if bool(counted.any()):
        probability[rows] = front_probabilities(values[..., counted], whole[..., counted])
    predicted = scale.gains(front.mean[rows])
    volume = hypervolume_interval(
        scale.gains(values, maximised=True),
        predicted,
        generator=child(generator, "directions"),
    )
    coverage = Coverage.of(seen.with_any().X, space) if guarded else None
    some = sorted(farthest_rows(predicted, _POOL // 2))
    pool = plausible_points(
        X[some], space, coverage, count=_POOL, generator=child(generator, "pool")
    )
    curse = expected_optimism(
        model, X[some], evaluated, pool, generator=child(generator, "optimism")
    )
    return FrontUncertainty(
        front=replace(front, probability=probability),
        hypervolume=volume,
        left_out=_by_metric(metrics, left_out_optimism(model, seen), "se"),
        simulated=_by_metric(metrics, curse, "sd"),
    )


def _by_metric(
    metrics: Sequence[Metric], found: tuple[Tensor, Tensor] | None, spread: str
) -> dict[str, dict[str, float | None]]:
    if found is None:
        return {metric.name: {"mean": None, spread: None} for metric in metrics}
    pairs = zip(*(part.tolist() for part in found), strict=True)
    return {
        metric.name: {"mean": mean, spread: width}
        for metric, (mean, width) in zip(metrics, pairs, strict=True)
    }


def with_uncertainty(
    found: Recommendation,
    seen: Observations,
    space: CoefficientSpace,
    settings: Settings,
    *,
    generator: Generator,
) -> Recommendation:
    """Return ``found`` with the assessment of its front (:func:`assess`), and the time it took."""
    start = time.perf_counter()
    sure = assess(
        found.front,
        found.model,
        seen,
        space,
        found.scale,
        guarded=settings.guard,
        generator=generator,
    )
    seconds = {**found.seconds, "uncertainty": time.perf_counter() - start}
    return replace(found, front=sure.front, uncertainty=sure.describe(), seconds=seconds)
