"""Reading a recorded nested run back, with a root whose surrogate can serve any preference."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from map_bo.errors import StoreError
from map_bo.foreign import understood
from map_bo.loop.reading import as_in_run, load_state, recorded_surrogate
from map_bo.loop.recommend import refit as fit_again
from map_bo.loop.result import Result
from map_bo.loop.state import UNREADABLE, replay
from map_bo.nested.composition import subspace
from map_bo.nested.ledger import Ledger
from map_bo.nested.record import NodeStore, check_nested_event
from map_bo.nested.result import NestedResult, NodeRecord
from map_bo.nested.tree import Group
from map_bo.plain import Trust, modernise, name_of
from map_bo.problems.problem import Problem
from map_bo.space import CoefficientSpace
from map_bo.surrogates.informed import Informed
from map_bo.surrogates.surrogate import Surrogate
from map_bo.tracking.codec import decode_metric
from map_bo.tracking.jsonl import JsonlStore
from map_bo.tracking.store import Event

__all__ = ["is_nested", "load_nested"]

_HINT = "finish the run with `map-bo resume`, unless its record was edited by hand"


def is_nested(created: dict[str, Any]) -> bool:
    """Return whether a run is nested, by the data of its ``created`` event."""
    return bool(created.get("nested"))


def load_nested(
    run_dir: str | Path,
    *,
    problem: Problem | None = None,
    surrogate: Surrogate | None = None,
    refit: bool = False,
    trust: Trust = (),
) -> NestedResult:
    """Return the result of a recorded nested run; no model is loaded and nothing is evaluated.

    Args:
        run_dir: The run's directory.
        problem: The run's problem, needed only to export a choice.
        surrogate: The run's surrogate settings. When given, the surrogate of the root is fitted
            again, so that choices are not limited to the points of the front.
        refit: Whether to fit the recorded surrogate again where none is given.
        trust: Packages whose classes the record may name; see :func:`map_bo.plain.from_plain`.

    Raises:
        StoreError: When there is no such run, or it has not finished.
        SettingsError: When the recorded surrogate cannot be built, or its package is not trusted.
    """
    with understood(StoreError, f"the record in {run_dir}", hint=_HINT):
        return _load(run_dir, problem=problem, surrogate=surrogate, refit=refit, trust=trust)


def _load(
    run_dir: str | Path,
    *,
    problem: Problem | None,
    surrogate: Surrogate | None,
    refit: bool,
    trust: Trust,
) -> NestedResult:
    state, space = load_state(run_dir)
    events = list(JsonlStore.open(Path(run_dir)).read())
    created = state.created
    if not is_nested(dict(created)):
        raise StoreError(
            f"the run in {run_dir} is not nested", hint="read it with map_bo.load_result"
        )
    for event in events:
        check_nested_event(event)
    flat = Result.of(state, space, problem=problem, run_dir=Path(run_dir))
    try:
        tree = Group.of(next(e.data["tree"] for e in events if e.kind == "planned"))
        records = tuple(_record(node) for node in flat.summary["nested"]["nodes"])
        result = NestedResult(**vars(flat), tree=tree, nodes=records)
        promote = modernise(created["nested"], {"promote": None})["promote"]
        if promote == "point" and not created["nested"]["refine"]:
            choices = tuple(result.point(i) for i in range(len(result.front)))
            return dataclasses.replace(result, choices=choices)
        if refit and surrogate is None:
            surrogate = recorded_surrogate(created, trust=trust)
        if surrogate is None:
            return result
        key = "refine" if created["nested"]["refine"] else "root"
        own = list(NodeStore(key, lambda event: None, events).read())
        about = own[0].data
        directions = torch.tensor(about["problem"]["directions"], dtype=torch.float64)
        node_space = CoefficientSpace.from_description(about["space"])
        metrics = tuple(decode_metric(metric) for metric in about["metrics"])
        node_state = replay(own, metrics, node_space.d)
    except (StopIteration, *UNREADABLE) as error:
        raise StoreError(
            f"the record in {run_dir} cannot be read as that of a nested run: {error!r}",
            hint=_HINT,
        ) from error
    if name_of(about["settings"]["surrogate"]) == "Informed":
        ledger = Ledger(state.metrics, before=events)
        columns = directions.abs().sum(0) > 0
        names = [metric.name for metric in metrics]
        known = ledger.about(names, columns, before=_measured_before(events, key))
        surrogate = Informed(surrogate, subspace(space, columns), directions[:, columns], known)
    surrogate = as_in_run(surrogate, about)
    again = fit_again(node_state, node_space, surrogate) if flat.is_corrected else None
    root = dataclasses.replace(
        Result.of(node_state, node_space, problem=None),
        model=surrogate.fit(node_state.seen, node_space),
        refitted=None if again is None else again.model,
    )
    return dataclasses.replace(result, root=root, directions=directions)


def _measured_before(events: Sequence[Event], key: str) -> int:
    """Return how many points had been measured when a node began."""
    found = next(e.data for e in events if e.kind == "found" and e.data["node"] == key)
    return int(found["measured"])


def _record(node: dict[str, Any]) -> NodeRecord:
    return NodeRecord(
        name=node["node"],
        label=node["label"],
        stage=node["stage"],
        tasks=node["tasks"],
        coefficients=node["coefficients"],
        evaluations=node["evaluations"],
        data_sets=node["data_sets"],
        promoted=tuple(node["handed"]),
    )
