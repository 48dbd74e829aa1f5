"""Numbers and switches that users give, in the forms in which they have them.

A count may come as Python's integer, as one of numpy's (a seed out of ``np.arange``) or as a tensor
of one; what is kept is Python's own, so that records and identities do not depend on the form.
Text, fractions and truth values are no counts, and are refused by name.
"""

from __future__ import annotations

import math
import operator
from numbers import Real

from map_bo.errors import ConfigError, MapBoError

__all__ = ["real_number", "switch", "whole_number"]


def whole_number(
    name: str,
    value: object,
    *,
    least: int | None = None,
    most: int | None = None,
    error: type[MapBoError] = ConfigError,
    hint: str | None = None,
) -> int:
    """Return a whole number that a user gave as an ``int``.

    Args:
        name: What it is, to begin the message with.
        value: What was given.
        least: The smallest that is possible.
        most: The largest that is possible.
        error: What is raised.
        hint: How to fix it; None says the range.

    Raises:
        MapBoError: An ``error`` when it is not a whole number, or out of range.
    """
    number = _as_int(value)
    inside = number is not None and (
        (least is None or number >= least) and (most is None or number <= most)
    )
    if number is None or not inside:
        raise error(
            f"{name} must be {_range(least, most)}, got {value!r}",
            hint=hint or f"give {_range(least, most)}",
        )
    return number


def real_number(
    name: str,
    value: object,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    most: float = math.inf,
    error: type[MapBoError] = ConfigError,
    hint: str | None = None,
) -> float:
    """Return a finite number that a user gave; whole numbers stay whole.

    Args:
        name: What it is, to begin the message with.
        value: What was given.
        above: It must be larger than this.
        least: The smallest that is possible.
        most: The largest that is possible.
        error: What is raised.
        hint: How to fix it; None says the range.

    Raises:
        MapBoError: An ``error`` when it is not a number, not finite, or out of range.
    """
    number: float | None = _as_int(value)
    if number is None and isinstance(value, Real) and not _is_truth(value):
        number = float(value)
    if number is None or not (
        -math.inf < number < math.inf and number > above and least <= number <= most
    ):
        raise error(
            f"{name} must be {_interval(above, least, most)}, got {value!r}",
            hint=hint or f"give {_interval(above, least, most)}",
        )
    return number


def switch(name: str, value: object, *, error: type[MapBoError] = ConfigError) -> bool:
    """Return a truth value that a user gave, Python's or numpy's.

    Raises:
        MapBoError: An ``error`` when it is anything else, such as the text ``"false"``.
    """
    if not _is_truth(value):
        raise error(f"{name} must be true or false, got {value!r}", hint="give true or false")
    return bool(value)


def _is_truth(value: object) -> bool:
    return isinstance(value, bool) or type(value).__name__ in ("bool_", "bool")


def _as_int(value: object) -> int | None:
    if _is_truth(value):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def _range(least: int | None, most: int | None) -> str:
    if least is not None and most is not None:
        return f"a whole number from {least} to {most}"
    if least is not None:
        return f"a whole number of at least {least}"
    return "a whole number" if most is None else f"a whole number of at most {most}"


def _interval(above: float, least: float, most: float) -> str:
    if above > -math.inf:
        return f"a number above {above:g}" + (f", up to {most:g}" if most < math.inf else "")
    if least > -math.inf and most < math.inf:
        return f"a number between {least:g} and {most:g}"
    if least > -math.inf:
        return f"a number of at least {least:g}"
    return "a finite number" if most == math.inf else f"a number of at most {most:g}"
