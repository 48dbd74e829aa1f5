r"""Score where it settles the front, for what it costs: which examples of which row come next.

An action is a new row on some share of all examples, or more examples of one task on a row that
was measured before. Its worth is the expected drop of the doubt about the front, which is that of
:mod:`map_bo.samplers.posterior.front_uncertainty` (``criterion="variance"``): the variance of
utilities at the points that are plausibly somebody's best. The action with the largest drop per
cost is taken; a task whose front is settled has nothing to drop, and is not measured again.

In closed form, for each metric alone and on its link scale. Rows that cover the same examples err
together, so what an action tells depends on what the other rows cover. With ``C`` the covariance of
the best linear unbiased estimates (:mod:`map_bo.examples.information`), ``M`` the number of
examples, ``S`` the covariance of outcomes and ``t`` the misfit of the surrogate, the noise of the
rows is ``N = C - S / M + t I``. An action adds information ``U diag(w) U'``, so ``C`` falls by

    G G' = C U (diag(1 / w) + U' C U)^{-1} U' C,

and what is seen of the function gains the precision

    N_after^{-1} - N^{-1} = H H',   H H' = N^{-1} G (I - G' N^{-1} G)^{-1} G' N^{-1}.

With ``P`` the posterior covariance at rows and targets, the variances at the targets fall by the
diagonal of ``P_TR H (I + H' P_RR H)^{-1} H' P_RT``. Nothing depends on outcomes that are yet to
come, so what is in flight counts as scored.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Generator, Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import ConfigError, SurrogateError
from map_bo.examples.information import (
    further_information,
    information,
    information_of_new_rows,
    outcome_covariance,
    with_new_row,
)
from map_bo.examples.sets import Part
from map_bo.pareto.indicators import preference_weights
from map_bo.rng import child, child_seed
from map_bo.samplers.allocation.allocation import LEAST, Action, Standing, prefix
from map_bo.samplers.designs.space_filling import sobol_points
from map_bo.samplers.posterior.acquisition import first_points
from map_bo.samplers.posterior.driven import Situation
from map_bo.samplers.posterior.front_uncertainty import (
    FrontUncertainty,
    plausible_optima,
    utility_weights,
)
from map_bo.scale import farthest_rows
from map_bo.space import CoefficientSpace
from map_bo.surrogates.feasibility import Requirements
from map_bo.surrogates.surrogate import Surrogate
from map_bo.values import real_number

__all__ = ["FrontDoubt"]

_VAGUE = 1e6  # the variance of a row of which nothing was scored, in variances of one outcome
_JITTER = 1e-9
_EXACT = 1e-6  # the noise variance of a measurement without noise, in prior variances

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FrontDoubt:
    """Chooses rows and examples by the expected drop of the doubt about the front per cost.

    Attributes:
        acquisition: What the doubt is: its preferences, draws, surrogate and reference point.
        begin: Share of the budget that base, experts and blend have at first; the share of the
            examples that a new row is measured on follows from it.
        least: Examples of each task that a new row is measured on at least, where there are so
            many: on fewer, merges agree by chance, and a task looks settled that is not.
        steps: Shares of examples that a new row may be measured on, in units of the first.
        pool: Points at which a new row is imagined.
        most: Rows that are considered for more examples, those with the largest effect first.
    """

    acquisition: FrontUncertainty = field(default_factory=FrontUncertainty)
    begin: float = 1 / 6
    least: int = 100
    steps: tuple[float, ...] = (1.0, 2.0, 4.0)
    pool: int = 24
    most: int = 64

    def __post_init__(self) -> None:
        if not 0 < real_number("begin", self.begin) <= 1:
            raise ConfigError(
                f"begin must be above 0 and at most 1, got {self.begin}", hint="such as 0.2"
            )

    def through(self, surrogate: Surrogate, requirements: Requirements) -> Self:
        """Return the allocation that looks through the surrogate of a run."""
        seeing = self.acquisition.with_requirements(requirements)
        if seeing.surrogate is None:
            seeing = seeing.with_surrogate(surrogate)
        return replace(self, acquisition=seeing)

    def _share(self, standing: Standing) -> float:
        anchors = len(standing.space.anchors().X)
        return min(1.0, standing.budget * self.begin / anchors)

    def first(self, standing: Standing) -> tuple[Part, ...]:
        """Return what a new row is measured on: so much that the anchors take their share."""
        return prefix(standing, self._share(standing), least=self.least)

    def next(self, standing: Standing, *, generator: Generator) -> Action | None:
        """Return the action with the largest drop per cost; None when nothing can be afforded."""
        first = self.first(standing)
        begun = Action(None, first) if standing.affords(first) else None
        anchors = len(standing.space.anchors().X)
        if len(standing.covered) < anchors or int(standing.seen.ok.sum()) < 3:
            return begun
        try:
            doubt = self._doubt(standing, generator)
            return begun if doubt is None else self._best(standing, doubt, begun)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            logger.warning("the worth of examples could not be told, so a row is begun: %s", error)
            return begun

    def _best(self, standing: Standing, doubt: _Doubt, begun: Action | None) -> Action | None:
        best, most = begun, 0.0
        if begun is not None:
            for parts in self._beginnings(standing):
                worth = doubt.of_new_row(parts) / standing.cost(parts)
                if worth > most:
                    best, most = Action(None, parts), worth
        for action in self._further(standing, doubt.rows):
            worth = doubt.of(action) / standing.cost(action.parts)
            if worth > most:
                best, most = action, worth
        return best

    def _beginnings(self, standing: Standing) -> list[tuple[Part, ...]]:
        share = self._share(standing)
        found: dict[tuple[Part, ...], None] = {}
        for step in self.steps:
            parts = prefix(standing, min(1.0, share * step), least=round(self.least * step))
            if standing.affords(parts):
                found[parts] = None
        return list(found)

    def _further(self, standing: Standing, rows: Sequence[int]) -> list[Action]:
        """Return the ways to go on with rows: twice as many examples of one task, if affordable."""
        found = []
        for row in rows:
            if row in standing.busy:
                continue
            for name, size in standing.sizes.items():
                at = standing.covered[row].get(name, 0)
                if not standing.sets[name].divisible or at >= size or at == 0:
                    continue
                room = int((standing.left + 1e-9) * size / standing.weights[name])
                stop = min(size, 2 * max(LEAST, at), at + room)
                if stop - at >= min(LEAST, size - at):
                    found.append(Action(row, (Part(name, at, stop),)))
        return found

    def _doubt(self, standing: Standing, generator: Generator) -> _Doubt | None:
        seen, space = standing.seen, standing.space
        waiting = sorted(set(standing.covered) - set(standing.rows))
        count = len(standing.covered)
        source = child(generator, "allocation", count, round(1e6 * standing.spent))
        try:
            situation, screening, _ = self.acquisition.situation(
                seen,
                space,
                standing.X[waiting],
                generator=source,
                seed=child_seed(source, "libraries"),
            )
            W = preference_weights(
                self.acquisition.preferences,
                len(seen.metrics),
                generator=child(source, "preferences"),
            )
            W = situation.scale.weights(W)
            targets = plausible_optima(situation, W, self.acquisition.draws, generator=source)
        except SurrogateError:
            return None
        weights = utility_weights(situation, targets, W)
        chosen = farthest_rows(targets, min(self.pool, len(targets)))
        filling = first_points(sobol_points(space, generator=child(source, "pool")), self.pool // 3)
        pool = torch.cat([targets[chosen], filling])
        return _Doubt(standing, screening.kept, situation, waiting, pool, targets, weights)


class _Doubt:
    """The doubt about the front, and what actions would take off it.

    Args:
        standing: Where the search stands.
        seen: What the surrogate was fitted to.
        situation: The fit.
        waiting: Numbers of the rows in flight that have no outcome.
        pool: ``b x d`` points at which new rows are imagined.
        targets: ``p x d`` points that are plausibly best.
        weights: ``p x m`` weights of the variances there.
    """

    def __init__(
        self,
        standing: Standing,
        seen: Observations,
        situation: Situation,
        waiting: Sequence[int],
        pool: Tensor,
        targets: Tensor,
        weights: Tensor,
    ) -> None:
        good = seen.ok
        held = [row for row, ok in zip(standing.rows, good.tolist(), strict=True) if ok]
        self.rows = tuple(held)
        every = [*held, *waiting]
        X, model = standing.X[every], situation.model
        self._position = {row: i for i, row in enumerate(every)}
        with torch.no_grad():
            joint = model.joint(torch.cat([X, pool, targets]))[1]
            means = model.link_mean(torch.cat([X, pool]))
        evaluator_of = {name: key for key, one in standing.sets.items() for name in one.metrics}
        self._metrics: dict[str, list[_OneMetric]] = {}
        kept = seen.select(good)
        width = _widths(standing.space)
        distances = torch.cdist(torch.cat([X, pool]) / width, X / width)
        for j, metric in enumerate(seen.metrics):
            if not bool((weights[:, j] > 0).any()):
                continue
            key = evaluator_of[metric.name]
            column = standing.sets[key].metrics.index(metric.name)
            one = _OneMetric(
                metric,
                _outcomes(kept, key, column),
                [standing.covered[row].get(key, 0) for row in every],
                standing.sizes[key],
                distances,
                situation.model.links[j].slope(means[:, j]),
                float(model.misfit_variance()[j]),
                joint[j],
                weights[:, j],
                kept.Yvar[:, j],
            )
            self._metrics.setdefault(key, []).append(one)

    def of(self, action: Action) -> float:
        """Return the drop by more examples of a row."""
        assert action.row is not None
        row = self._position[action.row]
        return sum(
            one.drop(row, part.stop) for part in action.parts for one in self._metrics_of(part)
        )

    def of_new_row(self, parts: Sequence[Part]) -> float:
        """Return the drop by a new row at the best point of the pool."""
        drops = [one.drops_at_pool(part.stop) for part in parts for one in self._metrics_of(part)]
        return float(torch.stack(drops).sum(0).max()) if drops else 0.0

    def _metrics_of(self, part: Part) -> list[_OneMetric]:
        return self._metrics.get(part.evaluator, [])


def _widths(space: CoefficientSpace) -> Tensor:
    low, high = (torch.tensor(ends, dtype=torch.float64) for ends in (space.lower, space.upper))
    width = high - low
    return torch.where(width > 0, width, torch.ones_like(width))


def _outcomes(seen: Observations, evaluator: str, column: int) -> Tensor | None:
    """Return outcomes by row and example; None where rows have none."""
    found = [row.get(evaluator) for row in seen.examples]
    if not found or any(one is None for one in found):
        return None
    return torch.stack([one.row()[:, column] for one in found if one is not None])


class _OneMetric:
    """What actions would tell of one metric.

    Args:
        metric: The metric.
        outcomes: ``r x size`` outcomes of the rows that have some; None for a metric that is
            measured as a whole.
        covered: For each of ``R >= r`` rows, the rows in flight last: positions covered or in
            flight.
        size: All positions.
        distances: ``(R + b) x R`` distances of rows and pool from the rows.
        slopes: ``R + b`` derivatives of the metric by its link value.
        misfit: The surrogate's misfit variance, link scale.
        joint: ``(R + b + p) x (R + b + p)`` posterior covariance, link scale.
        weights: ``p`` weights of the variances at the targets.
        noise: ``r`` variances of the measurements, for a metric without outcomes.
    """

    def __init__(
        self,
        metric: Metric,
        outcomes: Tensor | None,
        covered: Sequence[int],
        size: int,
        distances: Tensor,
        slopes: Tensor,
        misfit: float,
        joint: Tensor,
        weights: Tensor,
        noise: Tensor,
    ) -> None:
        R = len(covered)
        unit = slopes[:R].clamp_min(1e-12)
        self._slopes, self._misfit, self._weights = slopes, misfit, weights
        self._distances, self._joint, self._size, self._R = distances, joint, size, R
        if outcomes is None:  # as a whole: independent rows, which have their measurement or none
            known = noise[noise.isfinite()]
            usual = float(known.median()) if len(known) else 0.0
            least = _EXACT * max(float(joint.diagonal().max()) + misfit, _EXACT)
            usual = max(usual * size, least * float(unit.max()) ** 2)
            S = usual * torch.eye(R, dtype=torch.float64)
            scored = [size if i < len(noise) else 0 for i in range(R)]
        else:
            bounds = None
            if (
                metric.kind == "proportion"
                and metric.lower is not None
                and metric.upper is not None
            ):
                bounds = (metric.lower, metric.upper)
            S = outcome_covariance(outcomes, bounds=bounds)
            for row in range(len(outcomes), R):
                S = with_new_row(S, distances[:row, :row], distances[row, :row])
            scored = outcomes.isfinite().sum(-1).tolist() + [0] * (R - len(outcomes))
        scored = [min(count, size) for count in scored]
        self._raw = S
        self._S = S / (unit.unsqueeze(-1) * unit)
        self._counts = scored
        vague = torch.diag(1 / (_VAGUE * self._S.diagonal()))
        self._C = torch.linalg.inv(information(self._S, scored) + vague)
        self._inverse: Tensor | None = None
        for row, count in enumerate(covered):
            if min(count, size) > self._counts[row]:
                self._take(row, min(count, size))

    def _noise_inverse(self) -> Tensor:
        if self._inverse is None:
            self._inverse = torch.linalg.inv(_noise(self._C, self._S, self._size, self._misfit))
        return self._inverse

    def _precision(self, row: int, stop: int) -> Tensor:
        """Return ``H`` (``R x b``) of a row that is to be covered up to ``stop``."""
        U, w = further_information(self._S, self._counts, row, stop)
        return _gained(self._C, self._noise_inverse(), U, w)

    def _take(self, row: int, stop: int) -> None:
        """Let a row in flight count as covered up to ``stop``."""
        H = self._precision(row, stop)
        R = self._R
        cross = self._joint[:, :R] @ H
        root = torch.linalg.cholesky(_eye(H) + H.T @ self._joint[:R, :R] @ H)
        taken = torch.linalg.solve_triangular(root, cross.T, upper=False)
        self._joint = self._joint - taken.T @ taken
        U, w = further_information(self._S, self._counts, row, stop)
        inner = torch.diag(1 / w) + U.T @ self._C @ U
        G = self._C @ U
        self._C = self._C - G @ torch.linalg.solve(inner, G.T)
        self._counts = [stop if i == row else count for i, count in enumerate(self._counts)]
        self._inverse = None

    def drop(self, row: int, stop: int) -> float:
        """Return the drop by covering a row up to ``stop``."""
        if stop <= self._counts[row]:
            return 0.0
        return float(self._drop(self._precision(row, stop), torch.arange(self._R)))

    def drops_at_pool(self, stop: int) -> Tensor:
        """Return the drops (``b``) by new rows at the points of the pool on ``stop`` examples."""
        R, p = self._R, len(self._weights)
        b, stop = len(self._joint) - R - p, min(stop, self._size)
        raw = torch.stack(
            [
                with_new_row(self._raw, self._distances[:R], self._distances[point])
                for point in range(R, R + b)
            ]
        )
        own = self._slopes[R : R + b, None]
        unit = torch.cat([self._slopes[:R].expand(b, -1), own], -1).clamp_min(1e-12)
        S = raw / (unit.unsqueeze(-1) * unit.unsqueeze(-2))
        U, w = information_of_new_rows(S, self._counts, stop)
        C = torch.zeros_like(S)
        C[:, :-1, :-1], C[:, -1, -1] = self._C, _VAGUE * S[:, -1, -1]
        inverse = torch.linalg.inv(_noise(C, S, self._size, self._misfit))
        at = torch.cat([torch.arange(R).expand(b, -1), torch.arange(R, R + b)[:, None]], -1)
        return self._drop(_gained(C, inverse, U, w), at)

    def _drop(self, H: Tensor, at: Tensor) -> Tensor:
        """Return the drops by precisions ``H H'`` (``... x R x b``) at positions (``... x R``)."""
        p = len(self._weights)
        cross = self._joint[-p:][:, at].movedim(0, -2) @ H
        among = self._joint[at.unsqueeze(-1), at.unsqueeze(-2)]
        inner = _eye(H) + H.mT @ among @ H
        root = torch.linalg.cholesky((inner + inner.mT) / 2)
        taken = torch.linalg.solve_triangular(root, cross.mT, upper=False)
        total: Tensor = (self._weights * taken.square().sum(-2)).sum(-1)
        return total


def _bounds(metric: Metric) -> tuple[float, float] | None:
    if metric.kind != "proportion" or metric.lower is None or metric.upper is None:
        return None
    return metric.lower, metric.upper


def _eye(H: Tensor) -> Tensor:
    return torch.eye(H.shape[-1], dtype=H.dtype)


def _noise(C: Tensor, S: Tensor, size: int, misfit: float) -> Tensor:
    own = S.diagonal(dim1=-1, dim2=-2)
    return C - S / size + torch.diag_embed(misfit + (_JITTER + 1e-3 / size) * own)


def _gained(C: Tensor, inverse: Tensor, U: Tensor, w: Tensor) -> Tensor:
    """Return ``H`` with ``H H'`` the precision that is gained; see the module."""
    CU = C @ U
    inner = torch.diag_embed(1 / w) + U.mT @ CU
    root = torch.linalg.cholesky((inner + inner.mT) / 2)
    G = torch.linalg.solve_triangular(root, CU.mT, upper=False).mT
    NG = inverse @ G
    left = _eye(G) - G.mT @ NG
    level, axes = torch.linalg.eigh((left + left.mT) / 2)
    gained: Tensor = NG @ (axes * level.clamp_min(1e-9).rsqrt().unsqueeze(-2))
    return gained
