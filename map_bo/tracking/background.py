"""A tracker in a thread of its own, so that it can neither stop nor slow the run."""

from __future__ import annotations

import logging
import queue
import threading
from typing import TypeAlias

from map_bo.tracking.store import Event
from map_bo.tracking.tracker import Tracker

__all__ = ["Background"]

logger = logging.getLogger(__name__)

_Item: TypeAlias = "Event | bool"  # a bool is the end: whether the run is whole

_SOON = 5.0
"""Seconds to wait for a tracker when the run broke off: someone may be holding Ctrl-C."""


class Background:
    """Tells another tracker from a thread; whatever goes wrong there is told once, as a warning.

    The queue in between is bounded. A tracker that lags behind by all of it hangs, and is given
    up, as is one that fails: the record of the run is complete without it.

    Args:
        inner: The tracker, used from the thread alone.
        name: What to call it in warnings.
        patience: Seconds to wait for it at the end of a run.
        room: Events that may wait in the queue.
    """

    def __init__(
        self, inner: Tracker, *, name: str, patience: float = 60.0, room: int = 10_000
    ) -> None:
        self._inner, self._name, self._patience = inner, name, patience
        self._queue: queue.Queue[_Item] = queue.Queue(room)
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)

    def observe(self, event: Event) -> None:
        """See :class:`Tracker`; it returns at once and raises nothing."""
        if self._thread.ident is None:
            self._thread.start()
        self._put(event)

    def finish(self, *, whole: bool) -> None:
        """Wait until the tracker has taken everything, but no longer than the patience."""
        if self._lost.is_set() or not self._thread.is_alive():
            return
        self._put(whole)
        self._thread.join(self._patience if whole else min(self._patience, _SOON))
        if self._thread.is_alive():
            self._give_up("it did not end in time")

    def _put(self, item: _Item) -> None:
        if self._lost.is_set():
            return
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._give_up(f"it lags behind by {self._queue.maxsize} events")

    def _work(self) -> None:
        try:
            while not self._lost.is_set():
                item = self._queue.get()
                if isinstance(item, bool):
                    self._inner.finish(whole=item)
                    return
                self._inner.observe(item)
        except BaseException as error:
            self._give_up(f"{type(error).__name__}: {error}")

    def _give_up(self, reason: str) -> None:
        if not self._lost.is_set():
            self._lost.set()
            logger.warning(
                "%s is given up for this session; the run and its record go on: %s",
                self._name,
                reason,
            )
