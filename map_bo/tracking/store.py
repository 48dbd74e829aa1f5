"""The protocol of run stores: append-only events, the single source of truth of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

__all__ = ["Event", "RunStore", "SharedStore"]


@dataclass(frozen=True)
class Event:
    """Something that happened in a run.

    Attributes:
        kind: ``created``, ``proposed``, ``observed``, ``front``, ``verified``, ``finished`` ...
        data: Plain JSON data; floats keep all their digits, NaN and infinity included.
        time: Seconds since the epoch, for the reader; no decision depends on it.
    """

    kind: str
    data: Mapping[str, Any]
    time: float = field(default_factory=time.time)

    @property
    def subject(self) -> str:
        """The kind, or that of the event of a node of a nested run, which it holds."""
        inner = self.data.get("kind") if self.kind == "node" else None
        return inner if isinstance(inner, str) else self.kind


@runtime_checkable
class RunStore(Protocol):
    """Append-only events: when ``append`` returns, the event survives a kill or a power loss."""

    def append(self, event: Event) -> None:
        """Add one event durably.

        Raises:
            StoreError: When it cannot be written (disk full, read-only); earlier events are kept.
        """
        ...

    def read(self) -> Iterator[Event]:
        """Yield all events in the order they were appended."""
        ...


@runtime_checkable
class SharedStore(RunStore, Protocol):
    """A store that several handles and processes write to, one at a time."""

    def turn(self) -> AbstractContextManager[None]:
        """Return a context in which nobody else writes, after waiting for whoever does.

        Raises:
            StoreError: When another process is driving the run, or the turn does not come.
        """
        ...

    def lock(self) -> AbstractContextManager[None]:
        """Return a context for driving the run, in which other processes do not wait for a turn.

        Raises:
            StoreError: Immediately, when another process drives the run.
        """
        ...

    def after(self, count: int) -> list[Event]:
        """Return the events after the first ``count``; to be called in a turn."""
        ...
