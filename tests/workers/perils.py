"""A problem that does to its worker whatever its first coefficient asks for."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from map_bo.data import Metric, Observations
from map_bo.space import CoefficientSpace
from map_bo.workers.workers import Task

WAYS = (
    *("nothing", "segfault", "exit", "abort", "stop", "hang"),
    *("deaf", "raise", "exhaust", "swallow", "slow"),
)


@dataclass(frozen=True)
class Perils:
    """Two metrics with noise; ``x[0]`` is the number of a way, in tenths."""

    noise: float = 0.1
    unbuildable: bool = False

    @property
    def space(self) -> CoefficientSpace:
        return CoefficientSpace(("way", "c"), (0.0, 0.0), (2.0, 1.0))

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (Metric("one", kind="unbounded"), Metric("two", kind="unbounded"))

    def describe(self) -> dict[str, object]:
        return {"type": "Perils", "noise": self.noise}

    def prepare(self) -> None:
        if self.unbuildable:
            raise OSError("no such weights")

    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        X = self.space.check(X)
        meet(WAYS[round(10 * float(X[0, 0]))])
        noise = self.noise * torch.rand(1, 2, generator=generator, dtype=torch.float64)
        return Observations(X, torch.stack([X[:, 1], -X[:, 1]], -1) + noise, self.metrics)


def meet(way: str) -> None:
    if way == "segfault":
        ctypes.string_at(0)
    elif way == "exit":
        os._exit(0)
    elif way == "abort":
        os.abort()
    elif way == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif way == "hang":
        while True:
            time.sleep(1)
    elif way == "deaf":  # as native code with the interpreter's lock
        ctypes.PyDLL(None).sleep(600)
    elif way == "raise":
        raise ValueError("no such answer")
    elif way == "exhaust":
        raise MemoryError("no room")
    elif way == "swallow":
        while True:
            try:
                time.sleep(600)
            except BaseException:
                continue
    elif way == "slow":
        time.sleep(1.5)


def task(
    way: str = "nothing",
    row: int = 0,
    *,
    c: float = 0.5,
    timeout: float | None = None,
    metrics: tuple[str, ...] | None = None,
) -> Task:
    """Return a task in which this happens."""
    return Task(
        "index", row, 0, (WAYS.index(way) / 10, c), 97 * WAYS.index(way) + row, metrics, timeout
    )
