"""The record of a node, kept in the one record of its nested run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy

from map_bo.tracking.store import Event

__all__ = ["NODE", "NodeStore"]

NODE = "node"
"""Kind of the events that hold an event of a node: ``node`` (its key), ``kind`` and ``data``."""


class NodeStore:
    """A run store whose events are written into another record, under the name of a node.

    Args:
        key: Name of the node's run.
        append: Adds an event to the record of the nested run, durably.
        before: The events that record holds already.
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
        own = deepcopy(dict(event.data))  # the caller's may change afterwards
        self._append(Event(NODE, {"node": self._key, "kind": event.kind, "data": own}, event.time))
        self._events.append(Event(event.kind, own, event.time))

    def read(self) -> Iterator[Event]:
        """Yield all events of the node in their order."""
        return iter(tuple(self._events))
