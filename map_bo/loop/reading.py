"""Reading a recorded run back: its state, its result, its configuration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from map_bo.errors import StoreError
from map_bo.loop.recommend import refitted
from map_bo.loop.result import Result
from map_bo.loop.state import RunState, replay
from map_bo.problems.problem import Problem
from map_bo.space import CoefficientSpace
from map_bo.surrogates.surrogate import Surrogate
from map_bo.tracking.codec import decode_metric
from map_bo.tracking.jsonl import JsonlStore

__all__ = ["created_of", "load_result", "load_state"]


def created_of(run_dir: str | Path) -> dict[str, Any]:
    """Return what was recorded when the run was started.

    Raises:
        StoreError: When the directory holds no run.
    """
    for event in JsonlStore.open(Path(run_dir)).read():
        if event.kind == "created":
            return dict(event.data)
    raise StoreError(
        f"{run_dir} holds a record in which no run was started",
        hint="name the directory that `map-bo run` wrote",
    )


def load_state(run_dir: str | Path) -> tuple[RunState, CoefficientSpace]:
    """Return the state of a recorded run and its space."""
    created = created_of(run_dir)
    events = list(JsonlStore.open(Path(run_dir)).read())
    # A run that merged in stages may end in other coefficients than it began with.
    spaces = [event.data["space"] for event in events if event.kind == "space"]
    try:
        metrics = tuple(decode_metric(metric) for metric in created["metrics"])
        space = CoefficientSpace.from_description([created["space"], *spaces][-1])
    except (KeyError, TypeError) as error:
        raise StoreError(
            f"the record in {run_dir} does not say what was run: {error!r}",
            hint="it was changed by hand, or written by another version",
        ) from error
    return replay(events, metrics, space.d), space


def load_result(
    run_dir: str | Path,
    *,
    problem: Problem | None = None,
    surrogate: Surrogate | None = None,
) -> Result:
    """Return the result of a recorded run; no checkpoint is loaded and nothing is evaluated.

    Args:
        run_dir: The run's directory.
        problem: The run's problem, needed only to export a choice.
        surrogate: The run's surrogate settings. When given, it is fitted again to the recorded
            evaluations, and to those with the verified points, so that choices can go beyond the
            points of the front.

    Raises:
        StoreError: When there is no run, or it has no front yet.
    """
    state, space = load_state(run_dir)
    result = Result.of(state, space, problem=problem, run_dir=Path(run_dir))
    if surrogate is None:
        return result
    return replace(
        result,
        model=surrogate.fit(state.seen, space),
        refitted=refitted(state, space, surrogate) if result.is_corrected else None,
    )
