"""Workers behind any executor of :mod:`concurrent.futures`: Parsl's, executorlib's, one's own.

An executor says neither who evaluates what nor ends a worker that hangs. Where a time limit matters
and evaluators may hang in native code, :class:`map_bo.workers.processes.Processes` keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import (
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)
from dataclasses import dataclass, field

from map_bo.errors import ConfigError, WorkersError, first_line
from map_bo.problems.problem import Problem
from map_bo.values import real_number, whole_number
from map_bo.workers.clusters.crew import Answer, Crew, Hand
from map_bo.workers.clusters.serving import Order, build, evaluate_or_build
from map_bo.workers.recipe import Recipe
from map_bo.workers.workers import Task, Workers

__all__ = ["Pool"]

_GRACE = 60.0  # seconds beyond a time limit: a process that has not built the problem does so first
_PROCESSES_HINT = "use map_bo.Processes(4), whose workers are replaced when they die"


@dataclass(frozen=True, eq=False)
class Pool:
    """Workers behind an executor, which stays open at the end of the run.

    The problem is built once in each of its processes. A time limit is kept by a signal in the
    worker, where its main thread evaluates; elsewhere, what came too late is a failed evaluation.
    A worker that does not even answer then is given up: no executor can end it.

    Args:
        executor: Its workers must be processes; of the standard library's, started with spawn.
        count: How many tasks it runs at the same time; a ``ProcessPoolExecutor`` knows.
        factory: A function, or its name ``"package.module:qualname"``, that makes the problem in
            a worker; by default the driver's own problem is made again there.
        device: Where the problem lives in each worker; ``None`` leaves it where the driver's is.
        threads: Threads of torch in each worker; ``None`` leaves that to the worker.
        patience: Seconds to wait until the first worker has built the problem.
        recipe: How workers build the problem, where that is known already.
    """

    executor: Executor
    count: int | None = None
    factory: str | Callable[[], Problem] | None = None
    device: str | None = None
    threads: int | None = None
    patience: float = 600.0
    recipe: Recipe | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        if not isinstance(self.executor, Executor):
            raise ConfigError(
                f"Pool takes an executor of concurrent.futures, got {self.executor!r:.80}",
                hint="such as map_bo.Pool(ProcessPoolExecutor(4, mp_context=get_context('spawn')))",
            )
        if isinstance(self.executor, ThreadPoolExecutor):
            raise ConfigError(
                "a ThreadPoolExecutor cannot evaluate: its threads share torch's settings, random "
                "numbers and the model with each other and with the driver",
                hint=_PROCESSES_HINT,
            )
        hint = "say how many tasks the executor runs at the same time: map_bo.Pool(executor, 4)"
        if self.count is None and isinstance(self.executor, ProcessPoolExecutor):
            put(self, "count", self.executor._max_workers)  # type: ignore[attr-defined]
        if self.count is None:
            raise ConfigError(
                f"a {type(self.executor).__name__} does not tell how many workers it has", hint=hint
            )
        put(self, "count", whole_number("count", self.count, least=1, hint=hint))
        if self.threads is not None:
            put(self, "threads", whole_number("threads", self.threads, least=1))
        put(self, "patience", real_number("patience", self.patience, least=0, hint="in seconds"))

    def open(self, problem: Problem) -> Workers:
        """Have the executor's workers build the problem.

        Raises:
            ConfigError: When the problem cannot be built elsewhere.
            WorkersError: When no worker can build it, or when they are threads or forks.
        """
        assert self.count is not None
        order = Order.of(
            problem,
            recipe=self.recipe,
            factory=self.factory,
            device=self.device,
            threads=self.threads,
        )
        crew = Crew(
            _Engine(self.executor, self.count, order),
            problem.metrics,
            what="executor's worker",
            patience=self.patience,
            grace=(_GRACE, 0.0),
        )
        crew.start()
        return crew


class _Slot:
    """Room for one task in an executor."""

    def __init__(self, engine: _Engine, number: int) -> None:
        self._engine = engine
        self.name = f"{number}"
        self.ended = False
        self._running: Future[Answer] | None = None

    def build(self) -> Future[Answer]:
        return self._submit(build, self._engine.order, alone=True)

    def evaluate(self, task: Task) -> Future[Answer]:
        return self._submit(evaluate_or_build, self._engine.order, task)

    def _submit(
        self, function: Callable[..., Answer], *args: object, **more: object
    ) -> Future[Answer]:
        try:
            self._running = self._engine.executor.submit(function, *args, **more)
        except Exception as error:  # it is broken, or has been shut down
            self._running = Future()
            self._running.set_exception(error)
        return self._running

    def kill(self) -> None:
        """Do without the worker; what has not begun is taken back."""
        self.ended = (
            self._running is not None and not self._running.cancel() and (not self._running.done())
        )


class _Engine:
    """As many tasks at a time as the executor has workers that answer."""

    def __init__(self, executor: Executor, count: int, order: Order) -> None:
        self.executor, self.order = executor, order
        self._slots: list[_Slot] = [_Slot(self, number + 1) for number in range(count)]
        self._count = count

    def look(self) -> Sequence[Hand]:
        """Return the slots.

        Raises:
            WorkersError: When all of them hold what does not answer.
        """
        alive = [slot for slot in self._slots if not slot.ended]
        if not alive:
            raise WorkersError(
                f"all {self._count} workers of the executor hang, and it cannot end them",
                hint=_PROCESSES_HINT,
            )
        return alive

    def blame(self, error: BaseException) -> str | None:
        """Say what became of a worker.

        Raises:
            WorkersError: When the executor is broken as a whole.
        """
        if isinstance(error, BrokenExecutor):
            raise WorkersError(
                f"the executor is broken, because one of its processes died: {first_line(error)}; "
                "all that were being evaluated are lost with it",
                hint=f"resume the run, which evaluates them again; {_PROCESSES_HINT}",
            ) from error
        return f"{type(error).__name__}: {first_line(error)}"

    def close(self, *, abandon: bool) -> None:
        """Leave the executor to its owner."""
