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
    BINS,
    MagnitudeSketch,
    kept_count,
    largest_magnitudes,
    magnitude_bins,
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
        counts = _counted(deltas, part, threads)

        def each(take: Callable[[Tensor], None]) -> None:
            _each_piece(deltas, part, take, threads)

        return largest_magnitudes(each, counts, rank(total))

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
        counts = _counted(deltas, range(len(slots)), deltas.threads)
        return (tuple(MagnitudeSketch.of(row) for row in counts),) * len(slots)
    result: list[tuple[MagnitudeSketch, ...]] = [()] * len(slots)

    def of(slot: int) -> None:
        counts = _counted(deltas, [slot], 1)
        result[slot] = tuple(MagnitudeSketch.of(row) for row in counts)

    _by_size(deltas, of)
    return tuple(result)


def _by_size(deltas: Deltas, of: Callable[[int], None]) -> None:
    """Do all tensors, the largest first so that threads end together."""
    slots = deltas.layout.slots
    order = sorted(range(len(slots)), key=lambda i: -slots[i].numel)
    spread(lambda slot, _: of(slot), order, lambda: None, threads=deltas.threads)


def _counted(deltas: Deltas, slots: Sequence[int], threads: int | None) -> Tensor:
    """Return the histograms of magnitudes, ``N x bins``."""
    lock = threading.Lock()
    total = torch.zeros(len(deltas.experts), BINS, dtype=torch.int64, device=deltas.device)

    def count(rows: Tensor) -> None:
        for row, counts in zip(rows, total, strict=True):
            found = magnitude_bins(row)
            with lock:
                counts.add_(found)

    _each_piece(deltas, slots, count, threads)
    return total.cpu()


def _each_piece(
    deltas: Deltas,
    slots: Sequence[int],
    take: Callable[[Tensor], None],
    threads: int | None,
) -> None:
    """Call ``take`` with all pieces of the task vectors, ``N x n``."""
    items = [
        (slot, start, min(start + _PIECE, deltas.layout.slots[slot].numel))
        for slot in slots
        for start in range(0, deltas.layout.slots[slot].numel, _PIECE)
    ]
    spread(lambda item, _: take(deltas.read(*item)[1:]), items, lambda: None, threads=threads)
