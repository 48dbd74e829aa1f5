"""How numbers are written for people: short, aligned, with no more digits than are meaningful."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from map_bo.data import Metric
from map_bo.space import CoefficientSpace

__all__ = [
    "better",
    "coefficient",
    "coefficients",
    "difference",
    "distinct",
    "fixed",
    "interval",
    "metric_value",
    "ratio",
    "seconds",
    "share",
    "shorten",
    "volume",
]


def metric_value(value: float, metric: Metric, *, missing: str = "") -> str:
    """Return a metric's value: three decimals for values of about [0, 1], else four digits.

    A proportion that is nearly 0 or 1 has as many decimals as tell it from that.
    """
    if math.isnan(value):
        return missing
    if metric.kind == "proportion" and (metric.lower, metric.upper) == (0.0, 1.0):
        apart = min(abs(value), abs(1 - value))
        if not 0 < apart < 0.001:
            return f"{value:.3f}"
        if abs(value) < 0.5:
            return f"{value:.2g}"
        return f"{value:.{min(15, 1 + math.ceil(-math.log10(apart) - 1e-9))}f}"
    if abs(value) < sys.float_info.min * 4:  # what a loss of exactly 0 is predicted as
        return "0.000"
    return f"{value:.3f}" if 0.01 <= abs(value) < 10 or value == 0 else f"{value:.4g}"


def interval(lower: float, upper: float, metric: Metric, *, missing: str = "") -> str:
    """Return ``"0.871 to 0.934"``."""
    if math.isnan(lower) or math.isnan(upper):
        return missing
    return f"{metric_value(lower, metric)} to {metric_value(upper, metric)}"


def fixed(value: float, digits: int, *, sign: bool = False) -> str:
    """Return ``value`` with so many decimals; one that is not 0 does not read as 0."""
    form = f"{'+' if sign else ''}.{digits}f"
    rounds_to_zero = 0 < abs(value) < 0.5 * 10.0**-digits
    return format(value, form.replace(f"{digits}f", "2g") if rounds_to_zero else form)


def difference(value: float) -> str:
    """Return a difference of metric values with its sign: three decimals below 10."""
    return fixed(value, 3, sign=True) if abs(value) < 10 else f"{value:+.4g}"


def volume(value: float) -> str:
    """Return a hypervolume with four decimals; one that is not 0 does not read as 0."""
    return fixed(value, 4)


def coefficient(value: float) -> str:
    """Return a coefficient with two decimals; a value that rounds to zero has no sign."""
    return f"{round(value, 2) + 0.0:.2f}"


def coefficients(x: Sequence[float], space: CoefficientSpace) -> list[str]:
    """Return the coefficients of a row (``d``); an option by its name, inactive settings empty."""
    if space.choice is None:
        return [coefficient(value) for value in x]
    named = space.named(x)
    values = (named.get(name, "") for name in space.names)
    return [value if isinstance(value, str) else coefficient(value) for value in values]


def better(metric: Metric) -> str:
    """Return ``"higher is better"`` or ``"lower is better"``."""
    return "higher is better" if metric.direction == "max" else "lower is better"


def share(value: float) -> str:
    """Return a probability with two decimals; one that is almost 0 or 1 does not read as certain.

    It is empty where the probability is not known.
    """
    if math.isnan(value):
        return ""
    if 0 < value < 0.005:
        return "<0.01"
    return ">0.99" if 0.995 <= value < 1 else f"{value:.2f}"


def ratio(value: float) -> str:
    """Return a share of another score with three decimals; empty where it is not known."""
    return "" if math.isnan(value) else f"{value:.3f}"


def seconds(value: float) -> str:
    """Return a duration in a suitable unit."""
    if value < 0.995:
        return f"{value:.2f} s"
    if value < 120:
        return f"{value:.1f} s"
    minutes = round(value / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def shorten(name: str, length: int) -> str:
    """Return ``name`` on one line; when it is longer than ``length``, its middle is cut out."""
    name = " ".join(name.split()) or repr(name)
    if len(name) <= length:
        return name
    tail = (length - 1) // 2
    return f"{name[: length - 1 - tail]}\u2026{name[len(name) - tail :]}"


def distinct(names: Sequence[str], length: int) -> list[str]:
    """Return all ``names`` shortened; those that would look the same are numbered."""
    short = [shorten(name, length) for name in names]
    return [
        f"{shorten(name, length - 3)} #{i + 1}" if short.count(name) > 1 else name
        for i, name in enumerate(short)
    ]
