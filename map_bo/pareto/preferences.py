"""From what a user prefers to one point of a front: weights and constraints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from map_bo.data import Metric
from map_bo.errors import PreferenceError, did_you_mean
from map_bo.scale import Scale, widths
from map_bo.values import real_number

__all__ = ["Preference", "check_names", "choose", "numbers_by_name", "shortfall", "utility"]

Rule = Literal["weighted_sum", "chebyshev"]


@dataclass(frozen=True)
class Preference:
    """What matters how much, and what must hold.

    Attributes:
        weights: Importance by metric name; any non-negative scale. Metrics not named weigh 0;
            with no weights at all, every metric weighs the same.
        at_least: Smallest acceptable value by metric name, in the metric's own unit, whichever
            way the metric is better.
        at_most: Largest acceptable value by metric name, in the metric's own unit.
        rule: ``"weighted_sum"`` of the scaled metrics, or ``"chebyshev"``, which makes the
            worst weighted shortfall from the best expert as small as it can be.
        confidence: Probability with which all bounds are to hold when the merge is measured, where
            a posterior can tell; None for bounds on what is predicted alone.

    Raises:
        PreferenceError: On weights that are negative, not finite or all zero, bounds that are
            not finite or contradict each other, a confidence that is not between 0 and 1, or an
            unknown rule.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    at_least: Mapping[str, float] = field(default_factory=dict)
    at_most: Mapping[str, float] = field(default_factory=dict)
    rule: Rule = "weighted_sum"
    confidence: float | None = 0.9

    def __post_init__(self) -> None:
        for name in ("weights", "at_least", "at_most"):
            given = {key: float(value) for key, value in getattr(self, name).items()}
            object.__setattr__(self, name, given)
        for name, weight in self.weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise PreferenceError(
                    f"the weight of {name} must be finite and at least 0, got {weight}",
                    hint="give 0 to ignore a metric",
                )
        if self.weights and not any(self.weights.values()):
            raise PreferenceError(
                "all weights are 0",
                hint="give at least one metric a positive weight, or no weights at all",
            )
        for kind, bounds in (("at least", self.at_least), ("at most", self.at_most)):
            for name, bound in bounds.items():
                if not math.isfinite(bound):
                    raise PreferenceError(
                        f"{name} must be {kind} a finite number, got {bound}",
                        hint="give a finite bound, or leave it out",
                    )
        for name in self.at_least.keys() & self.at_most.keys():
            if self.at_least[name] > self.at_most[name]:
                raise PreferenceError(
                    f"{name} cannot be at least {self.at_least[name]:g} and at most "
                    f"{self.at_most[name]:g}",
                    hint="swap or drop one of the two bounds",
                )
        if self.rule not in ("weighted_sum", "chebyshev"):
            raise PreferenceError(
                f"there is no rule {self.rule!r}", hint="choose weighted_sum or chebyshev"
            )
        if self.confidence is not None:
            hint = "give a probability such as 0.9, or None (--confidence 0) to bound predictions"
            value = real_number("confidence", self.confidence, error=PreferenceError, hint=hint)
            if not 0 < value < 1:
                raise PreferenceError(
                    f"confidence must be between 0 and 1, got {self.confidence!r}", hint=hint
                )
            object.__setattr__(self, "confidence", value)

    @property
    def bounded(self) -> bool:
        """Whether there is any bound."""
        return bool(self.at_least or self.at_most)


def choose(
    values: Tensor, preference: Preference, scale: Scale, *, probability: Tensor | None = None
) -> int:
    """Return the index of the point that suits a preference best.

    Points that break a constraint are out; the rest are compared by their :func:`utility`. Of
    equal points the first wins. With probabilities, points that keep the constraints with less
    than the preference's confidence are out too; where that leaves none, the most probable point
    of those that are predicted to keep them is taken.

    Args:
        values: ``k x m`` metric values of the points, in own units and directions.
        preference: Weights, constraints and rule.
        scale: The ``m`` metrics and their scale.
        probability: ``k`` probabilities that the point keeps all constraints when measured.

    Raises:
        PreferenceError: When the preference names an unknown metric, no point satisfies the
            constraints, or there is no point.
    """
    names = [metric.name for metric in scale.metrics]
    check_names(preference, names)
    if values.dim() != 2 or values.shape[-1] != len(names) or len(values) == 0:
        raise PreferenceError(
            f"values must be a non-empty matrix of {len(names)} metrics, got shape "
            f"{tuple(values.shape)}",
            hint="give one row per point and one column per metric",
        )
    allowed = _allowed(values, names, preference)
    score = utility(values, preference, scale)
    if probability is not None and preference.confidence is not None and preference.bounded:
        sure = allowed & (probability >= preference.confidence)
        if not bool(sure.any()):
            return int(probability.masked_fill(~allowed, -math.inf).argmax())
        allowed = sure
    return int(score.masked_fill(~allowed, -math.inf).argmax())


def check_names(preference: Preference, names: Sequence[str]) -> None:
    """Refuse a preference that names other metrics than ``names``.

    Raises:
        PreferenceError: When a weight or a bound is for an unknown metric.
    """
    given = [*preference.weights, *preference.at_least, *preference.at_most]
    unknown = sorted({name for name in given if name not in names})
    if unknown:
        raise PreferenceError(
            f"there is no metric {', '.join(repr(name) for name in unknown)}",
            hint=did_you_mean(unknown[0], names),
        )


def utility(values: Tensor, preference: Preference, scale: Scale) -> Tensor:
    """Return what a preference thinks of each point (``k``, larger is better), bounds aside.

    The number is in units of the scale, on which the reference point is 0 and the best single
    expert is 1; a metric without a range decides nothing. Differentiable in ``values``.

    Args:
        values: ``k x m`` metric values of the points, in own units and directions.
        preference: Weights and rule.
        scale: The ``m`` metrics and their scale.
    """
    names = [metric.name for metric in scale.metrics]
    weights = torch.tensor(
        [preference.weights.get(name, 0.0) if preference.weights else 1.0 for name in names],
        dtype=torch.float64,
    )
    weights = scale.weights(weights / weights.sum())
    S = scale.gains(values.double())
    score: Tensor = S @ weights
    if preference.rule == "chebyshev":
        # The small weighted sum tells apart points whose worst shortfall is the same.
        score = -(weights * (1 - S)).amax(-1) + 1e-3 * score
    return score


def shortfall(
    values: Tensor,
    metrics: Sequence[Metric],
    preference: Preference,
    *,
    width: Tensor | None = None,
) -> Tensor:
    """Return by how much each point misses the bounds, summed over them (``k``, 0 when none).

    Args:
        values: ``k x m`` metric values of the points, in own units and directions.
        metrics: The ``m`` metrics.
        preference: The bounds.
        width: ``m`` widths to measure the misses in; own units when None.

    Raises:
        PreferenceError: When a bound is for an unknown metric.
    """
    names = [metric.name for metric in metrics]
    check_names(preference, names)
    unit = torch.ones(len(names), dtype=torch.float64) if width is None else width
    total = torch.zeros(len(values), dtype=torch.float64)
    for bounds, side in ((preference.at_least, 1.0), (preference.at_most, -1.0)):
        for name, bound in bounds.items():
            column = names.index(name)
            total = total + (side * (bound - values[:, column])).clamp_min(0.0) / unit[column]
    return total


def numbers_by_name(what: str, given: object) -> dict[str, float]:
    """Return what a caller gives per metric; nothing for None.

    Args:
        what: What it is, to begin an error with, such as ``"at_least"``.
        given: A mapping from names to numbers, or None.

    Raises:
        PreferenceError: When it is not.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise PreferenceError(
            f"{what} must map metrics to numbers, got {given!r}",
            hint=f"write {what}={{'math': 0.5}}",
        )
    found = {}
    for name, value in given.items():
        try:
            found[str(name)] = float(value)
        except (TypeError, ValueError):
            raise PreferenceError(
                f"{what} of {name} must be a number, got {value!r}",
                hint=f"write {what}={{'{name}': 0.5}}",
            ) from None
    return found


def _allowed(values: Tensor, names: Sequence[str], preference: Preference) -> Tensor:
    """Return which points keep all bounds; raise with what is attainable when none does."""
    bounds = [(name, bound, 1.0) for name, bound in preference.at_least.items()]
    bounds += [(name, bound, -1.0) for name, bound in preference.at_most.items()]
    if not bounds:
        return torch.ones(len(values), dtype=torch.bool)
    column = [names.index(name) for name, _, _ in bounds]
    limit = torch.tensor([bound for _, bound, _ in bounds], dtype=torch.float64)
    sign = torch.tensor([side for _, _, side in bounds], dtype=torch.float64)
    miss = ((limit - values[:, column].double()) * sign).clamp_min(0.0)  # k x bounds
    allowed = ~(miss > 0).any(-1)
    if bool(allowed.any()):
        return allowed
    # Misses in different units are compared as shares of each metric's range over the points.
    share = miss / widths(values[:, column].amin(0), values[:, column].amax(0))
    nearest = int(share.amax(-1).argmin())
    missed, attainable = [], []
    for i, (name, bound, side) in enumerate(bounds):
        words = "at least" if side > 0 else "at most"
        own = values[:, column[i]]
        if float(miss[nearest, i]) > 0:
            missed.append(
                f"{name} = {float(own[nearest]):.4g} misses {words} {bound:g} "
                f"by {float(miss[nearest, i]):.4g}"
            )
        extreme, reach = ("largest", own.amax()) if side > 0 else ("smallest", own.amin())
        attainable.append(f"the {extreme} {name} alone is {float(reach):.4g}")
    at_nearest = ", ".join(
        f"{name} = {float(values[nearest, names.index(name)]):.4g}"
        for name in dict.fromkeys(name for name, _, _ in bounds)
    )
    raise PreferenceError(
        f"no point satisfies all constraints; for the nearest point, {'; '.join(missed)}",
        hint=f"relax a bound: {', '.join(attainable)}; together, point {nearest} has {at_nearest}",
    )
