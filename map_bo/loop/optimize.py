"""A whole run in one call, and a recorded run opened by its record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from map_bo.errors import StoreError
from map_bo.evaluators.isolation.world import own_maths
from map_bo.foreign import understood
from map_bo.loop.known import begin_with, has_begun
from map_bo.loop.mirrors import trackers
from map_bo.loop.progress import Progress, RichProgress, silent
from map_bo.loop.reading import created_of
from map_bo.loop.result import Result
from map_bo.loop.run import Run
from map_bo.loop.settings import Settings
from map_bo.loop.transfer.sources import Known, take
from map_bo.plain import Trust, from_plain
from map_bo.problems.problem import Problem
from map_bo.problems.told import ToldProblem
from map_bo.space import CoefficientSpace
from map_bo.tracking.codec import decode_metric
from map_bo.tracking.fresh import leaving_nothing
from map_bo.tracking.jsonl import JsonlStore, MemoryStore, absolute_directory
from map_bo.tracking.store import RunStore
from map_bo.tracking.tracker import Tracker, Tracking

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from map_bo.workers.workers import WorkerSettings

__all__ = ["open_run", "optimize"]


@own_maths()
def optimize(
    problem: Problem,
    budget: int,
    *,
    seed: int = 0,
    run_dir: str | Path | None = None,
    progress: bool | Progress = True,
    known: Known | None = None,
    config: Mapping[str, Any] | None = None,
    tracking: str | Tracking | Sequence[str | Tracking] = "local",
    workers: WorkerSettings | Executor | int | None = None,
    **settings: Any,
) -> Result:
    """Find the Pareto front of a problem in ``budget`` evaluations.

    Args:
        problem: What to optimise.
        budget: Number of evaluations. It includes the final verification of front points (10 %,
            at most 8); see ``verify`` and ``verify_extra`` of :class:`Settings`.
        seed: The same seed gives the same run.
        run_dir: Where to record the run. When it already holds this same run, the run is resumed,
            or returned if it had finished. Its budget and what else may change on a run
            (:data:`map_bo.loop.growth.MAY_CHANGE`) are then the new ones, also of a run that had
            finished (:meth:`map_bo.loop.run.Run.extend`). None keeps the record in memory.
        progress: Whether to show a progress bar.
        known: What an older study has measured, recorded at the start of a new run; its rows count
            in the budget. Observations, a :class:`~map_bo.loop.result.Result`, the directory of a
            run, a CSV file, ``map_bo.AxDatabase(FILE)``, or one of these in a
            :class:`map_bo.StartFrom` with a mapping of names. Experts and metrics may have been
            added since: old points have 0 for a new expert, and a new metric is one that was not
            measured there. Anchors that the study lacks are measured first.
        config: Extra plain data to record with the run.
        tracking: Mirrors of the record: ``"none"``, ``"local"`` (tables, plots and a page in
            ``run_dir``), ``"wandb"``, settings such as
            :class:`map_bo.tracking.wandb.mirror.Wandb`, or several of these.
        workers: Who evaluates: a number of processes (``workers=4``), settings of workers such as
            ``map_bo.Processes(4, devices=["cuda:0", "cuda:1"])``, or an executor. None evaluates in
            this process, one row after another.
        **settings: Any other field of :class:`Settings`: ``sampler``, ``surrogate``, ``solver``,
            ``batch``, ``verify``, ``guard``, ``retries``, ``timeout`` ...

    Returns:
        The front and all measurements.

    Raises:
        ConfigError: On an unknown setting, or a value of the wrong type.
        BudgetError: When the budget is too small for a front.
        EvaluationError: When too many evaluations failed.
        StoreError: When ``run_dir`` holds another run, is in use, or cannot be written.
    """
    chosen = Settings.checked(budget=budget, seed=seed, workers=workers, **settings)
    bar = progress if isinstance(progress, Progress) else (RichProgress() if progress else silent)

    # Before the store: what is refused leaves no run behind.
    begun = run_dir is not None and has_begun(absolute_directory(run_dir))
    taken = None if known is None or begun else take(known, problem)

    def run(store: RunStore, tracker: Tracker) -> Result:
        if taken is not None:
            state = Run(problem, chosen, store, config=config).state
            begin_with(taken, store, state, chosen.search)
        return Run(problem, chosen, store, config=config, tracker=tracker).drive(bar)

    if run_dir is None:
        with trackers(tracking, None) as tracker:
            return run(MemoryStore(), tracker)
    directory = absolute_directory(run_dir)
    mirrors = trackers(tracking, directory)  # before the store: a wrong name leaves no run behind
    exists = (directory / "events.jsonl").exists()
    with leaving_nothing(directory, fresh=not exists):
        store = JsonlStore.open(directory) if exists else JsonlStore.create(directory)
        with store.lock(), mirrors as tracker:
            return run(store, tracker)


def open_run(run_dir: str | Path, *, trust: Trust = ()) -> Run:
    """Return a recorded run, to ask for rows and to tell their outcomes.

    Everything comes from the record: no checkpoint is read, and the run cannot evaluate a point
    itself. Several processes may have the same run open; see :class:`map_bo.loop.run.Run`.

    Args:
        run_dir: The run's directory.
        trust: Packages whose classes the record may name; see :func:`map_bo.plain.from_plain`.

    Raises:
        StoreError: When there is no run, or it is a nested one.
        SettingsError: When its settings cannot be built again, or their package is not trusted.
    """
    created = created_of(run_dir)
    if created.get("nested"):
        raise StoreError(
            "a nested run measures points of many nodes, which cannot be asked for by hand",
            hint="drive it with `map-bo resume RUN`, or start a run without nested=...",
        )
    with understood(
        StoreError,
        f"the record in {run_dir}",
        hint="restore it from a copy if it was edited by hand",
    ):
        values = {name: from_plain(part, trust=trust) for name, part in created["settings"].items()}
        metrics = tuple(decode_metric(metric) for metric in created["metrics"])
        space = CoefficientSpace.from_description(created["space"])
        problem = ToldProblem(space, metrics, created["problem"])
        settings = Settings.checked(**values)
    return Run(problem, settings, JsonlStore.open(Path(run_dir)))
