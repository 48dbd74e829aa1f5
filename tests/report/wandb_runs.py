"""Comparisons whose runs were tracked with wandb, made without running anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from map_bo.report.comparison.comparison import Comparison
from map_bo.report.comparison.runs import RunRecord
from map_bo.tracking.wandb.run import WandbRun

Home = Callable[[RunRecord], WandbRun | None]


def home(record: RunRecord) -> WandbRun:
    """Every run in one project and group; ids by name."""
    name = f"{record.settings['surrogate']}{record.settings['seed']}"
    return WandbRun(name, "merging", None, "study")


def tracked(found: Comparison, where: Home = home) -> Comparison:
    """Return a comparison with its finished runs on wandb."""
    runs = tuple(
        replace(run, record=replace(run.record, wandb=where(run.record))) for run in found.runs
    )
    return replace(found, runs=runs)
