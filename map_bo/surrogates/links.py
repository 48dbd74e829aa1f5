"""Links between a metric's own scale and the unbounded scale on which a surrogate is Gaussian.

A quadratic or a GP knows no bounds; an accuracy does. On the logit scale a quadratic may go
where it likes and the prediction stays a proportion, and binomial noise, which shrinks towards
the bounds, gets a variance that a Gaussian model can use.

Values at a bound have no finite logarithm. They are moved inside by a distance that the data
themselves set (:func:`observed_on_link`): by half a success when the number of examples is known,
else by half the smallest distance from that bound that was observed, or by half the standard
deviation of the value's own noise when that is larger. No distance is absolute, so losses of 1e-9
are told apart as losses of 1 are, and multiplying a loss by a number only moves a constant.

How much of the sampling noise of a metric differs from one evaluation to the next.

An accuracy of ``p`` on ``n`` examples has the binomial variance ``p (1 - p) / n`` about the
accuracy on all possible examples. Two evaluations on examples of their own err independently, and
that is the noise which a surrogate has to average out. Two evaluations on the *same* examples err
together: with a correlation ``rho`` between what two merged models get right, the share ``rho`` of
the noise raises or lowers every evaluation alike, and all trade-offs between models stay as they
are. What differs from one evaluation to the next, and so is noise to a surrogate, is the share
``1 - rho``. To take it for the whole makes the surrogate smooth away what it could have learnt: on
experts that hardly conflict, it then overlooks that more than a whole sum of task vectors is too
much.

``rho`` of merged models is about .9 between coefficients .1 apart and between .3 and .7, by the
case, for any two (``python -m benchmarks.quality.correlation``); so the share lies between .1 and
.7, and :data:`DIFFERS` is about the middle of that on a logarithmic scale. Shares of 1, .3, .1 and
.03 were also tried on some of the cases of the quality study, and .3 was the most even.

Where the outcomes of the examples are known, the share is measured on them
(:mod:`map_bo.examples.sharing`). Where observations have a covariance of their noise among rows
(:attr:`map_bo.data.Observations.covariance`), that says it all: what rows have in common is in it,
and nothing is scaled (:func:`covariance_on_link`).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import SurrogateError
from map_bo.examples.sharing import DIFFERS, differing_share

__all__ = [
    "DIFFERS",
    "IdentityLink",
    "Link",
    "LogLink",
    "LogitLink",
    "SoftplusLink",
    "as_fitted",
    "bound_distances",
    "check_enough",
    "correlated",
    "covariance_on_link",
    "from_link",
    "links_for",
    "observed_on_link",
    "target_units",
    "to_link",
]

LinkKind = Literal["auto", "identity"]

# exp(150) is about 1e65: no loss in any unit is larger, and its fourth power is still finite.
_LARGEST_EXPONENT = 150.0
_TINY = torch.finfo(torch.float64).tiny
_SPACING = torch.finfo(torch.float64).eps
_ROUNDING = 1e-12  # of a magnitude: targets that differ by less do not differ
_HALF_A_SUCCESS = 5e-4  # in a thousand examples, as a share of a proportion's range


class Link(ABC):
    """A strictly increasing map from a metric's own scale to the whole real line.

    Every link is a frozen dataclass; all methods work elementwise on tensors of any shape.
    """

    name: ClassVar[str]

    @abstractmethod
    def inside(self, y: Tensor, distance: Tensor | None = None) -> Tensor:
        """Return ``y`` moved to where ``forward`` is finite.

        Args:
            y: Metric values.
            distance: How far from a bound the result has to be at least, in the metric's unit;
                the link's own ``margin`` counts where that is larger, and so does what floating
                point can tell from the bound.
        """

    @abstractmethod
    def forward(self, y: Tensor) -> Tensor:
        """Return ``y`` (metric scale) on the link scale; values at or over a bound go inside."""

    @abstractmethod
    def inverse(self, f: Tensor) -> Tensor:
        """Return ``f`` (link scale) on the metric scale; differentiable."""

    @abstractmethod
    def slope(self, f: Tensor) -> Tensor:
        """Return the derivative of ``inverse`` at ``f``, which is positive."""


@dataclass(frozen=True)
class IdentityLink(Link):
    """The scale of the metric itself; nothing is bounded and nothing is moved."""

    name: ClassVar[str] = "identity"

    def inside(self, y: Tensor, distance: Tensor | None = None) -> Tensor:
        """Return ``y``: there is no bound to keep away from."""
        return y

    def forward(self, y: Tensor) -> Tensor:
        """Return ``y``."""
        return y

    def inverse(self, f: Tensor) -> Tensor:
        """Return ``f``."""
        return f

    def slope(self, f: Tensor) -> Tensor:
        """Return ones."""
        return torch.ones_like(f)


@dataclass(frozen=True)
class LogitLink(Link):
    """``f = log(p / (1 - p))`` with ``p = (y - lower) / (upper - lower)``; for proportions.

    Attributes:
        lower: Smallest possible value of the metric.
        upper: Largest possible value.
        margin: Share of the range that values keep from both bounds at least; by default none
            but what keeps the logit finite.
    """

    lower: float = 0.0
    upper: float = 1.0
    margin: float = 0.0
    name: ClassVar[str] = "logit"

    def inside(self, y: Tensor, distance: Tensor | None = None) -> Tensor:
        """Return ``y`` at least ``max(margin, distance)`` from both bounds (not past a quarter)."""
        width = self.upper - self.lower
        least = _SPACING * max(width, abs(self.lower), abs(self.upper))
        far = torch.full_like(y, max(self.margin * width, least))
        if distance is not None:
            far = torch.maximum(far, distance.clamp(max=width / 4))
        return torch.minimum(torch.maximum(y, self.lower + far), self.upper - far)

    def forward(self, y: Tensor) -> Tensor:
        """Return the scaled logit of ``y``."""
        return torch.logit((self.inside(y) - self.lower) / (self.upper - self.lower))

    def inverse(self, f: Tensor) -> Tensor:
        """Return the scaled sigmoid of ``f``."""
        return self.lower + (self.upper - self.lower) * torch.sigmoid(f)

    def slope(self, f: Tensor) -> Tensor:
        """Return ``(upper - lower) p (1 - p)``."""
        return (self.upper - self.lower) * torch.sigmoid(f) * torch.sigmoid(-f)


@dataclass(frozen=True)
class LogLink(Link):
    """``f = log(y - lower)``; the default for losses.

    Preferred to softplus because it has no scale of its own: a loss in bits instead of nats
    only moves the constant of the surrogate, and the surrogate's errors are relative, which is
    what matters when bad merges lose ten times more than good ones. Softplus is linear above
    about 1 and logarithmic below, so the unit of the loss would decide what is fitted.

    Attributes:
        lower: Lower bound of the loss.
        margin: Distance that values keep from ``lower`` at least, in the unit of the loss; by
            default none but what keeps the logarithm finite.
    """

    lower: float = 0.0
    margin: float = 0.0
    name: ClassVar[str] = "log"

    def inside(self, y: Tensor, distance: Tensor | None = None) -> Tensor:
        """Return ``y`` at least ``max(margin, distance)`` above ``lower``."""
        far = torch.full_like(y, max(self.margin, _SPACING * abs(self.lower), _TINY))
        return torch.maximum(
            y, self.lower + (far if distance is None else torch.maximum(far, distance))
        )

    def forward(self, y: Tensor) -> Tensor:
        """Return the logarithm of the distance to ``lower``."""
        return torch.log(self.inside(y) - self.lower)

    def inverse(self, f: Tensor) -> Tensor:
        """Return ``lower + exp(f)``, with the exponent held below 150."""
        return self.lower + f.clamp(max=_LARGEST_EXPONENT).exp()

    def slope(self, f: Tensor) -> Tensor:
        """Return ``exp(f)``."""
        return f.clamp(max=_LARGEST_EXPONENT).exp()


@dataclass(frozen=True)
class SoftplusLink(Link):
    """``y = lower + log(1 + exp(f))``: the published method's link for losses.

    Attributes:
        lower: Lower bound of the loss.
        margin: As in :class:`LogLink`.
    """

    lower: float = 0.0
    margin: float = 0.0
    name: ClassVar[str] = "softplus"

    def inside(self, y: Tensor, distance: Tensor | None = None) -> Tensor:
        """Return ``y`` at least ``max(margin, distance)`` above ``lower``."""
        return LogLink(self.lower, self.margin).inside(y, distance)

    def forward(self, y: Tensor) -> Tensor:
        """Return the inverse of softplus, written so that neither end overflows."""
        above = self.inside(y) - self.lower
        return above + torch.log(-torch.expm1(-above))

    def inverse(self, f: Tensor) -> Tensor:
        """Return ``lower + softplus(f)``."""
        return self.lower + torch.nn.functional.softplus(f)

    def slope(self, f: Tensor) -> Tensor:
        """Return the sigmoid of ``f``."""
        return torch.sigmoid(f)


def links_for(metrics: Sequence[Metric], *, kind: LinkKind = "auto") -> tuple[Link, ...]:
    """Return one link a metric.

    Args:
        metrics: The ``m`` metrics.
        kind: ``"auto"`` takes the logit for proportions, the logarithm for losses and the
            identity else; ``"identity"`` takes the identity for all.

    Raises:
        SurrogateError: When ``kind`` is neither.
    """
    if kind not in ("auto", "identity"):
        raise SurrogateError(
            f"there is no link kind {kind!r}", hint="link kinds are 'auto' and 'identity'"
        )
    return tuple(IdentityLink() if kind == "identity" else _natural(metric) for metric in metrics)


def _natural(metric: Metric) -> Link:
    if metric.kind == "proportion":
        assert metric.lower is not None
        assert metric.upper is not None
        return LogitLink(metric.lower, metric.upper)
    if metric.kind == "loss":
        assert metric.lower is not None
        return LogLink(metric.lower)
    return IdentityLink()


def to_link(Y: Tensor, links: Sequence[Link]) -> Tensor:
    """Return metric values (``... x m``) on their link scales."""
    return torch.stack([link.forward(Y[..., j]) for j, link in enumerate(links)], dim=-1)


def from_link(F: Tensor, links: Sequence[Link]) -> Tensor:
    """Return link-scale values (``... x m``) on their metrics' own scales; differentiable."""
    return torch.stack([link.inverse(F[..., j]) for j, link in enumerate(links)], dim=-1)


def observed_on_link(seen: Observations, links: Sequence[Link]) -> tuple[Tensor, Tensor]:
    """Return the observations on the link scale with the variance of their noise there.

    A proportion ``p`` measured on ``n`` examples becomes ``p~ = (n p + 1/2) / (n + 1)`` with
    ``Var[logit p~] ~ 1 / ((n + 1) p~ (1 - p~))``; ``p (1 - p) / n`` would call ``p = 1`` exact.
    A count takes precedence over ``Yvar``. Any other known variance goes through the
    delta method, at the value moved inside its bounds by at least half its own standard
    deviation. A value at a bound moves inside by half the smallest distance from that bound among
    the other values (and a proportion by no more than half a success in a thousand examples).
    One that claims to be exact gets an unknown variance: nothing about it is exact on a scale
    where it is infinite.

    Args:
        seen: Observations; what was not measured comes out as NaN.
        links: One link a metric.

    Returns:
        ``n x m`` values and ``n x m`` noise variances, NaN where the variance is unknown.
    """
    values, variances = [], []
    for j, (link, metric) in enumerate(zip(links, seen.metrics, strict=True)):
        y, known = seen.Y[:, j], seen.Yvar[:, j]
        own = known.nan_to_num(nan=0.0).sqrt() / 2
        moved = link.inside(y, torch.maximum(own, _distance(y, metric)))
        z = link.forward(moved)
        slope = link.slope(z)
        # The square of a slope below 1e-154 is 0 in float64.
        var = torch.where(
            slope.square() > 0, known / slope.square(), (known.sqrt() / slope).square()
        )
        var = torch.where((known == 0) & (moved != y), torch.nan, var)
        if metric.kind == "proportion":
            assert metric.lower is not None
            assert metric.upper is not None
            width = metric.upper - metric.lower
            n = seen.counts[:, j]
            counted = torch.isfinite(n)
            p = (((y - metric.lower) / width).clamp(0, 1) * n + 0.5) / (n + 1)
            spread = (n + 1) * p * (1 - p)
            if isinstance(link, LogitLink):
                z = torch.where(counted, torch.logit(p), z)
                var = torch.where(counted, 1 / spread, var)
            else:
                # Without a logit the value stays where it was measured; its variance is the
                # smoothed binomial one, through the delta method of whichever link there is.
                binomial = width**2 * spread / (n + 1).square()
                var = torch.where(counted, binomial / link.slope(z).square(), var)
        values.append(z)
        variances.append(var)
    return torch.stack(values, -1), torch.stack(variances, -1)


def correlated(covariance: Tensor) -> Tensor:
    """Return of which metrics rows have noise in common, ``m`` booleans for ``m x n x n``."""
    own = torch.diag_embed(covariance.diagonal(dim1=-1, dim2=-2))
    return (covariance != own).flatten(1).any(-1)


def covariance_on_link(
    seen: Observations, links: Sequence[Link], at: Tensor | None = None
) -> Tensor | None:
    """Return the covariance of the noise among rows on the link scale, by the delta method.

    ``D C D`` with the covariance ``C`` on the metric's own scale and ``D`` the inverse slopes of
    the inverse link. Both belong to the values *expected*: taken at the observed values they err
    with them, and where the error is common to all rows, a fit moves far to one side of the data
    (D'Agostini, *On the use of the covariance matrix to fit correlated data*, Nuclear Instruments
    and Methods A 346, 1994). The variance of a proportion is as the slope of the logit, and the one
    in ``C`` is that of the observed value; moved to the expected one, it leaves the geometric mean
    of both slopes in ``D``. What this leaves below 0 of an eigenvalue, where ``C`` was pieced
    together from estimates, is put to 0.

    The noise of a metric whose rows have nothing in common is that of :func:`observed_on_link`.

    Args:
        seen: Observations of rows that have all of their metrics.
        links: One link a metric.
        at: ``n x m`` values on the link scale that were expected; by default the observed ones.

    Returns:
        ``m x n x n``, with 0 for what is unknown; None where the noise of the rows is independent.
    """
    if seen.covariance is None:
        return None
    Z, variance = observed_on_link(seen, links)
    slopes = torch.stack([link.slope(Z[:, j]) for j, link in enumerate(links)])
    if at is not None:
        logit = torch.tensor([isinstance(link, LogitLink) for link in links]).unsqueeze(-1)
        expected = torch.stack([link.slope(at[:, j]) for j, link in enumerate(links)])
        slopes = torch.where(logit, slopes.sqrt() * expected.sqrt(), expected)
    found = seen.covariance.clone()
    found.diagonal(dim1=-1, dim2=-2).copy_(seen.Yvar.mT.nan_to_num(nan=0.0))
    # Divided twice: the product of two slopes below 1e-154 is 0 in float64.
    found = found / slopes.unsqueeze(-1) / slopes.unsqueeze(-2)
    there = ~variance.mT.isnan()  # an unknown variance has no covariances either
    found = found.masked_fill(~(there.unsqueeze(-1) & there.unsqueeze(-2)), 0.0)
    independent = torch.diag_embed(variance.mT.nan_to_num(nan=0.0))
    found = torch.where(correlated(found)[:, None, None], found, independent)
    found = (found + found.mT) / 2
    values, axes = torch.linalg.eigh(found)
    if bool((values >= -_ROUNDING * values.abs().amax(-1, keepdim=True)).all()):
        return found
    root: Tensor = axes * values.clamp_min(0.0).sqrt().unsqueeze(-2)
    return root @ root.mT


def _distance(y: Tensor, metric: Metric) -> Tensor:
    """Return how far inside values at a bound of the metric are taken to be, ``n``; else 0."""
    far = torch.zeros_like(y)
    for bound in (metric.lower, metric.upper):
        if bound is not None:
            far = torch.where(y == bound, _half_the_nearest(y, bound, metric), far)
    return far


def _half_the_nearest(y: Tensor, bound: float, metric: Metric) -> float:
    gaps = (y - bound).abs()
    apart = gaps[gaps > 0]
    nearest = float(apart.min()) / 2 if len(apart) else 0.0
    if metric.kind != "proportion":
        return nearest
    assert metric.lower is not None
    assert metric.upper is not None
    most = _HALF_A_SUCCESS * (metric.upper - metric.lower)
    return min(nearest, most) if len(apart) else most


def bound_distances(seen: Observations) -> Tensor:
    """Return from where on a measurement would be at a bound, ``2 x m`` distances from the bounds.

    Half an example of a count, and where there are none, half of what was observed next to the
    bound if the bound itself was observed; else 0. First the lower bounds, then the upper ones.
    """
    seen = seen.succeeded()
    found = torch.zeros(2, len(seen.metrics), dtype=torch.float64)
    for j, metric in enumerate(seen.metrics):
        y, counts = seen.Y[:, j], seen.counts[:, j]
        for i, bound in enumerate((metric.lower, metric.upper)):
            if bound is None:
                continue
            if metric.kind == "proportion" and bool(torch.isfinite(counts).all()):
                assert metric.lower is not None
                assert metric.upper is not None
                found[i, j] = (metric.upper - metric.lower) / (2 * counts.median())
            elif bool((y == bound).any()):
                found[i, j] = _half_the_nearest(y, bound, metric)
    return found


def target_units(shift: Tensor, spread: Tensor, links: Sequence[Link]) -> Tensor:
    """Return the units in which targets are standardised, ``m`` positive values, link scale.

    A metric's unit is the spread of its targets. Where that is rounding alone it is their
    magnitude on the metric's own scale, and 1 on that of a logarithm or a logit, which have a
    unit.

    Args:
        shift: ``m`` means of the targets.
        spread: ``m`` standard deviations.
        links: One link per metric.
    """
    free = torch.tensor([isinstance(link, IdentityLink) for link in links])
    size = torch.where(free, shift.abs(), 1 + shift.abs())
    one = torch.where(free & (size > 0), size, torch.ones_like(size))
    return torch.where(spread > _ROUNDING * size, spread, one)


def as_fitted(seen: Observations) -> Observations:
    """Return the rows that a surrogate is fitted to, with the noise that it has to average out.

    They are the rows that have any of their metrics; what a partial row lacks is NaN.

    For a metric whose every evaluation is on the same examples, variances are a share of those
    recorded, and counts those by that share: so many independent examples would leave as much
    noise. The share is :data:`DIFFERS`, or what outcomes of the examples say
    (:func:`~map_bo.examples.sharing.differing_share`). Everything else stays as it is.

    Rows with a covariance of their noise keep it as it is; its diagonal is their variance, and
    what was counted plays no part, except where that is all that is known of the noise.
    """
    good = seen.with_any()
    if good.covariance is not None:
        known = good.covariance.diagonal(dim1=-1, dim2=-2).mT
        stated = torch.where(good.Yvar.isnan(), _binomial_variance(good), good.Yvar)
        return dataclasses.replace(
            good,
            Yvar=torch.where(known > 0, known, stated),
            counts=torch.full_like(good.counts, torch.nan),
        )
    share = torch.tensor(
        [DIFFERS if metric.resampling == "same" else 1.0 for metric in good.metrics],
        dtype=torch.float64,
    )
    if any(good.examples):
        measured = differing_share(good)
        share = torch.where(measured.isfinite() & (share < 1), measured, share)
    return dataclasses.replace(good, Yvar=good.Yvar * share, counts=good.counts / share)


def _binomial_variance(seen: Observations) -> Tensor:
    """Return the variance of counted proportions, ``n x m``; NaN where nothing was counted."""
    found = torch.full_like(seen.Y, torch.nan)
    for j, metric in enumerate(seen.metrics):
        if metric.kind == "proportion":
            assert metric.lower is not None
            assert metric.upper is not None
            width, n = metric.upper - metric.lower, seen.counts[:, j]
            p = (((seen.Y[:, j] - metric.lower) / width).clamp(0, 1) * n + 0.5) / (n + 1)
            found[:, j] = width**2 * p * (1 - p) / (n + 1)
    return found


def check_enough(seen: Observations, what: str, *, needed: int = 2) -> None:
    """Refuse evaluations of which too few have a metric.

    Args:
        seen: All evaluations.
        what: What is to be fitted, with its article.
        needed: How many of each metric it takes.

    Raises:
        SurrogateError: With the first metric that was measured too seldom.
    """
    found = seen.measured.sum(0).tolist()
    least = min(found)
    if least >= needed:
        return
    hint = "evaluate more points, or look at the reasons of those that failed"
    if int(seen.ok.sum()) == max(found):
        raise SurrogateError(
            f"{least} of {len(seen)} evaluations succeeded; {what} needs at least {needed}",
            hint=hint,
        )
    raise SurrogateError(
        f"{least} of {len(seen)} evaluations have the metric "
        f"{seen.metrics[found.index(least)].name!r}; {what} needs at least {needed}",
        hint=hint,
    )
