"""The trials of an Ax experiment in the record of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from map_bo.ax.experiment import KEY
from map_bo.ax.observations import Found, LeftOut, Origin, observations_of
from map_bo.ax.rows import run_id
from map_bo.errors import DataError
from map_bo.loop.identity import difference
from map_bo.loop.known import include
from map_bo.loop.reading import load_state
from map_bo.loop.state import RunState
from map_bo.tracking.jsonl import JsonlStore

if TYPE_CHECKING:
    from ax.core.experiment import Experiment

__all__ = ["Recorded", "record"]


@dataclass(frozen=True)
class Recorded:
    """What :func:`record` did.

    Attributes:
        taken: How many observations were recorded.
        failed: How many of them are failures.
        completed: How many are outcomes of points that the run had proposed and that waited.
        evaluations: How many the search of the run has now.
        left_out: The trials that were not taken, and why.
    """

    taken: int
    failed: int
    completed: int
    evaluations: int
    left_out: tuple[LeftOut, ...]


def record(experiment: Experiment, store: JsonlStore, *, search: int | None = None) -> Recorded:
    """Record the trials of ``experiment`` in a run, all that can be taken or none.

    Trials that the run knows already, because they were exported from it or recorded before, are
    left out. The run then goes on with ``map-bo resume`` or ``map_bo.optimize(run_dir=...)``.

    Args:
        experiment: The experiment.
        store: The store of the run.
        search: How many evaluations the search of the run has, where it starts with these; see
            :func:`map_bo.loop.known.include`.

    Raises:
        DataError: When the experiment has other parameters or metrics, or comes from a run of
            another problem.
        StoreError: When the front of the run has been solved, or the run is in use.
    """
    with store.lock():
        events = store.after(0)
        state, space = load_state(store.directory)
        _refuse_another_problem(experiment, state)
        found = observations_of(experiment, space, state.metrics)
        source = {
            "from": "ax",
            "experiment": experiment.name,
            "created": int(experiment.time_created.timestamp()),
        }
        known = _known(found, state, run_id(events), source)
        found = found.without(known, "the run has it already")
        trials = [[origin.trial, origin.arm] for origin in found.origins]
        waiting = state.pending
        told = {**source, "trials": trials}
        after = include(found.observations, store, state, told, search=search)
    return Recorded(
        taken=len(found.observations),
        failed=int(found.observations.failed_rows.sum()),
        completed=sum(row in after.outcomes for row in waiting),
        evaluations=len(after.outcomes),
        left_out=tuple(sorted(found.left_out, key=lambda left: (left.trial, left.arm))),
    )


def _refuse_another_problem(experiment: Experiment, state: RunState) -> None:
    theirs = (experiment._properties.get(KEY) or {}).get("problem")
    ours = state.created.get("problem")
    if theirs and ours and (found := difference({"problem": theirs}, {"problem": ours})):
        raise DataError(
            f"the experiment comes from a run of another problem: {found}",
            hint="if its values mean the same all the same, pass them in Python: "
            "map_bo.optimize(problem, ..., known=observations_of(...).observations)",
        )


def _known(found: Found, state: RunState, run: str, source: Mapping[str, Any]) -> list[bool]:
    before = {
        (trial, arm)
        for told in state.imported.values()
        if {key: told.get(key) for key in source} == source
        for trial, arm in told.get("trials", ())
    }

    def is_known(origin: Origin) -> bool:
        if (origin.trial, origin.arm) in before:
            return True
        if origin.kept.get("run") != run:
            return False
        # What was verified before the run was extended is one of its rows.
        return "verification" in origin.kept or origin.kept.get("row") in state.outcomes

    return [is_known(origin) for origin in found.origins]
