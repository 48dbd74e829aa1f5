"""What a metric has to keep during a whole run: a constraint is no objective.

A constrained metric takes no part in hypervolume, dominance, trade-offs or preferences; points
that break a constraint are no answer of the run. Importing this costs nothing, as the settings do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from map_bo.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from map_bo.data import Metric

__all__ = [
    "AtLeast",
    "AtMost",
    "Constraint",
    "check_constraints",
    "plain_constraints",
    "read_constraints",
]

_WRITTEN = "write constraints as [AtLeast('safe', 0.9)] or {safe: '>= 0.9'}"
_FORM = re.compile(r"\s*(?P<sign>>=|<=|≥|≤|at least|at most)\s*(?P<bound>\S+)\s*")
_LISTED = re.compile(r"\s*(?P<metric>.+?)\s*(?P<rest>(?:>=|<=|≥|≤|at least|at most)\s*\S+)\s*")


@dataclass(frozen=True)
class AtLeast:
    """A metric must not be smaller than a bound, whichever way the metric is better.

    Attributes:
        metric: Name of the metric.
        bound: Smallest acceptable value, in the metric's own unit.

    Raises:
        ConfigError: When the bound is not a finite number.
    """

    metric: str
    bound: float

    def __post_init__(self) -> None:
        _check(self)

    def __str__(self) -> str:
        return f"{self.metric} >= {self.bound!r}"


@dataclass(frozen=True)
class AtMost:
    """A metric must not be larger than a bound, whichever way the metric is better.

    Attributes:
        metric: Name of the metric.
        bound: Largest acceptable value, in the metric's own unit.

    Raises:
        ConfigError: When the bound is not a finite number.
    """

    metric: str
    bound: float

    def __post_init__(self) -> None:
        _check(self)

    def __str__(self) -> str:
        return f"{self.metric} <= {self.bound!r}"


Constraint: TypeAlias = AtLeast | AtMost


def _check(constraint: Any) -> None:
    if not isinstance(constraint.metric, str) or not constraint.metric:
        raise ConfigError(
            f"a constraint needs the name of a metric, got {constraint.metric!r}", hint=_WRITTEN
        )
    try:
        bound = math.nan if isinstance(constraint.bound, bool) else float(constraint.bound)
    except (TypeError, ValueError):
        bound = math.nan
    if not math.isfinite(bound):
        raise ConfigError(
            f"the bound of {constraint.metric} must be a finite number, got {constraint.bound!r}",
            hint="give the bound in the metric's own unit",
        )
    object.__setattr__(constraint, "bound", bound)


def read_constraints(given: Any) -> tuple[Constraint, ...]:
    """Return the constraints that a caller or a configuration gives.

    Args:
        given: None; constraints; texts such as ``"safe >= 0.9"``; or a mapping from metrics to
            ``">= 0.9"`` or to several of these.

    Raises:
        ConfigError: When it is none of these, or two of them contradict each other.
    """
    if given is None:
        return ()
    if isinstance(given, AtLeast | AtMost | str):
        given = [given]
    if isinstance(given, Mapping):
        found = [
            _of_text(str(metric), text)
            for metric, texts in given.items()
            for text in ([texts] if isinstance(texts, str) or not _several(texts) else texts)
        ]
    elif isinstance(given, Iterable):
        found = [_one(part) for part in given]
    else:
        raise ConfigError(f"constraints cannot be {given!r}", hint=_WRITTEN)
    low = {one.metric: one.bound for one in found if isinstance(one, AtLeast)}
    high = {one.metric: one.bound for one in found if isinstance(one, AtMost)}
    if len(low) + len(high) < len(found):
        raise ConfigError(
            "a metric has two constraints of the same side: "
            f"{', '.join(str(one) for one in found)}",
            hint="keep the stricter one",
        )
    for metric in low.keys() & high.keys():
        if low[metric] > high[metric]:
            raise ConfigError(
                f"{metric} cannot be at least {low[metric]:g} and at most {high[metric]:g}",
                hint="swap or drop one of the two bounds",
            )
    return tuple(found)


def plain_constraints(constraints: Iterable[Constraint]) -> dict[str, list[str]]:
    """Return constraints as plain data that :func:`read_constraints` reads."""
    found: dict[str, list[str]] = {}
    for one in constraints:
        sign = ">=" if isinstance(one, AtLeast) else "<="
        found.setdefault(one.metric, []).append(f"{sign} {one.bound!r}")
    return found


def _several(value: Any) -> bool:
    return isinstance(value, Sequence)


def _one(part: Any) -> Constraint:
    if isinstance(part, AtLeast | AtMost):
        return part
    found = _LISTED.fullmatch(part) if isinstance(part, str) else None
    if found is None:
        raise ConfigError(f"{part!r} is not a constraint", hint=_WRITTEN)
    return _of_text(found["metric"], found["rest"])


def _of_text(metric: str, text: Any) -> Constraint:
    found = _FORM.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise ConfigError(
            f"the constraint of {metric} must read '>= BOUND' or '<= BOUND', got {text!r}",
            hint=_WRITTEN,
        )
    kind = AtLeast if found["sign"] in (">=", "≥", "at least") else AtMost
    return kind(metric, found["bound"])  # type: ignore[arg-type]  # checked there


def check_constraints(constraints: Sequence[Constraint], metrics: Sequence[Metric]) -> None:
    """Refuse constraints that these metrics cannot have.

    Raises:
        ConfigError: On an unknown metric, or a bound that no value of the metric can keep.
    """
    known = {metric.name: metric for metric in metrics}
    for one in constraints:
        metric = known.get(one.metric)
        if metric is None:
            raise ConfigError(
                f"the constraint {one} names an unknown metric",
                hint=did_you_mean(one.metric, known) or f"metrics are {', '.join(known)}",
            )
        ends = (metric.upper, 1.0) if isinstance(one, AtLeast) else (metric.lower, -1.0)
        end, side = ends
        if end is not None and (one.bound - end) * side > 0:
            raise ConfigError(
                f"no value of {one.metric} can keep {one}: it ends at {end:g}",
                hint="give a bound in the metric's own unit",
            )
