"""Results that the pieces of one tensor share, made by the first thread that wants one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

__all__ = ["KEPT", "SharedResults"]

KEPT = 8
"""How many are kept: threads are at neighbouring tensors."""

T = TypeVar("T")


class SharedResults(Generic[T]):
    """The last few results, each made once: other threads that want it wait for it.

    Args:
        kept: How many.
    """

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._found: dict[tuple[float, ...], Future[T]] = {}
        self._lock = threading.Lock()

    def get(self, key: tuple[float, ...], make: Callable[[], T]) -> T:
        """Return what ``make`` returned for a key, now or before; what it raises is not kept."""
        with self._lock:
            future = self._found.get(key)
            mine = future is None
            if future is None:
                future = self._found[key] = Future()
                while len(self._found) > self._kept:
                    self._found.pop(next(iter(self._found)))
        if mine:
            try:
                future.set_result(make())
            except BaseException as error:
                with self._lock:
                    self._found.pop(key, None)
                future.set_exception(error)
        return future.result()
