"""The protocol of run stores: append-only events, the single source of truth of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

__all__ = ["Event", "RunStore"]


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
