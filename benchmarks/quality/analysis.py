"""What the rows of the study say: paired differences with their uncertainty, and verdicts.

Seeds are paired: the same seed gives every method the same preferences and, where they start from
the same design, the same first points. Differences are taken seed by seed and case by case, and
their mean is bootstrapped over these pairs, each case drawing among its own seeds.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray
from scipy.stats import friedmanchisquare, rankdata, wilcoxon

from benchmarks.quality.tidy import Row

__all__ = [
    "Difference",
    "Ranking",
    "bootstrap",
    "holm",
    "needed",
    "needed_interval",
    "paired",
    "ranking",
    "reach",
    "values",
]

_Array = NDArray[np.float64]
RESAMPLES = 10_000
LEAST = 5  # seeds of each case below which no verdict is given
TARGET = 0.95  # share of the best known hypervolume that counts as reached


@dataclass(frozen=True)
class Difference:
    """A mean paired difference, method less baseline, with its 95 % bootstrap interval.

    Attributes:
        mean: The mean over cases of the means over seeds.
        low: Lower end.
        high: Upper end.
        pairs: Number of pairs.
        cases: Number of cases.
        seeds: Fewest pairs of any case.
    """

    mean: float
    low: float
    high: float
    pairs: int
    cases: int
    seeds: int

    @property
    def enough(self) -> bool:
        """Whether there are seeds enough to believe the interval: a bootstrap of few is narrow."""
        return self.seeds >= LEAST

    def verdict(self, *, larger_is_better: bool) -> str:
        """Return ``better``, ``worse`` or ``no clear difference``, by the interval alone.

        With fewer than five seeds on some case it is ``too few seeds``.
        """
        if not self.enough:
            return "too few seeds"
        if self.low <= 0 <= self.high:
            return "no clear difference"
        return "better" if (self.low > 0) == larger_is_better else "worse"

    def __str__(self) -> str:
        """Return mean and interval for a table."""
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def bootstrap(
    groups: Sequence[Sequence[float]],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Return the percentile interval of the mean over groups of the mean within each.

    Values are drawn with replacement within their group, so that every case keeps its weight.

    Args:
        groups: Values (paired differences) of each case.
        resamples: Number of bootstrap samples.
        seed: Of the draws.
        level: Of the interval.
    """
    source = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for group in groups:
        held = np.asarray(group, dtype=np.float64)
        rows = source.integers(len(held), size=(resamples, len(held)))
        means += held[rows].mean(-1) / len(groups)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def values(
    rows: Iterable[Row], measure: str, *, evaluations: int | None = None
) -> dict[tuple[str, str], dict[int, float]]:
    """Return a measure by (case, method) and seed; rows without it are left out.

    Args:
        rows: Rows of the table.
        measure: Name of a column.
        evaluations: Only this checkpoint; ``None`` for methods with a single one.
    """
    found: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for row in rows:
        if evaluations in (None, row["evaluations"]) and row.get(measure) is not None:
            found[row["case"], row["method"]][row["seed"]] = row[measure]
    return dict(found)


def paired(
    rows: Iterable[Row],
    name: str,
    baseline: str,
    measure: str,
    *,
    evaluations: int | Sequence[int],
    cases: Sequence[str] | None = None,
) -> Difference | None:
    """Return the mean difference of a measure, paired by case, seed and evaluations.

    Args:
        rows: Rows of the table.
        name: The method.
        baseline: What it is compared with.
        measure: Name of a column.
        evaluations: Checkpoints; differences at several of them are averaged within a seed.
        cases: Cases to look at; all by default.

    Returns:
        ``None`` when there is no pair.
    """
    points = [evaluations] if isinstance(evaluations, int) else list(evaluations)
    held = [row for row in rows if row["method"] in (name, baseline)]
    differences: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for point in points:
        found = values(held, measure, evaluations=point)
        for (case, who), own in found.items():
            if who != name or (cases is not None and case not in cases):
                continue
            other = found.get((case, baseline), {})
            for seed in own.keys() & other.keys():
                differences[case][seed].append(own[seed] - other[seed])
    groups = [
        [float(np.mean(each)) for _, each in sorted(by_seed.items())]
        for _, by_seed in sorted(differences.items())
        if by_seed
    ]
    if not groups:
        return None
    low, high = bootstrap(groups)
    mean = float(np.mean([np.mean(group) for group in groups]))
    sizes = [len(group) for group in groups]
    return Difference(mean, low, high, sum(sizes), len(groups), min(sizes))


def reach(rows: Iterable[Row]) -> dict[tuple[str, str], int]:
    """Return by (case, method) the evaluations that all of its seeds came to."""
    most: dict[tuple[str, str], dict[int, int]] = defaultdict(dict)
    for row in rows:
        own = most[row["case"], row["method"]]
        own[row["seed"]] = max(own.get(row["seed"], 0), row["evaluations"])
    return {key: min(own.values()) for key, own in most.items()}


def needed(
    rows: Iterable[Row], *, target: float = TARGET
) -> dict[tuple[str, str], dict[int, float]]:
    """Return by (case, method) and seed the evaluations that first reach a share of the best known.

    Infinite where the target was not reached at any checkpoint that all seeds of the case and the
    method came to.
    """
    rows = list(rows)
    limits = reach(rows)
    found: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for row in rows:
        if row["evaluations"] > limits[row["case"], row["method"]]:
            continue
        own, seed = found[row["case"], row["method"]], row["seed"]
        own.setdefault(seed, math.inf)
        if row.get("share") is not None and row["share"] >= target:
            own[seed] = min(own[seed], float(row["evaluations"]))
    return dict(found)


def needed_interval(
    counts: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float, float]:
    """Return the median number of evaluations and its 95 % bootstrap interval, infinities kept."""
    source = np.random.default_rng(seed)
    # Checkpoints are few and infinity is one of them: medians are of order statistics alone, the
    # upper one where the number of seeds is even.
    held: _Array = np.sort(np.asarray(counts, dtype=np.float64))
    middle = len(held) // 2
    drawn = np.sort(held[source.integers(len(held), size=(resamples, len(held)))], -1)[:, middle]
    ordered = np.sort(drawn)
    low = ordered[int(0.025 * resamples)]
    high = ordered[min(int(0.975 * resamples), resamples - 1)]
    return float(held[middle]), float(low), float(high)


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Return p-values adjusted for their number by Holm's step-down procedure (Holm 1979)."""
    ordered = sorted(p.items(), key=lambda item: item[1])
    adjusted: dict[str, float] = {}
    least = 0.0
    for i, (name, value) in enumerate(ordered):
        least = max(least, min(1.0, (len(ordered) - i) * value))
        adjusted[name] = least
    return adjusted


@dataclass(frozen=True)
class Ranking:
    """Methods ranked on the same cases.

    Attributes:
        ranks: Mean rank of each method over the cases, 1 is best.
        friedman: p-value of Friedman's test that all are alike; ``None`` below three methods.
        against: Holm-adjusted p-value of Wilcoxon's signed-rank test of each against the first
            named.
        wins: For each ordered pair, on how many cases the first is better.
        cases: The cases that all of them were run on.
    """

    ranks: Mapping[str, float]
    friedman: float | None
    against: Mapping[str, float]
    wins: Mapping[tuple[str, str], int]
    cases: tuple[str, ...]


def ranking(
    rows: Iterable[Row],
    methods: Sequence[str],
    measure: str,
    *,
    evaluations: int,
    larger_is_better: bool = False,
) -> Ranking | None:
    """Rank methods by their mean over seeds, cases as blocks.

    Seeds of one case are no independent evidence about other cases, so each case counts once.

    Returns:
        ``None`` when fewer than two cases have all the methods.
    """
    found = values(rows, measure, evaluations=evaluations)
    names = {case for case, _ in found}
    cases = sorted(case for case in names if all((case, method) in found for method in methods))
    if len(cases) < 2 or len(methods) < 2:
        return None
    table = np.array(
        [[np.mean(list(found[case, method].values())) for method in methods] for case in cases]
    )
    table = -table if larger_is_better else table
    ranks = np.apply_along_axis(rankdata, 1, table).mean(0)
    columns = dict(zip(methods, table.T, strict=True))
    friedman = float(friedmanchisquare(*table.T).pvalue) if len(methods) > 2 else None
    first = methods[0]
    p = {
        name: 1.0
        if np.allclose(columns[name], columns[first])
        else float(wilcoxon(columns[name], columns[first]).pvalue)
        for name in methods[1:]
    }
    wins = {
        (a, b): int((columns[a] < columns[b]).sum()) for a in methods for b in methods if a != b
    }
    means = dict(zip(methods, map(float, ranks), strict=True))
    return Ranking(means, friedman, holm(p), wins, tuple(cases))


def typical(numbers: Iterable[float | None]) -> float | None:
    """Return the median of what is there, ``None`` of nothing."""
    held = [number for number in numbers if number is not None]
    return median(held) if held else None
