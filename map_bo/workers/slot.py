"""One worker that is a process: its pool of pebble's, what it evaluates, and how it comes back.

pebble notices processes that die and kills those that exceed their limit. What it has no word for
is seen to here: a process that leaves with exit code 0, one that does not even take its task, and
the pool itself, which breaks when a process dies that evaluates nothing.
"""

from __future__ import annotations

import logging
import pickle
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from pebble import ProcessExpired, ProcessPool

from map_bo.data import Metric, Observations
from map_bo.errors import MapBoError, WorkersError
from map_bo.workers.child import Place, Ready, WithoutScript, begin, evaluate, ready
from map_bo.workers.workers import Outcome, Task

__all__ = ["Slot", "settle"]

logger = logging.getLogger(__name__)

_SETTLE = 0.5  # seconds in which the pool itself may tell of a process that has ended
_GRACE = 1.0  # seconds after its limit in which an evaluation may end by itself
_ENDING = 1.0  # seconds that a process has to end when it is asked to
_STARTS = 3  # attempts to put a new process in the place of one that has died


class _Context(SpawnContext):
    """Starts the processes of one pool, and knows the latest of them.

    Args:
        script: Whether they import the driver's script, whose functions they need. Otherwise it
            needs no ``if __name__ == "__main__"``.
    """

    def __init__(self, *, script: bool) -> None:
        super().__init__()
        self._kind: type[BaseProcess] = SpawnProcess if script else WithoutScript
        self.started: list[BaseProcess] = []

    def Process(self, *args: Any, **kwargs: Any) -> BaseProcess:  # type: ignore[override]
        process = self._kind(*args, **kwargs)
        self.started.append(process)
        return process

    @property
    def latest(self) -> BaseProcess | None:
        """The process that was started last."""
        return self.started[-1] if self.started else None


@dataclass(eq=False)
class _Flight:
    """What a worker is evaluating: the task, our promise, and the pool's."""

    task: Task
    future: Future[Outcome]
    inner: Future[bytes]
    process: BaseProcess | None
    begun: float
    gone: float | None = None  # when its process was first seen to have ended
    overdue: bool = False  # whether it was killed here for its limit


class Slot:
    """One worker: its pool, and what it does."""

    def __init__(
        self, number: int, place: Place, *, script: bool, wake: Callable[[], None]
    ) -> None:
        self.place = place
        self.name = f"worker {number}"
        self.flight: _Flight | None = None
        self.idle = False
        self.broken: MapBoError | None = None
        self._script = script
        self._was_ready = False
        self._attempts = 0  # to get ready, since it was ready last
        self._processes = 0  # of the pool, when it is ready
        self._ready: Future[bytes] | None = None
        self._ending: list[threading.Thread] = []
        self._wake = wake
        self.context, self.pool = self._made()

    def _made(self) -> tuple[_Context, ProcessPool]:
        context = _Context(script=self._script)
        pool = ProcessPool(
            max_workers=1, initializer=begin, initargs=(self.place,), context=context
        )
        return context, pool

    @property
    def process_id(self) -> int | None:
        """The id of its process; None where there is none just now."""
        latest = self.context.latest
        return latest.pid if latest is not None and _alive(latest) else None

    def start(self) -> None:
        """Start the process; in a thread that lives as long as it, or the system ends it."""
        self._expect()

    def _expect(self) -> None:
        """Expect the pool's process to get ready."""
        self.idle, self._attempts = False, self._attempts + 1
        latest = self.context.latest
        coming = latest is None or not _alive(latest)
        self._processes = len(self.context.started) + coming
        self._ready = self.pool.schedule(ready)
        self._ready.add_done_callback(lambda _: self._wake())

    def launch(self, task: Task, future: Future[Outcome]) -> bool:
        """Let the process evaluate a task; return whether it was taken."""
        limit = None if task.timeout is None else _hard_limit(task.timeout)
        self.idle = False
        try:
            inner = self.pool.schedule(evaluate, args=(pickle.dumps(task),), timeout=limit)
        except RuntimeError:  # the idle process has died just now, and the pool broke
            self._again()
            return False
        self.flight = _Flight(task, future, inner, self.context.latest, time.monotonic())
        inner.add_done_callback(lambda _: self._wake())
        return True

    def look(self, metrics: Sequence[Metric]) -> None:
        """See whether the process has become ready, has ended its task, or has died."""
        if self.broken is not None:
            return
        if self._ready is not None:
            self._look_at_start(self._ready)
        elif self.flight is not None:
            self._look_at_flight(self.flight, metrics)
        elif self.idle and not _alive(self.context.latest):
            logger.warning("%s %s while it was idle", self.name, _words(self.context.latest))
            self._again()

    def _look_at_start(self, waiting: Future[bytes]) -> None:
        if not waiting.done():
            if len(self.context.started) > self._processes:  # it left, and the pool began anew
                self._fail(_lost_at_start(self.context.started[-2], self.place))
            return
        self._ready = None
        try:
            found = pickle.loads(waiting.result())
        except (Exception, CancelledError):
            error = _lost_at_start(self.context.latest, self.place)
            if self._was_ready and self._attempts < _STARTS:
                logger.warning("%s; it is started again", error.message)
                self._again()
            else:
                self._fail(error)
            return
        if isinstance(found, MapBoError):
            self._fail(_at_worker(found))
            return
        assert isinstance(found, Ready)
        self.name, self.idle, self._attempts, self._was_ready = found.name, True, 0, True

    def _look_at_flight(self, flight: _Flight, metrics: Sequence[Metric]) -> None:
        if not flight.inner.done():
            if not self._is_lost(flight):
                return
            flight.inner.cancel()
        self.flight = None
        try:
            found = pickle.loads(flight.inner.result(timeout=0))
        except (Exception, CancelledError) as error:
            limit = flight.task.timeout
            if limit is not None and (flight.overdue or isinstance(error, TimeoutError)):
                reason = f"it took longer than {limit:g} s, and its worker was killed"
            elif isinstance(error, ProcessExpired | BrokenProcessPool | CancelledError):
                reason = f"the worker {_words(flight.process)}"
            else:
                reason = f"the worker was lost: {error}"
            self._land(flight, metrics, reason, lost=not reason.startswith("it took"))
        else:
            self.idle = True
            if isinstance(found, MapBoError):
                settle(flight.future, error=found)
            else:
                settle(flight.future, found)

    def _is_lost(self, flight: _Flight) -> bool:
        """Return whether a process has ended without a word of the pool, or outlived its limit."""
        now = time.monotonic()
        if not _alive(flight.process):
            flight.gone = flight.gone or now
            return now - flight.gone > _SETTLE
        limit = flight.task.timeout
        if limit is not None and now - flight.begun > _hard_limit(limit) + 4 * _ENDING:
            flight.overdue = True
            _kill(flight.process)  # it has ended by the next look
        return False

    def _land(self, flight: _Flight, metrics: Sequence[Metric], reason: str, *, lost: bool) -> None:
        names = flight.task.metrics
        of = {metric.name: metric for metric in metrics}
        kept = tuple(metrics) if names is None else tuple(of[name] for name in names)
        seconds = time.monotonic() - flight.begun
        row = Observations.failed(flight.task.point.unsqueeze(0), kept, reason)
        row = replace(row, cost=torch.tensor([seconds], dtype=torch.float64))
        settle(flight.future, Outcome(flight.task.key, row, self.name, lost))
        self._again()

    def _again(self) -> None:
        """Expect a new process: the pool's own, or one of a new pool where that has broken."""
        with suppress(RuntimeError):  # of a pool that breaks just now
            if self.pool.active:
                self._expect()
                return
        self._end_soon()
        self.context, self.pool = self._made()
        self._expect()

    def _fail(self, error: MapBoError) -> None:
        self.broken, self.idle, self._ready = error, False, None
        if self._was_ready:
            logger.warning("%s is given up: %s", self.name, error.reason)
        self._end_soon()

    def _end_soon(self) -> None:
        thread = threading.Thread(target=partial(_end, self.pool, self.context), daemon=True)
        self._ending.append(thread)
        thread.start()

    def end(self) -> None:
        """End the process: asked first, and then killed."""
        self.idle = False
        if self.broken is None:
            self._end_soon()
        for thread in self._ending:
            thread.join()


def _hard_limit(seconds: float) -> float:
    """Return after how many seconds a worker is killed that does not heed its limit."""
    return seconds + max(_GRACE, 0.02 * seconds)


def settle(
    future: Future[Outcome], outcome: Outcome | None = None, error: MapBoError | None = None
) -> None:
    """Keep the promise of an outcome, or break it with an error; once."""
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        assert outcome is not None
        future.set_result(outcome)


def _alive(process: BaseProcess | None) -> bool:
    if process is None:
        return True  # it has not been started yet
    try:
        return process.is_alive()
    except (ValueError, AssertionError):  # closed, or not of this process
        return False


def _kill(process: BaseProcess | None) -> None:
    if process is not None and process.pid is not None:
        with suppress(OSError, ValueError, AttributeError):
            process.kill()


def _words(process: BaseProcess | None) -> str:
    """Return what became of a process, as in "died: signal 11 (SIGSEGV)"."""
    code = None if process is None else process.exitcode
    if code is None:
        return "went out of reach"
    if code == signal.SIGTERM:  # pebble's processes leave with its number
        return "was asked to end: signal 15 (SIGTERM)"
    if code >= 0:
        return f"ended with exit code {code}" + ("" if code == 1 else ": it left with os._exit")
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "unknown"
    if name == "SIGKILL":
        return "was killed: signal 9 (SIGKILL); out of memory?"
    return f"died: signal {-code} ({name})"


def _lost_at_start(process: BaseProcess | None, place: Place) -> WorkersError:
    where = "see what it printed to standard error"
    if place.log:  # which goes with the directory of a run that has measured nothing
        said = _last_lines(Path(place.log))
        where = f"it printed last: {said}" if said else f"it printed nothing to {place.log}"
    return WorkersError(
        f"a worker {_words(process)} before it was ready",
        hint=f"{where}; a script whose functions workers need must start the run below "
        '`if __name__ == "__main__":`',
    )


def _last_lines(file: Path, most: int = 400) -> str:
    """Return the end of a text file, on one line."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return " | ".join(text.split("\n")[-6:]).strip(" |")[-most:]


def _at_worker(error: MapBoError) -> MapBoError:
    if isinstance(error, WorkersError):
        return error
    return WorkersError(
        f"the problem cannot be prepared in a worker: {error.message}", hint=error.hint
    )


def _end(pool: ProcessPool, context: _Context) -> None:
    """End a pool and its processes: asked first, and then killed."""
    pool.stop()  # type: ignore[no-untyped-call]
    for process in context.started:
        if _alive(process):
            with suppress(OSError, ValueError, AttributeError):
                process.terminate()
    until = time.monotonic() + _ENDING
    while any(_alive(one) and one.pid for one in context.started) and time.monotonic() < until:
        time.sleep(0.02)
    for process in context.started:
        if _alive(process):
            _kill(process)
    try:
        pool.join()
    except Exception as error:  # of a pool that has broken; its processes have been ended
        logger.debug("a pool did not end in good order: %s", error)
