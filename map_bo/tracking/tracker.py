"""The protocol of trackers: mirrors of a run's events for people; nothing reads them back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Protocol, runtime_checkable

from map_bo.tracking.store import Event

__all__ = ["Tracker", "Trackers", "Tracking"]

logger = logging.getLogger(__name__)


@runtime_checkable
class Tracker(Protocol):
    """Receives every event of a run after it has been recorded."""

    def observe(self, event: Event) -> None:
        """Take the next event of the record.

        Every process that works on a run sends the whole record from ``created`` on, so events that
        another process has sent before come again, in the same order.
        """
        ...

    def finish(self, *, whole: bool) -> None:
        """End the tracking in this process; no event follows.

        Args:
            whole: Whether the run has finished; False when it was interrupted.
        """
        ...


@runtime_checkable
class Tracking(Protocol):
    """Settings of a tracker."""

    def open(self, directory: Path | None) -> Tracker:
        """Return a tracker of the run in ``directory``; None is a run that is kept in memory."""
        ...


class Trackers:
    """Several trackers as one that never raises: a tracker that fails is logged and removed.

    As a context it finishes them at the end of the block, as whole unless the block raised.

    Args:
        parts: The trackers, in the order in which they receive events; may be empty.
    """

    def __init__(self, parts: Iterable[Tracker] = ()) -> None:
        self._parts = list(parts)

    def observe(self, event: Event) -> None:
        """See :class:`Tracker`."""
        self._each(lambda tracker: tracker.observe(event))

    def finish(self, *, whole: bool) -> None:
        """See :class:`Tracker`."""
        self._each(lambda tracker: tracker.finish(whole=whole))
        self._parts = []

    def _each(self, send: Callable[[Tracker], None]) -> None:
        for tracker in list(self._parts):
            try:
                send(tracker)
            except Exception as error:
                self._parts.remove(tracker)
                logger.warning(
                    "the tracker %s failed and is removed; the run and its record go on: %s: %s",
                    type(tracker).__name__,
                    type(error).__name__,
                    error,
                )

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.finish(whole=kind is None)
