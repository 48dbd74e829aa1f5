"""From what a user names as the start of a run to the observations that it takes over."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

from map_bo.data import Observations
from map_bo.errors import DataError, StoreError
from map_bo.loop.identity import problem_identity
from map_bo.loop.reading import created_of, load_state
from map_bo.loop.result import Result
from map_bo.loop.transfer.embedding import Taken, embed
from map_bo.loop.transfer.examples import check_outcomes
from map_bo.loop.transfer.study import HasStudy, StartFrom, Study
from map_bo.loop.transfer.table import read_table
from map_bo.problems.problem import Problem, digests_of_examples
from map_bo.tracking.jsonl import JsonlStore, is_run

__all__ = ["Known", "is_database", "take"]

Known: TypeAlias = Observations | Result | StartFrom | HasStudy | str | Path
"""What a new run can start from."""

_TABLES = (".csv", ".txt")
_SQLITE = b"SQLite format 3\x00"


def take(known: Known, problem: Problem) -> Taken:
    """Return what a run of ``problem`` takes over from an older study.

    Args:
        known: Observations; a result; the directory of a run; a CSV file; what reads a study; or
            one of these with a mapping of names (:class:`StartFrom`).
        problem: The new run's problem.

    Raises:
        DataError: When it does not fit; the hint says what would make it fit.
        SpaceError: When rows lie outside the space of the problem.
        StoreError: When a run cannot be read, or is still going on.
    """
    how = known if isinstance(known, StartFrom) else StartFrom(known)
    given, space, metrics = how.source, problem.space, problem.metrics
    plain = not isinstance(known, StartFrom)
    if (
        plain
        and isinstance(given, Observations)
        and given.metrics == tuple(metrics)
        and given.X.shape[-1] == space.d
    ):
        space.check(given.X)
        check_outcomes(given, problem)
        return Taken(given, {"from": "python"})
    study = _study(given, how, problem)
    # Examples are read only where there are some to compare them with.
    examples = digests_of_examples(problem) if study.examples else {}
    described = json.loads(json.dumps(problem_identity(problem)))
    return embed(study, space, metrics, how, problem=described, examples=examples)


def _study(given: object, how: StartFrom, problem: Problem) -> Study:
    if isinstance(given, Observations):
        return Study.of(given, None, source={"from": "python"}, title="the given observations")
    if isinstance(given, Result):
        return _of_result(given)
    if isinstance(given, HasStudy):
        return given.study()
    if not isinstance(given, str | Path):
        raise DataError(
            f"a run cannot start from a {type(given).__name__}",
            hint="give Observations, a Result, the directory of a run, a CSV file, or "
            "map_bo.AxDatabase(FILE)",
        )
    path = Path(given)
    if path.is_dir():
        return _of_run(path)
    if not path.is_file():
        raise DataError(
            f"there is no file or directory {str(path)!r} to start from",
            hint="name the directory of a run, a CSV file, or a database of Ax",
        )
    if is_database(path):
        raise DataError(
            f"{path} is a database of another library, which is not read here",
            hint=f"give known=map_bo.AxDatabase({str(path)!r})",
        )
    if path.suffix.lower() not in _TABLES:
        raise DataError(
            f"{path} is not a database of Ax, and its name is not that of a CSV file",
            hint="name the directory of a run, a file that ends in .csv, or an SQLite file of Ax",
        )
    space = problem.space
    return read_table(
        path,
        [*dict.fromkeys((*space.names, *space.experts, *how.experts))],
        [*dict.fromkeys((*(metric.name for metric in problem.metrics), *how.metrics))],
    )


def is_database(path: Path) -> bool:
    """Return whether a file is an SQLite database."""
    with path.open("rb") as file:
        return file.read(len(_SQLITE)) == _SQLITE


def _of_result(result: Result) -> Study:
    described = None
    examples: Mapping[str, str] = {}
    if result.run_dir is not None and is_run(result.run_dir):
        created = created_of(result.run_dir)
        described, examples = created.get("problem"), created.get("examples") or {}
    elif result.problem is not None:
        described = json.loads(json.dumps(problem_identity(result.problem)))
        examples = digests_of_examples(result.problem)
    where = {} if result.run_dir is None else {"path": str(Path(result.run_dir).absolute())}
    return Study.of(
        result.seen.append(result.verification),
        result.space,
        source={"from": "result", **where},
        title="the given result" if result.run_dir is None else f"the run in {result.run_dir}",
        problem=described if isinstance(described, Mapping) else None,
        examples=examples,
    )


def _of_run(directory: Path) -> Study:
    if not is_run(directory):
        raise StoreError(
            f"{directory} holds no run to start from",
            hint="name a directory that `map-bo run` wrote, a CSV file, or a database of Ax",
        )
    created: dict[str, Any] = created_of(directory)
    if created.get("nested"):
        raise StoreError(
            f"the run in {directory} is a nested one, whose nodes measured merges of merges",
            hint="start from a run that merged all experts at once",
        )
    with ExitStack() as alone:
        if os.access(directory, os.W_OK):  # an archive cannot be locked, and nobody writes to it
            alone.enter_context(JsonlStore.open(directory).lock())  # refused while it is driven
        state, space = load_state(directory)
    if not state.outcomes:
        raise StoreError(
            f"the run in {directory} has no evaluation yet",
            hint=f"continue it with `map-bo resume {directory}`, or start without it",
        )
    described = created.get("problem")
    source: dict[str, Any] = {"from": "run", "path": str(directory.absolute())}
    if state.summary is None:
        source["finished"] = False
    return Study.of(
        state.data,
        space,
        source=source,
        title=f"the run in {directory}",
        problem=described if isinstance(described, Mapping) else None,
        examples=created.get("examples") or {},
    )
