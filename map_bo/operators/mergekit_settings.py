"""Parameters of mergekit recipes: numbers, and lists of filters on tensor names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from map_bo.errors import ConfigError

__all__ = ["Entries", "as_bool", "as_number", "blocks_of", "entries"]

Entries = tuple[tuple[str | None, float], ...]
"""Filter (a part of tensor names; None takes all) and value; the first match counts."""


def as_number(name: str, value: Any) -> float:
    """Return the value of a parameter as a number.

    Raises:
        ConfigError: When it is none, or is a gradient over layers.
    """
    if isinstance(value, list):
        raise ConfigError(
            f"{name} is a gradient over layers: {value}",
            hint="give one value, or filters for groups of layers; with blocks each group of "
            "layers has coefficients of its own",
        )
    try:
        # YAML reads 1e-5, without a point, as text.
        number = float(value) if isinstance(value, (int, float, str)) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{name} is {value!r}", hint="give a number")
    return number


def as_bool(name: str, value: Any) -> bool:
    """Return the value of a parameter that is true or false.

    Raises:
        ConfigError: When it is neither.
    """
    if isinstance(value, bool):
        return value
    if value in (0, 1):
        return bool(value)
    raise ConfigError(f"{name} is {value!r}", hint="give true or false for the whole merge")


def entries(name: str, settings: Sequence[Any]) -> Entries:
    """Return the filters and values of a parameter.

    Args:
        name: The parameter, for messages.
        settings: What is given for it, the one that counts first; None is nothing.

    Raises:
        ConfigError: When nothing is given, or something that is neither a number nor filters.
    """
    found: list[tuple[str | None, float]] = []
    for setting in settings:
        if setting is None:
            continue
        conditional = isinstance(setting, Mapping) or (
            isinstance(setting, list) and any(isinstance(item, Mapping) for item in setting)
        )
        items = [setting] if isinstance(setting, Mapping) or not conditional else setting
        for item in items:
            text = None
            if conditional:
                if not isinstance(item, Mapping) or "value" not in item:
                    raise ConfigError(
                        f"{name} has the entry {item!r}", hint="write - filter: TEXT, value: NUMBER"
                    )
                text, item = item.get("filter"), item["value"]
            text = None if text in (None, "*") else str(text)
            value = as_number(name, item)
            # Where an earlier filter is a part of this one it takes all that this would.
            if not any(earlier is not None and earlier in (text or "") for earlier, _ in found):
                found.append((text, value))
            if text is None:
                return tuple(found)
    if not found:
        raise ConfigError(f"the recipe gives no {name}", hint=f"set {name} under parameters:")
    return tuple(found)


def blocks_of(columns: Sequence[Entries]) -> tuple[dict[str, str] | None, list[list[float]]]:
    """Return blocks of tensors that have the same values, and the values of each column there.

    Args:
        columns: Parameters; those that have filters must have the same ones.

    Returns:
        Patterns by block as `Blocks` takes them, None where there are no filters; and a row of
        values, one for each column, by block.

    Raises:
        ConfigError: When the filters differ.
    """
    uneven = [column for column in columns if column[0][0] is not None]
    if not uneven:
        return None, [[column[0][1] for column in columns]]
    texts = [text for text, _ in uneven[0] if text is not None]
    if any([text for text, _ in column if text is not None] != texts for column in uneven):
        raise ConfigError(
            "filters differ between models or parameters",
            hint="give the same filters in the same order wherever there are some",
        )
    blocks = {text: _pattern(text, texts[:i]) for i, text in enumerate(texts)}
    rows = [[dict(column).get(text, column[-1][1]) for column in columns] for text in texts]
    if all(column[-1][0] is None for column in uneven):
        blocks["rest" if "rest" not in blocks else "all the rest"] = "*"
        rows.append([column[-1][1] for column in columns])
    return blocks, rows


def _pattern(text: str, earlier: Sequence[str]) -> str:
    if not earlier:
        return re.escape(text)
    others = "|".join(map(re.escape, earlier))
    return f"^(?!.*(?:{others})).*{re.escape(text)}"
