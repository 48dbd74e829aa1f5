"""The record of a nested run: one store, which also holds the events of all of its nodes.

:class:`Record` writes the events of the whole run; :class:`NodeStore` is the run store that a node
sees, whose events are kept in the same record under the name of the node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

from map_bo.errors import StoreError
from map_bo.loop.growth import (
    changed_settings,
    created_in_force,
    refuse_nested_changes,
    with_changes,
)
from map_bo.loop.identity import refuse_another
from map_bo.loop.result import Result
from map_bo.loop.state import check_created
from map_bo.loop.summary import versions
from map_bo.nested.ledger import MEASURED, Ledger
from map_bo.nested.tree import NodePath
from map_bo.tracking.store import Event, RunStore
from map_bo.tracking.tracker import Tracker, Trackers

__all__ = ["NODE", "NodeStore", "Record", "check_nested_event"]

NODE = "node"
"""Kind of the events that hold an event of a node: ``node`` (its key), ``kind`` and ``data``."""


_HELD: Mapping[str, Mapping[str, type]] = {
    NODE: {"node": str, "kind": str, "data": Mapping},
    "measured": {"names": list, "observation": Mapping},
    "planned": {"tree": list},
    "found": {"node": str, "free": int, "measured": int},
    "begun": {"node": str, "spent": int, "evaluations": int},
    "handed": {"node": str, "parts": list},
    "done": {"node": str, "data_sets": int, "evaluations": int},
    "seeds": {"points": list},
    "space": {"space": Mapping},
}
"""Kind of an event that only nested runs have -> its data and their types."""


def check_nested_event(event: Event) -> None:
    """Refuse an event of a nested run that does not hold what its kind promises.

    Raises:
        StoreError: When a part is missing or of another type.
    """
    for name, kind in _HELD.get(event.kind, {}).items():
        value = event.data.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise StoreError(
                f"an event {event.kind!r} of the record holds {name} = {str(value)[:40]!r}, which "
                f"is not a {kind.__name__}",
                hint="see `map-bo check RUN`; if it was edited by hand, restore it from a copy",
            )


class NodeStore:
    """A run store whose events are written into another record, under the name of a node.

    Args:
        key: Name of the node's run.
        append: Adds an event to the record of the nested run, durably.
        before: The events that the record already holds.
    """

    def __init__(self, key: str, append: Callable[[Event], None], before: Iterable[Event]) -> None:
        self._key, self._append = key, append
        self._events = [
            Event(event.data["kind"], event.data["data"], event.time)
            for event in before
            if event.kind == NODE and event.data.get("node") == key
        ]

    def append(self, event: Event) -> None:
        """Add one event durably; see :class:`map_bo.tracking.store.RunStore`."""
        own = deepcopy(dict(event.data))  # the caller may change its own afterwards
        self._append(Event(NODE, {"node": self._key, "kind": event.kind, "data": own}, event.time))
        self._events.append(Event(event.kind, own, event.time))

    def read(self) -> Iterator[Event]:
        """Yield all events of the node in order."""
        return iter(tuple(self._events))


class Record:
    """Writes events, and finds them again when a run is resumed.

    Args:
        store: Where events go.
        identity: Plain data that is equal for two runs exactly when they are the same run.
        config: Extra plain data to record.
        tracker: Receives every event, those of the store first.

    Raises:
        StoreError: When the store holds another run.
    """

    ledger: Ledger

    def __init__(
        self,
        store: RunStore,
        identity: Mapping[str, Any],
        *,
        config: Mapping[str, Any] | None = None,
        tracker: Tracker | None = None,
    ) -> None:
        self.store = store
        self._trackers = Trackers([] if tracker is None else [tracker])
        self._events: list[Event] = []
        before = list(store.read())
        if not before:
            self._record("created", **identity, versions=versions(), config=config)
            return
        if before[0].kind != "created":
            raise StoreError(
                f"the record does not begin with a run but with {before[0].kind!r}",
                hint="see `map-bo check RUN`",
            )
        check_created(before[0].data)
        created = created_in_force(before) or {}
        changes = changed_settings(created.get("settings", {}), identity["settings"])
        refuse_another(with_changes(created, changes), identity)
        refuse_nested_changes(changes)
        for event in before:
            check_nested_event(event)
            self._events.append(event)
            self._trackers.observe(event)
        if changes:
            self.extend(settings=changes)

    def extend(
        self,
        *,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        config: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Record that settings or the recorded configuration are others from now on.

        Args:
            settings: Name -> ``from`` and ``to``; see :mod:`map_bo.tracking.extension`.
            config: Key -> the same.
        """
        told = {"settings": dict(settings or {}), "config": dict(config or {})}
        self._record("extended", **told, reopens=False)

    @property
    def spent(self) -> int:
        """Measurements of one metric at one point so far."""
        return self.ledger.spent

    def _append(self, event: Event) -> None:
        self.store.append(event)
        self._events.append(event)
        self._trackers.observe(event)

    def _record(self, kind: str, **data: Any) -> None:
        self._append(Event(kind, data))

    def _recorded(self, kind: str, node: str | None = None) -> Mapping[str, Any] | None:
        for event in self._events:
            if event.kind == kind and event.data.get("node") == node:
                return event.data
        return None

    def _begin(
        self, name: str, allocate: Callable[[NodePath, int], int], path: NodePath
    ) -> Mapping[str, Any]:
        """Return the recorded start of a node: its evaluations; allocate them at its turn."""
        begun = self._recorded("begun", name)
        spent = self.spent if begun is None else int(begun["spent"])
        evaluations = allocate(path, spent)
        if begun is None:
            self._record("begun", node=name, spent=spent, evaluations=evaluations)
            begun = self._recorded("begun", name)
        assert begun is not None
        return begun

    def _finish(
        self, name: str, results: Sequence[Result], begun: Mapping[str, Any], *, alone: bool = True
    ) -> None:
        """Record the cost of a node, which may have run ``alone`` or beside others."""
        if self._recorded("done", name) is None:
            count = sum(len(result.seen) + len(result.verification) for result in results)
            shared = any(event.data.get("by") for event in self._events if event.kind == MEASURED)
            spent = self.spent - int(begun["spent"])
            if shared or not alone:
                spent = self._spent_by(name)
            self._record(
                "done",
                node=name,
                data_sets=spent,
                evaluations=count,
                measured=self.ledger.measured,
            )

    def _spent_by(self, node: str) -> int:
        """Return the data sets that a node has measured, also where others ran beside it.

        What was measured in the driver's process does not name its node: it is of the one that
        began an evaluation last.
        """
        total, last = 0, ""
        for event in self._events:
            if event.kind == NODE and event.data["kind"] == "started":
                last = event.data["node"]
            elif event.kind == MEASURED:
                by = event.data.get("by") or event.data.get("node") or last
                total += len(event.data["names"]) * (by.partition("@")[0] == node)
        return total
