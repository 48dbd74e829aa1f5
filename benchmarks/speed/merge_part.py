"""What the parts of the benchmark of merging have in common: settings, outcome, taking turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.merge_shapes import Size

__all__ = [
    "ABSENT",
    "Copy",
    "Options",
    "Outcome",
    "Seconds",
    "Way",
    "dtype_name",
    "in_turns",
    "medians",
    "over",
    "row",
    "storages",
    "table_of",
    "timed",
]

ABSENT = "not installed"

Seconds = dict[str, list[float]]
"""Way -> its seconds, one for each turn."""

Way = Callable[[int], float]
"""Does its work for a turn, counted from 0, and returns the seconds that count."""


@dataclass(frozen=True)
class Options:
    """How a part is to be measured.

    Attributes:
        size: Sizes and repetitions.
        scratch: Folder for checkpoints; what is written there is removed.
        peers: Whether to measure what takes other libraries long.
    """

    size: Size
    scratch: Path
    peers: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a part found.

    Attributes:
        title: Says what was merged.
        table: Lines of Markdown: the table, after a line on how it was measured.
        data: All numbers, for JSON.
    """

    title: str
    table: list[str]
    data: dict[str, Any]


class Copy:
    """A plain copy in memory that moves some bytes: it reads half of them and writes the others.

    Args:
        source: Memory to read from; enough of it.
        nbytes: How many bytes are moved in all.
    """

    def __init__(self, source: Tensor, nbytes: int) -> None:
        half = nbytes // 2 // source.element_size()
        self._source = source.view(-1)[:half]
        self._target = torch.empty_like(self._source)
        self.nbytes = 2 * half * source.element_size()

    def __call__(self, turn: int = 0) -> Tensor:
        """Copy once, and return the copy."""
        return self._target.copy_(self._source)


def timed(work: Callable[[int], Any], device: torch.device | str = "cpu") -> Way:
    """Return ``work`` as a way that counts all of its seconds, until the device is done."""
    cuda = torch.device(device).type == "cuda"

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize(device)

    def way(turn: int) -> float:
        wait()
        start = time.perf_counter()
        result = work(turn)
        wait()
        took = time.perf_counter() - start
        del result  # what it returns is freed after the clock was read
        return took

    return way


def in_turns(ways: Mapping[str, Way], repeats: int, *, warm_up: bool = True) -> Seconds:
    """Let all ways take turns, so that what else runs on the machine disturbs them alike.

    Args:
        ways: Name -> way.
        repeats: How many turns count.
        warm_up: Whether one more turn comes first and does not count.
    """
    seconds: Seconds = {name: [] for name in ways}
    for turn in range(repeats + warm_up):
        for name, way in ways.items():
            took = way(turn)
            if turn >= warm_up:
                seconds[name].append(took)
    return seconds


def medians(seconds: Seconds) -> dict[str, float]:
    """Return the median seconds of each way."""
    return {name: median(values) for name, values in seconds.items()}


def over(seconds: Seconds, yardstick: str = "copy") -> dict[str, float]:
    """Return the median, over the turns, of each way's seconds over those of the yardstick."""
    return {
        name: median(a / b for a, b in zip(values, seconds[yardstick], strict=True))
        for name, values in seconds.items()
    }


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def storages() -> tuple[torch.dtype, ...]:
    """Return the dtypes that task vectors can be stored in."""
    from map_bo.errors import MergeError
    from map_bo.merging.checkpoints.checkpoint import open_checkpoint
    from map_bo.merging.vectors.task_vectors import TaskVectors

    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        base, expert = ({"x": torch.tensor([1.0, value])} for value in (2.0, 3.0))
        try:
            TaskVectors.load(open_checkpoint(base), {"e": open_checkpoint(expert)}, dtype=dtype)
        except MergeError:
            continue
        found.append(dtype)
    return tuple(found)


def row(*cells: object) -> str:
    """Return a line of a Markdown table; numbers with three digits, None as an empty cell."""
    texts = []
    for cell in cells:
        if cell is None:
            texts.append("")
        elif isinstance(cell, float):
            texts.append(f"{cell:.3f}" if abs(cell) < 10 else f"{cell:.1f}")
        else:
            texts.append(str(cell))
    return f"| {' | '.join(texts)} |"


def table_of(note: str, heads: tuple[str, ...], rows: list[str]) -> list[str]:
    """Return a note and a Markdown table."""
    return [note, "", row(*heads), "|" + "---|" * len(heads), *rows]
