"""Workers whose results come late, in an order that a test chooses."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from map_bo.data import Observations
from map_bo.problems.problem import Problem, select_metrics
from map_bo.rng import make_generator
from map_bo.workers.workers import Outcome, Task

Pick = Callable[[Sequence[Task]], int]
"""Which of the tasks at work ends next."""


def first(tasks: Sequence[Task]) -> int:
    return 0


def last(tasks: Sequence[Task]) -> int:
    return len(tasks) - 1


class LateWorkers:
    """Holds tasks until all workers have one, or nothing comes any more; then ends one of them.

    Args:
        problem: What to evaluate.
        size: How many workers there are.
        pick: Which task ends next.
        loses: Which tasks take their worker along.
        breaks: After how many tasks every further one raises.
    """

    local = False

    def __init__(
        self,
        problem: Problem,
        size: int,
        *,
        pick: Pick = first,
        loses: Callable[[Task], bool] = lambda task: False,
        breaks: int | None = None,
    ) -> None:
        self.size = size
        self.tasks: list[Task] = []
        self.most = 0
        self.closed: bool | None = None
        self._problem, self._pick, self._loses, self._breaks = problem, pick, loses, breaks
        self._held: list[tuple[Task, Future[Outcome]]] = []
        self._lock = threading.Lock()
        self._news = time.monotonic()
        threading.Thread(target=self._work, daemon=True).start()

    def submit(self, task: Task) -> Future[Outcome]:
        future: Future[Outcome] = Future()
        with self._lock:
            self.tasks.append(task)
            self._held.append((task, future))
            self.most = max(self.most, len(self._held))
            self._news = time.monotonic()
        return future

    def running(self) -> Sequence[tuple[str, Task, float]]:
        return [(f"worker {i}", task, 1.0) for i, (task, _) in enumerate(self._held[: self.size])]

    def close(self, *, abandon: bool = False) -> None:
        self.closed = abandon

    def _work(self) -> None:
        while self.closed is None:
            time.sleep(0.001)
            with self._lock:
                idle = time.monotonic() - self._news > 0.03
                if not self._held or (len(self._held) < self.size and not idle):
                    continue
                at_work = self._held[: self.size]
                one = at_work[self._pick([task for task, _ in at_work])]
                self._held.remove(one)
                self._news = time.monotonic()
            task, future = one
            if self._breaks is not None and len(self.tasks) > self._breaks:
                future.set_exception(RuntimeError("the cluster is gone"))
            else:
                future.set_result(self._outcome(task))

    def _outcome(self, task: Task) -> Outcome:
        problem = self._problem
        if task.metrics is not None:
            problem = select_metrics(problem, task.metrics)
        X = task.point.unsqueeze(0)
        if self._loses(task):
            lost = Observations.failed(X, problem.metrics, "the worker died: signal 11 (SIGSEGV)")
            return Outcome(task.key, lost, "worker", lost=True)
        return Outcome(task.key, problem.evaluate(X, generator=make_generator(task.seed)), "worker")
