"""Workers that are processes of this machine, in pools of pebble's: one worker in each.

A worker that dies, hangs or is stopped takes nothing along but its row, whose outcome says why; a
new process takes its place. A pool has one worker, so that it is known which worker has which
device and which row.
"""

from __future__ import annotations

import logging
import os
import pickle
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from map_bo.data import Metric
from map_bo.errors import ConfigError, MapBoError, WorkersError
from map_bo.merging.vectors.storage import available_bytes, format_bytes, parse_bytes
from map_bo.problems.problem import Problem
from map_bo.values import whole_number
from map_bo.workers.child import Place
from map_bo.workers.recipe import Recipe
from map_bo.workers.resident import (
    EstimatesMemory,
    OnDevice,
    Releases,
    identity_of_problem,
)
from map_bo.workers.slot import Slot, settle
from map_bo.workers.workers import Outcome, Task

__all__ = ["ProcessWorkers", "Processes"]

logger = logging.getLogger(__name__)

_LOOK = 0.1  # seconds between two looks at the workers
_SETTLE = 0.5  # seconds in which the pool itself may tell of a process that has ended
_GRACE = 1.0  # seconds after its limit in which an evaluation may end by itself
_ENDING = 1.0  # seconds that a process has to end when it is asked to
_STARTS = 3  # attempts to put a new process in the place of one that has died
_WORTH_MAPPING = 64 * 2**20  # bytes of weights from which on workers share them
_LEAST = 128 * 2**20  # bytes that a process takes as soon as it has imported torch
_MOST = 1024


@dataclass(frozen=True)
class Processes:
    """Evaluates in processes of this machine, each with the problem built and prepared in it.

    Attributes:
        count: How many. One isolates evaluators that crash or hang from the run.
        devices: Names of devices, such as ``["cuda:0", "cuda:1"]``; the workers take them in turn,
            so several may share one. None leaves the problem where it is.
        factory: A function without arguments that returns the problem, or its name
            ``"package.module:function"``; for problems that cannot be built elsewhere from what
            they are.
        threads: Threads of each worker; by default the cores of this process divided by ``count``.
        memory: Most memory that a worker may take for itself, in bytes or such as ``"8GB"``; what
            exceeds it is a failed evaluation. Mapped files and GPU memory do not count.
        logs: Folder for what the workers print, a file for each; by default it goes to the
            standard error of this process.
        recipe: How workers build the problem, where that is known already.

    Raises:
        ConfigError: When one of them is not possible.
    """

    count: int = 1
    devices: Sequence[str] | None = None
    factory: str | Callable[[], Problem] | None = None
    threads: int | None = None
    memory: int | str | None = None
    logs: str | Path | None = None
    recipe: Recipe | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        hint = "give a number of processes, such as workers=4 or map_bo.Processes(4)"
        count = whole_number("count", self.count, least=1, most=_MOST, hint=hint)
        object.__setattr__(self, "count", count)
        if self.threads is not None:
            hint = "give a number of threads, or leave it out"
            whole_number("threads", self.threads, least=1, most=_MOST, hint=hint)
        if self.memory is not None:
            parse_bytes(self.memory, "memory")
        if self.recipe is not None and not isinstance(self.recipe, Recipe):
            raise ConfigError(
                f"recipe must be a Recipe, got {self.recipe!r:.80}",
                hint="leave it out, or give a factory",
            )
        if self.devices is not None:
            given = [self.devices] if isinstance(self.devices, str) else list(self.devices)
            if not given:
                raise ConfigError(
                    "devices is empty", hint="name some, such as devices=['cuda:0'], or none at all"
                )
            object.__setattr__(self, "devices", tuple(str(_device(name)) for name in given))

    def with_recipe(self, recipe: Recipe) -> Processes:
        """Return the settings with a recipe, unless they have one or a factory already."""
        if self.recipe is not None or self.factory is not None:
            return self
        return replace(self, recipe=recipe)

    def with_logs(self, folder: str | Path) -> Processes:
        """Return the settings with a folder for logs, unless they have one already."""
        return self if self.logs is not None else replace(self, logs=folder)

    def open(self, problem: Problem) -> ProcessWorkers:
        """Start the processes and wait until each has the problem ready.

        What ``problem`` has loaded is given back, as far as it can.

        Raises:
            ConfigError: When the problem cannot be built in another process, there is no such
                device, or this machine has too little memory for so many processes.
            WorkersError: When a worker cannot get ready, or holds another problem.
        """
        for name in self.devices or ():
            _require_device(torch.device(name))
        _require_memory(self.count)
        if self.recipe is not None:
            recipe = self.recipe
        elif self.factory is not None:
            recipe = Recipe.calling(self.factory, script=True)
        else:
            recipe = Recipe.of(problem, script=True)
        expected = identity_of_problem(problem)
        if isinstance(problem, Releases):
            problem.release()
        if self.logs is not None:
            _make_folder(Path(self.logs))
        large = isinstance(problem, EstimatesMemory) and problem.memory() >= _WORTH_MAPPING
        names = self.devices or (_device_of(problem),)
        place = Place(
            pickle.dumps(recipe),
            expected,
            self.threads or max(1, _cores() // self.count),
            mapped=large and self.count > 1,
            memory=None if self.memory is None else parse_bytes(self.memory, "memory"),
            driver=os.getpid(),
        )
        places = []
        for number in range(self.count):
            name = names[number % len(names)]
            sharing = sum(names[other % len(names)] == name for other in range(self.count))
            log = None if self.logs is None else str(Path(self.logs) / f"worker-{number + 1}.log")
            placed = replace(place, sharing=sharing, log=log)
            places.append(_on(placed, name) if self.devices is not None else placed)
        workers = ProcessWorkers(places, problem.metrics, script=recipe.main)
        workers.start()
        return workers


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _device(name: object) -> torch.device:
    try:
        return torch.device(str(name))
    except RuntimeError as error:
        raise ConfigError(
            f"{name!r:.80} is not a device", hint="name devices such as cuda:0 or cpu"
        ) from error


def _device_of(problem: Problem) -> str:
    return str(problem.device) if isinstance(problem, OnDevice) else "cpu"


def _require_device(device: torch.device) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        ConfigError: Saying what there is.
    """
    if device.type == "cuda":
        there = torch.cuda.device_count()
        if (device.index or 0) >= there:
            what = f"it has {there} of CUDA" if there else "it has none of CUDA"
            raise ConfigError(
                f"there is no device {device} on this machine: {what}",
                hint="name devices that are there, as `nvidia-smi` lists them, or cpu",
            )
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("there is no device mps on this machine", hint="leave devices out")


def _require_memory(count: int) -> None:
    """Refuse more processes than this machine has memory for, whatever the problem takes.

    Raises:
        ConfigError: Saying how many there may be.
    """
    left, need = available_bytes(), count * _LEAST
    if left is not None and need > left:
        raise ConfigError(
            f"{count} processes take {format_bytes(need)} of memory at the very least, and this "
            f"machine has {format_bytes(left)} left",
            hint=f"use at most {max(1, left // _LEAST)} workers, fewer where the model is large",
        )


def _on(place: Place, name: str) -> Place:
    """Return a place on a device: one of CUDA is the only one that its process sees."""
    device = torch.device(name)
    if device.type != "cuda":
        return replace(place, device=name, label=name)
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    index = device.index or 0
    known = seen.split(",") if seen else []
    own = known[index].strip() if index < len(known) else str(index)
    return replace(place, device="cuda:0", label=name, environment={"CUDA_VISIBLE_DEVICES": own})


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the folder {folder} for the workers' logs cannot be made: {error.strerror}",
            hint="give another folder as logs",
        ) from error


class ProcessWorkers:
    """Processes that hold the problem; see :class:`Processes`, which starts them.

    Args:
        places: Where each worker is.
        metrics: Those of the problem.
        script: Whether workers import the driver's script.
    """

    local = False

    def __init__(self, places: Sequence[Place], metrics: Sequence[Metric], *, script: bool) -> None:
        self.threads = places[0].threads
        self._metrics = tuple(metrics)
        self._slots = [
            Slot(number, place, script=script, wake=self._wake)
            for number, place in enumerate(places, start=1)
        ]
        self._queue: deque[tuple[Task, Future[Outcome]]] = deque()
        self._condition = threading.Condition()
        self._news = self._closing = self._abandoned = False
        self._failure: MapBoError | None = None
        self._begun: Future[None] = Future()
        self._thread = threading.Thread(target=self._supervise, name="map_bo workers", daemon=True)

    @property
    def size(self) -> int:
        """How many workers there are; those that cannot be started again do not count."""
        return max(1, sum(slot.broken is None for slot in self._slots))

    def start(self) -> None:
        """Start the processes, and wait until all are ready.

        Raises:
            WorkersError: What the first that cannot get ready says.
        """
        self._thread.start()
        try:
            self._begun.result()
        except BaseException:
            self.close(abandon=True)
            raise

    def submit(self, task: Task) -> Future[Outcome]:
        """Take a task; more than ``size`` of them wait in their order."""
        future: Future[Outcome] = Future()
        with self._condition:
            if self._failure is not None:
                settle(future, error=self._failure)
                return future
            if self._closing:
                raise WorkersError("these workers have been closed", hint="open new ones")
            self._queue.append((task, future))
        self._wake()
        return future

    def running(self) -> Sequence[tuple[str, Task, float]]:
        """Return which worker evaluates what, and for how many seconds."""
        now = time.monotonic()
        flights = [(slot.name, slot.flight) for slot in self._slots]
        return [(name, one.task, now - one.begun) for name, one in flights if one is not None]

    def describe(self) -> dict[str, Any]:
        """Return what they are, for the summary of a run."""
        devices = [slot.place.label for slot in self._slots if slot.place.label]
        told = {"devices": devices} if devices else {}
        return {"kind": "processes", "threads": self.threads, **told}

    def processes(self) -> list[int]:
        """Return the ids of the processes that hold the problem now."""
        return [pid for slot in self._slots if (pid := slot.process_id) is not None]

    def close(self, *, abandon: bool = False) -> None:
        """End the workers: when they are idle, or at once where what they do is ``abandon``ed."""
        with self._condition:
            self._closing = True
            self._abandoned = self._abandoned or abandon
        self._wake()
        if self._thread.is_alive():
            self._thread.join()

    def _wake(self) -> None:
        with self._condition:
            self._news = True
            self._condition.notify()

    def _supervise(self) -> None:
        """Look after the workers until they are closed; the only thread that changes them.

        It starts the processes, too, as the system ends a process when the thread ends that
        started it.
        """
        try:
            for slot in self._slots:
                slot.start()
            while not self._is_over():
                for slot in self._slots:
                    slot.look(self._metrics)
                self._settle_start()
                self._dispatch()
                with self._condition:
                    self._condition.wait_for(lambda: self._news, timeout=_LOOK)
                    self._news = False
        except Exception as error:  # not to leave the driver waiting
            logger.exception("the workers cannot be looked after any more")
            failure = WorkersError(f"the workers cannot be looked after: {error}")
            with self._condition:
                self._failure = failure
            self._give_up(failure)
        finally:
            for slot in self._slots:
                if slot.flight is not None:
                    slot.flight.future.cancel()
            for _, future in self._queue:
                future.cancel()
            enders = [threading.Thread(target=slot.end) for slot in self._slots]
            for thread in enders:
                thread.start()
            for thread in enders:
                thread.join()

    def _is_over(self) -> bool:
        with self._condition:
            busy = self._queue or any(slot.flight is not None for slot in self._slots)
            return self._closing and (self._abandoned or not busy)

    def _settle_start(self) -> None:
        broken = [slot.broken for slot in self._slots if slot.broken is not None]
        if not self._begun.done():
            if broken:
                self._begun.set_exception(broken[0])
            elif all(slot.idle for slot in self._slots):
                self._begun.set_result(None)
        elif len(broken) == len(self._slots):
            self._give_up(broken[0])

    def _give_up(self, error: MapBoError) -> None:
        if not self._begun.done():
            self._begun.set_exception(error)
        for slot in self._slots:
            if slot.flight is not None:
                settle(slot.flight.future, error=error)
                slot.flight = None
        while self._queue:
            settle(self._queue.popleft()[1], error=error)

    def _dispatch(self) -> None:
        for slot in self._slots:
            if slot.idle and self._queue and slot.launch(*self._queue[0]):
                self._queue.popleft()
