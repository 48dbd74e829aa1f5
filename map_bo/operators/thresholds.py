"""Magnitude thresholds of all task vectors, over a whole vector or tensor by tensor."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from map_bo.merging.deltas import Deltas
from map_bo.merging.workers import spread
from map_bo.operators.quantiles import (
    MagnitudeSketch,
    kept_count,
    largest_magnitude,
    magnitude_bins,
)

__all__ = ["TRIMS", "Thresholds", "sketches", "thresholds"]

TRIMS = ("global", "tensor")
_PIECE = 1 << 20

Thresholds = tuple[tuple[float, ...], ...]
"""By tensor of the layout and by expert: the smallest magnitude that is kept."""


def thresholds(deltas: Deltas, density: float, trim: str) -> Thresholds:
    """Return the magnitudes that keep the largest ``density`` of the numbers, exactly.

    Numbers that are equal to a threshold are all kept, so that where many are equal (differences
    of bfloat16 weights) more than ``density`` may stay.

    Args:
        deltas: The task vectors; read twice.
        density: Share to keep, in ``[0, 1]``.
        trim: ``"global"`` ranks all numbers of a task vector together, ``"tensor"`` those of each
            tensor apart.
    """
    experts, slots = len(deltas.experts), deltas.layout.slots
    if density >= 1:
        return ((0.0,) * experts,) * len(slots)
    if trim == "global":
        counts = _counted(deltas, range(len(slots)))
        kept = kept_count(density, int(counts[0].sum()))
        found = tuple(
            largest_magnitude(_row_pieces(deltas, range(len(slots)), n), counts[n], kept)
            for n in range(experts)
        )
        return (found,) * len(slots)
    result: list[tuple[float, ...]] = [()] * len(slots)

    def of(slot: int) -> None:
        kept = kept_count(density, slots[slot].numel)
        counts = _counted(deltas, [slot], threads=1)
        result[slot] = tuple(
            largest_magnitude(_row_pieces(deltas, [slot], n), counts[n], kept)
            for n in range(experts)
        )

    _by_size(deltas, of)
    return tuple(result)


def sketches(deltas: Deltas, trim: str) -> tuple[tuple[MagnitudeSketch, ...], ...]:
    """Return the distributions of magnitudes by tensor and expert, in one pass; see `thresholds`.

    With ``trim="global"`` those of all tensors are the same.
    """
    slots = deltas.layout.slots
    if trim == "global":
        counts = _counted(deltas, range(len(slots)))
        return (tuple(MagnitudeSketch.of(row) for row in counts),) * len(slots)
    result: list[tuple[MagnitudeSketch, ...]] = [()] * len(slots)

    def of(slot: int) -> None:
        counts = _counted(deltas, [slot], threads=1)
        result[slot] = tuple(MagnitudeSketch.of(row) for row in counts)

    _by_size(deltas, of)
    return tuple(result)


def _by_size(deltas: Deltas, of: Callable[[int], None]) -> None:
    """Do all tensors, the largest first so that threads end together."""
    slots = deltas.layout.slots
    order = sorted(range(len(slots)), key=lambda i: -slots[i].numel)
    threads = None if deltas.device.type == "cpu" else 1
    spread(lambda slot, _: of(slot), order, lambda: None, threads=threads)


def _counted(deltas: Deltas, slots: range | list[int], *, threads: int | None = None) -> Tensor:
    """Return the histograms of magnitudes, ``N x bins``."""
    lock = threading.Lock()
    total: list[Tensor] = []

    def count(item: tuple[int, int, int], _: None) -> None:
        rows = deltas.read(*item)[1:]
        counts = torch.stack([magnitude_bins(row) for row in rows])
        with lock:
            if total:
                total[0].add_(counts)
            else:
                total.append(counts)

    if deltas.device.type != "cpu":
        threads = 1
    spread(count, _pieces(deltas, slots), lambda: None, threads=threads)
    return total[0].cpu()


def _pieces(deltas: Deltas, slots: range | list[int]) -> list[tuple[int, int, int]]:
    return [
        (slot, start, min(start + _PIECE, deltas.layout.slots[slot].numel))
        for slot in slots
        for start in range(0, deltas.layout.slots[slot].numel, _PIECE)
    ]


def _row_pieces(deltas: Deltas, slots: range | list[int], expert: int) -> Iterator[Tensor]:
    for item in _pieces(deltas, slots):
        yield deltas.read(*item)[1 + expert]
