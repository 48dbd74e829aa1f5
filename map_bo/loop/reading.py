"""Reading recorded runs back: the state and result of one, and all runs of a sweep.

Everything comes from the record of a run; nothing is evaluated. The runs of a sweep are read
whether they finished or not, and a job that failed before it recorded anything says why in a file
of its own (:func:`record_failure`).
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from numpy.typing import NDArray

from map_bo.errors import AnotherRunError, MapBoError, SettingsError, StoreError
from map_bo.examples.sets import ExampleOutcomes
from map_bo.foreign import read_json, understood
from map_bo.loop.growth import created_in_force
from map_bo.loop.recommend import refit as fit_again
from map_bo.loop.result import Result
from map_bo.loop.state import RunState, check_created, replay
from map_bo.plain import Trust, flat, from_plain, read_repr
from map_bo.problems.problem import Problem
from map_bo.report.comparison.runs import Outcome, RunRecord, Status
from map_bo.report.run.outcome_table import outcome_columns
from map_bo.space import CoefficientSpace
from map_bo.surrogates.outliers import Outlier, screened
from map_bo.surrogates.surrogate import Surrogate
from map_bo.tracking.codec import decode_metric, decode_observations, decode_scale
from map_bo.tracking.jsonl import JsonlStore, is_run
from map_bo.tracking.store import Event
from map_bo.tracking.wandb.run import wandb_run_of

__all__ = [
    "as_in_run",
    "clear_failure",
    "created_of",
    "examples_of",
    "load_result",
    "load_state",
    "outcomes_table",
    "read_runs",
    "record_failure",
    "recorded_surrogate",
]

_EVENTS = "events.jsonl"
_FAILURE = "failure.json"
_HYDRA = ".hydra"  # every job begins with it
_IGNORED = ("progress", "tracking")  # groups and settings that do not change what a run finds


def _reading(run_dir: str | Path) -> AbstractContextManager[None]:
    return understood(
        StoreError,
        f"the record in {run_dir}",
        hint="restore it from a copy if it was edited by hand, or read it with the version of "
        "map-bo that wrote it",
    )


def created_of(run_dir: str | Path, *, extended: bool = True) -> dict[str, Any]:
    """Return what is recorded of a run's start, with the settings in force.

    It is the data of its ``created`` event after all extensions (:mod:`map_bo.loop.growth`), or
    without them where they are not asked for (``extended``).

    Raises:
        StoreError: When the directory holds no run.
    """
    with _reading(run_dir):
        events = _checked(JsonlStore.open(Path(run_dir)).read())
        if not extended:
            events = (event for event in events if event.kind == "created")
        created = created_in_force(events)
        if created is not None:
            return created
    raise StoreError(
        f"the record in {run_dir} does not begin with a run",
        hint="name a directory that `map-bo run` wrote",
    )


def _checked(events: Iterable[Event]) -> Iterator[Event]:
    for event in events:
        if event.kind == "created":
            check_created(event.data)
        yield event


def load_state(run_dir: str | Path) -> tuple[RunState, CoefficientSpace]:
    """Return the state of a recorded run and its space."""
    created = created_of(run_dir)
    with _reading(run_dir):
        events = list(JsonlStore.open(Path(run_dir)).read())
        # The result of a nested run may have other coefficients than its experts.
        spaces = [event.data["space"] for event in events if event.kind == "space"]
        metrics = tuple(decode_metric(metric) for metric in created["metrics"])
        space = CoefficientSpace.from_description([created["space"], *spaces][-1])
        return replay(events, metrics, space.d), space


def examples_of(run_dir: str | Path) -> tuple[Mapping[str, ExampleOutcomes], ...]:
    """Return the outcomes of examples of each evaluation of a recorded run.

    The evaluations are those of ``evaluations.csv``: the search, then the verification. Of a nested
    run they are its measurements, in their order.

    Returns:
        For each evaluation, evaluator -> its outcomes; empty where there are none.

    Raises:
        StoreError: When there is no run, or its record is damaged.
    """
    state, _ = load_state(run_dir)
    if not state.created.get("nested"):
        search = [state.outcomes[row] for row in sorted(state.outcomes)]
        checks = [state.verified[row] for row in sorted(state.verified)]
        return tuple(row for one in (*search, *checks) for row in one.examples)
    with _reading(run_dir):
        named = {metric.name: metric for metric in state.metrics}
        return tuple(
            row
            for event in JsonlStore.open(Path(run_dir)).read()
            if event.kind == "measured" and "node" not in event.data
            for row in decode_observations(
                event.data["observation"], [named[name] for name in event.data["names"]]
            ).examples
        )


def outcomes_table(run_dir: str | Path) -> dict[str, NDArray[Any]]:
    """Return the outcome of every example in every evaluation of a recorded run, as columns.

    ``pandas.DataFrame(map_bo.outcomes_table(run))`` is a data frame of them, and so with other
    libraries. ``map-bo outcomes RUN --out FILE`` writes the table.

    Returns:
        Columns of equal length by name: ``row`` (of ``evaluations.csv``, from 0), ``evaluator``,
        ``metric``, ``example`` (as its evaluator numbers them) and ``outcome`` (in the metric's own
        unit, rounded as the record keeps it; NaN where the example failed).

    Raises:
        StoreError: When there is no run, or its record is damaged.
    """
    return outcome_columns(examples_of(run_dir))


def load_result(
    run_dir: str | Path,
    *,
    problem: Problem | None = None,
    surrogate: Surrogate | None = None,
    refit: bool = False,
    trust: Trust = (),
) -> Result:
    """Return the result of a recorded run; no checkpoint is loaded and nothing is evaluated.

    Args:
        run_dir: The run's directory.
        problem: The run's problem, needed only to export a choice.
        surrogate: The run's surrogate settings. When given, it is fitted again to the recorded
            evaluations, and once more with the verified points among them, so that choices are not
            limited to the points of the front.
        refit: Whether to fit the recorded surrogate again where none is given; see
            :func:`recorded_surrogate`.
        trust: Packages whose classes the record may name; see :func:`map_bo.plain.from_plain`.

    Raises:
        StoreError: When there is no run, or it has no front yet.
        SettingsError: When the recorded surrogate cannot be built, or its package is not trusted.
    """
    state, space = load_state(run_dir)
    with _reading(run_dir):
        if refit and surrogate is None:
            surrogate = recorded_surrogate(state.created, trust=trust)
        result = Result.of(state, space, problem=problem, run_dir=Path(run_dir))
        if surrogate is None:
            return result
        surrogate = as_in_run(surrogate, state.created)
        again = fit_again(state, space, surrogate) if result.is_corrected else None
        return replace(
            result,
            model=surrogate.fit(state.seen, space),
            refitted=None if again is None else again.model,
        )


def as_in_run(surrogate: Surrogate, created: Mapping[str, Any]) -> Surrogate:
    """Return a surrogate as a recorded run used it: without outliers where it set them aside.

    Runs of version 0.1 kept them.

    Args:
        surrogate: Its settings.
        created: What was recorded when the run was started.
    """
    aside = created.get("settings", {}).get("outliers") == "auto"
    return screened(surrogate) if aside else surrogate


def recorded_surrogate(created: Mapping[str, Any], *, trust: Trust = ()) -> Surrogate | None:
    """Return the surrogate settings of a run, built again from its record.

    Args:
        created: What was recorded when the run was started.
        trust: Packages whose classes the record may name; see :func:`map_bo.plain.from_plain`.

    Returns:
        The settings; None for runs of version 0.1 that were started in Python, whose records name
        them in words alone.

    Raises:
        SettingsError: When they cannot be built, or their package is not trusted.
    """
    recorded = created.get("settings", {}).get("surrogate")
    if isinstance(recorded, str):  # version 0.1
        recorded = ((created.get("config") or {}).get("tree") or {}).get("surrogate")
    if recorded is None:
        return None
    surrogate = from_plain(recorded, trust=trust)
    if not isinstance(surrogate, Surrogate):
        raise SettingsError(
            f"the recorded surrogate is a {type(surrogate).__name__}, which is not one",
            hint="the record was changed by hand",
        )
    return surrogate


def record_failure(directory: Path, error: BaseException) -> None:
    """Write the reason of a failed job into its directory, for the report of its sweep.

    Raises:
        OSError: When it cannot be written.
    """
    known = isinstance(error, MapBoError)
    reason = error.message if isinstance(error, MapBoError) else f"{type(error).__name__}: {error}"
    failure = {
        "reason": reason,
        "hint": error.hint if isinstance(error, MapBoError) else None,
        "refused": isinstance(error, AnotherRunError),
        "trace": None if known else "".join(traceback.format_exception(error)),
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / _FAILURE).write_text(json.dumps(failure, indent=2) + "\n", encoding="utf-8")


def clear_failure(directory: Path) -> None:
    """Remove what :func:`record_failure` wrote, once the job has finished after all."""
    with suppress(FileNotFoundError):
        (directory / _FAILURE).unlink()


def read_runs(directories: Sequence[str | Path], *, beside: str | Path) -> list[RunRecord]:
    """Return every run in the given sweeps (or runs), in the order of their paths.

    A run is a directory with ``events.jsonl``, or one in which a job failed or was killed before
    it recorded anything. Hidden directories (those of launchers) are skipped.

    Args:
        directories: Directories of sweeps, or of single runs.
        beside: Directory of the report; links are relative to it.

    Raises:
        StoreError: When a directory does not exist or holds no run.
    """
    records = []
    several = len(directories) > 1
    for directory in directories:
        if not os.path.isdir(directory):  # any name; pathlib raises on a long one
            raise StoreError(
                f"{directory} is not a directory",
                hint="name the directory of a run (map-bo run) or of a sweep (map-bo run -m)",
            )
    titles = _titles([Path(directory) for directory in directories])
    for title, directory in zip(titles, map(Path, directories), strict=True):
        found = list(_jobs(directory))
        if not found:
            raise StoreError(
                f"{directory} holds no run: there is no {_EVENTS} in it or below",
                hint="name the directory of a run (map-bo run) or of a sweep (map-bo run -m)",
            )
        for job in found:
            inside = str(job.relative_to(directory))
            name = title if inside == "." else f"{title}/{inside}" if several else inside
            records.append(_record(job, name, title, Path(beside)))
    return records


def _titles(directories: Sequence[Path]) -> list[str]:
    names = [directory.resolve().name for directory in directories]
    return [
        name if names.count(name) == 1 else str(directory)
        for name, directory in zip(names, directories, strict=True)
    ]


def _jobs(directory: Path) -> Iterator[Path]:
    for folder, inside, files in os.walk(directory):
        begun = _HYDRA in inside
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        if is_run(folder) or _FAILURE in files or begun:
            inside.clear()
            yield Path(folder)


def _record(job: Path, name: str, sweep: str, beside: Path) -> RunRecord:
    page = job / "report.html"
    target = os.path.relpath(page if page.exists() else job, beside)
    link = quote(target if page.exists() else f"{target}/")
    failure, refused = _failure_of(job)
    if not is_run(job):
        status: Status = "failed" if failure else "unfinished"
        return RunRecord(name, link, sweep, status, failure or "nothing was recorded")
    try:
        return _read(job, RunRecord(name, link, sweep, "finished"), failure, refused)
    except MapBoError as error:
        reason = error.message
    except Exception as error:  # a report of many runs does not fail for one of them
        reason = f"the record was edited, or written by another version: {error!r}"
    return RunRecord(name, link, sweep, "unreadable", reason)


def _read(job: Path, known: RunRecord, failure: str, refused: bool) -> RunRecord:
    created = created_of(job)
    settings, named = _settings(created)
    state, space = load_state(job)
    known = replace(
        known, settings=settings, named=named, wandb=wandb_run_of(job, created.get("config"))
    )
    if state.summary is None or state.front is None:
        budget = created.get("settings", {}).get("budget", "?")
        done = f"{len(state.outcomes) + len(state.verified)} of {budget} evaluations are recorded"
        reason = f"{failure} ({done})" if failure else done
        return replace(known, status="failed" if failure else "unfinished", reason=reason)
    if refused:  # another run has finished in this directory
        return replace(known, status="failed", reason=failure)
    listed = state.summary.get("outliers", ())
    outcome = Outcome(
        seen=state.data,
        front=Result.of(state, space).front,
        scale=decode_scale(state.front_data["reference"], state.metrics),
        seconds={key: float(value) for key, value in state.summary["seconds"].items()},
        data_sets=(state.summary.get("nested") or {}).get("data_sets"),
        outliers=tuple(Outlier.read(one) for one in listed),
    )
    return replace(known, outcome=outcome)


def _failure_of(job: Path) -> tuple[str, bool]:
    """Return why a job failed, and whether it was refused because of the run in its directory."""
    try:
        failure = read_json(job / _FAILURE)
        hint = f" (hint: {failure['hint']})" if failure.get("hint") else ""
        return f"{failure['reason']}{hint}", bool(failure.get("refused"))
    except FileNotFoundError:
        return "", False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "it failed, and its reason cannot be read", False


def _settings(created: Mapping[str, Any]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the flat settings of a run, and the names of those given on its command line."""
    config = created.get("config") or {}
    if "tree" not in config:  # a run made in Python
        return _flat_settings(created.get("settings", {})), ()
    settings = _flat(config["tree"])
    choices = config.get("choices") or {}
    settings |= {key: str(value) for key, value in choices.items() if value and key not in _IGNORED}
    given = [text.lstrip("+~").partition("=") for text in config.get("overrides") or ()]
    named = {name.partition("@")[0]: value for name, _, value in given}
    # A setting that is a mapping has no value of its own among the flat settings.
    settings |= {name: value for name, value in named.items() if name not in settings}
    return {k: v for k, v in settings.items() if k not in _IGNORED}, tuple(named)


def _flat_settings(settings: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        said = read_repr(value) if isinstance(value, str) and "(" in value else value
        found |= flat(said, name, modules=False)
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in found.items()}


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in data.items():
        if f"{prefix}{key}" in _IGNORED or key == "progress":  # a problem may have its own
            continue
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        elif not key.startswith("_args_"):
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return flat
