"""Trackers: mirrors of a run's events for people to look at. Nothing reads them back."""

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
    """Is told everything that a run records, after it has been recorded."""

    def observe(self, event: Event) -> None:
        """Take the next event of the record.

        Every process that works on a run tells it the whole record from ``created`` on, so what
        another process has told before comes again, in the same order.
        """
        ...

    def finish(self, *, whole: bool) -> None:
        """Nothing follows in this process.

        Args:
            whole: Whether the run has come to its end; False when it broke off.
        """
        ...


@runtime_checkable
class Tracking(Protocol):
    """Settings of a tracker."""

    def open(self, directory: Path | None) -> Tracker:
        """Return a tracker of the run in ``directory``, or of one that is kept in memory."""
        ...


class Trackers:
    """Several trackers as one, which the run cannot feel: what fails is told once and left out.

    As a context it finishes them at the end of the block, whole unless the block raised.

    Args:
        parts: The trackers, in the order in which they are told; none is allowed.
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

    def _each(self, tell: Callable[[Tracker], None]) -> None:
        for tracker in list(self._parts):
            try:
                tell(tracker)
            except Exception as error:
                self._parts.remove(tracker)
                logger.warning(
                    "the tracker %s failed and is left out; the run and its record go on: %s: %s",
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
