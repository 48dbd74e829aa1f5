"""What tells the runs of a sweep apart: the fewest settings, in the words of the user."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["UNSET", "Variation", "variation"]

UNSET = "not set"
"""Shown where a run does not have a setting that another has."""

_SEED = "seed"


@dataclass(frozen=True)
class Variation:
    """How runs differ.

    Attributes:
        keys: The settings that tell them apart, ``seed`` aside.
        values: For each key its values, in natural order.
        labels: For each run its variant, such as ``"surrogate=gp, loop.budget=24"``.
        order: The variants in the natural order of their values.
    """

    keys: tuple[str, ...]
    values: Mapping[str, tuple[str, ...]]
    labels: tuple[str, ...]
    order: tuple[str, ...]


def variation(settings: Sequence[Mapping[str, str]], named: Sequence[str] = ()) -> Variation:
    """Return the fewest settings that tell the runs apart.

    Settings are looked at in turn: those the user named, then the shortest names. One is kept
    when it splits what those before it leave together; what follows from another (a default that
    is interpolated from it, all that an experiment sets) is therefore left out, and so is what
    goes with the seed, which pairs the runs.

    Args:
        settings: Name and value of every setting, one mapping for each run.
        named: Names that the user gave, most telling first.
    """
    known = {key for one in settings for key in one}
    rest = sorted(known - set(named), key=lambda key: (key.count("."), key))
    seeds = [one.get(_SEED) for one in settings]
    kept: list[str] = []
    cells: list[tuple[str, ...]] = [()] * len(settings)
    for key in [*(key for key in dict.fromkeys(named) if key in known), *rest]:
        values = [one.get(key, UNSET) for one in settings]
        if key == _SEED or (len(set(seeds)) > 1 and values == seeds):
            continue
        finer = [(*cell, value) for cell, value in zip(cells, values, strict=True)]
        if len(set(finer)) > len(set(cells)):
            kept.append(key)
            cells = finer
    labels = tuple(
        ", ".join(f"{key}={value}" for key, value in zip(kept, cell, strict=True)) or "all runs"
        for cell in cells
    )
    return Variation(
        keys=tuple(kept),
        values={
            key: tuple(sorted({cell[i] for cell in cells}, key=natural))
            for i, key in enumerate(kept)
        },
        labels=labels,
        order=tuple(
            dict.fromkeys(
                label
                for _, label in sorted(
                    zip(cells, labels, strict=True), key=lambda pair: [natural(x) for x in pair[0]]
                )
            )
        ),
    )


def natural(text: str) -> list[tuple[int, float, str]]:
    """Return a key that sorts numbers inside words by their size."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(0, float(x), "") if i % 2 else (1, 0.0, x) for i, x in enumerate(parts) if x]
