"""The cases of the quality benchmark, by name.

python -m benchmarks.quality.cases [--suite all] [--root FOLDER]    a table of them

The folder of the image sets comes from ``--root`` (in code ``case(name, root=...)``) or from the
environment variable ``MAP_BO_DATA``; without it the image cases are not available.
"""

from __future__ import annotations

import argparse
import inspect
import time
from collections.abc import Callable
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.cases_core import Case
from benchmarks.quality.cases_functions import BOTORCH, SYNTHETIC
from benchmarks.quality.cases_images import IMAGES, missing_images
from benchmarks.quality.cases_models import BLOCKS, DIGITS, NOISY
from benchmarks.quality.cases_plateau import PLATEAUS
from map_bo.errors import ConfigError, DataError
from map_bo.rng import make_generator

__all__ = ["SUITES", "VERSION", "Case", "available", "case", "names"]

VERSION = 1
"""Raise it with any change of a case: what was recorded on another version does not count."""

_REAL = {**DIGITS, **NOISY, **BLOCKS, **IMAGES, **PLATEAUS}
_FUNCTIONS = {**SYNTHETIC, **BOTORCH}
_ALL: dict[str, Callable[..., Case]] = {**_REAL, **_FUNCTIONS}

SUITES: dict[str, tuple[str, ...]] = {
    "real": tuple(_REAL),
    "synthetic": tuple(_FUNCTIONS),
    "all": tuple(_ALL),
    "smoke": ("digits-mlp-2", "digits-mlp-2-noisy", "concave-2"),
}
"""Suite -> names of its cases; ``"real"`` are those that merge trained models."""


def names(suite: str) -> tuple[str, ...]:
    """Return the names of the cases of a suite, in a fixed order.

    Raises:
        ConfigError: When there is no such suite.
    """
    if suite not in SUITES:
        raise ConfigError(f"there is no suite {suite!r}", hint=f"suites are {', '.join(SUITES)}")
    return SUITES[suite]


def available(name: str, *, root: str | Path | None = None) -> str | None:
    """Return why a case cannot be run here, or None when it can.

    Args:
        name: The case.
        root: Folder of the image sets; see the module.

    Raises:
        ConfigError: When there is no such case.
    """
    _require(name)
    return missing_images(root) if name in IMAGES else None


def case(name: str, **options: Any) -> Case:
    """Return a case; it is made once a process, and its models are trained when missing.

    Args:
        name: See :data:`SUITES`.
        options: Of the case's family: ``seed`` and ``epochs`` of training (digits, noisy,
            blocks), ``few`` examples (noisy), ``seed`` (synthetic), ``noise_std`` (botorch),
            ``root`` and ``epochs`` (images).

    Raises:
        ConfigError: When there is no such case or option.
        DataError: When the images that it needs are not there.
    """
    _require(name)
    known = _options(_ALL[name])
    for option in options:
        if option not in known:
            raise ConfigError(
                f"the case {name} has no option {option!r}",
                hint=f"it has {', '.join(known)}" if known else "it has none",
            )
    if reason := available(name, root=options.get("root")):
        raise DataError(
            f"the case {name} is not available: {reason}",
            hint="give root=FOLDER, or set MAP_BO_DATA to the folder of the image sets",
        )
    return _made(name, tuple(sorted(options.items())))


@cache
def _made(name: str, options: tuple[tuple[str, Any], ...]) -> Case:
    return _ALL[name](name, **dict(options))


def _require(name: str) -> None:
    if name not in _ALL:
        near = get_close_matches(name, list(_ALL), n=3, cutoff=0.5)
        raise ConfigError(
            f"there is no case {name!r}",
            hint=f"did you mean {', '.join(near)}?" if near else f"cases are {', '.join(_ALL)}",
        )


def _options(make: Callable[..., Case]) -> tuple[str, ...]:
    wanted = ("seed", "epochs", "few", "noise_std", "root")
    takes = inspect.signature(make).parameters
    return tuple(name for name in wanted if name in takes)


def row(one: Case) -> str:
    """Return a line of the table: sizes, scale, the blend's gain, and the truth's speed."""
    anchors = one.problem.space.anchors()
    blend = one.gains(one.truth(anchors.X[-1:]))[0]
    X = one.problem.space.sample(64, generator=make_generator(0))
    one.truth(X[:8])
    start = time.process_time()
    one.truth(X)
    milliseconds = (time.process_time() - start) / len(X) * 1e3

    def listed(values: torch.Tensor) -> str:
        return " ".join(f"{value:.2f}" for value in values.tolist())

    return (
        f"| {one.name} | {one.family} | {one.problem.space.d} | {one.m} | {listed(one.low)} "
        f"| {listed(one.high)} | {float(blend.mean()):.2f} ({float(blend.amin()):.2f}) "
        f"| {milliseconds:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", default="all", choices=sorted(SUITES))
    parser.add_argument("--root", type=Path, help="folder of the image sets")
    parser.add_argument("--only", nargs="+", metavar="CASE")
    options = parser.parse_args()
    print("| case | family | d | m | gain 0 | gain 1 | blend's gain, mean (least) | truth, ms |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.only or names(options.suite):
        if reason := available(name, root=options.root):
            print(f"| {name} | skipped: {reason} |" + " |" * 6)
            continue
        given = {"root": options.root} if name in IMAGES and options.root else {}
        print(row(case(name, **given)), flush=True)


if __name__ == "__main__":
    main()
