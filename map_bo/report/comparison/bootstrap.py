"""Means of a few runs and their uncertainty: percentile bootstrap, paired where runs are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Literal

import numpy as np

__all__ = ["LEAST", "Estimate", "Reading", "mean_interval", "paired_difference"]

LEAST = 5
"""Number of values below which no difference is called clear: a bootstrap of few is too narrow."""

Reading = Literal["higher", "lower", "no clear difference", "too few pairs"]


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % percentile bootstrap interval.

    Attributes:
        mean: The mean.
        low: Lower end; NaN for a single value.
        high: Upper end; NaN for a single value.
        count: Number of values (of pairs, for a difference).
    """

    mean: float
    low: float
    high: float
    count: int

    @property
    def reading(self) -> Reading:
        """What a difference means, by its interval alone."""
        if self.count < LEAST:
            return "too few pairs"
        if self.low > 0:
            return "higher"
        return "lower" if self.high < 0 else "no clear difference"


def mean_interval(
    values: Sequence[float], *, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Estimate | None:
    """Return the mean of ``values`` and its percentile bootstrap interval.

    Args:
        values: Any number of values; without any, ``None`` is returned.
        resamples: Number of bootstrap samples.
        level: Coverage of the interval.
        seed: Seed of the draws; the same values always give the same interval.
    """
    held = np.asarray(values, dtype=np.float64)
    if held.size == 0:
        return None
    if held.size == 1:
        return Estimate(float(held[0]), nan, nan, 1)
    rows = np.random.default_rng(seed).integers(held.size, size=(resamples, held.size))
    low, high = np.quantile(held[rows].mean(-1), [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(held.mean()), float(low), float(high), held.size)


def paired_difference(
    own: Mapping[int, float], other: Mapping[int, float], *, resamples: int = 10_000
) -> Estimate | None:
    """Return the mean of ``own`` minus ``other`` over the seeds that both have.

    Args:
        own: Value by seed.
        other: Value by seed.
        resamples: Number of bootstrap samples; these are of differences, so pairs stay together.

    Returns:
        ``None`` when no seed is shared.
    """
    seeds = sorted(own.keys() & other.keys())
    return mean_interval([own[seed] - other[seed] for seed in seeds], resamples=resamples)
