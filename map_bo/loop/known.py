"""Observations from elsewhere, as part of a run's record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from map_bo.data import Metric, Observations
from map_bo.errors import BudgetError, DataError, StoreError
from map_bo.loop.state import RunState, advance
from map_bo.loop.transfer.embedding import Taken
from map_bo.scale import anchor_rows, same_points
from map_bo.space import CoefficientSpace
from map_bo.tracking.codec import encode_observations, encode_tensor
from map_bo.tracking.jsonl import JsonlStore, is_run
from map_bo.tracking.store import Event, RunStore

__all__ = [
    "anchors_lacking",
    "begin_with",
    "has_begun",
    "imported_of",
    "include",
    "notes_on_imported",
]


def _check(found: Observations, metrics: Sequence[Metric], d: int) -> None:
    if found.metrics != tuple(metrics) or found.X.shape[-1] != d:
        raise DataError(
            f"the observations have metrics {[metric.name for metric in found.metrics]} and "
            f"{found.X.shape[-1]} coefficients, the run has "
            f"{[metric.name for metric in metrics]} and {d}",
            hint="metrics must agree in name, direction, kind and bounds",
        )


def include(
    found: Observations,
    store: RunStore,
    state: RunState,
    source: Mapping[str, Any],
    *,
    search: int | None = None,
) -> RunState:
    """Record observations in a run, all of them or none, and return the run's new state.

    They count as evaluations of the search, like those of the run itself: they use up its budget
    and the surrogate is fitted to them. A row at a point that was proposed and has no outcome yet
    becomes the outcome of that point.

    Args:
        found: Observations of the run's metrics at points of its space.
        store: The run's store.
        state: The state of that store.
        source: Plain data on where they come from.
        search: How many evaluations the search has, where the run starts with these: the anchors
            that they lack are then queued, to be measured first; see :func:`anchors_lacking`.

    Raises:
        BudgetError: When a metric was never measured, and the budget leaves no evaluation for it.
        DataError: When they have other metrics or coefficients.
        StoreError: When the front of the run has been solved, or the event cannot be written.
    """
    if not len(found):
        return state
    if state.created.get("nested"):
        raise StoreError(
            "a nested run takes no observations from elsewhere: its nodes measure their own points",
            hint="start a run that merges all experts at once, without nested=...",
        )
    if state.front is not None:
        raise StoreError(
            "the front of this run has been solved, so no observation can be added",
            hint="start a new run with all of them: `map-bo run ... start_from=FILE`, or "
            "map_bo.optimize(..., known=observations)",
        )
    _check(found, state.metrics, state.X.shape[-1])
    space = CoefficientSpace.from_description(state.created["space"])
    waiting, number, indices = list(state.pending), len(state.X), []
    for rows in same_points(found.X, state.X, space).tolist():
        same = [i for i in waiting if rows[i]]
        if same:
            waiting.remove(same[0])
        indices.append(same[0] if same else number)
        number += not same
    data = {"indices": indices, "observations": encode_observations(found), "source": dict(source)}
    event = Event("imported", data)
    after = advance(state, event)  # before writing: the record must stay replayable
    if search is not None:  # in the same event: a run that is killed has both or neither
        event = Event("imported", {**data, **anchors_lacking(after, space, search)})
        after = advance(state, event)
    store.append(event)
    return after


def begin_with(taken: Taken, store: RunStore, state: RunState, search: int) -> RunState:
    """Record what was ``taken`` over in a run that has no evaluation yet, and queue its anchors.

    Nothing is done in any other run.

    Args:
        taken: Observations and where they come from.
        store: The run's store.
        state: The state of that store.
        search: How many evaluations the search has.

    Returns:
        The state after it.

    Raises:
        BudgetError: When the budget leaves no evaluation for a metric that was never measured.
    """
    if len(state.X):
        return state
    return include(taken.observations, store, state, taken.source, search=search)


def anchors_lacking(state: RunState, space: CoefficientSpace, search: int) -> dict[str, Any]:
    """Return which anchors the observations that a run starts with lack, as data of their event.

    Base, experts and blend make the scale of a run. Those that the observations hold in some
    metrics alone are to be completed (``complete``: their rows); those that they do not hold at
    all become new rows (``queue``: their coefficients), as many as the budget leaves.

    Args:
        state: The state right after the observations were recorded.
        space: The run's space.
        search: How many evaluations the search has.

    Raises:
        BudgetError: When a metric was never measured, and the budget leaves no evaluation for it.
    """
    seen, anchors = state.seen, space.anchors()
    rows, again, lacking = sorted(state.outcomes), [], []
    for i, here in enumerate(anchor_rows(seen.X, space)):
        if not bool(here.any()):
            lacking.append(i)
        elif not bool((here & (seen.ok | seen.failed_rows)).any()):
            again.append(rows[int(here.nonzero()[0])])
    room = max(0, search - len(state.X))
    never = [
        metric.name
        for metric, there in zip(seen.metrics, seen.measured.any(0).tolist(), strict=True)
        if not there
    ]
    if never and not room and not again and bool(seen.incomplete.any()):
        raise BudgetError(
            f"the budget leaves {search} evaluations for the search, and {len(seen)} are known: "
            f"none is left to measure {', '.join(never)}",
            hint=f"give a budget of at least {len(seen) + len(anchors)} evaluations and those "
            "that verify the front",
        )
    queue = anchors.X[lacking[:room]]
    return {
        **({"complete": sorted(again)} if again else {}),
        **({"queue": encode_tensor(queue)} if len(queue) else {}),
    }


def has_begun(directory: Path) -> bool:
    """Return whether a run is recorded in a directory, and more of it than that it was created."""
    if not is_run(directory):
        return False
    return any(event.kind != "created" for event in JsonlStore.open(directory).read())


def notes_on_imported(state: RunState) -> list[str]:
    """Return what the summary says about observations that the run did not make itself."""
    count = len(state.imported)
    if not count:
        return []
    sources = {id(source): source for source in state.imported.values()}
    told = [str(note) for source in sources.values() for note in source.get("notes", ())]
    return [f"{count} of the evaluations were made elsewhere and imported", *dict.fromkeys(told)]


def imported_of(state: RunState) -> dict[str, Any]:
    """Return what the summary holds of imported evaluations; nothing where there are none.

    That is ``imported``: their number, their ``rows`` (from 0), and each ``source`` as plain data.
    """
    if not state.imported:
        return {}
    sources = {id(source): source for source in state.imported.values()}
    kept = [
        {key: value for key, value in source.items() if key not in ("notes", "trials")}
        for source in sources.values()
    ]
    found = {"evaluations": len(state.imported), "rows": sorted(state.imported), "sources": kept}
    return {"imported": found}
