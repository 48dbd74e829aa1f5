"""A surrogate that knows more than its run: measurements from elsewhere, metric by metric.

In a tree of merges a node searches a space of its own, whose points ``u`` stand for the points
``c = u R`` of a larger space. What its parts measured lies in that larger space too, on some of the
metrics only. Surrogates treat metrics independently, so each metric is fitted to all of its own
measurements in the larger space, and the node sees the fit along its own directions ``R``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from botorch.acquisition.objective import PosteriorTransform
from botorch.models.model import FantasizeMixin
from botorch.posteriors.posterior import Posterior
from torch import Generator, Tensor

from map_bo.data import Observations
from map_bo.errors import SurrogateError
from map_bo.observed import stacked_covariance
from map_bo.plain import identity_of
from map_bo.scale import same_points
from map_bo.space import CoefficientSpace
from map_bo.surrogates.auto import (
    AutoModel,
    Selection,
    SideBySide,
    leaving_out,
    noise_matrices,
)
from map_bo.surrogates.quadratic_model import spread_matrix
from map_bo.surrogates.surrogate import (
    PointCovariances,
    SampledFunctions,
    Surrogate,
    SurrogateModel,
    fits_partial_rows,
    has_uncertainty,
)
from map_bo.surrogates.validation import LeavesOneOut, promises_leave_one_out

__all__ = ["Informed", "InformedLeavingOut", "InformedModel"]


class InformedModel(SurrogateModel, FantasizeMixin):
    """A model of the larger space, seen along the directions of a smaller one.

    Args:
        whole: The model of the larger space, of the same metrics.
        directions: ``k x d``: what a unit of each of the ``k`` coefficients is in it.
        selection: Which model each metric has, and why.
    """

    def __init__(
        self, whole: SideBySide, directions: Tensor, selection: Sequence[Selection]
    ) -> None:
        super().__init__()
        self.whole, self.directions, self.selection = whole, directions, tuple(selection)
        self.metrics, self.links = whole.metrics, whole.links

    @property
    def batch_shape(self) -> torch.Size:
        """Leading dimensions of the posterior; empty unless conditioned on batches."""
        return self.whole.batch_shape

    @property
    def likelihood(self) -> None:
        """There is no common gpytorch likelihood; botorch only asks whether there is one."""
        return None

    def describe_selection(self) -> list[dict[str, Any]]:
        """Return which candidate models each metric, as plain data."""
        return [selection.describe() for selection in self.selection]

    def link_mean(self, X: Tensor) -> Tensor:
        """Return the posterior mean on the link scale, ``n x m`` for ``n x k``."""
        return self.whole.link_mean(X @ self.directions)

    def posterior(  # type: ignore[override]
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: PosteriorTransform | None = None,
    ) -> Posterior:
        """Return the joint Gaussian posterior at ``X`` (``... x q x k``) on the link scale."""
        return self.whole.posterior(
            X @ self.directions, output_indices, observation_noise, posterior_transform
        )

    def for_metrics(self, columns: Sequence[int]) -> InformedModel:
        """Return the model of some metrics alone."""
        selection = [self.selection[j] for j in columns]
        return self._with(self.whole.for_metrics(columns), selection, 0)

    def condition_on_observations(
        self, X: Tensor, Y: Tensor, noise: Tensor | None = None, **kwargs: Any
    ) -> InformedModel:
        """Return the model that has also seen ``Y`` at ``X``, hyperparameters held."""
        more = self.whole.condition_on_observations(X @ self.directions, Y, noise, **kwargs)
        return self._with(more, self.selection, X.shape[-2])

    def joint(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean (``q x m``) and covariance (``m x q x q``) of each metric at ``X``."""
        return self.whole.joint(X @ self.directions)

    def covariances_with(self, points: Tensor) -> PointCovariances:
        """Return the posterior covariances of other points with ``points`` (``p x k``)."""
        return _Covariances(self, points)

    def sample_functions(self, k: int, *, generator: Generator) -> SampledFunctions:
        """Draw ``k`` functions of the larger space, seen along the directions."""
        return _Functions(self.whole.sample_functions(k, generator=generator), self.directions)

    def misfit_variance(self) -> Tensor:
        """Return the variance of the lack of fit (``m``, link scale)."""
        return self.whole.misfit_variance()

    def _with(self, whole: SideBySide, selection: Sequence[Selection], more: int) -> InformedModel:
        del more
        return InformedModel(whole, self.directions, selection)


class InformedLeavingOut(InformedModel):
    """An informed model whose parts all leave evaluations out.

    Args:
        whole: The model of the larger space, of the same metrics.
        directions: ``k x d``: what a unit of each of the ``k`` coefficients is in it.
        selection: Which model each metric has, and why.
        rows: Which of the run's own rows the part of each metric was fitted to, ``n x m``
            booleans; these are its last, and are left out one by one in validation.
    """

    def __init__(
        self, whole: SideBySide, directions: Tensor, selection: Sequence[Selection], rows: Tensor
    ) -> None:
        super().__init__(whole, directions, selection)
        self.rows = rows

    @property
    def own(self) -> int:
        """How many rows are the run's own."""
        return len(self.rows)

    def leave_one_out(self) -> tuple[Tensor, Tensor]:
        """Return mean and latent variance of the run's own rows, each without itself."""
        return self._own([part.leave_one_out() for part in leaving_out(self.whole.models)])

    def training_targets(self) -> tuple[Tensor, Tensor]:
        """Return the run's own rows as fitted and their total noise variance, ``n x m`` each."""
        return self._own([part.training_targets() for part in leaving_out(self.whole.models)])

    def noise_covariance(self) -> Tensor | None:
        """Return that among the run's own rows, ``m x n x n``; None where it is independent."""
        found = noise_matrices(self.whole.models)
        if found is None:
            return None
        parts = []
        for matrix, held in zip(found, self.whole.columns, strict=True):
            there = self.rows[:, held[0]]
            ahead = matrix.shape[-1] - int(there.sum())
            parts.append(spread_matrix(matrix[:, ahead:, ahead:], there))
        return self.whole.arranged(parts, 0)

    def _own(self, pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        rows = [self.rows[:, held[0]] for held in self.whole.columns]
        first, second = (
            self.whole.arranged(
                [_last(pair[i], there) for pair, there in zip(pairs, rows, strict=True)]
            )
            for i in (0, 1)
        )
        return first, second

    def _with(
        self, whole: SideBySide, selection: Sequence[Selection], more: int
    ) -> InformedLeavingOut:
        rows = torch.cat([self.rows, torch.ones(more, self.rows.shape[1], dtype=torch.bool)])
        return InformedLeavingOut(whole, self.directions, selection, rows)

    def for_metrics(self, columns: Sequence[int]) -> InformedLeavingOut:
        """Return the model of some metrics alone."""
        whole = self.whole.for_metrics(columns)
        selection = [self.selection[j] for j in columns]
        return InformedLeavingOut(whole, self.directions, selection, self.rows[:, list(columns)])


def _last(values: Tensor, rows: Tensor) -> Tensor:
    """Return the last of ``values`` at the rows that have them (``n`` booleans), else NaN."""
    last = values[len(values) - int(rows.sum()) :]
    if bool(rows.all()):
        return last
    spread = values.new_full((len(rows), values.shape[-1]), torch.nan)
    spread[rows] = last
    return spread


class _Covariances(PointCovariances):
    def __init__(self, model: InformedModel, points: Tensor) -> None:
        self._directions = model.directions
        self._whole = model.whole.covariances_with(points @ model.directions)

    def among(self) -> Tensor:
        return self._whole.among()

    def to(self, X: Tensor) -> tuple[Tensor, Tensor]:
        return self._whole.to(X @ self._directions)


class _Functions(SampledFunctions):
    def __init__(self, whole: SampledFunctions, directions: Tensor) -> None:
        self._whole, self._directions = whole, directions
        self.explicit = whole.explicit

    def __call__(self, X: Tensor) -> Tensor:
        return self._whole(X @ self._directions)

    def each(self, X: Tensor, which: Tensor) -> Tensor:
        return self._whole.each(X @ self._directions, which)


@dataclass(frozen=True, eq=False)
class Informed:
    """Settings of a surrogate that is fitted to a run's evaluations and to what is known besides.

    Attributes:
        surrogate: What is fitted in the larger space.
        space: The larger space, of ``d`` coefficients.
        directions: ``k x d``: what a unit of each coefficient of the run is in the larger space.
        known: Metric name -> further measurements of that metric alone, in the larger space.
            Metrics with measurements at the same points are fitted together. What the run measured
            itself counts once.
    """

    surrogate: Surrogate
    space: CoefficientSpace
    directions: Tensor
    known: Mapping[str, Observations] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Informed({self.surrogate!r})"

    def describe(self) -> dict[str, Any]:
        """Return plain data by which it is recognised: what is known may grow in the same run."""
        name = f"{Informed.__module__}:{Informed.__qualname__}"
        return {"class": name, "fields": {"surrogate": identity_of(self.surrogate)}}

    @property
    def leaves_one_out(self) -> bool:
        """Whether the models leave evaluations out: when those of the surrogate do."""
        return promises_leave_one_out(self.surrogate)

    @property
    def takes_partial_rows(self) -> bool:
        """Whether each metric is fitted to all rows that have it: when the surrogate does so."""
        return fits_partial_rows(self.surrogate)

    @property
    def certain(self) -> bool:
        """Whether the models have no uncertainty: when those of the surrogate have none."""
        return not has_uncertainty(self.surrogate)

    def fit(self, seen: Observations, space: CoefficientSpace) -> InformedModel:
        """Fit each metric to all of its measurements.

        Raises:
            SurrogateError: When a metric has too few, or the directions do not fit the spaces.
        """
        if self.directions.shape != (space.d, self.space.d):
            raise SurrogateError(
                f"directions of shape {tuple(self.directions.shape)} do not take {space.d} "
                f"coefficients to {self.space.d}"
            )
        own = seen.with_any() if self.takes_partial_rows else seen.succeeded()
        at = own.X @ self.directions
        further = {
            metric.name: _elsewhere(self.known[metric.name].succeeded(), at, self.space)
            for metric in seen.metrics
            if metric.name in self.known
        }
        groups: dict[tuple[tuple[float, ...], ...], list[int]] = {}
        for j, metric in enumerate(seen.metrics):
            elsewhere = further.get(metric.name)
            X = () if elsewhere is None else tuple(map(tuple, elsewhere.X.tolist()))
            groups.setdefault(X, []).append(j)
        parts: list[SurrogateModel] = []
        for X, columns in groups.items():
            rows = _columns(own, columns, at)
            if X:
                before = _side_by_side([further[metric.name] for metric in rows.metrics])
                rows = before.append(rows)
            parts.append(self.surrogate.fit(rows, self.space))
        selection = _selections(parts, list(groups.values()), seen)
        whole = SideBySide(parts, list(groups.values()))
        if all(isinstance(part, LeavesOneOut) for part in parts):
            there = torch.empty_like(own.measured)
            for columns in groups.values():
                there[:, columns] = own.measured[:, columns].any(-1, keepdim=True)
            return InformedLeavingOut(whole, self.directions, selection, there)
        return InformedModel(whole, self.directions, selection)


def _elsewhere(known: Observations, at: Tensor, space: CoefficientSpace) -> Observations:
    """Return the rows of ``known`` that are at none of the points ``at``."""
    return known.select(~same_points(known.X, at, space).any(-1))


def _columns(seen: Observations, columns: list[int], X: Tensor) -> Observations:
    measured = seen.measured[:, columns]
    reasons = zip(seen.failures, measured.all(-1).tolist(), strict=True)
    return Observations(
        X=X,
        Y=torch.where(measured, seen.Y[:, columns], torch.nan),
        metrics=tuple(seen.metrics[j] for j in columns),
        Yvar=seen.Yvar[:, columns],
        counts=seen.counts[:, columns],
        cost=seen.cost,
        failures=tuple(None if whole else reason for reason, whole in reasons),
        examples=seen.examples,
        covariance=None if seen.covariance is None else seen.covariance[columns],
    )


def _side_by_side(parts: list[Observations]) -> Observations:
    """Return observations of single metrics at the same points as those of all of them."""
    return Observations(
        X=parts[0].X,
        Y=torch.cat([part.Y for part in parts], -1),
        metrics=tuple(part.metrics[0] for part in parts),
        Yvar=torch.cat([part.Yvar for part in parts], -1),
        counts=torch.cat([part.counts for part in parts], -1),
        covariance=stacked_covariance([(part.covariance, part.Yvar) for part in parts]),
    )


def _selections(
    parts: list[SurrogateModel], groups: list[list[int]], seen: Observations
) -> list[Selection]:
    found: dict[int, Selection] = {}
    for part, columns in zip(parts, groups, strict=True):
        for i, j in enumerate(columns):
            if isinstance(part, AutoModel):
                found[j] = part.selection[i]
            else:
                name = type(part).__name__
                found[j] = Selection(seen.metrics[j].name, name, "the only candidate", ())
    return [found[j] for j in range(len(found))]
