"""Magnitudes at which a share of the numbers is kept: exact, or from sketches of bounded size.

The bits of a non-negative float, read as a whole number, are in the order of the floats. So a
histogram over the leading bits finds, in one pass and bounded memory, the bin that holds a
quantile; a second pass over the numbers of that bin alone finds it exactly.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "BINS",
    "MagnitudeSketch",
    "kept_count",
    "largest_magnitudes",
    "magnitude_bins",
]

_SHIFT = 14  # 8 bits of exponent and 9 of mantissa: bins are 0.2 % wide
BINS = 1 << (31 - _SHIFT)
"""How many bins the magnitudes of float32 numbers fall into."""

_KNOTS = 1024


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
    bits = values.contiguous().view(torch.int32).bitwise_and(0x7FFFFFFF)
    return torch.bincount(bits.bitwise_right_shift_(_SHIFT).flatten(), minlength=BINS)


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


def largest_magnitudes(
    each: Callable[[Callable[[Tensor], None]], None], counts: Tensor, k: int
) -> tuple[float, ...]:
    """Return the ``k``-th largest magnitude of each row of numbers that come in pieces, exactly.

    The numbers of the bin that holds it are counted by their remaining bits. So memory is bounded
    where most numbers are alike too, as differences of bfloat16 weights are.

    Args:
        each: Calls what it is given with all pieces (``N x n``, float32), from any threads; all
            together hold ``k`` columns or more.
        counts: ``N`` histograms of the rows (see `magnitude_bins`), on the CPU.
        k: From 1 to the number of columns.
    """
    above = counts.flip(-1).cumsum(-1)
    at = (above < k).sum(-1)  # bins above the one that holds the k-th
    bins = (BINS - 1 - at).tolist()
    lock = threading.Lock()
    finer = torch.zeros(len(counts), 1 << _SHIFT, dtype=torch.int64)

    def take(piece: Tensor) -> None:
        for row, total, bin_ in zip(piece, finer, bins, strict=True):
            bits = row.contiguous().view(torch.int32).bitwise_and(0x7FFFFFFF)
            inside = bits[bits.bitwise_right_shift(_SHIFT) == bin_].bitwise_and_((1 << _SHIFT) - 1)
            found = torch.bincount(inside, minlength=1 << _SHIFT).cpu()
            with lock:
                total.add_(found)

    each(take)
    result = []
    for row, total, count, bin_ in zip(above, finer, at.tolist(), bins, strict=True):
        left = k - (int(row[count - 1]) if count else 0)
        rest = (1 << _SHIFT) - 1 - int((total.flip(0).cumsum(0) < left).sum())
        bits = torch.tensor((bin_ << _SHIFT) + rest, dtype=torch.int32)
        result.append(float(bits.view(torch.float32)))
    return tuple(result)


def _edge(bins: Tensor) -> Tensor:
    """Return the smallest magnitude of each bin, in float64."""
    bits = bins.to(torch.int64).bitwise_left_shift(_SHIFT).to(torch.int32)
    return bits.view(torch.float32).double()
