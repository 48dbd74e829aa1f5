"""Many runs on one scale: how they vary, what each found, and how clear their differences are.

:func:`variation` finds the fewest settings that distinguish the runs of a sweep, preferably those
that the user named; runs that agree in them are one variant. :func:`compare` puts all finished runs
on one scale, so that a :class:`Comparison` can compare variants by their means over seeds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from map_bo.data import Metric, to_maximisation
from map_bo.errors import DataError
from map_bo.pareto.indicators import win_rate_dominance, win_rate_per_objective
from map_bo.report.comparison.bootstrap import Estimate, mean_interval, paired_difference
from map_bo.report.comparison.runs import Outcome, RunRecord, ScaledRun, columns_of, measure
from map_bo.scale import Scale

__all__ = ["UNSET", "Comparison", "Curve", "Variation", "compare", "variation"]

UNSET = "not set"
"""Shown for a run without a setting that another run has."""

_SEED = "seed"


@dataclass(frozen=True)
class Variation:
    """How runs differ.

    Attributes:
        keys: The settings that distinguish them, except for ``seed``.
        values: The values of each key, in natural order.
        labels: The variant of each run, such as ``"surrogate=gp, loop.budget=24"``.
        order: The variants in the natural order of their values.
    """

    keys: tuple[str, ...]
    values: Mapping[str, tuple[str, ...]]
    labels: tuple[str, ...]
    order: tuple[str, ...]


def variation(settings: Sequence[Mapping[str, str]], named: Sequence[str] = ()) -> Variation:
    """Return the fewest settings that distinguish the runs.

    Settings are considered in turn: first those that the user named, then those with the shortest
    names. A setting is kept when it splits runs that all settings before it leave together. So
    settings that follow from another one (an interpolated default, everything that an experiment
    sets) are left out, and so are those that vary with the seed, by which runs are paired.

    Args:
        settings: Name and value of every setting, one mapping per run.
        named: Names that the user gave, most important first.
    """
    known = {key for one in settings for key in one}
    rest = sorted(known - set(named), key=lambda key: (key.count("."), key))
    seeds = [one.get(_SEED) for one in settings]
    kept: list[str] = []
    cells: list[tuple[str, ...]] = [()] * len(settings)
    for key in [*(key for key in dict.fromkeys(named) if key in known), *rest]:
        values = [one.get(key, UNSET) for one in settings]
        if key == _SEED or (len(set(seeds)) > 1 and values == seeds):
            continue
        finer = [(*cell, value) for cell, value in zip(cells, values, strict=True)]
        if len(set(finer)) > len(set(cells)):
            kept.append(key)
            cells = finer
    labels = tuple(
        ", ".join(f"{key}={value}" for key, value in zip(kept, cell, strict=True)) or "all runs"
        for cell in cells
    )
    return Variation(
        keys=tuple(kept),
        values={
            key: tuple(sorted({cell[i] for cell in cells}, key=natural))
            for i, key in enumerate(kept)
        },
        labels=labels,
        order=tuple(
            dict.fromkeys(
                label
                for _, label in sorted(
                    zip(cells, labels, strict=True), key=lambda pair: [natural(x) for x in pair[0]]
                )
            )
        ),
    )


def natural(text: str) -> list[tuple[int, float, str]]:
    """Return a sort key by which numbers inside words are sorted by their value."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(0, float(x), "") if i % 2 else (1, 0.0, x) for i, x in enumerate(parts) if x]


@dataclass(frozen=True)
class Curve:
    """The progress of a variant: one value per number of evaluations.

    Attributes:
        places: Numbers of evaluations, from 1.
        mean: Mean hypervolume of the observed points over the runs, real.
        low: Lower end of the band.
        high: Upper end of the band.
    """

    places: tuple[int, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Runs compared.

    Attributes:
        title: The name of the sweep or sweeps.
        keys: The settings that vary, except for the seed.
        values: The values of each.
        variants: The combinations that occur, the baseline first.
        runs: The finished runs.
        missing: The runs that did not finish.
        metrics: The ``m`` metrics that all finished runs have.
        scale: The scale that they share.
        notes: What a reader has to know.
    """

    title: str
    keys: tuple[str, ...]
    values: Mapping[str, tuple[str, ...]]
    variants: tuple[str, ...]
    runs: tuple[ScaledRun, ...]
    missing: tuple[RunRecord, ...]
    metrics: tuple[Metric, ...]
    scale: Scale
    notes: tuple[str, ...]

    @property
    def baseline(self) -> str:
        """The variant that the others are compared with."""
        return self.variants[0]

    def of(self, variant: str) -> tuple[ScaledRun, ...]:
        """Return the finished runs of a variant, by seed."""
        found = (run for run in self.runs if run.variant == variant)
        return tuple(sorted(found, key=lambda run: run.seed))

    def by_seed(self, variant: str, measure: str) -> dict[int, float]:
        """Return a measure of a variant's runs by seed; runs without it are left out."""
        return {run.seed: run.values[measure] for run in self.of(variant) if measure in run.values}

    def mean(self, variant: str, measure: str) -> Estimate | None:
        """Return the mean of a measure over a variant's runs; ``None`` where none has it."""
        return mean_interval(list(self.by_seed(variant, measure).values()))

    def difference(self, variant: str, measure: str) -> Estimate | None:
        """Return variant minus baseline, paired by seed; ``None`` without a pair."""
        return paired_difference(
            self.by_seed(variant, measure), self.by_seed(self.baseline, measure)
        )

    def win_rate(
        self, variant: str, other: str, kind: Literal["per objective", "dominance"]
    ) -> float | None:
        """Return the win rate of the fronts of observed points (real), over pairs of equal seed.

        Args:
            variant: The variant whose fronts win.
            other: The variant whose fronts lose.
            kind: ``"per objective"`` (all pairs of points and metrics, ties count half) or
                ``"dominance"`` (share of pairs of points in which the first dominates).

        Returns:
            The mean over seeds; ``None`` without a pair.
        """
        rate: Callable[[Tensor, Tensor], float] = (
            win_rate_per_objective if kind == "per objective" else win_rate_dominance
        )
        theirs = {run.seed: run for run in self.of(other)}
        rates = [
            rate(
                to_maximisation(run.points, self.metrics),
                to_maximisation(theirs[run.seed].points, self.metrics),
            )
            for run in self.of(variant)
            if run.seed in theirs and len(run.points) and len(theirs[run.seed].points)
        ]
        return float(np.mean(rates)) if rates else None

    def curve(self, variant: str) -> Curve:
        """Return the mean hypervolume against evaluations, with its 95 % bootstrap band.

        A run that stopped early keeps its last value. The band of a single run has no width.
        """
        runs = self.of(variant)
        places = tuple(sorted({place for run in runs for place in run.places}))
        columns = [[_value_at(run, place) for place in places] for run in runs]
        estimates = [
            mean_interval(list(column), resamples=2000) for column in zip(*columns, strict=True)
        ]
        known = [estimate for estimate in estimates if estimate is not None]
        return Curve(
            places=places,
            mean=tuple(e.mean for e in known),
            low=tuple(e.mean if e.low != e.low else e.low for e in known),
            high=tuple(e.mean if e.high != e.high else e.high for e in known),
        )


def compare(records: Sequence[RunRecord], *, title: str, baseline: str | None = None) -> Comparison:
    """Put finished runs on one scale.

    Metrics are those that all finished runs have, by name and direction. Each is scaled to 0 at
    the worst reference point and to 1 at the best "best expert" of the runs that measured their
    anchors (of all runs, where none did), so that all hypervolumes have one reference point.

    Args:
        records: The runs, in any order.
        title: The name of the sweep or sweeps.
        baseline: Variant that the others are compared with; the first in natural order by
            default.

    Raises:
        DataError: When no run finished, the finished ones have no metric in common, or there is
            no variant ``baseline``.
    """
    done = [record for record in records if record.outcome is not None]
    missing = tuple(record for record in records if record.outcome is None)
    if not done:
        first = f"; the first of them, {missing[0].name}: {missing[0].reason}" if missing else ""
        raise DataError(
            f"none of the {len(missing)} runs of {title} finished{first}",
            hint="repeat the command of the sweep with the same hydra.sweep.dir to resume it",
        )
    notes: list[str] = []
    metrics, dropped = _common(done)
    if dropped:
        notes.append(
            "the runs have different metrics; only those that all runs have are compared: "
            f"{', '.join(m.name for m in metrics)} (left out: {', '.join(dropped)})"
        )
    settings = [dict(record.settings) for record in done]
    named = list(dict.fromkeys(key for record in done for key in record.named))
    found = variation(settings, named)
    pairs = [(label, r.seed or 0) for label, r in zip(found.labels, done, strict=True)]
    if len(set(pairs)) < len(pairs) and len({record.sweep for record in done}) > 1:
        for one, record in zip(settings, done, strict=True):
            one["sweep"] = record.sweep
        found = variation(settings, ["sweep", *named])
        notes.append(
            "the sweeps share settings and seeds, so their runs are separate variants by sweep"
        )
    scale = _scale(done, metrics)
    notes += scale.notes()
    runs: dict[tuple[str, int], ScaledRun] = {}
    for record, label in zip(done, found.labels, strict=True):
        if (label, record.seed or 0) in runs:
            notes.append(
                f"{record.name} has the settings and the seed of another run and is left out"
            )
            continue
        runs[label, record.seed or 0] = measure(record, label, scale)
    order = list(found.order)
    if baseline is not None:
        if baseline not in order:
            raise DataError(
                f"there is no variant {baseline!r}", hint=f"variants are {'; '.join(order)}"
            )
        order = [baseline, *(name for name in order if name != baseline)]
    if any(record.seed is None for record in done):
        notes.append("some runs have no recorded seed; they count as seed 0")
    return Comparison(
        title=title,
        keys=found.keys,
        values=found.values,
        variants=tuple(order),
        runs=tuple(runs.values()),
        missing=missing,
        metrics=metrics,
        scale=scale,
        notes=tuple(notes),
    )


def _outcome(record: RunRecord) -> Outcome:
    assert record.outcome is not None
    return record.outcome


def _common(done: Sequence[RunRecord]) -> tuple[tuple[Metric, ...], list[str]]:
    """Return the metrics that all runs have, and the names of the others."""
    every = [_outcome(record).seen.metrics for record in done]
    names = [{(metric.name, metric.direction) for metric in metrics} for metrics in every]
    shared = set.intersection(*names)
    if not shared:
        raise DataError(
            "the runs have no metric in common: "
            + "; ".join(dict.fromkeys(", ".join(m.name for m in metrics) for metrics in every)),
            hint="compare runs of one problem",
        )
    kept = tuple(metric for metric in every[0] if (metric.name, metric.direction) in shared)
    return kept, sorted({name for one in names for name, _ in one - shared})


def _scale(done: Sequence[RunRecord], metrics: tuple[Metric, ...]) -> Scale:
    """Return the scale that the runs share, those that measured their anchors before others."""
    every = [_outcome(record).scale for record in done]
    counted = [scale for scale in every if scale.is_anchored] or every
    rules = "; ".join(dict.fromkeys(scale.rule for scale in counted))
    rule = rules if len(counted) == 1 else f"{rules}, the worst over {len(counted)} runs"
    return Scale.common([one.select(columns_of(one.metrics, metrics)) for one in counted], rule)


def _value_at(run: ScaledRun, place: int) -> float:
    """Return the volume at the last number of evaluations up to ``place``; 0 before the first."""
    value = 0.0
    for reached, volume in zip(run.places, run.volumes, strict=True):
        if reached > place:
            break
        value = volume
    return value
