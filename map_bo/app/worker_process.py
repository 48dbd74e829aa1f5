"""Processes that a launcher starts for the jobs of a sweep: they end when the sweep's process does.

A sweep that is killed cannot stop its workers, which would go on with its jobs, hold their locks,
and keep a GPU. So each worker watches the process that started it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from contextlib import suppress

__all__ = ["announce_sweep", "end_with_parent", "exit_if_orphaned"]

_SWEEP = "MAP_BO_SWEEP_PROCESS"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_GRACE = 10.0  # seconds to record that an evaluation was interrupted

_watched: list[int] = []


def announce_sweep() -> None:
    """Let the processes that this one starts know that they work for it."""
    os.environ[_SWEEP] = str(os.getpid())


def end_with_parent(poll: float = 1.0) -> bool:
    """End this process soon after the sweep's, if that has started it directly.

    It gets SIGTERM, so an evaluation is recorded as interrupted; after some seconds it is ended in
    any case. On Linux the system sends the signal at once; elsewhere, and where that fails, a
    thread looks every ``poll`` seconds.

    Returns:
        Whether it is such a process. Jobs of a cluster, which outlive the command that submitted
        them, are not.
    """
    parent = os.getppid()
    if os.environ.get(_SWEEP) != str(parent):
        return False
    if not _watched:
        _watched.append(parent)
        threading.Thread(target=_watch, args=(parent, poll), daemon=True).start()
        _ask_for_signal()
        exit_if_orphaned()  # it may have died before the signal was asked for
    return True


def exit_if_orphaned() -> None:
    """End this process if its sweep has ended: a pool would start its next job otherwise."""
    if _watched and os.getppid() != _watched[0]:
        os._exit(128 + signal.SIGTERM)


def _ask_for_signal() -> None:
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _watch(parent: int, poll: float) -> None:
    while os.getppid() == parent:
        time.sleep(poll)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE)
    os._exit(128 + signal.SIGTERM)
