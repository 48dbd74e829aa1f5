"""Observations from elsewhere, as part of a run's record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from map_bo.data import Metric, Observations
from map_bo.errors import DataError, StoreError
from map_bo.loop.state import RunState, advance
from map_bo.scale import same_points
from map_bo.space import CoefficientSpace
from map_bo.tracking.codec import encode_observations
from map_bo.tracking.store import Event, RunStore

__all__ = ["begin_with", "check_known", "include", "notes_on_imported"]


def check_known(found: Observations, metrics: Sequence[Metric], space: CoefficientSpace) -> None:
    """Refuse observations that do not fit the run that is to hold them.

    Raises:
        DataError: When they have other metrics or another number of coefficients.
        SpaceError: When one lies outside the space.
    """
    _check(found, metrics, space.d)
    space.check(found.X)


def _check(found: Observations, metrics: Sequence[Metric], d: int) -> None:
    if found.metrics != tuple(metrics) or found.X.shape[-1] != d:
        raise DataError(
            f"the observations have metrics {[metric.name for metric in found.metrics]} and "
            f"{found.X.shape[-1]} coefficients, the run has "
            f"{[metric.name for metric in metrics]} and {d}",
            hint="metrics must agree in name, direction, kind and bounds",
        )


def include(
    found: Observations, store: RunStore, state: RunState, source: Mapping[str, Any]
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

    Raises:
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
    store.append(event)
    return after


def begin_with(known: Observations, store: RunStore, state: RunState) -> None:
    """Record ``known`` in a run that has no evaluation yet; do nothing in any other."""
    if not len(state.X):
        include(known, store, state, {"from": "python"})


def notes_on_imported(state: RunState) -> list[str]:
    """Return what the summary says about observations that the run did not make itself."""
    count = len(state.imported)
    return [f"{count} of the evaluations were made elsewhere and imported"] if count else []
