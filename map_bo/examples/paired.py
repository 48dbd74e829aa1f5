"""Tests and intervals for two models that were scored on the same examples.

A model is compared with another by its outcome minus the other's, example by example; what both
get right or wrong cancels. Differences are of the first minus the second in the metric's own
unit, whichever way it is better.

- Outcomes of 0 and 1: the exact test of McNemar (1947) on the examples where exactly one of the
  two is right, or its mid-p variant (Fagerland, Lydersen and Laake 2013), and the score interval
  of Tango (1998), which at level ``1 - a`` leaves out 0 where McNemar's statistic exceeds its
  critical value.
- Grades and losses: all flips of sign of the differences where few of them are not 0 (Fisher's
  randomisation test), else Student's t for paired differences, with the interval of t.
- A model that was chosen as the best of several on these very examples is compared with what the
  best of them would show if nothing differed: the distribution of the largest statistic under
  flips of sign that all of them share (Westfall and Young 1993; Romano and Wolf 2005). Models
  that answer alike count as one.
- Several comparisons are corrected by Holm (1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Generator, Tensor

from map_bo.errors import DataError

__all__ = [
    "PairedDifference",
    "compare",
    "compare_sums",
    "detectable",
    "holm",
    "largest_of",
    "mcnemar",
    "p_of_largest",
    "paired_t",
    "power",
    "sign_flips",
    "tango",
]

NORMAL_975 = 1.959963984540054
_ENUMERATED = 14  # differences whose 2^14 signs are all tried
_HALVINGS = 60
_CHUNK = 64_000_000  # numbers of a product of signs and differences at once


@dataclass(frozen=True)
class PairedDifference:
    """The first model minus the second on the same examples.

    Attributes:
        difference: Mean difference, the metric's own unit.
        lower: Lower end of its interval.
        upper: Upper end.
        p: Probability of a difference at least as far from 0, were there none.
        n: Examples that both were scored on.
        test: What ``p`` comes from, in words.
        discordant: Examples on which the two differ.
    """

    difference: float
    lower: float
    upper: float
    p: float
    n: int
    test: str
    discordant: int


def mcnemar(gained: int, lost: int, *, mid_p: bool = False) -> float:
    """Return the two-sided p-value of McNemar's exact test.

    Args:
        gained: Examples that the first alone gets right.
        lost: Examples that the second alone gets right.
        mid_p: Whether the observed table counts half. Its level is only close to the nominal
            one, and it finds more; see Fagerland, Lydersen and Laake (2013).

    Raises:
        DataError: On a negative count.
    """
    if min(gained, lost) < 0:
        raise DataError(
            f"counts of examples must not be negative, got {gained} and {lost}",
            hint="count the examples that only one of the two models gets right",
        )
    n, few = gained + lost, min(gained, lost)
    if n == 0:
        return 1.0
    p = 2 * float(stats.binom.cdf(few, n, 0.5))
    at = float(stats.binom.pmf(few, n, 0.5))
    if mid_p:
        return 1 - at / 2 if gained == lost else p - at
    return min(1.0, p)


def tango(
    gained: int, lost: int, n: int, *, z: float = NORMAL_975, population: int | None = None
) -> tuple[float, float]:
    """Return the score interval of a difference of paired proportions (Tango 1998).

    Args:
        gained: Examples that the first alone gets right.
        lost: Examples that the second alone gets right.
        n: Examples that both were scored on.
        z: Quantile of the interval; 1.96 gives 95 %.
        population: How many examples there are in all, where the interval is about the difference
            on exactly these; ``n`` of them gives the difference itself. None where it is about
            further examples of the kind.

    Returns:
        Its ends, in [-1, 1].

    Raises:
        DataError: When the counts do not fit together.
    """
    if min(gained, lost) < 0 or n < max(1, gained + lost):
        raise DataError(
            f"{gained} and {lost} of {n} examples cannot be those that one model alone gets right",
            hint="give counts that are not negative and add up to at most the examples",
        )
    found = (gained - lost) / n
    z = z * math.sqrt(_left_out(n, population))
    if z == 0:
        return found, found

    def statistic(delta: float) -> float:
        # Maximum likelihood of the share that only the second gets right, given the difference.
        b = -gained - lost + (2 * n - gained + lost) * delta
        c = -lost * delta * (1 - delta)
        share = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
        variance = n * (2 * share + delta * (1 - delta))
        apart = gained - lost - n * delta
        if variance <= 0:
            return math.copysign(math.inf, apart) if apart else 0.0
        return apart / math.sqrt(variance)

    def end(beyond: float, outside: float) -> float:
        inside = found
        for _ in range(_HALVINGS):
            middle = (inside + outside) / 2
            if abs(statistic(middle)) > beyond:
                outside = middle
            else:
                inside = middle
        return inside

    low = -1.0 if abs(statistic(-1.0)) <= z else end(z, -1.0)
    high = 1.0 if abs(statistic(1.0)) <= z else end(z, 1.0)
    return low, high


def paired_t(differences: Tensor, *, population: int | None = None) -> float:
    """Return the two-sided p-value of Student's t for differences (``n``) of mean 0.

    It is 1 where all of them are 0, or where there is only one.
    """
    d = _checked(differences)
    n, mean = len(d), float(d.mean())
    if n < 2 or mean == 0:
        return 1.0
    error = float(d.std()) * math.sqrt(_left_out(n, population) / n)
    return 0.0 if error == 0 else 2 * float(stats.t.sf(abs(mean) / error, n - 1))


def sign_flips(differences: Tensor) -> float:
    """Return the two-sided p-value of all flips of sign of differences (``n``).

    It is exact where differences are symmetric around 0 when there is none.

    Raises:
        DataError: When more than 14 differences are not 0: then :func:`paired_t` is close.
    """
    d = _checked(differences)
    d = d[d != 0].abs()
    if not len(d):
        return 1.0
    if len(d) > _ENUMERATED:
        raise DataError(
            f"{len(d)} differences have 2^{len(d)} combinations of signs",
            hint="use paired_t for more than 14 differences that are not 0",
        )
    codes = torch.arange(2 ** len(d)).unsqueeze(-1)
    signs = 1 - 2 * (codes >> torch.arange(len(d)) & 1).double()
    sums = (signs @ d).abs()
    own = abs(float(_checked(differences).sum()))
    return float((sums >= own * (1 - 1e-9)).double().mean())


def compare(
    first: Tensor,
    second: Tensor,
    *,
    z: float = NORMAL_975,
    mid_p: bool = False,
    population: int | None = None,
) -> PairedDifference:
    """Compare two models by their outcomes on the same examples.

    Examples that failed under either of them (NaN) are left out.

    Args:
        first: ``n`` outcomes of the first.
        second: ``n`` outcomes of the second, on the same examples.
        z: Quantile of the interval; 1.96 gives 95 %.
        mid_p: See :func:`mcnemar`.
        population: Size of the set that the interval is about, where it is finite; p-values
            do not use it, which makes them larger than they need be. See :func:`tango`.

    Raises:
        DataError: When the outcomes are not in pairs, or no example is left.
    """
    if first.dim() != 1 or first.shape != second.shape:
        raise DataError(
            f"outcomes of shape {tuple(first.shape)} and {tuple(second.shape)} are not in pairs",
            hint="give one outcome per example of each model, in the same order",
        )
    both = torch.isfinite(first) & torch.isfinite(second)
    first, second = first[both].double(), second[both].double()
    n = len(first)
    if not n:
        raise DataError(
            "the two models have no example in common",
            hint="score both of them on the same examples",
        )
    d = first - second
    apart = int((d != 0).sum())
    if all(bool(((x == 0) | (x == 1)).all()) for x in (first, second)):
        gained, lost = int((d > 0).sum()), int((d < 0).sum())
        low, high = tango(gained, lost, n, z=z, population=population)
        p = mcnemar(gained, lost, mid_p=mid_p)
        name = "McNemar, mid-p" if mid_p else "McNemar, exact"
        return PairedDifference((gained - lost) / n, low, high, p, n, name, apart)
    mean = float(d.mean())
    half = math.inf
    if n > 1:
        # The quantile of t at the same level as z of the normal.
        t = -float(stats.t.ppf(stats.norm.sf(z), n - 1))
        half = t * float(d.std()) * math.sqrt(_left_out(n, population) / n)
    few = apart <= _ENUMERATED
    p = sign_flips(d) if few else paired_t(d)
    name = "sign flips" if few else "paired t"
    return PairedDifference(mean, mean - half, mean + half, p, n, name, apart)


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values that are corrected for their number (Holm 1979), in the given order.

    Declaring those below ``a`` makes a single false statement with a probability of at most
    ``a``, however the comparisons depend on each other.
    """
    order = sorted(range(len(p)), key=lambda i: p[i])
    corrected, most = [1.0] * len(p), 0.0
    for rank, i in enumerate(order):
        most = max(most, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = most
    return corrected


def largest_of(parts: Sequence[Tensor], *, draws: int = 2000, generator: Generator) -> Tensor:
    """Return how large the largest of several statistics is where nothing differs (``draws``).

    The statistic of a candidate is the sum of its differences over the root of the sum of their
    squares; for outcomes of 0 and 1 that is McNemar's. Signs are flipped example by example, for
    all candidates at once, so that candidates that answer alike add nothing.

    Args:
        parts: For each set of examples, ``n_e x K`` differences of ``K`` candidates from the same
            model, in the same unit, 0 where an example was not scored for both. Sets of one
            metric are one part; of a weighted sum of metrics, each metric's differences times
            its weight over its number of examples.
        draws: How many flips.
        generator: Source of the signs.

    Returns:
        ``draws`` values, not negative; 0 where no candidate differs.

    Raises:
        DataError: When the parts are of different numbers of candidates.
    """
    if len({part.shape[-1] for part in parts}) != 1 or any(part.dim() != 2 for part in parts):
        raise DataError(
            f"differences of shapes {[tuple(part.shape) for part in parts]} are not of the same "
            "candidates",
            hint="give one column per candidate in each part",
        )
    columns = torch.cat([part.double().nan_to_num(0.0) for part in parts])
    columns = columns[(columns != 0).any(-1)]
    size = columns.square().sum(0).sqrt()
    largest = torch.zeros(draws, dtype=torch.float64)
    if not bool((size > 0).any()):
        return largest
    columns = _distinct((columns[:, size > 0] / size[size > 0]).float(), generator)
    step = max(1, _CHUNK // max(columns.shape))
    for start in range(0, draws, step):
        count = min(step, draws - start)
        signs = torch.randint(2, (count, len(columns)), generator=generator).float() * 2 - 1
        largest[start : start + count] = (signs @ columns).abs().amax(-1).double()
    return largest


def compare_sums(parts: Sequence[Tensor], *, z: float = NORMAL_975) -> PairedDifference:
    """Return the difference of two models in a sum of metrics, each on examples of its own.

    Args:
        parts: For each set of examples, the differences of the two models (``n_e``) times the
            weight of the metric; NaN where either failed.
        z: Quantile of the interval; 1.96 gives 95 %.

    Returns:
        The sum of the mean differences, with Welch's t over the sets of examples.

    Raises:
        DataError: When a set has no example in common.
    """
    kept = [_checked(part[torch.isfinite(part)]) for part in parts]
    n = sum(len(part) for part in kept)
    total = sum(float(part.mean()) for part in kept)
    shares = [float(part.var()) / len(part) if len(part) > 1 else math.inf for part in kept]
    variance = sum(shares)
    apart = sum(int((part != 0).sum()) for part in kept)
    if variance == 0:
        return PairedDifference(total, total, total, float(total == 0), n, "Welch's t", apart)
    if math.isinf(variance):
        return PairedDifference(total, -math.inf, math.inf, 1.0, n, "Welch's t", apart)
    freedom = variance**2 / sum(s * s / (len(d) - 1) for s, d in zip(shares, kept, strict=True))
    error = math.sqrt(variance)
    half = -float(stats.t.ppf(stats.norm.sf(z), freedom)) * error
    p = 2 * float(stats.t.sf(abs(total) / error, freedom))
    return PairedDifference(total, total - half, total + half, p, n, "Welch's t", apart)


def p_of_largest(parts: Sequence[Tensor], largest: Tensor) -> float:
    """Return the p-value of a model that was chosen as the best of several on its own examples.

    Args:
        parts: Its differences, as those of one candidate in :func:`largest_of` (``n_e`` each).
        largest: What :func:`largest_of` says of all that could have been chosen.

    Returns:
        How likely the largest statistic is at least as large where nothing differs.
    """
    d = torch.cat([part.double().nan_to_num(0.0) for part in parts])
    size = float(d.square().sum().sqrt())
    own = abs(float(d.sum())) / size if size else 0.0
    return (1 + int((largest >= own * (1 - 1e-6)).sum())) / (1 + len(largest))


def power(difference: float, discordant: float, n: int, *, level: float = 0.05) -> float:
    """Return how likely McNemar's exact test finds a difference.

    Args:
        difference: The true difference of the two shares of right answers.
        discordant: Share of the examples on which exactly one of the two is right.
        n: Examples.
        level: Largest p-value that counts as a finding, such as .05 over the number of
            comparisons.

    Returns:
        The probability that the p-value is at most ``level``, with the right sign.

    Raises:
        DataError: When the shares are not possible.
    """
    if not abs(difference) <= discordant <= 1 or n < 1:
        raise DataError(
            f"models that differ on {discordant:g} of the examples cannot differ by {difference:g}",
            hint="give a share of at most 1, and a difference of at most that share",
        )
    if discordant == 0:
        return 0.0
    up = (discordant + abs(difference)) / (2 * discordant)
    low, high = (int(stats.binom.ppf(q, n, discordant)) for q in (1e-9, 1 - 1e-9))
    counts = np.arange(low, high + 1)
    # The most losses that leave the two-sided p-value at the level, -1 for none.
    most = stats.binom.ppf(level / 2, counts, 0.5)
    most = np.where(2 * stats.binom.cdf(most, counts, 0.5) > level, most - 1, most)
    found = np.where(most >= 0, stats.binom.cdf(most, counts, 1 - up), 0.0)
    return float((stats.binom.pmf(counts, n, discordant) * found).sum())


def detectable(discordant: float, n: int, *, level: float = 0.05, wanted: float = 0.8) -> float:
    """Return the smallest difference that is found with a probability of ``wanted``.

    Args:
        discordant: Share of the examples on which exactly one of the two is right.
        n: Examples.
        level: See :func:`power`.
        wanted: The power.

    Returns:
        The difference of the shares of right answers; infinity where ``n`` examples find none.
    """
    if power(discordant, discordant, n, level=level) < wanted:
        return math.inf
    low, high = 0.0, discordant
    for _ in range(20):
        middle = (low + high) / 2
        if power(middle, discordant, n, level=level) < wanted:
            low = middle
        else:
            high = middle
    return high


def _distinct(columns: Tensor, generator: Generator) -> Tensor:
    """Return the columns (``n x K``) without those that are equal to another.

    Equal columns have equal products with a random vector, and others have not.
    """
    normal = torch.randn(len(columns), generator=generator)
    products, order = (normal @ columns).sort()
    first = torch.ones_like(products, dtype=torch.bool)
    first[1:] = (products[1:] - products[:-1]) > 1e-5 * products.abs().amax().clamp_min(1e-30)
    return columns[:, order[first]]


def _checked(differences: Tensor) -> Tensor:
    d = differences.double()
    if d.dim() != 1 or not len(d) or not bool(torch.isfinite(d).all()):
        raise DataError(
            f"differences must be a finite vector, got shape {tuple(d.shape)}",
            hint="leave out examples that failed under either model",
        )
    return d


def _left_out(n: int, population: int | None) -> float:
    """Return the finite-population factor of a variance: the share that was not scored."""
    if population is None:
        return 1.0
    if population < n:
        raise DataError(
            f"{n} examples are not some of {population}",
            hint="give the size of the whole set, or None for further examples of the kind",
        )
    return 1 - n / population
