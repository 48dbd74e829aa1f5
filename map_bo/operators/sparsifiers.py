"""What leaves parts of task vectors out, with all that no coefficient changes ready."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from map_bo.merging.arena import arena
from map_bo.merging.deltas import Deltas
from map_bo.merging.workers import spread
from map_bo.operators.random_mask import element_key
from map_bo.operators.sparsify import drop, keep_band, keep_largest, magnitude_ranks, rank_drop
from map_bo.operators.thresholds import Thresholds

__all__ = ["Band", "Drop", "RankDrop", "Sparsifier", "Trim", "element_keys", "ranked", "row_width"]

_RANKED = 1 << 18  # numbers that are ranked at once

Limits = Callable[[float], Thresholds]
"""Share of the largest numbers -> the magnitudes from which they are kept."""


class Sparsifier(Protocol):
    """Leaves out parts of pieces of task vectors."""

    def at(self, settings: Mapping[str, float]) -> Sparsifier:
        """Return the sparsifier for values of the settings that are searched."""
        ...

    def unit(self, slot: int) -> int:
        """Return a number of elements: a tensor is cut at its multiples only."""
        ...

    def apply(self, rows: Tensor, slot: int, start: int) -> Tensor:
        """Return ``N x n`` new rows: what stays of a piece, rescaled where the method says so."""
        ...


def row_width(shape: Sequence[int]) -> int:
    """Return how many numbers make a row within which `RankDrop` ranks; see `Della`.

    Of a convolution the last dimension alone is a few numbers, or one, which are no ranking.
    """
    if len(shape) < 2:
        return math.prod(shape)
    return math.prod(shape[1:]) if len(shape) > 3 else shape[-1]


def ranked(deltas: Deltas, widths: Sequence[int]) -> dict[int, Tensor]:
    """Return the ranks of all numbers within their matrix rows, by tensor; see `magnitude_ranks`.

    Args:
        deltas: Resident task vectors.
        widths: Length of the matrix rows of each tensor.
    """
    slots = deltas.layout.slots
    order = sorted(range(len(slots)), key=lambda i: -slots[i].numel)
    ranks: dict[int, Tensor] = {}
    items: list[tuple[int, int, int]] = []
    for slot in order:
        size, width = slots[slot].numel, max(widths[slot], 1)
        ranks[slot] = torch.empty(
            len(deltas.experts), size, dtype=torch.int16, device=deltas.device
        )
        step = width * max(1, _RANKED // width)
        items += [(slot, at, min(at + step, size)) for at in range(0, size, step)]

    def rank(item: tuple[int, int, int], _: None) -> None:
        slot, start, stop = item
        rows = deltas.read(slot, start, stop)[1:]
        ranks[slot][:, start:stop] = magnitude_ranks(rows, widths[slot])

    spread(rank, items, lambda: None, threads=deltas.threads)
    return ranks


def element_keys(deltas: Deltas, seed: int) -> tuple[tuple[int, ...], ...]:
    """Return the keys of the random numbers by tensor and expert; see `element_key`."""
    return tuple(
        tuple(element_key(seed, expert, slot.name) for expert in deltas.experts)
        for slot in deltas.layout.slots
    )


@dataclass(frozen=True)
class Trim:
    """Keeps what is at least as large as a threshold.

    Attributes:
        limits: The thresholds.
        find: Thresholds for a density, where the density is searched.
    """

    limits: Thresholds
    find: Limits | None

    def at(self, settings: Mapping[str, float]) -> Sparsifier:
        """See `Sparsifier`."""
        if self.find is None or "density" not in settings:
            return self
        return replace(self, limits=self.find(settings["density"]))

    def unit(self, slot: int) -> int:
        """See `Sparsifier`."""
        return 1

    def apply(self, rows: Tensor, slot: int, start: int) -> Tensor:
        """See `Sparsifier`."""
        return keep_largest(rows, self.limits[slot], empty=arena.empty)


@dataclass(frozen=True)
class Band:
    """Keeps what is between two thresholds.

    Attributes:
        density: Share of the numbers that stay.
        gamma: Share of the largest that go.
        low: The smallest magnitudes that stay.
        high: The largest magnitudes that stay.
        find: Thresholds for a share, where one is searched.
        top: Ceilings for a share, where one is searched.
    """

    density: float
    gamma: float
    low: Thresholds
    high: Thresholds
    find: Limits | None
    top: Limits | None

    @classmethod
    def of(cls, density: float, gamma: float, find: Limits, top: Limits, searched: bool) -> Band:
        """Find both thresholds."""
        gone = min(gamma, 1 - density)
        low = find(density + gone if density > 0 else 0.0)
        again = (find, top) if searched else (None, None)
        return cls(density, gamma, low, top(gone), *again)

    def at(self, settings: Mapping[str, float]) -> Sparsifier:
        """See `Sparsifier`."""
        if self.find is None or self.top is None:
            return self
        density = settings.get("density", self.density)
        gamma = settings.get("gamma", self.gamma)
        return Band.of(density, gamma, self.find, self.top, True)

    def unit(self, slot: int) -> int:
        """See `Sparsifier`."""
        return 1

    def apply(self, rows: Tensor, slot: int, start: int) -> Tensor:
        """See `Sparsifier`."""
        return keep_band(rows, self.low[slot], self.high[slot], empty=arena.empty)


@dataclass(frozen=True)
class Drop:
    """Drops by chance and rescales.

    Attributes:
        keys: Keys of the random numbers.
        rate: Drop rate.
    """

    keys: tuple[tuple[int, ...], ...]
    rate: float

    def at(self, settings: Mapping[str, float]) -> Sparsifier:
        """See `Sparsifier`."""
        return replace(self, rate=settings.get("drop_rate", self.rate))

    def unit(self, slot: int) -> int:
        """See `Sparsifier`."""
        return 1

    def apply(self, rows: Tensor, slot: int, start: int) -> Tensor:
        """See `Sparsifier`."""
        return drop(rows, self.keys[slot], start, self.rate, empty=arena.empty)


@dataclass(frozen=True)
class RankDrop:
    """Drops by chance, small numbers more often, and rescales.

    Attributes:
        keys: Keys of the random numbers.
        widths: Length of the matrix rows of each tensor.
        ranks: Ranks of all numbers by tensor; None ranks each piece anew.
        rate: Mean drop rate.
        epsilon: From the lowest to the highest drop rate.
    """

    keys: tuple[tuple[int, ...], ...]
    widths: tuple[int, ...]
    ranks: Mapping[int, Tensor] | None
    rate: float
    epsilon: float

    def at(self, settings: Mapping[str, float]) -> Sparsifier:
        """See `Sparsifier`."""
        rate = settings.get("drop_rate", self.rate)
        return replace(self, rate=rate, epsilon=settings.get("epsilon", self.epsilon))

    def unit(self, slot: int) -> int:
        """See `Sparsifier`."""
        return self.widths[slot]

    def apply(self, rows: Tensor, slot: int, start: int) -> Tensor:
        """See `Sparsifier`."""
        if self.ranks is None:
            ranks = magnitude_ranks(rows, self.widths[slot])
        else:
            ranks = self.ranks[slot][:, start : start + rows.shape[1]]
        return rank_drop(
            rows, ranks, self.keys[slot], start, self.rate, self.epsilon, empty=arena.empty
        )
