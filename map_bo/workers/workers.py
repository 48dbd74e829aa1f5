"""What workers are: they hold a problem, take rows to evaluate, and give outcomes back.

A message is a few numbers in either direction; what a worker holds may be gigabytes that take
minutes to load. So workers live as long as the run, and rows travel to them. Only the driver of the
run writes its record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

from map_bo.data import Observations
from map_bo.examples.sets import Part
from map_bo.problems.problem import Problem

__all__ = [
    "DescribesWorkers",
    "KeepsLogs",
    "Key",
    "Kind",
    "Outcome",
    "Settled",
    "Task",
    "WorkerSettings",
    "Workers",
]

Kind = Literal["index", "verify", "probe"]
"""Of which part of a run a row is: the search, the verification, or the probes of a nested run."""

Key = tuple[str, str, int | str, int, int]
"""What tells an attempt from every other: node, kind, row, attempt and seed."""


@dataclass(frozen=True)
class Task:
    """One attempt to evaluate one row; plain data, so that it travels anywhere.

    Attributes:
        kind: Which part of the run the row belongs to.
        row: Its number there.
        attempt: How often it has failed before.
        x: Its ``d`` coefficients, exactly.
        seed: Seed of the evaluation's generator: the same wherever it is evaluated.
        metrics: Names of the metrics to measure; None for all.
        timeout: Seconds that it may take; None for no limit.
        node: Of a nested run, whose evaluation it is.
        parts: Which examples to score, by positions in the orders of their evaluators; None for
            all, as the problem measures them.
        order: The seed that these orders are drawn by.
    """

    kind: Kind
    row: int | str
    attempt: int
    x: tuple[float, ...]
    seed: int
    metrics: tuple[str, ...] | None = None
    timeout: float | None = None
    node: str = ""
    parts: tuple[Part, ...] | None = None
    order: int = 0

    @property
    def key(self) -> Key:
        """What tells this attempt from every other, so that a late or doubled result is known."""
        return (self.node, self.kind, self.row, self.attempt, self.seed)

    @property
    def point(self) -> Tensor:
        """The ``d`` coefficients."""
        return torch.tensor(self.x, dtype=torch.float64)

    @property
    def words(self) -> str:
        """What the row is called in messages."""
        if self.kind == "verify":
            return f"verifying front point {self.row}"
        if self.kind == "probe":
            return f"probe {self.row}"
        return f"evaluation {int(self.row) + 1}"

    @classmethod
    def of(
        cls,
        kind: Kind,
        row: int | str,
        attempt: int,
        x: Tensor,
        *,
        generator: Generator,
        metrics: Sequence[str] | None = None,
        timeout: float | None = None,
        node: str = "",
        parts: Sequence[Part] | None = None,
        order: int = 0,
    ) -> Task:
        """Return the task of a row (``d``), which is evaluated with this generator."""
        return cls(
            kind,
            row,
            attempt,
            tuple(x.double().tolist()),
            generator.initial_seed(),
            None if metrics is None else tuple(metrics),
            timeout,
            node,
            None if parts is None else tuple(parts),
            order,
        )


@dataclass(frozen=True, eq=False)
class Outcome:
    """What came of a task.

    Attributes:
        key: That of the task.
        observations: One row, which is a failed one where anything went wrong.
        worker: Name of the worker that evaluated it; empty in the driver's own process.
        lost: Whether the worker died, hung or went out of reach in it, so that the failure may
            be the machine's and not the row's.
    """

    key: Key
    observations: Observations
    worker: str = ""
    lost: bool = False


@runtime_checkable
class Workers(Protocol):
    """Workers that hold a problem. Futures give an :class:`Outcome`; a worker's death is one too.

    A future raises only what makes every further evaluation fail as well: a problem that cannot be
    built, a cluster out of reach, a user's interrupt.
    """

    @property
    def size(self) -> int:
        """How many tasks are evaluated at the same time; it may change while a cluster grows."""
        ...

    @property
    def local(self) -> bool:
        """Whether rows are evaluated in the driver's process, by its own problem."""
        ...

    def submit(self, task: Task) -> Future[Outcome]:
        """Take a task; more than ``size`` of them wait in their order."""
        ...

    def running(self) -> Sequence[tuple[str, Task, float]]:
        """Return which worker evaluates what, and for how many seconds, as far as it is known."""
        ...

    def close(self, *, abandon: bool = False) -> None:
        """End the workers: when they are idle, or at once where what they do is ``abandon``ed."""
        ...


@runtime_checkable
class DescribesWorkers(Protocol):
    """Workers that say what they are, for the summary of a run."""

    def describe(self) -> Mapping[str, Any]:
        """Return plain data, such as their kind and their threads."""
        ...


@runtime_checkable
class WorkerSettings(Protocol):
    """Settings of workers, which open them over a problem."""

    @property
    def count(self) -> int | None:
        """How many workers there will be; None where a cluster decides."""
        ...

    def open(self, problem: Problem) -> Workers:
        """Start the workers, each with the problem built and prepared.

        Raises:
            WorkersError: When they cannot be started, or hold another problem than the driver.
            ConfigError: When the problem cannot be built elsewhere; the hint says how it can.
        """
        ...


@runtime_checkable
class KeepsLogs(Protocol):
    """Settings of workers that can write what workers print to files."""

    def with_logs(self, folder: str | Path) -> WorkerSettings:
        """Return the settings with a folder for logs, unless they have one already."""
        ...


@dataclass(frozen=True, eq=False)
class Settled:
    """A task that has ended: the task, and its outcome."""

    task: Task
    outcome: Outcome
