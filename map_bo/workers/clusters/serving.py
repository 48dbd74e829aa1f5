"""What runs in a worker of a cluster: its process holds problems, and answers the driver.

Everything that can go wrong with a row or a problem is an answer. An exception is left to what goes
wrong with the process, the machine or the network.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pickle
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Self

import torch

from map_bo.data import Observations
from map_bo.errors import MapBoError, WorkersError, first_line
from map_bo.problems.problem import Problem
from map_bo.workers.clusters.crew import Answer, Built, Missing, Refused
from map_bo.workers.recipe import Recipe
from map_bo.workers.resident import (
    EstimatesMemory,
    Releases,
    Resident,
    identity_of_problem,
)
from map_bo.workers.workers import Outcome, Task

__all__ = ["Order", "build", "evaluate", "evaluate_or_build", "forget"]

_IMPORTED_IN = os.getpid()  # another process than this one has been forked from it
_WORTH_MAPPING = 64 * 2**20  # bytes of weights from which on workers share them
_SPAWN = (
    "map_bo.Processes(n), or map_bo.Pool(ProcessPoolExecutor(n, mp_context="
    "multiprocessing.get_context('spawn')))"
)
_RESIDENT_HINT = "workers need the same modules and files as the driver"


@dataclass(frozen=True)
class Order:
    """What a driver wants built.

    Attributes:
        token: Digest of the recipe and of the problem: what is built once serves all that ask for
            the same.
        recipe: How to build the problem.
        expected: The identity of the driver's own.
        device: Where it is to live; None leaves that to the problem.
        threads: Threads of torch in the worker; None leaves that to the worker.
        mapped: Whether workers on one machine share the weights, from a file.
        driver: What tells this driver from others.
        process: Host and process of the driver.
    """

    token: str
    recipe: Recipe
    expected: Mapping[str, str]
    device: str | None = None
    threads: int | None = None
    mapped: bool = False
    driver: str = field(default_factory=lambda: uuid.uuid4().hex)
    process: tuple[str, int] = field(default_factory=lambda: (socket.gethostname(), os.getpid()))

    @classmethod
    def of(
        cls,
        problem: Problem,
        *,
        recipe: Recipe | None = None,
        factory: str | Callable[[], Problem] | None = None,
        device: str | None = None,
        threads: int | None = None,
    ) -> Self:
        """Return the order for the problem of this process, which gives back what it has loaded.

        Raises:
            ConfigError: When it cannot be built elsewhere; the hint says how it can.
        """
        if recipe is None:
            recipe = Recipe.of(problem) if factory is None else Recipe.calling(factory)
        expected = identity_of_problem(problem)
        if isinstance(problem, Releases):
            problem.release()
        mapped = isinstance(problem, EstimatesMemory) and problem.memory() >= _WORTH_MAPPING
        content = pickle.dumps((recipe, sorted(expected.items()), device, threads))
        token = hashlib.sha256(content).hexdigest()[:24]
        return cls(token, recipe, expected, device, threads, mapped)


@dataclass(eq=False)
class _Held:
    resident: Resident
    drivers: set[str]
    last: dict[str, tuple[Task, Outcome]] = field(default_factory=dict)  # of each driver


# A process is a worker as a whole: torch's settings are, and weights are as large as its memory.
_held: dict[str, _Held] = {}
_turn = threading.RLock()  # one evaluation at a time, whatever the threads of the engine


def build(order: Order, *, alone: bool = False) -> Answer:
    """Build the problem in this process, unless it is here already.

    Args:
        order: What to build.
        alone: Whether what else is held here may go, because nobody will say when it may.
    """
    with _turn:
        held = _held.get(order.token)
        if held is None:
            if alone:
                _held.clear()
            try:
                _require_own_process(order)
                if order.threads is not None:
                    torch.set_num_threads(order.threads)
                resident = Resident.build(
                    order.recipe,
                    expected=order.expected,
                    device=order.device,
                    mapped=order.mapped,
                )
            except MapBoError as error:
                return Refused(error)
            except Exception as error:  # whatever the user's own code raises
                return Refused(_unforeseen("the problem cannot be built in a worker", error))
            held = _held[order.token] = _Held(resident, set())
        held.drivers.add(order.driver)
        return Built(held.resident.name, socket.gethostname(), os.getpid())


def _require_own_process(order: Order) -> None:
    """Refuse a worker that is a thread of the driver or a fork of it.

    Raises:
        WorkersError: When it is.
    """
    here = (socket.gethostname(), os.getpid())
    if here == order.process:
        raise WorkersError(
            "the workers are threads of the driver's own process, which share torch's settings, "
            "random numbers and the model with each other",
            hint=f"use workers that are processes: {_SPAWN}",
        )
    if (order.process[0], _IMPORTED_IN) == order.process:
        raise WorkersError(
            "the workers are forks of the driver, in which torch's threads and GPUs do not work",
            hint=f"start them with spawn: {_SPAWN}",
        )


def evaluate(token: str, driver: str, task: Task) -> Answer:
    """Evaluate a task with the problem that is held here.

    A task that is sent again, because its answer was lost on the way, is not evaluated again.

    Args:
        token: That of the order.
        driver: That of the order.
        task: The task.
    """
    with _turn:
        held = _held.get(token)
        if held is None:
            return Missing()
        last = held.last.get(driver)
        if last is not None and last[0] == task:
            return last[1]
        try:
            outcome = _within_limit(held.resident, task)
        except MapBoError as error:
            return Refused(error)
        except Exception as error:
            return Refused(_unforeseen(f"{task.words} failed outside its evaluator", error))
        held.last[driver] = (task, outcome)
        return outcome


def evaluate_or_build(order: Order, task: Task) -> Answer:
    """Evaluate a task in whatever process of an executor this is, and build the problem first."""
    built = build(order, alone=True)
    return evaluate(order.token, order.driver, task) if isinstance(built, Built) else built


def forget(token: str, driver: str) -> None:
    """Let go of a problem that no other driver uses."""
    with _turn:
        held = _held.get(token)
        if held is not None:
            held.drivers.discard(driver)
            held.last.pop(driver, None)
            if not held.drivers:
                del _held[token]


def _within_limit(resident: Resident, task: Task) -> Outcome:
    """Evaluate; where no signal can interrupt it, what came too late is failed afterwards."""
    if task.timeout is None or threading.current_thread() is threading.main_thread():
        return resident.evaluate(task)
    start = time.perf_counter()
    outcome = resident.evaluate(dataclasses.replace(task, timeout=None))
    if time.perf_counter() - start <= task.timeout:
        return outcome
    row = outcome.observations
    late = Observations.failed(row.X, row.metrics, f"it took longer than {task.timeout:g} s")
    return dataclasses.replace(outcome, observations=dataclasses.replace(late, cost=row.cost))


def _unforeseen(what: str, error: Exception) -> WorkersError:
    return WorkersError(f"{what}: {type(error).__name__}: {first_line(error)}", hint=_RESIDENT_HINT)
