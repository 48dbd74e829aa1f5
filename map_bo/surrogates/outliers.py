"""Outliers: measured values that no surrogate of the others can explain, set aside for the fit.

A run that diverged for once returns a finite value far from what the metric is there: 50 where
losses are below 1.5. A Gaussian fit bends to it, or takes everything else for noise. Here a value
is judged by what the surrogate predicts at its point from all others (leave-one-out), metric by
metric:

1. *Suspects.* The residual ``u`` of each value in its own leave-one-out prediction, in standard
   deviations, is compared with the typical residual (the median of ``|u|``), which no few outliers
   can move; the fit's own noise estimate they can, which is how an outlier masks itself and others.
   The largest suspect is left out, the surrogate fitted again, and so on (the backward search of
   Hadi and Simonoff, *Procedures for the Identification of Multiple Outliers in Linear Models*,
   JASA 88, 1993), up to :data:`MOST` of the values.
2. *Judgement.* The fit to the rest predicts each suspect. It is set aside where it is further from
   that than :data:`CUTOFF` standard deviations, and by more than the others vary. One inside the
   range of the others needs twice as many: it costs little, and at the edge of what was evaluated
   predictions are too sure of themselves. Whatever is not set aside goes back, and the remaining
   ones are judged again.
3. *Corroboration.* Where the nearest other evaluation of a suspect is a suspect on the same side,
   the two agree on something real, such as a narrow region in which merges break: both are kept.

Where the noise of the evaluations has a covariance, a value is also predicted from what the noise
of the others tells of its own: what all err by together makes none of them an outlier.

All is decided anew at every fit, so a value is taken back once later evaluations bear it out. The
record keeps every value; only the fit, and what is scaled by it, goes without.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from map_bo.choice import handles_choice
from map_bo.data import Observations
from map_bo.errors import SurrogateError
from map_bo.plain import identity_of
from map_bo.space import CoefficientSpace
from map_bo.surrogates.features import inputs
from map_bo.surrogates.links import (
    LogitLink,
    as_fitted,
    correlated,
    covariance_on_link,
    observed_on_link,
)
from map_bo.surrogates.surrogate import (
    Surrogate,
    SurrogateModel,
    fits_partial_rows,
    has_uncertainty,
)
from map_bo.surrogates.validation import LeavesOneOut, promises_leave_one_out

__all__ = [
    "CUTOFF",
    "MOST",
    "Outlier",
    "Screened",
    "Screening",
    "SetsAside",
    "fit_screened",
    "screened",
    "without",
]

CUTOFF = 6.0
"""Standard deviations of the prediction without it, beyond which a value is an outlier."""

MOST = 0.15
"""Share of the values of a metric that may be set aside."""

# Times the typical leave-one-out residual, from which on a value is looked at: one within the bulk
# of the values, and one outside.
_SUSPICIOUS, _OUTSIDE = 5.0, 2.0
_FEWEST = 8  # values of a metric, and 2 (d + 2), without which nothing is judged
_NEAR = 0.2  # of the box, times sqrt(d): how far apart values may be that bear each other out
_REASON = "set aside as an outlier"


@dataclass(frozen=True)
class Outlier:
    """A value that is set aside.

    Attributes:
        row: Row of the observations that it is in.
        metric: Name of its metric.
        value: The value, own unit.
        expected: What the fit to the others predicts in its place.
        deviation: Standard deviation of that prediction, noise included.
    """

    row: int
    metric: str
    value: float
    expected: float
    deviation: float

    def describe(self) -> dict[str, Any]:
        """Return plain data; evaluations are numbered from 1."""
        return {
            "evaluation": self.row + 1,
            "metric": self.metric,
            "value": self.value,
            "expected": self.expected,
            "deviation": self.deviation,
        }

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Outlier:
        """Return what :meth:`describe` described."""
        return cls(
            int(data["evaluation"]) - 1,
            str(data["metric"]),
            float(data["value"]),
            float(data["expected"]),
            float(data["deviation"]),
        )

    def note(self) -> str:
        """Return the sentence that a reader of the run is told."""
        return (
            f"evaluation {self.row + 1}: {self.metric} = {self.value:.4g} is {_REASON}: the "
            f"other evaluations predict {self.expected:.3g} +- {2 * self.deviation:.2g}; "
            "outliers=keep fits it all the same"
        )


@dataclass(frozen=True, eq=False)
class Screening:
    """A fit, and what it was made without.

    Attributes:
        model: The fitted surrogate.
        kept: The observations without the values that were set aside; all rows are there.
        outliers: The values that were set aside, by row.
    """

    model: SurrogateModel
    kept: Observations
    outliers: tuple[Outlier, ...] = ()


def without(seen: Observations, outliers: Sequence[Outlier]) -> Observations:
    """Return observations without some of their values; all rows are there."""
    names = [metric.name for metric in seen.metrics]
    aside = torch.zeros_like(seen.measured)
    for outlier in outliers:
        aside[outlier.row, names.index(outlier.metric)] = True
    return seen.without(aside, _REASON)


@runtime_checkable
class SetsAside(Protocol):
    """Settings of a surrogate that sets outliers aside and says which."""

    def screen(self, seen: Observations, space: CoefficientSpace) -> Screening:
        """Return the fit, and what it was made without."""
        ...


def fit_screened(surrogate: Surrogate, seen: Observations, space: CoefficientSpace) -> Screening:
    """Return the fit of any surrogate, with what it set aside where it does so.

    Estimates from parts of examples are asked for several times with nothing new measured: which
    examples come next, then where; so the last fit to such is kept.

    Raises:
        SurrogateError: When it cannot be fitted.
    """
    for of, by, within, last in _last_fit:
        if of is seen and (by, within) == (surrogate, space):
            return last
    if isinstance(surrogate, SetsAside):
        found = surrogate.screen(seen, space)
    else:
        found = Screening(surrogate.fit(seen, space), seen)
    if seen.covariance is not None:
        _last_fit[:] = [(seen, surrogate, space, found)]
    return found


_last_fit: list[tuple[Observations, Surrogate, CoefficientSpace, Screening]] = []


def screened(surrogate: Surrogate) -> Surrogate:
    """Return a surrogate that sets outliers aside, where it leaves evaluations out to find them.

    One that does not is returned as it is.
    """
    if isinstance(surrogate, SetsAside) or not promises_leave_one_out(surrogate):
        return surrogate
    return Screened(surrogate)


@dataclass(frozen=True)
class Screened:
    """Settings of a surrogate that sets outliers aside before it fits; see the module.

    Its models are those of the surrogate: where nothing is set aside, that of all evaluations.

    Attributes:
        surrogate: What is fitted; its models leave evaluations out.
    """

    surrogate: Surrogate

    def __repr__(self) -> str:
        return repr(self.surrogate)

    def describe(self) -> dict[str, Any]:
        """Return plain data by which it is recognised: whether outliers count is the run's own."""
        found: dict[str, Any] = identity_of(self.surrogate)
        return found

    @property
    def leaves_one_out(self) -> bool:
        """Whether the models leave evaluations out: when those of the surrogate do."""
        return promises_leave_one_out(self.surrogate)

    @property
    def takes_choice(self) -> bool:
        """Whether it handles a space with a choice: when the surrogate does."""
        return handles_choice(self.surrogate)

    @property
    def takes_partial_rows(self) -> bool:
        """Whether each metric is fitted to all rows that have it: when the surrogate does so."""
        return fits_partial_rows(self.surrogate)

    @property
    def certain(self) -> bool:
        """Whether the models have no uncertainty: when those of the surrogate have none."""
        return not has_uncertainty(self.surrogate)

    def fit(self, seen: Observations, space: CoefficientSpace) -> SurrogateModel:
        """Fit to the evaluations without outliers.

        Raises:
            SurrogateError: When too few evaluations succeeded.
        """
        return self.screen(seen, space).model

    def screen(self, seen: Observations, space: CoefficientSpace) -> Screening:
        """Fit to the evaluations without outliers, and say which these are.

        Raises:
            SurrogateError: When too few evaluations succeeded.
        """
        model = self.surrogate.fit(seen, space)
        found: list[Outlier] = []
        for j, metric in enumerate(seen.metrics):
            alone = seen.of(metric.name)
            if len(alone) < max(_FEWEST, 2 * (space.d + 2)):
                continue
            rows = seen.measured[:, j].nonzero().flatten()
            try:
                judged = _Search(self.surrogate, alone, space).outliers(model.one_metric(j))
            except SurrogateError:  # the rest cannot be fitted: then nothing can be judged
                continue
            for i, (expected, deviation) in judged.items():
                row = int(rows[i])
                value = float(seen.Y[row, j])
                found.append(Outlier(row, metric.name, value, expected, deviation))
        if not found:
            return Screening(model, seen)
        kept = without(seen, found)
        found.sort(key=lambda one: (one.row, one.metric))
        return Screening(self.surrogate.fit(kept, space), kept, tuple(found))


class _Search:
    """The outliers among the values of one metric.

    Args:
        surrogate: What is fitted.
        seen: ``n`` evaluations of the metric alone, none of them failed.
        space: The coefficients.
    """

    def __init__(self, surrogate: Surrogate, seen: Observations, space: CoefficientSpace) -> None:
        self.surrogate, self.seen, self.space = surrogate, seen, space
        self.fitted = as_fitted(seen)
        self.z = torch.zeros(len(seen), dtype=torch.float64)
        self.covariance: Tensor | None = None
        self.at, self.unknown = self.z, False

    def outliers(self, model: SurrogateModel) -> dict[int, tuple[float, float]]:
        """Return row -> what is expected there and its standard deviation, of each outlier.

        Args:
            model: The fit to all rows, of this metric.
        """
        values, variance = observed_on_link(self.fitted, model.links)
        self.z, self.unknown = values[:, 0], bool(variance.isnan().any())
        self.at = self.z
        if self.fitted.covariance is not None and bool(correlated(self.fitted.covariance)):
            with torch.no_grad():
                self.at = model.link_mean(self.seen.X)[:, 0]
        covariance = covariance_on_link(self.fitted, model.links, self.at.unsqueeze(-1))
        self.covariance = None if covariance is None else covariance[0]
        out = torch.zeros(len(self.seen), dtype=torch.bool)
        first = model
        for _ in range(math.ceil(MOST * len(self.seen))):
            size = self._residuals(first if not bool(out.any()) else model, ~out).abs()
            limit = torch.where(self._outside(~out), _OUTSIDE, _SUSPICIOUS) * size[~out].median()
            suspects = size.masked_fill(size <= limit, 0.0)
            if not float(suspects.max()) > 0:
                break
            out[int(suspects.argmax())] = True
            model = self._fit(~out)
        while bool(out.any()):
            distance, rest = self._distances(model, ~out), self.z[~out]
            beyond = torch.maximum(self.z - rest.max(), rest.min() - self.z) > rest.std() / 2
            far = out & (distance.abs() > torch.where(beyond, CUTOFF, 2 * CUTOFF))
            far &= (self.z - self._at(model, ~out)[0]).abs() > rest.std()
            far &= ~self._agree(far, distance)
            if torch.equal(far, out):
                break
            out = far
            model = self._fit(~out) if bool(out.any()) else model
        mean, deviation = self._at(model, ~out)
        link = model.links[0]
        unit = deviation * link.slope(mean)
        expected = link.inverse(mean)
        return {int(i): (float(expected[i]), float(unit[i])) for i in out.nonzero().flatten()}

    def _fit(self, rows: Tensor) -> SurrogateModel:
        return self.surrogate.fit(self.seen.select(rows), self.space)

    def _outside(self, rows: Tensor) -> Tensor:
        """Return which values lie outside Tukey's fences about those in ``rows``, ``n``."""
        low, high = torch.quantile(self.z[rows], torch.tensor([0.25, 0.75]).double())
        fence = 1.5 * (high - low)
        outside: Tensor = (self.z < low - fence) | (self.z > high + fence)
        return outside

    def _noise(self, model: SurrogateModel, mean: Tensor) -> Tensor:
        """Return the noise of each value about ``mean``, ``n``; misfit included.

        Known noise counts as it would be there: about a value that diverged, the link may make any
        noise as large as one likes. Unknown noise is that of the fit.
        """
        assert isinstance(model, LeavesOneOut)
        link, metric, seen = model.links[0], self.fitted.metrics[0], self.fitted
        known = seen.Yvar[:, 0] / link.slope(mean).square()
        if isinstance(link, LogitLink) and metric.kind == "proportion":
            p = torch.sigmoid(mean)
            binomial = 1 / ((seen.counts[:, 0] + 1) * p * torch.sigmoid(-mean))
            known = torch.where(seen.counts[:, 0].isnan(), known, binomial)
        fitted = model.training_targets()[1].nanmedian()
        noise: Tensor = torch.where(known.isnan(), fitted, known + model.misfit_variance()[0])
        return noise

    def _residuals(self, model: SurrogateModel, rows: Tensor) -> Tensor:
        """Return leave-one-out residuals in standard deviations, ``n``; 0 where not in ``rows``."""
        if not isinstance(model, LeavesOneOut):
            return torch.zeros_like(self.z)
        mean, latent = (value[:, 0] for value in model.leave_one_out())
        there = ~mean.isnan()  # a model of several metrics has rows without this one
        found, at = torch.zeros_like(self.z), torch.zeros_like(self.z)
        at[rows] = mean[there]
        noise = self._noise(model, at)[rows]
        if self.covariance is not None:
            misfit = self._misfit(model)
            own = (model.training_targets()[1][there, 0] - misfit).clamp_min(0.0)
            noise = own * self._stretch(model, at)[rows].square() + misfit
        variance = latent[there] + noise
        found[rows] = (self.z - at)[rows] / variance.sqrt()
        return found

    def _misfit(self, model: SurrogateModel) -> Tensor:
        """Return the variance on top of known noise, a scalar: the noise where it is unknown."""
        assert isinstance(model, LeavesOneOut)
        if self.unknown:
            return model.training_targets()[1].nanmedian()
        return model.misfit_variance()[0]

    def _stretch(self, model: SurrogateModel, mean: Tensor) -> Tensor:
        """Return by what deviations of noise change from where they are to ``mean``, ``n``."""
        link = model.links[0]
        return link.slope(self.at) / link.slope(mean)

    def _at(self, model: SurrogateModel, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return predicted means and standard deviations of all values, noise included, ``n``.

        With a covariance ``C`` of the noise, those of values that are not in ``rows`` are given the
        noise there: with ``W = C_i,rest (C_rest + t I)^-1`` the value is
        ``f_i + W (z - f)_rest`` plus what that leaves of its noise.

        Args:
            model: The fit to ``rows``.
            rows: ``n`` booleans.
        """
        with torch.no_grad():
            mean, covariance = model.joint(self.seen.X)
        if self.covariance is not None:
            centre, misfit = mean[:, 0], self._misfit(model)
            stretch = self._stretch(model, centre)
            known = self.covariance[rows][:, rows]
            least = torch.maximum(misfit, 1e-9 * known.diagonal().mean() + 1e-300)
            noise = known + least * torch.eye(len(known), dtype=known.dtype)
            toward = stretch.unsqueeze(-1) * self.covariance[:, rows]
            weights = torch.linalg.solve(noise, toward.mT).mT
            own = stretch.square() * self.covariance.diagonal() - (weights * toward).sum(-1)
            away = torch.eye(len(centre), dtype=centre.dtype)
            away[:, rows] -= weights
            latent = ((away @ covariance[0]) * away).sum(-1)
            total = latent.clamp_min(0.0) + own.clamp_min(0.0) + misfit
            return centre + weights @ (self.z - centre)[rows], total.sqrt()
        latent = covariance[0].diagonal().clamp_min(0.0)
        return mean[:, 0], (latent + self._noise(model, mean[:, 0])).sqrt()

    def _distances(self, model: SurrogateModel, rows: Tensor) -> Tensor:
        """Return how far values are from their prediction, ``n``, in standard deviations.

        These are at least the model's own, and larger where it is too sure of what it was fitted
        to.
        """
        mean, deviation = self._at(model, rows)
        size = self._residuals(model, rows)[rows].square().mean().sqrt()
        return (self.z - mean) / (deviation * size.clamp_min(1.0))

    def _agree(self, far: Tensor, distance: Tensor) -> Tensor:
        """Return which values are borne out by the nearest other one, ``n`` booleans."""
        U = inputs(self.seen.X, self.space)
        apart = torch.cdist(U, U)
        apart.fill_diagonal_(torch.inf)
        gap, nearest = apart.min(-1)
        same = far & far[nearest] & (distance.sign() == distance[nearest].sign())
        same &= gap <= _NEAR * math.sqrt(self.space.d)
        agreed = same.clone()
        agreed[nearest[same]] = True
        return agreed
