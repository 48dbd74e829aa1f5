"""Threads for work that goes chunk by chunk through memory, and memory that they use again.

An operation of torch that is cut over threads waits for the slowest of them at its end. For many
short operations on chunks that fit into a cache it is faster to give each thread chunks of its
own and let torch use one thread within an operation; torch holds no lock while it computes.

Chunks are some megabytes. An allocator gives such memory back to the system when it is freed, and
every new one is then paged in anew, which costs more than the arithmetic on it. So each thread has
an arena, whose memory it uses again for every piece.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import count
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["Empty", "arena", "parallel_for"]

_ALIGNMENT = 64

Empty = Callable[..., Tensor]
"""Makes temporary tensors: ``torch.empty``, or an arena's ``empty``."""

Item = TypeVar("Item")
State = TypeVar("State")

_lock = threading.Lock()
_pools: dict[int, ThreadPoolExecutor] = {}


def parallel_for(
    work: Callable[[Item, State], None],
    items: Sequence[Item],
    state: Callable[[], State],
    *,
    threads: int | None = None,
) -> None:
    """Do ``work(item, state)`` for all items, on as many threads as torch uses.

    Args:
        work: What to do with an item; different items must not write to the same memory.
        items: The items; threads take them in their order.
        state: Makes what one thread needs for itself, such as buffers; called in that thread.
        threads: How many threads; by default those of torch.

    Raises:
        BaseException: What ``work`` raised first; other threads stop after their current item.
    """
    threads = min(threads or torch.get_num_threads(), len(items))
    if not items:
        return
    if threads <= 1:
        with _alone():
            own = state()
            for item in items:
                work(item, own)
        return
    tickets, failed = count(), threading.Event()

    def run(inference: bool) -> None:
        # The modes of the caller are those of its thread alone.
        with torch.inference_mode(inference), torch.no_grad():
            own = state()
            while not failed.is_set():
                ticket = next(tickets)  # one bytecode of C code: no two threads get the same
                if ticket >= len(items):
                    return
                try:
                    work(items[ticket], own)
                except BaseException:
                    failed.set()
                    raise

    pool = _pool(threads)
    inference = torch.is_inference_mode_enabled()
    futures = [pool.submit(run, inference) for _ in range(threads)]
    try:
        wait(futures)
    except BaseException:
        # The caller was interrupted: nothing may be written after it has gone on.
        failed.set()
        wait(futures)
        raise
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise errors[0]


@contextmanager
def _alone() -> Iterator[None]:
    """Let torch use one thread within an operation, as in the threads of a pool.

    So results are the same, to the last digit of a sum, however many threads there are.
    """
    within = torch.get_num_threads()
    if within > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if within > 1:
            torch.set_num_threads(within)


def _pool(threads: int) -> ThreadPoolExecutor:
    with _lock:
        if threads not in _pools:
            within = torch.get_num_threads()
            started = threading.Barrier(threads + 1)

            def begin() -> None:
                # Asked for first, since a thread takes over torch's number when it first needs it.
                torch.get_num_threads()
                torch.set_num_threads(1)  # of this thread alone
                started.wait()

            pool = ThreadPoolExecutor(threads, "map-bo-merge")
            for _ in range(threads):
                pool.submit(begin)
            started.wait()
            # torch also remembers the last number that any thread gave, for threads to come.
            torch.set_num_threads(within)
            _pools[threads] = pool
        return _pools[threads]


def _forget() -> None:
    global _lock
    _lock = threading.Lock()
    _pools.clear()


class Arena(threading.local):
    """Temporary tensors, valid until the next `reset` of the same thread."""

    def __init__(self) -> None:
        self._memory: dict[torch.device, Tensor] = {}
        self._used = 0
        self._wanted = 0

    def reset(self) -> None:
        """Take all tensors back; what they held is lost."""
        self._wanted = max(self._wanted, self._used)
        self._used = 0

    def empty(
        self,
        *shape: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Return an uninitialised tensor, as ``torch.empty`` does."""
        device = torch.device(device)
        needed = math.prod(shape) * dtype.itemsize
        start = self._used
        self._used = start + -(-needed // _ALIGNMENT) * _ALIGNMENT
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)  # its allocator keeps memory
        memory = self._memory.get(device)
        # A tensor made in inference mode could not be used outside it.
        if memory is None or (start == 0 and len(memory) < max(self._wanted, needed)):
            with torch.inference_mode(False):
                size = max(self._wanted, needed, 1)
                memory = self._memory[device] = torch.empty(size, dtype=torch.uint8)
        if self._used > len(memory):
            return torch.empty(shape, dtype=dtype)
        return memory[start : start + needed].view(dtype).view(shape)


arena = Arena()

if hasattr(os, "register_at_fork"):  # threads do not survive in a forked child
    os.register_at_fork(after_in_child=_forget)
