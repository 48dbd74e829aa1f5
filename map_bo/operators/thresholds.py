"""Magnitude thresholds of all task vectors, over a whole vector or tensor by tensor."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from map_bo.merging.deltas import Deltas
from map_bo.merging.workers import spread
from map_bo.operators.quantiles import (
    MagnitudeSketch,
    bins_within,
    kept_count,
    located,
    magnitude_bins,
    magnitude_of,
)

__all__ = ["TRIMS", "Thresholds", "ceilings", "sketches", "thresholds"]

TRIMS = ("global", "tensor")
_PIECE = 1 << 18

Thresholds = tuple[tuple[float, ...], ...]
"""By tensor of the layout and by expert: the smallest magnitude that is kept."""


def thresholds(deltas: Deltas, density: float, trim: str) -> Thresholds:
    """Return the magnitudes that keep the largest ``density`` of the numbers, exactly.

    Numbers that are equal to a threshold are all kept, so that where many are equal (differences
    of bfloat16 weights) more than ``density`` may stay.

    Args:
        deltas: The task vectors; read twice.
        density: Share to keep, in ``[0, 1]``, of at least one number unless it is 0.
        trim: ``"global"`` ranks all numbers of a task vector together, ``"tensor"`` those of each
            tensor apart.
    """
    if density >= 1:
        return _everywhere(deltas, 0.0)
    if density <= 0:
        return _everywhere(deltas, math.inf)
    return _ranked(deltas, lambda total: kept_count(density, total), trim)


def ceilings(deltas: Deltas, share: float, trim: str) -> Thresholds:
    """Return the largest magnitudes that stay where the largest ``share`` of the numbers goes.

    That is less than one number of a short tensor, and then none goes. Numbers that are equal to
    a ceiling all stay, so that less than ``share`` may go. See `thresholds`.
    """
    if share <= 0:
        return _everywhere(deltas, math.inf)
    return _ranked(deltas, lambda total: kept_count(share, total, least=0) + 1, trim)


def _everywhere(deltas: Deltas, value: float) -> Thresholds:
    return ((value,) * len(deltas.experts),) * len(deltas.layout.slots)


def _ranked(deltas: Deltas, rank: Callable[[int], int], trim: str) -> Thresholds:
    """Return the magnitudes that have a rank (from 1) among so many numbers; 0 below all."""
    experts, slots = len(deltas.experts), deltas.layout.slots

    def found(part: Sequence[int], threads: int | None) -> tuple[float, ...]:
        total = sum(slots[slot].numel for slot in part)
        if not 1 <= rank(total) <= total:
            return (0.0,) * experts
        counts = _counted(deltas, part, lambda n, row: magnitude_bins(row), threads=threads)
        bins = [located(row, rank(total)) for row in counts]
        counts = _counted(
            deltas, part, lambda n, row: bins_within(row, bins[n][0]), threads=threads
        )
        return tuple(
            magnitude_of(bin_, located(row, left)[0])
            for row, (bin_, left) in zip(counts, bins, strict=True)
        )

    if trim == "global":
        return (found(range(len(slots)), deltas.threads),) * len(slots)
    result: list[tuple[float, ...]] = [()] * len(slots)

    def of(slot: int) -> None:
        result[slot] = found([slot], 1)

    _by_size(deltas, of)
    return tuple(result)


def sketches(deltas: Deltas, trim: str) -> tuple[tuple[MagnitudeSketch, ...], ...]:
    """Return the distributions of magnitudes by tensor and expert, in one pass; see `thresholds`.

    With ``trim="global"`` those of all tensors are the same.
    """
    slots = deltas.layout.slots
    if trim == "global":
        counts = _counted(
            deltas, range(len(slots)), lambda n, row: magnitude_bins(row), threads=deltas.threads
        )
        return (tuple(MagnitudeSketch.of(row) for row in counts),) * len(slots)
    result: list[tuple[MagnitudeSketch, ...]] = [()] * len(slots)

    def of(slot: int) -> None:
        counts = _counted(deltas, [slot], lambda n, row: magnitude_bins(row), threads=1)
        result[slot] = tuple(MagnitudeSketch.of(row) for row in counts)

    _by_size(deltas, of)
    return tuple(result)


def _by_size(deltas: Deltas, of: Callable[[int], None]) -> None:
    """Do all tensors, the largest first so that threads end together."""
    slots = deltas.layout.slots
    order = sorted(range(len(slots)), key=lambda i: -slots[i].numel)
    spread(lambda slot, _: of(slot), order, lambda: None, threads=deltas.threads)


def _counted(
    deltas: Deltas,
    slots: Sequence[int],
    count: Callable[[int, Tensor], Tensor],
    *,
    threads: int | None = None,
) -> Tensor:
    """Return the sums of what is counted in the pieces of each task vector, ``N x bins``."""
    lock = threading.Lock()
    nothing = torch.zeros(0, device=deltas.device)
    total = torch.stack([count(n, nothing) for n in range(len(deltas.experts))])

    def add(item: tuple[int, int, int], _: None) -> None:
        for n, row in enumerate(deltas.read(*item)[1:]):
            found = count(n, row)
            with lock:
                total[n].add_(found)

    spread(add, _pieces(deltas, slots), lambda: None, threads=threads)
    return total.cpu()


def _pieces(deltas: Deltas, slots: Sequence[int]) -> list[tuple[int, int, int]]:
    return [
        (slot, start, min(start + _PIECE, deltas.layout.slots[slot].numel))
        for slot in slots
        for start in range(0, deltas.layout.slots[slot].numel, _PIECE)
    ]
