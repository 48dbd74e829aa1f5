"""Magnitudes at which a share of the task vectors' numbers is kept: exact, or from sketches.

Over a whole task vector or tensor by tensor, in bounded memory. The bits of a non-negative float,
read as a whole number, are in the order of the floats. So a histogram over the leading bits finds,
in one pass, the bin that holds a quantile; a histogram over the other bits of its numbers, in
a second pass, finds it exactly.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from map_bo.merging.align.layout import FlatLayout
from map_bo.merging.vectors.operator import Deltas
from map_bo.merging.vectors.parallel import parallel_for

__all__ = [
    "BINS",
    "TRIMS",
    "MagnitudeSketch",
    "Scores",
    "Thresholds",
    "bins_within",
    "ceilings",
    "kept_count",
    "locate",
    "magnitude_bins",
    "magnitude_of",
    "sketches",
    "thresholds",
]

_SHIFT = 14  # 8 bits of exponent and 9 of mantissa: bins are 0.2 % wide
BINS = 1 << (31 - _SHIFT)
"""How many bins the magnitudes of float32 numbers fall into."""

_KNOTS = 1024

TRIMS = ("global", "tensor")
_PIECE = 1 << 18

Thresholds = tuple[tuple[float, ...], ...]
"""By tensor of the layout and by expert: the smallest magnitude that is kept."""


def kept_count(density: float, total: int, *, least: int = 1) -> int:
    """Return how many of ``total`` numbers a density keeps: the floor of ``density total``.

    A density above 0 keeps at least ``least``, a density of 0 none.
    """
    if density <= 0:
        return 0
    # A product such as .29 * 100 may come out just below a whole number.
    return min(max(least, int(density * total * (1 + 1e-12))), total)


def magnitude_bins(values: Tensor) -> Tensor:
    """Return how many magnitudes fall into each of `BINS` bins, for float32 values."""
    return torch.bincount(_bits(values).bitwise_right_shift_(_SHIFT), minlength=BINS)


@dataclass(frozen=True, eq=False)
class MagnitudeSketch:
    """The distribution of magnitudes of one tensor, or of a whole task vector.

    ``_KNOTS + 1`` quantiles at equal steps of the share of numbers, read from a histogram whose
    bins are 0.2 % wide, and the shares of the numbers that the histogram tells them by.

    Attributes:
        shares: ``k`` ascending shares of the numbers that lie below a knot.
        knots: ``k`` magnitudes, ascending.
        total: How many numbers there are.
        error: The largest share by which what `threshold` keeps can differ from what was asked.
    """

    shares: Tensor
    knots: Tensor
    total: int
    error: float

    @classmethod
    def of(cls, counts: Tensor) -> MagnitudeSketch:
        """Make a sketch of a histogram (see `magnitude_bins`)."""
        counts = counts.cpu()
        filled = counts.nonzero().flatten()
        total = int(counts.sum())
        if not total:
            empty = torch.zeros(1, dtype=torch.float64)
            return cls(empty, empty, 0, 0.0)
        inside = counts[filled].double() / total
        upper = inside.cumsum(0)
        edges = _edge(filled)
        # Quantiles at equal steps: of each the lower edge of the first bin that reaches beyond.
        wanted = torch.arange(_KNOTS + 1, dtype=torch.float64) / _KNOTS
        at = torch.unique(torch.searchsorted(upper, wanted.clamp_max(1 - 0.5 / total)))
        shares = upper[at] - inside[at]
        error = float((torch.cat([shares[1:], torch.ones(1).double()]) - shares).max())
        return cls(shares, edges[at], total, error)

    def threshold(self, density: float) -> float:
        """Return a magnitude such that about ``density`` of the numbers are at least as large.

        The share that is kept differs from ``density`` by at most ``error``; it falls steadily
        with the density.
        """
        if density >= 1 or not self.total:
            return 0.0
        if density <= 0:
            return math.inf
        return float(np.interp(1 - density, self.shares.numpy(), self.knots.numpy()))

    def ceiling(self, share: float) -> float:
        """Return a magnitude such that about ``share`` of the numbers are larger.

        The share differs from what was asked by at most ``error``. None is larger where it is
        less than one number.
        """
        if not kept_count(share, self.total, least=0):
            return math.inf
        # Up to the end of its bin, so that numbers that are all alike stay.
        below = torch.tensor(self.threshold(share), dtype=torch.float32).view(torch.int32)
        return float(below.bitwise_or((1 << _SHIFT) - 1).view(torch.float32))


def locate(counts: Tensor, k: int) -> tuple[int, int]:
    """Return the bin of the ``k``-th largest magnitude, and its rank within that bin.

    Args:
        counts: A histogram, see `magnitude_bins` or `bins_within`.
        k: From 1 to the number of numbers.
    """
    above = counts.flip(0).cumsum(0)
    at = int((above < k).sum())  # bins above the one that holds the k-th
    return len(counts) - 1 - at, k - (int(above[at - 1]) if at else 0)


def bins_within(values: Tensor, bin_: int) -> Tensor:
    """Return how often each of the ``2^14`` magnitudes of a bin occurs, for float32 values."""
    bits = _bits(values)
    inside = bits[bits.bitwise_right_shift(_SHIFT) == bin_].bitwise_and_((1 << _SHIFT) - 1)
    return torch.bincount(inside, minlength=1 << _SHIFT)


def magnitude_of(bin_: int, within: int) -> float:
    """Return the magnitude that is number ``within`` of a bin."""
    bits = torch.tensor((bin_ << _SHIFT) + within, dtype=torch.int32)
    return float(bits.view(torch.float32))


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int32).bitwise_and(0x7FFFFFFF).flatten()


def _edge(bins: Tensor) -> Tensor:
    """Return the smallest magnitude of each bin, in float64."""
    bits = bins.to(torch.int64).bitwise_left_shift(_SHIFT).to(torch.int32)
    return bits.view(torch.float32).double()


class Scores:
    """Numbers that are computed from base and task vectors, to find their thresholds.

    In the form of `Deltas`: where those have task vectors, these have scores.

    Args:
        deltas: What the scores are computed from.
        names: Names of the ``k`` scores.
        score: ``(1 + N) x n`` piece of base and task vectors -> ``k x n`` scores in float32.
    """

    def __init__(
        self, deltas: Deltas, names: Sequence[str], score: Callable[[Tensor], Tensor]
    ) -> None:
        self._deltas, self.experts, self._score = deltas, tuple(names), score
        self.in_place = False

    @property
    def layout(self) -> FlatLayout:
        """The tensors; see `Deltas`."""
        return self._deltas.layout

    @property
    def device(self) -> torch.device:
        """Where pieces are; see `Deltas`."""
        return self._deltas.device

    @property
    def threads(self) -> int | None:
        """How many threads may read at once; see `Deltas`."""
        return self._deltas.threads

    @property
    def resident(self) -> bool:
        """Whether the task vectors are in memory; see `Deltas`."""
        return self._deltas.resident

    def read(self, slot: int, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return the base and the scores of a piece, ``(1 + k) x n``; see `Deltas`."""
        rows = self._deltas.read(slot, start, stop)
        return torch.cat([rows[:1], self._score(rows)])

    def floor_piece(self, slot: int, start: int, piece: Tensor) -> None:
        """Leave scores as they are; see `Deltas`."""


def thresholds(
    deltas: Deltas,
    density: float,
    trim: str,
    *,
    above: float = 0.0,
    counts: Sequence[int] | None = None,
) -> Thresholds:
    """Return the magnitudes that keep the largest ``density`` of the numbers, exactly.

    Numbers that are equal to a threshold are all kept, so that where many are equal (differences
    of bfloat16 weights) more than ``density`` may stay.

    Args:
        deltas: The task vectors; read twice.
        density: Share to keep, in ``[0, 1]``, of at least one number unless it is 0.
        trim: ``"global"`` ranks all numbers of a task vector together, ``"tensor"`` those of each
            tensor apart.
        above: Share of the largest numbers that are not counted, since they go (`ceilings`): of
            ``n`` numbers the ``floor(density n)`` after the first ``floor(above n)`` are kept.
        counts: How many numbers of each tensor the shares are of, where that is not all of them
            but, for example, those that are not 0.
    """
    if density >= 1:
        return _everywhere(deltas, 0.0)
    if density <= 0:
        return _everywhere(deltas, math.inf)

    def rank(total: int) -> int:
        return min(total, kept_count(density, total) + kept_count(above, total, least=0))

    return _rank(deltas, rank, trim, counts)


def ceilings(deltas: Deltas, share: float, trim: str) -> Thresholds:
    """Return the largest magnitudes that stay where the largest ``share`` of the numbers goes.

    That is less than one number of a short tensor, and then none goes. Numbers that are equal to
    a ceiling all stay, so that less than ``share`` may go. See `thresholds`.
    """
    if share <= 0:
        return _everywhere(deltas, math.inf)
    return _rank(deltas, lambda total: kept_count(share, total, least=0) + 1, trim)


def _everywhere(deltas: Deltas, value: float) -> Thresholds:
    return ((value,) * len(deltas.experts),) * len(deltas.layout.slots)


def _rank(
    deltas: Deltas,
    rank: Callable[[int], int],
    trim: str,
    counted: Sequence[int] | None = None,
) -> Thresholds:
    """Return the magnitudes that have a rank (from 1) among so many numbers; 0 below all."""
    experts, slots = len(deltas.experts), deltas.layout.slots

    def found(part: Sequence[int], threads: int | None) -> tuple[float, ...]:
        total = sum(slots[slot].numel if counted is None else counted[slot] for slot in part)
        if not 1 <= rank(total) <= total:
            return (0.0,) * experts
        counts = _count(deltas, part, lambda n, row: magnitude_bins(row), threads=threads)
        bins = [locate(row, rank(total)) for row in counts]
        counts = _count(deltas, part, lambda n, row: bins_within(row, bins[n][0]), threads=threads)
        return tuple(
            magnitude_of(bin_, locate(row, left)[0])
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
        counts = _count(
            deltas, range(len(slots)), lambda n, row: magnitude_bins(row), threads=deltas.threads
        )
        return (tuple(MagnitudeSketch.of(row) for row in counts),) * len(slots)
    result: list[tuple[MagnitudeSketch, ...]] = [()] * len(slots)

    def of(slot: int) -> None:
        counts = _count(deltas, [slot], lambda n, row: magnitude_bins(row), threads=1)
        result[slot] = tuple(MagnitudeSketch.of(row) for row in counts)

    _by_size(deltas, of)
    return tuple(result)


def _by_size(deltas: Deltas, of: Callable[[int], None]) -> None:
    """Do all tensors, the largest first so that threads end together."""
    slots = deltas.layout.slots
    order = sorted(range(len(slots)), key=lambda i: -slots[i].numel)
    parallel_for(lambda slot, _: of(slot), order, lambda: None, threads=deltas.threads)


def _count(
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

    parallel_for(add, _pieces(deltas, slots), lambda: None, threads=threads)
    return total.cpu()


def _pieces(deltas: Deltas, slots: Sequence[int]) -> list[tuple[int, int, int]]:
    return [
        (slot, start, min(start + _PIECE, deltas.layout.slots[slot].numel))
        for slot in slots
        for start in range(0, deltas.layout.slots[slot].numel, _PIECE)
    ]
