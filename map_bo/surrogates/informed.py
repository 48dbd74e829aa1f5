"""A surrogate that knows more than its run: measurements from elsewhere, metric by metric.

In a tree of merges a node searches a space of its own, whose points ``u`` stand for the points
``c = u R`` of a larger space. What its parts measured lies in that larger space too, on some of the
metrics only. Surrogates treat metrics independently, so each metric is fitted to all of its own
measurements in the larger space, and the node sees the fit along its own directions ``R``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from botorch.acquisition.objective import PosteriorTransform
from botorch.models.model import FantasizeMixin
from botorch.posteriors.posterior import Posterior
from torch import Tensor

from map_bo.data import Observations
from map_bo.errors import SurrogateError
from map_bo.plain import identity_of
from map_bo.space import CoefficientSpace
from map_bo.surrogates.auto import AutoModel, Selection
from map_bo.surrogates.surrogate import Surrogate, SurrogateModel
from map_bo.surrogates.validation import LeavesOneOut

__all__ = ["Informed", "InformedModel"]


_SAME = 1e-9


class InformedModel(SurrogateModel, FantasizeMixin):
    """A model of the larger space, seen along the directions of a smaller one.

    Args:
        whole: The model of the larger space, of the same metrics.
        directions: ``k x d``: what a unit of each of the ``k`` coefficients is in it.
        own: How many of the last rows that each part was fitted to are the run's own, and so are
            left out one by one in validation.
    """

    def __init__(self, whole: AutoModel, directions: Tensor, own: int) -> None:
        super().__init__()
        self.whole, self.directions, self.own = whole, directions, own
        self.metrics, self.links = whole.metrics, whole.links

    @property
    def num_outputs(self) -> int:
        """The number ``m`` of metrics."""
        return len(self.metrics)

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
        return self.whole.describe_selection()

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

    def subset_output(self, idcs: list[int]) -> InformedModel:
        """Return the model of the given metrics alone."""
        return InformedModel(self.whole.subset_output(idcs), self.directions, self.own)

    def condition_on_observations(
        self, X: Tensor, Y: Tensor, noise: Tensor | None = None, **kwargs: Any
    ) -> InformedModel:
        """Return the model that has also seen ``Y`` at ``X``, hyperparameters held."""
        more = self.whole.condition_on_observations(X @ self.directions, Y, noise, **kwargs)
        return InformedModel(more, self.directions, self.own + X.shape[-2])

    def leave_one_out(self) -> tuple[Tensor, Tensor]:
        """Return mean and latent variance of the run's own rows, each without itself."""
        return self._own([cast(LeavesOneOut, p).leave_one_out() for p in self.whole.parts])

    def training_targets(self) -> tuple[Tensor, Tensor]:
        """Return the run's own rows as fitted and their total noise variance, ``n x m`` each."""
        return self._own([cast(LeavesOneOut, p).training_targets() for p in self.whole.parts])

    def misfit_variance(self) -> Tensor:
        """Return the variance of the lack of fit (``m``, link scale)."""
        return self.whole.misfit_variance()

    def _own(self, pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        order = torch.tensor([j for held in self.whole.columns for j in held]).argsort()
        last = [[part[len(part) - self.own :] for part in pair] for pair in pairs]
        first, second = (torch.cat([pair[i] for pair in last], -1)[..., order] for i in (0, 1))
        return first, second


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
        own = seen.succeeded()
        at = own.X @ self.directions
        further = {
            metric.name: _elsewhere(self.known[metric.name].succeeded(), at)
            for metric in seen.metrics
            if metric.name in self.known
        }
        groups: dict[tuple[tuple[float, ...], ...], list[int]] = {}
        for j, metric in enumerate(seen.metrics):
            told = further.get(metric.name)
            X = () if told is None else tuple(map(tuple, told.X.tolist()))
            groups.setdefault(X, []).append(j)
        parts: list[SurrogateModel] = []
        for X, columns in groups.items():
            rows = _columns(own, columns, at)
            if X:
                before = _side_by_side([further[metric.name] for metric in rows.metrics])
                rows = before.append(rows)
            parts.append(self.surrogate.fit(rows, self.space))
        selection = _selections(parts, list(groups.values()), seen)
        return InformedModel(
            AutoModel(parts, list(groups.values()), selection), self.directions, len(own)
        )


def _elsewhere(known: Observations, at: Tensor) -> Observations:
    """Return the rows of ``known`` that are at none of the points ``at``."""
    if not len(at) or not len(known):
        return known
    return known.select((known.X[:, None] - at[None]).abs().amax(-1).amin(-1) > _SAME)


def _columns(seen: Observations, columns: list[int], X: Tensor) -> Observations:
    return Observations(
        X=X,
        Y=seen.Y[:, columns],
        metrics=tuple(seen.metrics[j] for j in columns),
        Yvar=seen.Yvar[:, columns],
        counts=seen.counts[:, columns],
        cost=seen.cost,
    )


def _side_by_side(parts: list[Observations]) -> Observations:
    """Return observations of single metrics at the same points as those of all of them."""
    return Observations(
        X=parts[0].X,
        Y=torch.cat([part.Y for part in parts], -1),
        metrics=tuple(part.metrics[0] for part in parts),
        Yvar=torch.cat([part.Yvar for part in parts], -1),
        counts=torch.cat([part.counts for part in parts], -1),
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
