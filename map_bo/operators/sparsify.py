"""Leaving out parts of task vectors: by magnitude, by chance, or both.

A `Sparsifier` has all that no coefficient changes ready, and applies pure functions to pieces
``N x n`` of task vectors in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from map_bo.merging.vectors.kernel import Kernel
from map_bo.merging.vectors.operator import Deltas
from map_bo.merging.vectors.parallel import Empty, arena, parallel_for
from map_bo.operators.random_mask import LEVELS, element_key, uniform_levels
from map_bo.operators.thresholds import Thresholds

__all__ = [
    "Band",
    "Drop",
    "Effects",
    "KeptEffects",
    "RankDrop",
    "Sparsifier",
    "Trim",
    "drop",
    "element_keys",
    "keep_band",
    "keep_largest",
    "magnitude_ranks",
    "rank_all",
    "rank_drop",
    "row_width",
]

_RANKED = 1 << 18  # numbers that are ranked at once
_ADDED = 1 << 14  # kept numbers that are added at once, so that temporary memory is bounded

Limits = Callable[[float], Thresholds]
"""Share of the largest numbers -> the magnitudes from which they are kept."""

Effects = Callable[[Tensor, int], Tensor]
"""A piece of base and task vectors and its tensor's index -> ``N x n`` what each expert adds to
the base for a coefficient of 1, in a merge that is linear in its coefficients."""

BandLimits = Callable[[float, float], Thresholds]
"""Share to keep, share of the largest that go -> the magnitudes from which numbers are kept."""


def keep_largest(
    rows: Tensor, thresholds: Sequence[float], *, empty: Empty = torch.empty
) -> Tensor:
    """Set to zero what is smaller in magnitude than the row's threshold.

    Args:
        rows: ``N x n``.
        thresholds: One for each row; what is equal to it is kept.
        empty: Where new tensors come from.
    """
    result = empty(*rows.shape, dtype=rows.dtype, device=rows.device)
    for row, out, threshold in zip(rows, result, thresholds, strict=True):
        _shrink(row, threshold, out)
    return result


def keep_band(
    rows: Tensor,
    low: Sequence[float],
    high: Sequence[float],
    *,
    empty: Empty = torch.empty,
) -> Tensor:
    """Keep magnitudes from ``low`` to ``high``, both included; see `keep_largest`."""
    result = keep_largest(rows, low, empty=empty)
    spare = empty(rows.shape[1], dtype=rows.dtype, device=rows.device)
    for out, limit in zip(result, high, strict=True):
        if limit < math.inf:
            torch.ops.aten.hardshrink.out(out, limit, out=spare)  # only what is above the limit
            out.sub_(spare)
    return result


def _shrink(row: Tensor, threshold: float, out: Tensor) -> None:
    if threshold <= 0:
        out.copy_(row)
    elif threshold == math.inf:
        out.zero_()
    else:
        # hardshrink keeps what is larger than its parameter; the next smaller float32 makes
        # "larger" into "at least the threshold".
        below = torch.nextafter(torch.tensor(threshold), torch.tensor(0.0))
        torch.ops.aten.hardshrink.out(row, float(below), out=out)


def drop(
    rows: Tensor,
    keys: Sequence[int],
    start: int,
    rate: float,
    *,
    empty: Empty = torch.empty,
) -> Tensor:
    r"""Drop each element with a rate and rescale what stays: ``m * v / (1 - p)``.

    DARE, Yu et al., *Language Models are Super Mario*, arXiv 2311.03099, equation (1): the
    expectation of a row is the row itself.

    Args:
        rows: ``N x n``.
        keys: Key of the random numbers of each row, see `element_key`.
        start: Index of the first element in its tensor.
        rate: Drop rate in ``[0, 1)``; taken to the nearest ``1 / 65536``.
        empty: Where new tensors come from.
    """
    level = min(round(rate * LEVELS), LEVELS - 1)
    levels = uniform_levels(keys, start, start + rows.shape[1], rows.device, empty=empty)
    # Comparing and multiplying in one dtype is several times faster than in a mixture.
    kept = empty(*rows.shape, device=rows.device)
    torch.ge(kept.copy_(levels), float(level - LEVELS // 2), out=kept)
    torch.mul(rows, kept, out=kept)
    return kept.mul_(LEVELS / (LEVELS - level)) if level else kept


def magnitude_ranks(rows: Tensor, width: int) -> Tensor:
    """Return the rank of each number within its matrix row, largest magnitude first.

    Args:
        rows: ``N x n``, where ``n`` is a multiple of ``width``.
        width: Length of a matrix row.

    Returns:
        ``N x n`` in uint16 as int16 bits less ``2^15``: the rank ``0 .. width - 1`` as a share of
        the row, in steps of ``1 / 65536``.
    """
    bits = rows.contiguous().view(torch.int32).bitwise_and(0x7FFFFFFF).view(-1, width)
    # The bits of magnitudes are in their order. With the index behind them all keys differ, so
    # that any sort gives one order, on any machine; sorting keys is faster than sorting indices.
    keys = bits.neg().to(torch.int64).bitwise_left_shift_(32)
    keys.bitwise_or_(torch.arange(width, device=rows.device))
    if keys.device.type == "cpu":
        keys.numpy().sort(axis=-1)  # twice as fast as torch's and more, on one thread
    else:
        keys = keys.sort(dim=-1).values
    steps = torch.arange(width, device=rows.device) * LEVELS // max(width, 1) - LEVELS // 2
    ranks = torch.empty(keys.shape, dtype=torch.int16, device=rows.device)
    order = keys.bitwise_and_(0xFFFFFFFF)
    ranks.scatter_(-1, order, steps.to(torch.int16).expand_as(order))
    return ranks.view(rows.shape)


def rank_drop(
    rows: Tensor,
    ranks: Tensor,
    keys: Sequence[int],
    start: int,
    rate: float,
    width: float,
    *,
    empty: Empty = torch.empty,
) -> Tensor:
    r"""Drop small numbers more often than large ones and rescale each by its own rate.

    MAGPRUNE of DELLA, Deep et al., *DELLA-Merging*, arXiv 2406.11617, section 3.1: an element of
    rank ``r`` among ``n`` (0 is the largest) is dropped with ``p_r = p - e / 2 + e r / n`` and
    else divided by ``1 - p_r``. (Random levels are whole numbers, so that an element is dropped
    with ``p_r`` to within ``1 / 65536``.)

    Args:
        rows: ``N x n``.
        ranks: ``N x n``, see `magnitude_ranks`.
        keys: Key of the random numbers of each row.
        start: Index of the first element in its tensor.
        rate: The mean drop rate ``p``.
        width: ``e``, from the lowest to the highest drop rate.
        empty: Where new tensors come from.
    """
    levels = uniform_levels(keys, start, start + rows.shape[1], rows.device, empty=empty)
    rates = empty(*rows.shape, device=rows.device)
    kept = empty(*rows.shape, device=rows.device)
    # Both are shifted by half a range: p_r LEVELS - LEVELS / 2 against the level.
    rates.copy_(ranks).mul_(width).add_(LEVELS * (rate - 0.5))
    torch.ge(kept.copy_(levels), rates, out=kept)
    torch.mul(rows, kept, out=kept)
    # 1 - p_r = (LEVELS / 2 - rates) / LEVELS
    half = torch.tensor(0.5, device=rows.device)
    return kept.div_(torch.add(half, rates, alpha=-1 / LEVELS, out=rates))


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

    Of a convolution the last dimension alone is a few numbers, or one, which is not a ranking.
    """
    if len(shape) < 2:
        return math.prod(shape)
    return math.prod(shape[1:]) if len(shape) > 3 else shape[-1]


def rank_all(deltas: Deltas, widths: Sequence[int]) -> dict[int, Tensor]:
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

    parallel_for(rank, items, lambda: None, threads=deltas.threads)
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
        find: Thresholds for a share to keep and one above it that goes, where one is searched.
        top: Ceilings for a share, where one is searched.
    """

    density: float
    gamma: float
    low: Thresholds
    high: Thresholds
    find: BandLimits | None
    top: Limits | None

    @classmethod
    def of(
        cls, density: float, gamma: float, find: BandLimits, top: Limits, searched: bool
    ) -> Band:
        """Find both thresholds."""
        gone = min(gamma, 1 - density)
        low = find(density, gone)
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


class KeptEffects(Kernel):
    """Linear merges in which few numbers move: what they add is kept, and a candidate adds it up.

    Eight bytes are kept for each number that an expert moves.

    Args:
        deltas: The task vectors; read once.
        effects: What each expert adds.
    """

    def __init__(self, deltas: Deltas, effects: Effects) -> None:
        slots, experts = deltas.layout.slots, len(deltas.experts)
        nothing = (torch.empty(0, dtype=torch.int64), torch.empty(0))
        self._kept: list[list[tuple[Tensor, Tensor]]] = [[nothing] * experts for _ in slots]

        def keep(slot: int, _: None) -> None:
            size = slots[slot].numel
            kind = torch.int32 if size < 1 << 31 else torch.int64
            found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(experts)]
            for start in range(0, size, _RANKED):
                arena.reset()
                rows = deltas.read(slot, start, min(start + _RANKED, size))
                for row, parts in zip(effects(rows, slot), found, strict=True):
                    at = row.nonzero().flatten()
                    parts.append(((at + start).to(kind), row[at]))
            for n, parts in enumerate(found):
                if parts:
                    where, values = zip(*parts, strict=True)
                    self._kept[slot][n] = torch.cat(where), torch.cat(values)

        order = sorted(range(len(slots)), key=lambda i: -slots[i].numel)
        parallel_for(keep, order, lambda: None, threads=deltas.threads)

    def piece(self, rows: Tensor, slot: int, start: int, c: Tensor) -> Tensor:
        """Return the base and what the experts add to it."""
        size = rows.shape[1]
        out = arena.empty(size, device=rows.device).copy_(rows[0])
        for (where, values), factor in zip(self._kept[slot], c.tolist(), strict=True):
            ends = torch.tensor([start, start + size], dtype=where.dtype, device=where.device)
            first, last = torch.searchsorted(where, ends).tolist()
            for at in range(first, last, _ADDED) if factor else ():
                part = slice(at, min(at + _ADDED, last))
                out.index_add_(0, where[part] - start, values[part], alpha=factor)
        return out
