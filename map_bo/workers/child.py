"""What a worker process does: it gets ready, evaluates what it is sent, and ends with its driver.

Nothing heavy is imported before the process has its device and its number of threads, which the
libraries read when they are loaded.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from map_bo.errors import MapBoError
    from map_bo.workers.resident import Resident

__all__ = ["Place", "Ready", "ask_for_signal", "begin", "end_with", "evaluate", "ready"]

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LOOK = 1.0  # seconds between two looks at the parent, where the system sends no signal
_THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


@dataclass(frozen=True)
class Place:
    """Where and with what a worker is; plain data.

    Attributes:
        recipe: A pickled :class:`~map_bo.workers.recipe.Recipe`.
        expected: By what the driver's problem is recognised.
        threads: Threads of torch and of the libraries under it.
        device: What the problem is put on, as the worker calls it; None leaves it where it is.
        label: What the driver calls that device.
        environment: Variables that are set before anything is imported.
        sharing: How many workers share the device.
        mapped: Whether to share rows with other workers.
        memory: Most bytes of its own that it may take; None for no limit.
        log: File that takes what is printed; None for the driver's standard error.
        driver: Process id of the driver.
    """

    recipe: bytes
    expected: Mapping[str, str]
    threads: int
    device: str | None = None
    label: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    sharing: int = 1
    mapped: bool = True
    memory: int | None = None
    log: str | None = None
    driver: int = 0


@dataclass(frozen=True)
class Ready:
    """A worker that is ready: its name."""

    name: str


@dataclass
class _Here:
    """What this process holds once it has begun: the one place for it, as a pool has no other."""

    resident: Resident | None = None
    error: MapBoError | None = None


_here = _Here()


def begin(place: Place) -> None:
    """Get this process ready: what goes wrong is kept, and told by :func:`ready`."""
    end_with(place.driver)
    os.environ.update(place.environment)
    os.environ.update(dict.fromkeys(_THREADS, str(place.threads)))
    _redirect(place.log)
    from map_bo.errors import MapBoError, WorkersError, first_line

    try:
        _limit_memory(place.memory)
        import torch

        torch.set_num_threads(place.threads)
        from map_bo.workers.resident import Resident

        _here.resident = Resident.build(
            pickle.loads(place.recipe),
            expected=place.expected,
            device=place.device,
            label=place.label,
            sharing=place.sharing,
            mapped=place.mapped,
        )
    except MapBoError as error:
        _here.error = error
    except Exception as error:  # whatever the user's own modules raise
        _here.error = WorkersError(
            f"a worker cannot get ready: {type(error).__name__}: {first_line(error)}",
            hint="workers need the same modules, files and memory as the driver",
        )


def ready() -> bytes:
    """Return a pickled :class:`Ready`, or the error that kept this process from it."""
    assert _here.resident is not None or _here.error is not None
    return pickle.dumps(Ready(_here.resident.name) if _here.resident else _here.error)


def evaluate(task: bytes) -> bytes:
    """Evaluate a pickled task; return its pickled outcome, or the error that ends the run.

    They are pickled here, as tensors would otherwise travel as handles of this process, which
    may end.
    """
    from map_bo.data import Observations
    from map_bo.errors import MapBoError
    from map_bo.workers.workers import Outcome

    given = pickle.loads(task)
    resident = _here.resident
    assert resident is not None
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whatever an evaluator has made of it
    found: Any
    try:
        found = resident.evaluate(given)
    except MapBoError as error:
        found = error
    except BaseException as error:  # such as a KeyboardInterrupt that an evaluator raises itself
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        row = given.point.unsqueeze(0)
        metrics = resident.metrics(given)
        found = Outcome(given.key, Observations.failed(row, metrics, reason), resident.name)
    return pickle.dumps(found)


def end_with(driver: int, poll: float = _LOOK) -> None:
    """End this process when the driver does, however that ends.

    On Linux the system kills it at once, also while it hangs; elsewhere a thread looks.

    Args:
        driver: Its process id.
        poll: Seconds between two looks.
    """
    if driver != os.getppid():
        os._exit(1)  # the driver has ended already
    ask_for_signal(signal.SIGKILL)
    threading.Thread(target=_watch, args=(driver, poll), daemon=True).start()


def ask_for_signal(number: int) -> None:
    """Ask the system to send this process a signal when its parent ends; on Linux alone."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)


def _watch(driver: int, poll: float) -> None:
    while os.getppid() == driver:
        time.sleep(poll)
    os._exit(1)


def _redirect(log: str | None) -> None:
    """Let what this process and its children print go to a file, or else to standard error.

    Standard output is the driver's, and may be read by another program.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if log is not None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 2)
        os.close(file)
    with suppress(OSError):
        os.dup2(2, 1)


def _limit_memory(most: int | None) -> None:
    if most is None:
        return
    import resource

    # Of memory that is its own alone: mapped files and what a GPU's driver reserves do not count.
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
