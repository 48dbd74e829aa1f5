"""The scale of a run's metrics: the reference point, the best end, and the gains between them.

Also what it is made from: the evaluations that are anchors of the space (base, experts, uniform
blend), and what is chosen by it: rows of a set that lie far apart.

A metric's range is compared with its own magnitude and noise, never with an absolute number, so
multiplying a metric by any positive number changes no gain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from map_bo.constraints import AtLeast, Constraint
from map_bo.data import Metric, Observations, check_metrics, to_maximisation
from map_bo.errors import DataError, SurrogateError
from map_bo.space import CoefficientSpace

__all__ = [
    "SAME_POINT",
    "Scale",
    "anchor_rows",
    "broken",
    "farthest_rows",
    "same_points",
    "varied_metrics",
    "widths",
]

SAME_POINT = 1e-9
"""Points are one where no coefficient differs by more than this share of its range."""

_ROUNDING = 1e-9  # of a metric's magnitude: what differs by less does not differ
_ANCHORED = "worst of"
_OBSERVED = "worst observed"
_GIVEN = "given by the user"


def widths(low: Tensor, high: Tensor) -> Tensor:
    """Return ``high - low``, and 1 where that does not exceed the rounding of the two.

    Args:
        low: ``m`` lower ends.
        high: ``m`` upper ends.
    """
    width = high - low
    return torch.where(width > _rounding(low, high), width, torch.ones_like(width))


def _rounding(low: Tensor, high: Tensor) -> Tensor:
    return _ROUNDING * (low.abs() + high.abs())


def varied_metrics(seen: Observations) -> Tensor:
    """Return ``m`` booleans: which metrics differ between any two evaluations beyond rounding.

    A metric that never varied can be traded for nothing: its predictions differ by rounding
    alone, which must not decide what dominates what. Where no metric varied, all count.
    """
    measured = seen.measured
    if not bool(measured.any(0).all()):
        return torch.ones(len(seen.metrics), dtype=torch.bool)
    low = torch.where(measured, seen.Y, torch.inf).amin(0)
    high = torch.where(measured, seen.Y, -torch.inf).amax(0)
    varied = high - low > _rounding(low, high)
    return varied if bool(varied.any()) else torch.ones_like(varied)


def same_points(
    X: Tensor, others: Tensor, space: CoefficientSpace, *, tolerance: float = SAME_POINT
) -> Tensor:
    """Return which rows of ``X`` (``n x d``) and ``others`` (``p x d``) are the same point.

    Args:
        X: ``n x d`` points.
        others: ``p x d`` points.
        space: The space of both.
        tolerance: Largest difference, as a share of each coefficient's range.

    Returns:
        ``n x p`` booleans.
    """
    gaps = torch.cdist(space.normalise(X), space.normalise(others), p=torch.inf)
    return gaps <= tolerance


def anchor_rows(X: Tensor, space: CoefficientSpace) -> Tensor:
    """Return which rows of ``X`` (``n x d``) are anchors of the space.

    Returns:
        ``a x n`` booleans: row ``j`` of ``X`` is anchor ``i`` of ``space.anchors()``.
    """
    return same_points(space.anchors().X, X, space)


def farthest_rows(gains: Tensor, count: int, *, first: Sequence[int] = ()) -> list[int]:
    """Return ``count`` rows of ``gains`` that represent the whole set, in the order of choice.

    After ``first``, or else the most balanced row (largest worst gain), always the row that is
    farthest from those already taken: Gonzalez' farthest-point rule (*Clustering to minimize the
    maximum intercluster distance*, 1985), which is within a factor of two of the smallest
    possible covering radius.

    Args:
        gains: ``k x m`` values on one scale.
        count: How many rows; all of them where there are fewer.
        first: Rows that are taken before any other.

    Returns:
        Distinct rows. Of equally far rows the first is taken.
    """
    count = min(count, len(gains))
    if count <= 0:
        return []
    rows = list(dict.fromkeys(first))[:count] or [int(gains.amin(-1).argmax())]
    distance = gains.new_full((len(gains),), torch.inf)

    def away_from(row: int) -> Tensor:
        return torch.minimum(distance, (gains - gains[row]).square().sum(-1))

    for row in rows:
        distance = away_from(row)
    distance[rows] = -1.0  # a row that is taken is farther from none
    while len(rows) < count:
        rows.append(int(distance.argmax()))
        distance = away_from(rows[-1])
        distance[rows[-1]] = -1.0
    return rows


@dataclass(frozen=True, eq=False)
class Scale:
    """What metrics are measured from and in: gain 0 at the reference point, 1 at the best end.

    The reference point is a threshold. Where a user sets it above the worst of base and experts,
    ``unit`` keeps the width of the scale apart from it: the threshold then moves the zero alone.

    A metric *has no range* where nothing that was measured beats the reference point by more than
    rounding or noise. Its gain is the constant 1, so that tensors keep one column per metric: it
    changes no hypervolume (volumes are products of gains), no difference of utilities, no
    distance and no dominance.

    A metric with a constraint is no objective. Its gain is 1 where its constraints hold and 0, the
    reference point, where one is broken: a point that breaks one earns no hypervolume. Otherwise
    it counts like a metric without a range.

    Attributes:
        metrics: The ``m`` metrics.
        point: ``m`` values of the reference point, own units: only what beats all of them earns
            hypervolume.
        best: ``m`` values of the other end, own units: the best single experts.
        rule: Where the two come from, for the reader.
        unit: ``m`` positive widths that are one gain, own units, where these are not from
            ``point`` to ``best``; else None.
        ranged: ``m`` booleans: which metrics have a range and are objectives. By default those
            whose two ends differ by more than rounding.
        constraints: What metrics have to keep.

    Raises:
        DataError: When shapes disagree, a value is not finite, or, without a ``unit``, ``best``
            is worse than ``point``.
    """

    metrics: tuple[Metric, ...]
    point: Tensor
    best: Tensor
    rule: str
    unit: Tensor | None = None
    ranged: Tensor = None  # type: ignore[assignment]
    constraints: tuple[Constraint, ...] = ()
    _low: Tensor = field(init=False, repr=False)
    _width: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        put, metrics = object.__setattr__, check_metrics(self.metrics)
        put(self, "metrics", metrics)
        for name in ("point", "best", "unit"):
            if getattr(self, name) is None:
                continue
            value = torch.as_tensor(getattr(self, name), dtype=torch.float64).detach().cpu()
            put(self, name, value)
            if value.shape != (len(metrics),) or not bool(torch.isfinite(value).all()):
                raise DataError(
                    f"the {name} of a scale is {value.tolist()} for the metrics "
                    f"{[metric.name for metric in metrics]}",
                    hint="give one finite value for every metric, in its own unit",
                )
        low, high = to_maximisation(self.point, metrics), to_maximisation(self.best, metrics)
        width = high - low if self.unit is None else self.unit
        if bool((width < 0).any()):
            raise DataError(
                "the best end of the scale is worse than the reference point in "
                f"{', '.join(_names(metrics, width < 0))}",
                hint="give both in the metrics' own units and directions",
            )
        ranged = width > _rounding(low, high) if self.ranged is None else self.ranged
        if ranged.shape != (len(metrics),):
            raise DataError(f"ranged has shape {tuple(ranged.shape)} for {len(metrics)} metrics")
        put(self, "constraints", tuple(self.constraints))
        held = self.constrained
        put(self, "ranged", ranged & (width > 0) & ~held)
        put(self, "_low", low)
        wide = self.ranged | (held & (width > 0))
        put(self, "_width", torch.where(wide, width, torch.ones_like(low)))

    @classmethod
    def of(
        cls,
        seen: Observations,
        space: CoefficientSpace,
        given: Mapping[str, float] | None = None,
        constraints: Sequence[Constraint] = (),
    ) -> Scale:
        """Return the scale of a run by what it has measured.

        The reference point is, for each metric, the worst value among the base and the experts,
        and the best end is the best of the experts. Where fewer than two of base and experts
        succeeded, the worst and the best observed values stand in, and the rule says so.

        Where no expert beats the reference point by more than rounding and noise, the best
        observation ends the scale instead; where that does not either, the metric has no range.

        A value in ``given`` replaces that of the reference point: it is a threshold, and not the
        scale. Where it is better than the default, one unit stays the metric's own range between
        base and experts, or, where they have none, that of all observations; the rule says so.

        A metric of a partial row counts where it was measured, so that an anchor whose other
        metrics failed is one end of its scale all the same.

        Noise is what ``Yvar`` says, as far as values that are noise alone differ in 95 of 100
        such runs (among many, the farthest lie farther apart than any two do); it is left out for
        metrics that are measured on the same examples every time, and one example of a metric
        that counts examples is added.

        Args:
            seen: All evaluations so far.
            space: The coefficients.
            given: Values of the reference point by metric name, own units; metrics that are left
                out keep the default.
            constraints: What metrics have to keep.

        Raises:
            DataError: When ``given`` names an unknown metric, or holds NaN or infinity.
            SurrogateError: When no evaluation of a metric succeeded.
        """
        if bool(seen.partial.any()):
            return _by_metric(seen, space, given or {})
        metrics, seen = seen.metrics, seen.succeeded()
        if not len(seen):
            raise SurrogateError(
                "no evaluation succeeded, so there is nothing to fit",
                hint="look at the reasons of the failures in events.jsonl",
            )
        gains = to_maximisation(seen.Y, metrics)
        ends, experts, rule = _ends(seen.X, space)
        low, high = gains[ends].amin(0), gains[experts].amax(0)
        rounding, most = _rounding(low, high), gains.amax(0)
        ranged = high - low > torch.maximum(rounding, _noise(seen.select(ends)))
        floor = torch.maximum(rounding, _noise(seen))
        above = ~ranged & (most - low > floor)
        high, ranged = torch.where(above, most, high), ranged | above
        if bool(above.any()):
            names = ", ".join(_names(metrics, above))
            rule += f"; where no expert beats it ({names}), the best observed ends the scale"
        unit = None
        if given:
            threshold, named = _threshold(given, metrics)
            rule = _given_rule(metrics, named, rule)
            span = most - gains.amin(0)
            width = torch.where(ranged, high - low, span)
            apart = named & ((threshold > low) | ~ranged)
            ranged = ranged | (named & (span > floor))
            low = torch.where(named, threshold, low)
            if bool(apart.any()):
                unit = torch.where(apart, torch.maximum(width, high - low), high - low)
                names = ", ".join(_names(metrics, apart))
                rule += f"; one unit of {names} is the range that was measured"
        return cls(
            metrics,
            to_maximisation(low, metrics),
            to_maximisation(high, metrics),
            rule,
            unit,
            ranged,
            tuple(constraints),
        )

    @classmethod
    def common(cls, scales: Sequence[Scale], rule: str) -> Scale:
        """Return the scale that several of the same metrics share: worst points, best ends.

        A metric has a range where it has one in any of them.
        """
        metrics = scales[0].metrics
        low = torch.stack([to_maximisation(one.point, metrics) for one in scales]).amin(0)
        high = torch.stack([to_maximisation(one.best, metrics) for one in scales]).amax(0)
        ranged = torch.stack([one.ranged for one in scales]).any(0)
        unit = None
        if any(one.unit is not None for one in scales):
            unit = torch.stack([one.width for one in scales]).amax(0)
        return cls(
            metrics,
            to_maximisation(low, metrics),
            to_maximisation(high, metrics),
            rule,
            unit,
            ranged,
            scales[0].constraints,
        )

    @property
    def constrained(self) -> Tensor:
        """``m`` booleans: which metrics have a constraint."""
        held = {one.metric for one in self.constraints}
        return torch.tensor([metric.name in held for metric in self.metrics], dtype=torch.bool)

    @property
    def is_anchored(self) -> bool:
        """Whether the reference point is the worst that base and experts were measured at."""
        return self.rule.startswith(_ANCHORED)

    @property
    def is_observed(self) -> bool:
        """Whether observations stand in for a base and experts that were not measured."""
        return self.rule.startswith(_OBSERVED)

    @property
    def width(self) -> Tensor:
        """``m`` positive widths, own units; of a metric without a range, its magnitude."""
        size = self.point.abs()
        wide = self.ranged | (
            self.constrained & (self._low != to_maximisation(self.best, self.metrics))
        )
        return torch.where(wide, self._width, torch.where(size > 0, size, torch.ones_like(size)))

    @property
    def end(self) -> Tensor:
        """``m`` values that have gain 1, own units."""
        if self.unit is None:
            return self.best
        return to_maximisation(self._low + self._width, self.metrics)

    @property
    def rangeless(self) -> tuple[str, ...]:
        """Names of the metrics that have no range."""
        return _names(self.metrics, ~self.ranged & ~self.constrained)

    def gains(
        self, values: Tensor, *, maximised: bool = False, unit: Tensor | None = None
    ) -> Tensor:
        """Return ``values`` (``... x m``) with 0 at the reference point and 1 at :attr:`end`.

        Nothing is cut off: what beats the best end has a gain above 1. Metrics without a range
        have gain 1; those with a constraint 1 where it holds, and else 0. Differentiable.

        Args:
            values: Metric values, own units.
            maximised: Whether ``values`` are turned so that larger is better already.
            unit: ``m`` widths in place of those from the point to the best end.
        """
        upward = values if maximised else to_maximisation(values, self.metrics)
        scaled = (upward - self._low) / (self._width if unit is None else unit)
        if bool(self.ranged.all()):
            return scaled
        fixed = torch.ones_like(scaled)
        if self.constraints:
            missed = broken(to_maximisation(upward, self.metrics), self.metrics, self.constraints)
            for i, one in enumerate(self.constraints):
                column = [metric.name for metric in self.metrics].index(one.metric)
                fixed[..., column] = fixed[..., column].masked_fill(missed[..., i] > 0, 0.0)
        return torch.where(self.ranged, scaled, fixed)

    def weights(self, preferences: Tensor) -> Tensor:
        """Return weights (``... x m``) without those of metrics that have no range.

        They add up to 1; weights that are on such metrics alone stay as they are.
        """
        if bool(self.ranged.all()):
            return preferences
        counted = preferences * self.ranged
        total = counted.sum(-1, keepdim=True)
        return torch.where(total > 0, counted / total, preferences)

    def observed_unit(self, values: Tensor) -> Tensor:
        """Return how far observed ``values`` (``n x m``, own units) reach, ``m`` positive widths.

        To the best of them, from the worst of them or the reference point, whichever is worse.
        """
        gains = to_maximisation(values, self.metrics)
        reach = gains.amax(0) - torch.minimum(self._low, gains.amin(0))
        return torch.where(self.ranged & (reach > 0), reach, torch.ones_like(reach))

    def select(self, columns: Sequence[int]) -> Scale:
        """Return the scale of the metrics in these columns."""
        index = torch.as_tensor(list(columns), dtype=torch.long)
        kept = {self.metrics[i].name for i in columns}
        return replace(
            self,
            constraints=tuple(one for one in self.constraints if one.metric in kept),
            metrics=tuple(self.metrics[i] for i in columns),
            point=self.point[index],
            best=self.best[index],
            unit=None if self.unit is None else self.unit[index],
            ranged=self.ranged[index],
        )

    def notes(self) -> list[str]:
        """Return what a reader must know: metrics without a range, thresholds that none met."""
        among = "the evaluations" if self.is_observed else "base and experts"
        said = []
        for metric, low, high in zip(
            self.metrics, self.point.tolist(), self.best.tolist(), strict=True
        ):
            if metric.name not in self.rangeless:
                continue
            what = f"does not differ between {among} ({high:.4g})"
            if self.rule.startswith(_GIVEN):
                what = f"does not vary ({high:.4g}; reference point {low:.4g})"
            elif low != high:
                ends = f"{low:.4g}, {high:.4g}"
                if f"{low:.4g}" == f"{high:.4g}":
                    ends = f"{high:.4g}, apart by {abs(high - low):.2g}"
                what = f"differs by no more than its noise between {among} ({ends})"
            said.append(
                f"metric {metric.name!r} {what}: it takes no part in hypervolumes and "
                "preferences; it still works as a constraint"
            )
        unmet = self.ranged & (self._low >= to_maximisation(self.best, self.metrics))
        for metric, low, high, chosen in zip(
            self.metrics, self.point.tolist(), self.best.tolist(), unmet.tolist(), strict=True
        ):
            if chosen:
                said.append(
                    f"the reference point of metric {metric.name!r} ({low:.4g}) is not beaten by "
                    f"{among} ({high:.4g}): it is a threshold, beyond which alone hypervolume "
                    "counts; preferences are in units of the range that was measured"
                )
        return said


def broken(values: Tensor, metrics: Sequence[Metric], constraints: Sequence[Constraint]) -> Tensor:
    """Return by how much each point breaks each constraint, ``... x c``; 0 where it keeps it.

    Args:
        values: ``... x m`` metric values, own units.
        metrics: The ``m`` metrics.
        constraints: The ``c`` constraints.
    """
    names = [metric.name for metric in metrics]
    missed = [
        (one.bound - values[..., names.index(one.metric)])
        * (1.0 if isinstance(one, AtLeast) else -1.0)
        for one in constraints
    ]
    if not missed:
        return values[..., :0]
    return torch.stack(missed, -1).clamp_min(0.0)


def _names(metrics: Sequence[Metric], which: Tensor) -> tuple[str, ...]:
    return tuple(m.name for m, chosen in zip(metrics, which.tolist(), strict=True) if chosen)


def _by_metric(seen: Observations, space: CoefficientSpace, given: Mapping[str, float]) -> Scale:
    """Return the scale of metrics that not all rows have: of each by the rows that have it."""
    _threshold(given, seen.metrics)
    parts = [
        Scale.of(
            seen.of(metric.name),
            space,
            {name: value for name, value in given.items() if name == metric.name},
        )
        for metric in seen.metrics
    ]
    rules: dict[str, list[str]] = {}
    for part in parts:
        rules.setdefault(part.rule, []).append(part.metrics[0].name)
    first, *others = rules
    rule = first + "".join(f"; for {', '.join(rules[other])}: {other}" for other in others)
    apart = any(part.unit is not None for part in parts)
    return Scale(
        seen.metrics,
        torch.cat([part.point for part in parts]),
        torch.cat([part.best for part in parts]),
        rule,
        torch.cat([part.width for part in parts]) if apart else None,
        torch.cat([part.ranged for part in parts]),
    )


def _ends(X: Tensor, space: CoefficientSpace) -> tuple[Tensor, Tensor, str]:
    """Return which rows of ``X`` (``n x d``) make the point and the best end, and the rule."""
    anchors, measured = space.anchors(), anchor_rows(X, space)
    is_expert = torch.tensor([kind == "expert" for kind in anchors.kinds], dtype=torch.bool)
    is_base = torch.tensor([kind == "base" for kind in anchors.kinds], dtype=torch.bool)
    found = (measured.any(-1) & (is_base | is_expert)).tolist()
    if sum(found) < 2:
        alone = [name for name, here in zip(anchors.names, found, strict=True) if here]
        which = f"of base and experts only {alone[0]}" if alone else "neither base nor experts"
        every = torch.ones(len(X), dtype=torch.bool)
        return every, every, f"{_OBSERVED} ({which} {'was' if alone else 'were'} measured)"
    experts = measured[is_expert].any(0)
    has_base = bool(measured[is_base].any())
    ends = experts | measured[is_base].any(0)
    return ends, experts, f"{_ANCHORED} {'base and experts' if has_base else 'the experts'}"


def _threshold(given: Mapping[str, float], metrics: tuple[Metric, ...]) -> tuple[Tensor, Tensor]:
    """Return the given values (``m``, larger is better) and which metrics have one."""
    names = [metric.name for metric in metrics]
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise DataError(
            f"the reference point names unknown metrics: {', '.join(unknown)}",
            hint=f"the metrics are {', '.join(names)}",
        )
    values = torch.tensor([float(given.get(name, 0.0)) for name in names], dtype=torch.float64)
    if not bool(torch.isfinite(values).all()):
        raise DataError(
            f"the reference point is {dict(given)}", hint="give finite values, in own units"
        )
    named = torch.tensor([name in given for name in names], dtype=torch.bool)
    return to_maximisation(values, metrics), named


def _given_rule(metrics: tuple[Metric, ...], named: Tensor, rule: str) -> str:
    if bool(named.all()):
        return _GIVEN
    return f"{_GIVEN} for {', '.join(_names(metrics, named))}, else {rule}"


def _noise(seen: Observations) -> Tensor:
    """Return how far rows that differ by noise alone lie apart, ``m``, with a probability of .95.

    The number of standard errors of a difference is Bonferroni's for all pairs of rows. Errors on
    the same examples cancel in a difference, and so does what a covariance of the noise says that
    rows have in common. A count of examples is exact to one.
    """
    same = torch.tensor([metric.resampling == "same" for metric in seen.metrics])
    variance = seen.Yvar.nan_to_num(0.0).masked_fill(same, 0.0).mean(0)
    n = len(seen)
    if seen.covariance is not None and n > 1:
        own = seen.covariance.diagonal(dim1=-1, dim2=-2).sum(-1)
        common = (seen.covariance.sum((-1, -2)) - own) / (n - 1)
        variance = ((own - common) / n).clamp_min(0.0)
    whole = [
        (metric.upper or 0.0) - (metric.lower or 0.0) if metric.kind == "proportion" else 0.0
        for metric in seen.metrics
    ]
    example = (torch.tensor(whole, dtype=torch.float64) / seen.counts).nan_to_num(0.0)
    pairs = max(1, len(seen) * (len(seen) - 1) / 2)
    level = torch.tensor(1 - 0.025 / pairs, dtype=torch.float64)
    errors: Tensor = torch.special.ndtri(level).square()
    return (2 * (errors * variance + example.square().amax(0))).sqrt()
