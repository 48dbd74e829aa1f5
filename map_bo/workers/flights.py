"""Tasks that are being evaluated: launched by one or several runs, and landing in any order."""

from __future__ import annotations

import math
import queue
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from map_bo.data import Observations
from map_bo.errors import WorkersError
from map_bo.workers.workers import DescribesWorkers, Outcome, Settled, Task, Workers

__all__ = ["Flights"]


@dataclass(frozen=True)
class _Flight:
    owner: object
    task: Task


class Flights:
    """What is in flight on workers that several runs may share.

    A few tasks more than there are workers may be in flight, so that none is idle while the next
    proposal is made; see :meth:`look_ahead`.

    Args:
        workers: Who evaluates.
    """

    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self._flights: dict[Future[Outcome], _Flight] = {}
        self._landed: queue.SimpleQueue[Future[Outcome]] = queue.SimpleQueue()
        self._settled: dict[object, list[Settled]] = {}
        self._begun = time.monotonic()
        self._busy = self._count = 0.0
        self._ahead = 0
        self._broken: Exception | None = None
        self.sharing = 1
        """How many runs share the workers now: each may use its part of them."""

    def free_for(self, owner: object) -> int:
        """Return how many more tasks an owner can launch now."""
        mine = len(self.of(owner)) + len(self._settled.get(owner, ()))
        part = math.ceil((self.workers.size + self._ahead) / self.sharing)
        return max(0, min(self.free, part - mine))

    @property
    def free(self) -> int:
        """How many more tasks can be launched now; none where the workers are broken."""
        if self._broken is not None:
            return 0
        waiting = sum(map(len, self._settled.values()))
        return max(0, self.workers.size + self._ahead - len(self._flights) - waiting)

    def look_ahead(self, proposing: float) -> None:
        """Let some tasks wait at the workers while proposals take so long.

        As many as end during one proposal, at most one for each worker. Where evaluations take much
        longer than proposals, as real ones do, that is none: each proposal then knows as much
        as it can.

        Args:
            proposing: Seconds that the last proposal took.
        """
        size = self.workers.size
        if self.workers.local or not self._count:
            return
        mean = max(self._busy / self._count, 1e-9)
        self._ahead = min(size, round(proposing * size / mean))

    def of(self, owner: object) -> list[Task]:
        """Return the tasks of an owner that are in flight."""
        return [flight.task for flight in self._flights.values() if flight.owner is owner]

    def launch(self, owner: object, task: Task) -> None:
        """Submit a task; what ends the run passes through where the driver evaluates itself."""
        future = self.workers.submit(task)
        self._flights[future] = _Flight(owner, task)
        future.add_done_callback(self._landed.put)

    def landed(self, owner: object) -> list[Settled]:
        """Return an owner's tasks that have ended, in the order in which they did.

        Raises:
            MapBoError: What a worker raised because every further evaluation would fail as well,
                once nothing else has landed.
        """
        self._collect()
        found = self._settled.pop(owner, [])
        if not found and self._broken is not None:
            raise self._broken
        return found

    def wait(self, seconds: float) -> bool:
        """Wait until a task ends, at most so long; return whether one has."""
        if self._settled or not self._flights or self._broken is not None:
            return True
        try:
            self._land(self._landed.get(timeout=seconds))
        except queue.Empty:
            return False
        return True

    def _collect(self) -> None:
        while True:
            try:
                future = self._landed.get_nowait()
            except queue.Empty:
                return
            self._land(future)

    def _land(self, future: Future[Outcome]) -> None:
        flight = self._flights.pop(future, None)
        if flight is None:  # a doubled result of what has ended already
            return
        try:
            outcome = _result(future, flight.task)
        except Exception as error:
            self._broken = self._broken or error
            return
        cost = float(outcome.observations.cost.nan_to_num().sum())
        self._busy, self._count = self._busy + cost, self._count + 1
        self._settled.setdefault(flight.owner, []).append(Settled(flight.task, outcome))

    def running(self) -> Sequence[tuple[str, Task, float]]:
        """Return which worker evaluates what, and for how many seconds."""
        return self.workers.running()

    @property
    def queued(self) -> int:
        """How many tasks wait for a worker."""
        return max(0, len(self._flights) - self.workers.size)

    @property
    def utilisation(self) -> float:
        """Share of the workers' time, since this was made, that was spent on evaluations."""
        passed = time.monotonic() - self._begun
        return min(1.0, self._busy / max(passed * self.workers.size, 1e-9))

    @property
    def measured(self) -> int:
        """How many tasks have ended."""
        return int(self._count)

    def describe(self) -> dict[str, Any]:
        """Return what a summary says of the workers; nothing of the driver's own process."""
        workers = self.workers
        if workers.local:
            return {}
        told = dict(workers.describe()) if isinstance(workers, DescribesWorkers) else {}
        used = {
            "count": workers.size,
            "evaluations": self.measured,
            "utilisation": round(self.utilisation, 4),
        }
        return {"workers": {**told, **used}}


def _result(future: Future[Outcome], task: Task) -> Outcome:
    if future.cancelled():
        raise WorkersError(
            f"{task.words} was cancelled by the workers",
            hint="resume the run; nothing that was measured is lost",
        )
    outcome = future.result()
    if not isinstance(outcome.observations, Observations) or outcome.key != task.key:
        raise WorkersError(
            f"a worker returned the outcome of another task for {task.words}",
            hint="workers evaluate what they are given: see to the executor",
        )
    return outcome
