"""A crew: the workers of a cluster, each with one task at a time, as the driver directs them.

An engine (Ray, Dask) says which workers there are, and takes tasks to them. The crew keeps the
queue, knows who evaluates what and since when, enforces time limits by the worker's death, tells a
row that took its worker along from one whose answer the network lost, and lets workers come and go.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import torch

from map_bo.data import Metric, Observations
from map_bo.errors import MapBoError, WorkersError, listed
from map_bo.workers.workers import Outcome, Task

__all__ = [
    "Answer",
    "Built",
    "Crew",
    "Engine",
    "Hand",
    "Missing",
    "OutOfReachError",
    "Refused",
    "failed_outcome",
]

logger = logging.getLogger(__name__)

_LOOK = 1.0  # seconds between two looks at the cluster
_LATE = 5.0  # seconds that further workers get at least, once the first is ready
_TRIES = 3  # builds in a row that may take their worker along before the run ends


@dataclass(frozen=True)
class Built:
    """A worker holds the problem.

    Attributes:
        name: What the worker is called: host, process and device.
        host: Name of its machine.
        process: Number of its process there.
    """

    name: str
    host: str
    process: int


@dataclass(frozen=True)
class Refused:
    """A worker says why every evaluation would fail: it cannot build the problem, or another one.

    Attributes:
        error: What it would raise.
    """

    error: MapBoError


@dataclass(frozen=True)
class Missing:
    """A process holds no problem, so it is not the one in which the problem was built."""


Answer: TypeAlias = Built | Outcome | Refused | Missing


class OutOfReachError(Exception):
    """The cluster does not answer just now; its workers may go on all the same."""


class Hand(Protocol):
    """One worker of a cluster, as the driver holds it. A call never waits."""

    @property
    def name(self) -> str:
        """What it is called until it says more of itself."""
        ...

    def build(self) -> Future[Answer]:
        """Have it build the problem."""
        ...

    def evaluate(self, task: Task) -> Future[Answer]:
        """Have it evaluate a task. The future raises when it dies or the cluster loses it."""
        ...

    def kill(self) -> None:
        """End its process at once, whatever it does, so that another one takes its place."""
        ...


class Engine(Protocol):
    """What starts workers on a cluster, or finds them there."""

    def look(self) -> Sequence[Hand]:
        """Return the workers that there are, each the same object as before, and new ones.

        Raises:
            OutOfReachError: When the cluster does not answer.
            WorkersError: When it never will.
        """
        ...

    def blame(self, error: BaseException) -> str | None:
        """Say what became of a worker whose future raised ``error``.

        Returns:
            The reason, for the record; None where it says nothing of the worker, because the
            driver itself has lost the cluster.
        """
        ...

    def close(self, *, abandon: bool) -> None:
        """Let go of the cluster, and of what this driver started there."""
        ...


@dataclass(eq=False)
class _Job:
    task: Task
    future: Future[Outcome] = field(default_factory=Future)
    home: str = ""  # who was evaluating it when the network failed, and may know its outcome


@dataclass(eq=False)
class _Post:
    hand: Hand
    name: str
    answer: Future[Answer] | None = None
    since: float = 0.0
    job: _Job | None = None
    ready: bool = False


def failed_outcome(
    task: Task,
    metrics: Sequence[Metric],
    reason: str,
    *,
    seconds: float = 0.0,
    worker: str = "",
    lost: bool = False,
) -> Outcome:
    """Return the outcome of a task that no evaluation has answered.

    Args:
        task: The task.
        metrics: All metrics of the problem; the row has those of the task.
        reason: Why it failed.
        seconds: What it has cost.
        worker: Who evaluated it.
        lost: Whether the worker was lost in it.
    """
    by_name = {metric.name: metric for metric in metrics}
    asked = tuple(by_name) if task.metrics is None else task.metrics
    row = Observations.failed(task.point.unsqueeze(0), [by_name[name] for name in asked], reason)
    if seconds > 0:
        row = dataclasses.replace(row, cost=torch.tensor([seconds]))
    return Outcome(task.key, row, worker, lost)


class Crew:
    """Workers of a cluster that hold one problem.

    Args:
        engine: Finds and reaches them.
        metrics: Those of the problem.
        what: What one of them is called in messages ("Ray worker").
        patience: Seconds to wait for a cluster that does not answer or has no worker left, before
            the run ends.
        grace: Seconds, as a function of a time limit, that a worker gets to keep it itself.
    """

    local = False

    def __init__(
        self,
        engine: Engine,
        metrics: Sequence[Metric],
        *,
        what: str,
        patience: float,
        grace: tuple[float, float] = (0.5, 0.0),
    ) -> None:
        self._engine, self._metrics, self._what = engine, tuple(metrics), what
        self._patience, self._grace = patience, grace
        self._posts: dict[Hand, _Post] = {}
        self._waiting: deque[_Job] = deque()
        self._events: queue.SimpleQueue[tuple[_Post, Future[Answer]] | _Job | None] = (
            queue.SimpleQueue()
        )
        self._lock = threading.Lock()
        self._closing = self._abandoned = False
        self._fatal: MapBoError | None = None
        self._refusals: list[MapBoError] = []
        self._opening = True
        self._lost_builds = 0
        self._looked = 0.0
        self._well = time.monotonic()  # when there was a worker last
        self._silent = False
        self._changed = threading.Condition(self._lock)
        self._thread = threading.Thread(target=self._direct, name="map-bo-crew", daemon=True)

    # What the driver sees

    def start(self) -> None:
        """Begin, and wait until the first workers are ready.

        Raises:
            WorkersError: When none of them becomes ready, or one refuses the problem.
        """
        self._thread.start()
        begun = time.monotonic()
        first: float | None = None
        try:
            with self._changed:
                while self._fatal is None:
                    ready = sum(post.ready for post in self._posts.values())
                    now = time.monotonic()
                    if ready and first is None:
                        first = now
                    if first is not None:
                        rest = len(self._posts) - ready
                        if not rest or now - first > max(_LATE, 0.5 * (first - begun)):
                            break
                    self._changed.wait(0.2)
                self._opening = False
                if self._fatal is not None:
                    raise self._fatal
        except BaseException:
            self.close(abandon=True)
            raise

    @property
    def size(self) -> int:
        """How many workers are ready; at least 1, because the others are on their way."""
        with self._lock:
            return max(1, sum(post.ready for post in self._posts.values()))

    @property
    def names(self) -> list[str]:
        """What the workers that are ready are called."""
        with self._lock:
            return [post.name for post in self._posts.values() if post.ready]

    def submit(self, task: Task) -> Future[Outcome]:
        """Take a task."""
        job = _Job(task)
        with self._lock:
            fatal = self._fatal
            if fatal is None and not self._closing:
                self._events.put(job)
                return job.future
        job.future.set_exception(
            fatal or WorkersError("the workers have been closed", hint="open them again")
        )
        return job.future

    def running(self) -> Sequence[tuple[str, Task, float]]:
        """Return which worker evaluates what, and for how many seconds."""
        now = time.monotonic()
        with self._lock:
            return [
                (post.name, post.job.task, now - post.since)
                for post in self._posts.values()
                if post.job is not None
            ]

    def close(self, *, abandon: bool = False) -> None:
        """Let go of the workers: when they are idle, or at once."""
        with self._lock:
            self._closing, self._abandoned = True, self._abandoned or abandon
        self._events.put(None)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            # A look at a cluster that does not answer is not waited for.
            self._thread.join(10.0 if abandon else None)
        self._engine.close(abandon=abandon)

    # The thread that directs them

    def _direct(self) -> None:
        try:
            while self._step():
                pass
        except MapBoError as error:
            self._give_up(error)
        except BaseException as error:  # of an engine, or memory: whoever waits has to hear of it
            self._give_up(
                WorkersError(
                    f"directing the workers failed: {type(error).__name__}: {error}",
                    hint="resume the run; nothing that was measured is lost",
                )
            )
        finally:
            self._drop_everything()

    def _step(self) -> bool:
        """Do what there is to do; return whether there will be more."""
        self._receive()
        if self._closing and (self._abandoned or not self._busy()):
            return False
        self._look()
        self._enforce_limits()
        self._assign()
        return True

    def _busy(self) -> bool:
        return bool(self._waiting) or any(p.job is not None for p in self._posts.values())

    def _receive(self) -> None:
        """Take what has come, and wait for it until the next look or time limit."""
        due = [self._looked + _LOOK]
        due += [
            post.since + self._limit(post.job.task.timeout)
            for post in self._posts.values()
            if post.job is not None and post.job.task.timeout is not None
        ]
        wait = max(0.0, min(due) - time.monotonic())
        with suppress(queue.Empty):
            event = self._events.get(timeout=wait) if wait else self._events.get_nowait()
            while True:
                if isinstance(event, _Job):
                    self._waiting.append(event)
                elif event is not None:
                    post, answer = event
                    # What is late belongs to an attempt that has ended already.
                    if self._posts.get(post.hand) is post and post.answer is answer:
                        self._answered(post, answer)
                event = self._events.get_nowait()

    def _limit(self, timeout: float) -> float:
        least, share = self._grace
        return timeout + max(least, share * timeout)

    def _ask(self, post: _Post, answer: Future[Answer]) -> None:
        post.answer, post.since = answer, time.monotonic()
        answer.add_done_callback(lambda done: self._events.put((post, done)))

    def _answered(self, post: _Post, answer: Future[Answer]) -> None:
        try:
            found = answer.result()
        except BaseException as error:  # of the engine: evaluators' failures are outcomes
            self._lose(post, self._blame(error))
            return
        if isinstance(found, Built):
            with self._changed:
                post.name, post.ready, post.answer = found.name, True, None
                self._changed.notify_all()
            self._lost_builds = 0
            logger.info("%s is ready", found.name)
        elif isinstance(found, Refused):
            self._refused(post, found.error)
        elif isinstance(found, Missing):
            self._lose(post, "its process ended, and another took its place")
        else:
            self._lost_builds = 0
            job = self._finish(post)
            _settle(job, dataclasses.replace(found, worker=found.worker or post.name))

    def _blame(self, error: BaseException) -> str | None:
        """Return what became of a worker.

        Raises:
            WorkersError: When that ends the run; the message says what was being evaluated.
        """
        try:
            return self._engine.blame(error)
        except WorkersError as fatal:
            words = [post.job.task.words for post in self._posts.values() if post.job is not None]
            if not words:
                raise
            message = f"{fatal.message} ({listed(words)})"
            raise WorkersError(message, hint=fatal.hint) from error

    def _finish(self, post: _Post) -> _Job:
        job = post.job
        assert job is not None
        with self._lock:
            post.job = post.answer = None
        return job

    def _refused(self, post: _Post, error: MapBoError) -> None:
        if self._opening or post.job is not None:
            raise error
        with self._changed:
            post.answer = None
            self._refusals.append(error)
        logger.warning("%s is not used: %s", post.name, error.reason)

    def _lose(self, post: _Post, reason: str | None, *, lost: bool = True) -> None:
        """Do without a worker, and end what it was doing: as a failure, unless nobody is to blame.

        Args:
            post: The worker's.
            reason: What became of it; None where only the driver's connection failed.
            lost: Whether the failure may be the worker's and not the row's.
        """
        seconds, job, was_ready = time.monotonic() - post.since, post.job, post.ready
        with self._changed:
            self._posts.pop(post.hand, None)
            post.job = post.answer = None
            post.ready = False
        if reason is None:
            if job is not None:
                logger.warning("%s is sent again: the cluster went out of reach", job.task.words)
                job.home = post.name
                self._waiting.appendleft(job)
            return
        post.hand.kill()
        if job is not None:
            words = f"{self._what} {post.name}: {reason}" if lost else reason
            logger.warning("%s: %s", job.task.words, words)
            outcome = failed_outcome(
                job.task, self._metrics, words, seconds=seconds, worker=post.name, lost=lost
            )
            _settle(job, outcome)
        elif not was_ready:
            self._lost_builds += 1
            logger.warning(
                "%s %s was lost as it built the problem: %s", self._what, post.name, reason
            )
            if self._lost_builds >= _TRIES:
                raise WorkersError(
                    f"{self._lost_builds} workers in a row were lost while they built the problem; "
                    f"the last: {reason}",
                    hint="see the logs of the cluster; does the problem fit into their memory?",
                )
        else:
            logger.warning("%s %s is gone: %s", self._what, post.name, reason)

    def _look(self) -> None:
        """See which workers there are."""
        now = time.monotonic()
        if now - self._looked < _LOOK and self._looked:
            return
        try:
            hands = self._engine.look()
        except OutOfReachError as error:
            if not self._silent:
                logger.warning(
                    "the cluster is out of reach (%s); waiting up to %g s", error, self._patience
                )
            self._silent = True
            self._lament(str(error))
            return
        finally:
            self._looked = time.monotonic()
        if self._silent:
            logger.warning("the cluster answers again")
            self._silent = False
        for hand in set(self._posts) - set(hands):
            self._lose(self._posts[hand], "it died or went out of reach")
        for hand in hands:
            if hand not in self._posts:
                post = _Post(hand, hand.name)
                with self._changed:
                    self._posts[hand] = post
                    self._changed.notify_all()
                self._ask(post, hand.build())
        if any(post.ready for post in self._posts.values()):
            self._well = time.monotonic()
        building = sum(post.answer is not None for post in self._posts.values())
        self._lament(
            f"{building} of its workers have not built the problem" if building else "none joined"
        )

    def _lament(self, what: str) -> None:
        """End the run when there has been no worker for too long."""
        passed = time.monotonic() - self._well
        if passed <= self._patience:
            return
        if self._refusals:
            raise self._refusals[-1]
        raise WorkersError(
            f"the cluster has had no worker for {passed:.0f} s: {what}",
            hint="see to the cluster, then start or resume the run: nothing that was measured is "
            "lost. `patience` is how long to wait",
        )

    def _enforce_limits(self) -> None:
        now = time.monotonic()
        for post in list(self._posts.values()):
            timeout = None if post.job is None else post.job.task.timeout
            if timeout is not None and now - post.since >= self._limit(timeout):
                self._lose(post, f"it took longer than {timeout:g} s", lost=False)

    def _assign(self) -> None:
        """Give every idle worker a task, in the order in which they came."""
        idle = [p for p in self._posts.values() if p.ready and p.job is None]
        while idle and self._waiting and not self._silent:
            job = self._waiting.popleft()
            if job.future.cancelled():
                continue
            post = next((p for p in idle if p.name == job.home), idle[0])
            idle.remove(post)
            with self._lock:
                post.job = job
            self._ask(post, post.hand.evaluate(job.task))

    def _give_up(self, error: MapBoError) -> None:
        with self._changed:
            self._fatal = error
            self._changed.notify_all()

    def _drop_everything(self) -> None:
        """Answer whoever still waits, then end what is abandoned."""
        with self._lock:
            self._closing = True
            at_work = [post for post in self._posts.values() if post.job is not None]
            jobs = [post.job for post in at_work if post.job is not None]
            for post in at_work:
                post.job, post.answer = None, None
        with suppress(queue.Empty):
            while True:
                event = self._events.get_nowait()
                if isinstance(event, _Job):
                    jobs.append(event)
        for job in [*jobs, *self._waiting]:
            if self._fatal is None:
                job.future.cancel()
            else:
                with suppress(InvalidStateError):
                    job.future.set_exception(self._fatal)
        self._waiting.clear()
        for post in at_work if self._abandoned or self._fatal is not None else ():
            with suppress(Exception):
                post.hand.kill()


def _settle(job: _Job, outcome: Outcome) -> None:
    with suppress(InvalidStateError):  # it was cancelled
        job.future.set_result(outcome)
