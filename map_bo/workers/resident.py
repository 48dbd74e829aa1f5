"""What lives in a worker: the problem, built there, prepared, and found to be the driver's."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import torch

import map_bo
from map_bo.data import Metric
from map_bo.errors import WorkersError, listed
from map_bo.evaluators.isolation.world import callers_world
from map_bo.problems.problem import (
    Preparable,
    Problem,
    description_of,
    digests_of_examples,
)
from map_bo.rng import make_generator
from map_bo.tracking.codec import encode_metric
from map_bo.workers.evaluation import evaluate_row, measuring
from map_bo.workers.recipe import Recipe
from map_bo.workers.workers import Outcome, Task

__all__ = ["EstimatesMemory", "MapsRows", "OnDevice", "Releases", "Resident", "identity_of_problem"]

_PATHS = frozenset({"source", "path", "directory", "folder"})  # where files lie is no identity


@runtime_checkable
class OnDevice(Protocol):
    """A problem that lives on a device, and can live on another."""

    @property
    def device(self) -> torch.device:
        """Where it lives."""
        ...

    def on(self, device: torch.device | str) -> Problem:
        """Return the same problem on another device."""
        ...


@runtime_checkable
class MapsRows(Protocol):
    """A problem whose largest part several processes can share."""

    def with_mapped_rows(self) -> Problem:
        """Return the same problem with that part mapped from a file; the numbers are the same."""
        ...


@runtime_checkable
class EstimatesMemory(Protocol):
    """A problem that can tell before it is prepared what that will take."""

    def memory(self) -> int:
        """Return about how many bytes it will take on its device."""
        ...


@runtime_checkable
class Releases(Protocol):
    """A problem that can give back what it has prepared."""

    def release(self) -> None:
        """Do so; it is prepared again when it is needed."""
        ...


def identity_of_problem(problem: Problem) -> dict[str, str]:
    """Return a digest of each part by which a problem is recognised, wherever its files lie.

    Parts are the version of map_bo, the space, the metrics, what the problem says of itself (of a
    merged model: base, each expert, operator), and the examples of evaluators.

    Args:
        problem: Any; its files are read, and it is prepared where its evaluators have examples.
    """
    told = dict(description_of(problem))
    parts: dict[str, Any] = {
        "the version of map_bo": map_bo.__version__,
        "space": told.pop("space", None) or problem.space.describe(),
        "metrics": [encode_metric(metric) for metric in problem.metrics],
    }
    for key, value in told.items():
        if key == "experts" and isinstance(value, Mapping):
            parts |= {f"expert {name}": part for name, part in value.items()}
        elif key not in parts and key != "mapped":
            parts[key] = value
    for name, digest in digests_of_examples(problem).items():
        parts[f"examples of {name}"] = digest
    return {name: _digest(part) for name, part in parts.items()}


def _digest(part: Any) -> str:
    text = json.dumps(_without_paths(part), sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _without_paths(part: Any) -> Any:
    if isinstance(part, Mapping):
        return {str(key): _without_paths(value) for key, value in part.items() if key not in _PATHS}
    return [_without_paths(one) for one in part] if isinstance(part, list | tuple) else part


@dataclass(eq=False)
class Resident:
    """The problem in a worker; made once there, and evaluating whatever is sent.

    Attributes:
        problem: The problem.
        name: Name of the worker: host, process and device.
    """

    problem: Problem
    name: str

    def __post_init__(self) -> None:
        self._parts: dict[tuple[str, ...], Problem] = {}

    @classmethod
    def build(
        cls,
        recipe: Recipe,
        *,
        expected: Mapping[str, str] | None = None,
        device: str | None = None,
        label: str = "",
        sharing: int = 1,
        mapped: bool = True,
    ) -> Self:
        """Build the problem by its recipe, prepare it, and check that it is the driver's.

        Args:
            recipe: How to build it.
            expected: The driver's :func:`identity_of_problem`; None checks nothing.
            device: Where it is to live, such as ``"cuda:0"``; None leaves that to the problem.
            label: What the device is called in the worker's name, where that is another name.
            sharing: How many workers share the device.
            mapped: Whether to share what can be shared with other processes of this machine.

        Raises:
            WorkersError: When it cannot be built, does not fit on the device, or is another one.
            MapBoError: What the problem itself refuses.
        """
        with callers_world():
            problem = recipe.build()
            name = f"{socket.gethostname()}/{os.getpid()}"
            if device is not None and isinstance(problem, OnDevice):
                problem = problem.on(device)
            if isinstance(problem, OnDevice) and problem.device.type != "cpu":
                name += f"/{label or problem.device}"
                _require_room(problem, problem.device, sharing)
            elif mapped and isinstance(problem, MapsRows):
                problem = problem.with_mapped_rows()
            if expected is not None:
                _require_same(expected, identity_of_problem(problem), name)
            if isinstance(problem, Preparable):
                problem.prepare()
        return cls(problem, name)

    def evaluate(self, task: Task) -> Outcome:
        """Evaluate a task; what goes wrong with its row is a failed outcome.

        Raises:
            MapBoError: What makes every further evaluation fail as well.
        """
        row = evaluate_row(
            self._measuring(task),
            task.point,
            timeout=task.timeout,
            generator=make_generator(task.seed),
        )
        return Outcome(task.key, row, self.name)

    def metrics(self, task: Task) -> tuple[Metric, ...]:
        """Return the metrics that a task asks for."""
        return self._measuring(task).metrics

    def _measuring(self, task: Task) -> Problem:
        if task.parts is not None or task.metrics is None:
            return measuring(self.problem, task)
        if task.metrics not in self._parts:
            self._parts[task.metrics] = measuring(self.problem, task)
        return self._parts[task.metrics]


def _require_same(expected: Mapping[str, str], found: Mapping[str, str], worker: str) -> None:
    """Refuse a problem that is not the driver's.

    Raises:
        WorkersError: Naming the parts that differ.
    """
    names = [*expected, *(name for name in found if name not in expected)]
    differ = [name for name in names if expected.get(name) != found.get(name)]
    if not differ:
        return
    digests = ", ".join(
        f"{name} (driver {expected.get(name, 'none')}, worker {found.get(name, 'none')})"
        for name in differ[:4]
    )
    version = "the version of map_bo" in differ
    raise WorkersError(
        f"worker {worker} holds another problem than the driver: {listed(differ)} differ by "
        f"digest: {digests}",
        hint="install the same version of map_bo for driver and workers"
        if version
        else "give all workers the same files, settings and data as the driver",
    )


def _require_room(problem: Problem, device: torch.device, sharing: int) -> None:
    """Refuse more workers than the memory of a device allows.

    Raises:
        WorkersError: When the estimate exceeds it, or there is no such device.
    """
    if device.type != "cuda":
        return
    try:
        _, total = torch.cuda.mem_get_info(device)
    except (RuntimeError, AssertionError) as error:
        raise WorkersError(
            f"device {device} cannot be used: {str(error).splitlines()[0]}",
            hint="name devices that this machine has, such as devices=['cuda:0']",
        ) from error
    if not isinstance(problem, EstimatesMemory):
        return
    need = problem.memory()
    if need * sharing > total:
        most = total // need
        raise WorkersError(
            f"{sharing} workers on {device} need about {need * sharing / 1e9:.1f} GB for weights "
            f"alone, and it has {total / 1e9:.1f} GB",
            hint=f"use at most {most} workers for each such device, or store task vectors in "
            "bfloat16"
            if most
            else "store task vectors in bfloat16, or keep them on the CPU",
        )
