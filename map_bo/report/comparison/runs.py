"""One run among many: its outcome, and its measures on the scale that all runs share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from map_bo.data import Front, Metric, Observations, directions
from map_bo.pareto.dominance import non_dominated
from map_bo.pareto.indicators import hypervolume
from map_bo.scale import Scale
from map_bo.surrogates.outliers import Outlier, without
from map_bo.tracking.wandb.run import WandbRun

__all__ = [
    "MEASURES",
    "Measure",
    "Outcome",
    "RunRecord",
    "ScaledRun",
    "Status",
    "columns_of",
    "measure",
]

Status: TypeAlias = Literal["finished", "unfinished", "failed", "unreadable"]

# Beyond five metrics a single hypervolume may take most of a second, so fewer are computed.
_EXACT_METRICS = 5
_PLACES = 25


@dataclass(frozen=True, eq=False)
class Outcome:
    """The outcome of a finished run.

    Attributes:
        seen: Every evaluation in order, failures included: the search, then the verification.
        front: The predicted front, with real values where they were verified.
        scale: The scale of its metrics.
        seconds: Seconds spent on each phase.
        data_sets: Measurements of one metric at one point that it made; ``None`` for all metrics at
            every evaluation. A nested run also measures some metrics at points of its nodes.
        outliers: Values of ``seen`` that were set aside; they earn no hypervolume.
    """

    seen: Observations
    front: Front
    scale: Scale
    seconds: Mapping[str, float] = field(default_factory=dict)
    data_sets: int | None = None
    outliers: Sequence[Outlier] = ()

    @property
    def evaluations(self) -> float:
        """Number of evaluations of all metrics, or of equal cost."""
        if self.data_sets is None:
            return float(len(self.seen))
        return self.data_sets / len(self.seen.metrics)


@dataclass(frozen=True, eq=False)
class RunRecord:
    """A run among many, finished or not.

    Attributes:
        name: Its name.
        link: Its page or directory, relative to the report.
        sweep: The sweep that it belongs to.
        status: Whether it finished.
        reason: Why it did not finish; empty when it did.
        settings: Name and value of every setting.
        named: The settings that the user gave, most important first.
        outcome: Its outcome; ``None`` unless it finished.
        wandb: The same run on Weights & Biases; ``None`` where it was not tracked.
    """

    name: str
    link: str
    sweep: str
    status: Status
    reason: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    named: tuple[str, ...] = ()
    outcome: Outcome | None = None
    wandb: WandbRun | None = None

    @property
    def seed(self) -> int | None:
        """The seed, by which runs are paired; ``None`` where none was recorded."""
        text = self.settings.get("seed", "")
        return int(text) if text.lstrip("-").isdigit() else None


@dataclass(frozen=True, eq=False)
class ScaledRun:
    """A finished run on the common scale: 0 at the reference point, 1 at the best expert.

    Attributes:
        record: The run.
        variant: The settings that tell it from the others.
        places: Numbers of evaluations; a nested run's nodes count before its first evaluation of
            all metrics.
        volumes: Hypervolume of all points observed up to each of these, real.
        points: ``k x m`` non-dominated observed points, own units, real.
        values: Value of each measure that the run has, by name.
    """

    record: RunRecord
    variant: str
    places: tuple[int, ...]
    volumes: tuple[float, ...]
    points: Tensor
    values: Mapping[str, float]

    @property
    def seed(self) -> int:
        """The seed; runs without a recorded one count as seed 0."""
        return self.record.seed or 0


@dataclass(frozen=True)
class Measure:
    """A number that runs are compared by.

    Attributes:
        name: Short name, as in ``results.csv``.
        title: Its full name, which says whether it is predicted or real.
        better: The better direction; ``""`` where neither is better.
        digits: Decimals to show.
    """

    name: str
    title: str
    better: Literal["higher", "lower", ""]
    digits: int


MEASURES = (
    Measure("observed_hypervolume_real", "hypervolume of observed points (real)", "higher", 4),
    Measure("verified_hypervolume_real", "hypervolume of verified points (real)", "higher", 4),
    Measure("front_hypervolume_predicted", "hypervolume of the front (predicted)", "", 4),
    Measure("optimism", "optimism (predicted minus real, scaled)", "", 4),
    Measure("evaluations", "evaluations", "lower", 1),
    Measure("failures", "failed evaluations", "lower", 1),
    Measure("seconds_evaluating", "seconds evaluating", "lower", 2),
    Measure("seconds_choosing", "seconds choosing and fitting", "lower", 2),
)


def columns_of(metrics: Sequence[Metric], kept: Sequence[Metric]) -> list[int]:
    """Return the columns of the ``kept`` metrics among ``metrics``, by name."""
    names = [metric.name for metric in metrics]
    return [names.index(metric.name) for metric in kept]


def measure(record: RunRecord, variant: str, scale: Scale) -> ScaledRun:
    """Measure a finished run on the common scale.

    Args:
        record: The run, with an outcome.
        variant: The settings that tell it from the others.
        scale: The scale of the ``m`` common metrics.
    """
    outcome = record.outcome
    assert outcome is not None
    seen, front = outcome.seen, outcome.front
    metrics = scale.metrics
    columns = columns_of(seen.metrics, metrics)
    zero = torch.zeros(len(metrics), dtype=torch.float64)

    def gains(values: Tensor) -> Tensor:
        return scale.gains(values[:, columns])

    kept = without(seen, outcome.outliers) if outcome.outliers else seen
    observed = gains(kept.Y)
    places = list(range(1, len(seen) + 1))
    if len(metrics) > _EXACT_METRICS and len(places) > _PLACES:
        places = sorted({round(place) for place in np.linspace(1, len(seen), _PLACES)})
    volumes = [hypervolume(observed[:place][kept.ok[:place]], zero) for place in places]
    before = max(0, round(outcome.evaluations) - len(seen))
    places = [before + place for place in places]
    rows = kept.ok.nonzero().flatten()
    rows = rows[non_dominated(observed[rows])] if len(rows) else rows
    spent = outcome.seconds
    values = {
        "observed_hypervolume_real": volumes[-1] if volumes else 0.0,
        "front_hypervolume_predicted": hypervolume(gains(front.mean), zero),
        "evaluations": outcome.evaluations,
        "failures": float(seen.failed_rows.sum()),
        "seconds_evaluating": float(seen.cost.nansum()),
        "seconds_choosing": sum(value for name, value in spent.items() if name != "evaluate"),
    }
    if bool(front.verified.any()):
        values["verified_hypervolume_real"] = hypervolume(gains(front.real[front.verified]), zero)
        gap = (front.mean - front.real)[front.verified][:, columns] * directions(metrics)
        ranged = scale.ranged if bool(scale.ranged.any()) else ~scale.ranged
        values["optimism"] = float((gap / scale.width)[:, ranged].mean())
    return ScaledRun(
        record, variant, tuple(places), tuple(volumes), seen.Y[rows][:, columns], values
    )
