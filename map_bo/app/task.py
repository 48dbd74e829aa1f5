"""One run, from a resolved configuration to a report."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from ax.core.experiment import Experiment
    from rich.console import Console

    from map_bo.loop.result import Result
    from map_bo.loop.run import Run
    from map_bo.loop.transfer.embedding import Taken
    from map_bo.loop.transfer.study import StartFrom
    from map_bo.problems.problem import Problem

__all__ = ["create", "drive", "is_told", "show"]

_TOLD = "map_bo.problems.told.told_problem"


def drive(
    config: DictConfig,
    directory: Path,
    *,
    fresh: bool = False,
    retry_failed: bool = False,
    choices: Mapping[str, Any] | None = None,
    changed: DictConfig | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Result:
    """Start (``fresh``) or resume the run in ``directory``, with its trackers.

    Args:
        config: The resolved configuration.
        directory: The run's directory.
        fresh: Whether the run is new; then an existing one is refused.
        retry_failed: Whether to repeat the evaluations that failed.
        choices: Further plain data to record with a new run.
        changed: The configuration from now on, where the run is extended.
        changes: What changes in it besides settings of the loop: key -> ``from`` and ``to``.
    """
    from map_bo.app.build import (
        build_nested,
        build_problem,
        build_settings,
        build_start,
        build_tracking,
        log_workers,
        refuse_unknown,
    )
    from map_bo.app.trust import trust_words
    from map_bo.errors import ConfigError, StoreError
    from map_bo.foreign import understood
    from map_bo.loop.growth import MAY_CHANGE
    from map_bo.loop.mirrors import trackers
    from map_bo.loop.progress import RichProgress, silent
    from map_bo.loop.run import Run
    from map_bo.nested.optimize import nested_run
    from map_bo.nested.run import NestedRun
    from map_bo.problems.told import ToldProblem
    from map_bo.tracking.jsonl import JsonlStore

    refuse_unknown(config)
    with understood(ConfigError, "the configuration", hint="see it with `map-bo run --cfg job`"):
        settings, nested = build_settings(config), build_nested(config)
        settings = log_workers(settings, directory)
        start = build_start(config)
        after = settings if changed is None else build_settings(changed)
        after = log_workers(after, directory)
        shown = config if changed is None else changed
        mirrors = trackers(build_tracking(shown), directory)
    if nested is not None and start is not None:
        raise ConfigError(
            "a nested run cannot start from an older study: its nodes measure other points",
            hint="leave out start_from, or merge all experts at once with nested=none",
        )
    problem = build_problem(config)  # before the store: an error here leaves no run behind
    begun = not fresh and _has_begun(directory)
    beginning = None if begun or start is None else _beginning(start, problem)
    store = JsonlStore.create(directory) if fresh else JsonlStore.open(directory)
    plain = _plain(config, choices)
    with store.lock(), mirrors as tracker:
        run: Run | NestedRun
        if nested is not None:
            run = nested_run(problem, after, nested, store, config=plain, tracker=tracker)
            if changes:
                run.extend(config=changes)
        else:
            if beginning is not None:
                _start_from(beginning, Run(problem, settings, store, config=plain))
            run = Run(problem, settings, store, config=plain, tracker=tracker)
            if changed is not None:
                run.extend(config=changes, **{name: getattr(after, name) for name in MAY_CHANGE})
        if isinstance(problem, ToldProblem) and isinstance(run, Run):
            _refuse_untold(run, directory)
        if retry_failed and isinstance(run, Run):
            run.reopen_failures()
        elif retry_failed:
            raise StoreError(
                "failed evaluations of a nested run cannot be repeated: later nodes depend on them",
                hint="resume without --retry-failed, or start a new run",
            )
        try:
            return run.drive(RichProgress() if shown.progress else silent)
        except KeyboardInterrupt:
            command = f"map-bo resume {shlex.quote(_relative(directory, Path.cwd()))}"
            command += trust_words(plain)
            sys.stderr.write(
                f"\ninterrupted; all measurements are kept; continue with `{command}`\n"
            )
            raise


def is_told(config: DictConfig) -> bool:
    """Return whether the problem of a configuration is evaluated elsewhere."""
    return bool((config.problem or {}).get("_target_") == _TOLD)


def create(config: DictConfig, directory: Path, choices: Mapping[str, Any] | None = None) -> str:
    """Create the run in ``directory`` without driving it, and return what to do next.

    Args:
        config: The resolved configuration.
        directory: The run's directory.
        choices: Further plain data to record.

    Raises:
        ConfigError: When the run would be nested, whose points cannot be asked for.
    """
    from map_bo.app.build import (
        build_nested,
        build_problem,
        build_settings,
        build_start,
        refuse_unknown,
    )
    from map_bo.errors import ConfigError
    from map_bo.foreign import understood
    from map_bo.loop.run import Run
    from map_bo.tracking.jsonl import JsonlStore

    refuse_unknown(config)
    with understood(ConfigError, "the configuration", hint="see it with `map-bo run --cfg job`"):
        settings, nested = build_settings(config), build_nested(config)
        start = build_start(config)
    if nested is not None:
        raise ConfigError(
            "the points of a nested run cannot be asked for: each of its nodes has a space of "
            "its own",
            hint="merge all experts at once with nested=none, or let the run drive itself",
        )
    problem = build_problem(config)
    beginning = None if start is None else _beginning(start, problem)
    run = Run(problem, settings, JsonlStore.create(directory), config=_plain(config, choices))
    if beginning is not None:
        _start_from(beginning, run)
    place = shlex.quote(_relative(directory, Path.cwd()))
    return (
        f"{place} holds a new run of {settings.search} evaluations; it waits to be asked:\n"
        f"  map-bo ask {place} -n 4 --json\n"
        f"  map-bo tell {place} ROW --json '{{\"METRIC\": VALUE, ...}}'\n"
        f"  map-bo resume {place}    # at the end: solves for the front"
        + ("" if is_told(config) else "; before: makes the evaluations itself")
    )


def _refuse_untold(run: Run, directory: Path) -> None:
    """Refuse to drive a run that is evaluated elsewhere before its search is complete."""
    from map_bo.errors import ConfigError

    state, settings = run.state, run.settings
    place = shlex.quote(_relative(directory, Path.cwd()))
    left = settings.search - len(state.outcomes)
    fewer = max(3, len(state.X))
    settle = f"settle for fewer: `map-bo resume {place} loop.budget={fewer}`"
    if fewer >= settings.search:  # all have been asked for
        settle = "tell those that will never be made as failed"
    if state.front is None and left > 0:
        raise ConfigError(
            f"{left} of {settings.search} evaluations have no outcome yet "
            f"({len(state.pending)} rows wait), and they are made elsewhere",
            hint=f"list what waits with `map-bo ask {place} --waiting`, ask for more with "
            f"`map-bo ask {place}`, or {settle}",
        )
    if state.summary is None and settings.verifications:
        raise ConfigError(
            f"{settings.verifications} points of the front are to be verified, and this run is "
            "evaluated elsewhere",
            hint=f"leave them out: `map-bo resume {place} loop.verify=0`",
        )


def _plain(config: DictConfig, choices: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what is recorded of a configuration."""
    tree: Any = OmegaConf.to_container(config, resolve=True)
    tree.pop("drive", None)  # it says what this command does, not what the run is
    return {"tree": tree, "cwd": str(Path.cwd()), **(choices or {})}


def _has_begun(directory: Path) -> bool:
    from map_bo.tracking.jsonl import JsonlStore

    return any(event.kind != "created" for event in JsonlStore.open(directory).read())


def _beginning(start: StartFrom, problem: Problem) -> Experiment | Taken:
    """Return what a run starts from, after checking that it fits.

    An Ax experiment that holds all coefficients and metrics of the run is returned as it is, so
    that the record tells trial by trial what was taken.
    """
    from map_bo.ax.database import read_experiment
    from map_bo.ax.known import AxDatabase, fits
    from map_bo.loop.transfer.sources import is_database, take

    path = Path(str(start.source))
    if not (path.is_file() and is_database(path)):
        return take(start, problem)
    experiment = read_experiment(path)
    mapped = start.experts or start.metrics or start.values or start.skip
    if not mapped and fits(experiment, problem.space, problem.metrics):
        return experiment
    return take(replace(start, source=AxDatabase(path, experiment=experiment)), problem)


def _start_from(beginning: Experiment | Taken, run: Run) -> None:
    """Record an older study as the first evaluations of a run, and queue the anchors it lacks."""
    from map_bo.app.ax_commands import report_recorded
    from map_bo.ax.recording import record
    from map_bo.loop.known import begin_with, notes_on_imported
    from map_bo.loop.reading import load_state
    from map_bo.loop.transfer.embedding import Taken
    from map_bo.tracking.jsonl import JsonlStore

    assert isinstance(run.store, JsonlStore)
    search = run.settings.search
    if isinstance(beginning, Taken):
        state = begin_with(beginning, run.store, run.state, search)
        sys.stdout.write(f"{len(state.imported)} evaluations recorded\n")
        sys.stdout.writelines(f"{note}\n" for note in notes_on_imported(state)[1:])
    else:
        report_recorded(record(beginning, run.store, search=search))
        state = load_state(run.store.directory)[0]
    if state.pending:
        sys.stdout.write(
            f"base, experts or blend to be measured first: {len(state.pending)} "
            "(`map-bo ask RUN --waiting` lists them)\n"
        )


def show(result: Result, here: Path) -> None:
    """Print the summary of a run, and the next commands from the directory ``here``."""
    from rich.console import Console

    from map_bo.loop.mirrors import view_of
    from map_bo.report.run.cards import print_summary

    console = Console()
    print_summary(view_of(result, normalised=_shows_shares(result)), console)
    _print_next_steps(console, result, here)


def _shows_shares(result: Result) -> bool:
    """Return whether the run was asked to show scores normalised by each expert's own."""
    from map_bo.loop.reading import created_of

    assert result.run_dir is not None
    tree = (created_of(result.run_dir).get("config") or {}).get("tree") or {}
    nodes = (tree.get("tracking") or {}).values()
    return any(isinstance(node, Mapping) and bool(node.get("normalised")) for node in nodes)


def _print_next_steps(console: Console, result: Result, here: Path) -> None:
    from map_bo.app.trust import trust_words
    from map_bo.loop.reading import created_of
    from map_bo.loop.result import Exportable

    assert result.run_dir is not None
    directory = _relative(result.run_dir, here)
    first = shlex.quote(f"{result.metrics[0].name}=2")
    console.print("\n[bold]Written[/bold]", highlight=False)
    names = ("report.html", "front.csv", "evaluations.csv", "summary.json", "plots")
    for name in [n for n in names if (result.run_dir / n).exists()] or ["events.jsonl"]:
        console.print(f"  {directory}/{name}", highlight=False, soft_wrap=True, markup=False)
    console.print("\n[bold]Next[/bold]", highlight=False)
    run = shlex.quote(directory)
    commands = [f"map-bo choose {run} --prefer {first}"]
    if isinstance(result.problem, Exportable):
        trust = trust_words(created_of(result.run_dir).get("config"), parts=("problem",))
        commands.append(f"map-bo merge {run} --prefer {first} --out merged{trust}")
    for command in commands:
        console.print(f"  {command}", highlight=False, soft_wrap=True, markup=False)


def _relative(path: Path, here: Path) -> str:
    try:
        return str(path.resolve().relative_to(here.resolve()))
    except ValueError:
        return str(path)
