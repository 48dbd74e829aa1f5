"""Nested merging from Python: one call from problem and budget to the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from map_bo.evaluators.isolation.world import own_maths
from map_bo.loop.mirrors import trackers
from map_bo.loop.progress import Progress, RichProgress, silent
from map_bo.loop.settings import Settings
from map_bo.nested.materialised import MaterialisedRun, composes
from map_bo.nested.result import NestedResult
from map_bo.nested.run import NestedRun
from map_bo.nested.settings import Nested
from map_bo.problems.problem import Problem
from map_bo.tracking.fresh import leaving_nothing
from map_bo.tracking.jsonl import JsonlStore, MemoryStore, absolute_directory
from map_bo.tracking.store import RunStore
from map_bo.tracking.tracker import Tracker, Tracking

__all__ = ["nested_run", "optimize_nested"]


def nested_run(
    problem: Problem,
    settings: Settings,
    nested: Nested,
    store: RunStore,
    *,
    config: Mapping[str, Any] | None = None,
    tracker: Tracker | None = None,
) -> NestedRun:
    """Return the run that suits the problem's operator; see :class:`NestedRun`."""
    kind = NestedRun if composes(problem) else MaterialisedRun
    return kind(problem, settings, nested, store, config=config, tracker=tracker)


@own_maths()
def optimize_nested(
    problem: Problem,
    budget: int,
    *,
    nested: Nested | None = None,
    seed: int = 0,
    run_dir: str | Path | None = None,
    progress: bool | Progress = True,
    config: Mapping[str, Any] | None = None,
    tracking: str | Tracking | Sequence[str | Tracking] = "local",
    **settings: Any,
) -> NestedResult:
    """Merge experts in stages, for the cost of a flat run with ``budget`` evaluations.

    Args:
        problem: What to optimise.
        budget: Evaluations of all metrics that a flat run of equal cost would have. A node measures
            only the tasks below it, and so can make more evaluations.
        nested: How to merge in stages; by default two stages that keep their fronts.
        seed: The same seed gives the same run.
        run_dir: Where to record the run; an unfinished run there goes on. None keeps it in memory.
        progress: Whether to show a progress bar.
        config: Extra plain data to record with the run.
        tracking: Mirrors of the record, as in :func:`map_bo.optimize`.
        **settings: Any other field of :class:`Settings`.

    Raises:
        BudgetError: When a node would have too few evaluations.
        ConfigError: On settings that are unknown or do not fit the problem.
        TreeError: When the tree does not fit the experts.
        SpaceError: When a coefficient cannot be 0.
        EvaluationError: When too many evaluations failed.
        StoreError: When ``run_dir`` holds another run, is in use, or cannot be written.
    """
    chosen = Settings.checked(budget=budget, seed=seed, **settings)
    how = Nested() if nested is None else nested
    bar = progress if isinstance(progress, Progress) else (RichProgress() if progress else silent)
    if run_dir is None:
        with trackers(tracking, None) as tracker:
            store: RunStore = MemoryStore()
            run = nested_run(problem, chosen, how, store, config=config, tracker=tracker)
            return run.drive(bar)
    directory = absolute_directory(run_dir)
    mirrors = trackers(tracking, directory)
    exists = (directory / "events.jsonl").exists()
    with leaving_nothing(directory, fresh=not exists):
        kept = JsonlStore.open(directory) if exists else JsonlStore.create(directory)
        with kept.lock(), mirrors as tracker:
            return nested_run(problem, chosen, how, kept, config=config, tracker=tracker).drive(bar)
