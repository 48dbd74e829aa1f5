"""A problem whose evaluations go wrong as their first coefficient says."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time

import torch
from torch import Generator, Tensor

import map_bo
from map_bo.data import Metric, Observations
from map_bo.errors import MergeError
from map_bo.problems.problem import Problem

TROUBLES = (
    "none",
    "segfault",
    "leave with 0",
    "leave with 3",
    "abort",
    "kill",
    "hang with signals blocked",
    "swallow",
    "sleep",
    "stop",
    "memory",
    "raise",
    "interrupt",
    "set-up",
)


SIGN = 33 / 64  # second coefficient of points with troubles


def point(trouble: str = "none", second: float = SIGN) -> tuple[float, float]:
    """Return the coefficients at which an evaluation has a trouble."""
    return TROUBLES.index(trouble) / 16, second


def do(trouble: str) -> None:
    """Get into a trouble."""
    match trouble:
        case "segfault":
            ctypes.string_at(0)
        case "leave with 0" | "leave with 3":
            os._exit(int(trouble[-1]))
        case "abort":
            os.abort()
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang with signals blocked":
            signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
            time.sleep(100)
        case "swallow":
            until = time.monotonic() + 100
            while time.monotonic() < until:
                with contextlib.suppress(BaseException):
                    time.sleep(100)
        case "sleep":
            time.sleep(100)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "memory":
            bytearray(20_000_000_000)
        case "raise":
            raise RuntimeError("no such layer")
        case "interrupt":
            raise KeyboardInterrupt
        case "set-up":
            raise MergeError("the checkpoint does not fit")


class Troubled:
    """The distance to a point and a metric with noise, where nothing goes wrong."""

    space = map_bo.CoefficientSpace(("a", "b"), (0.0, 0.0), (1.0, 1.0))
    metrics = (Metric("near"), Metric("noisy"))

    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        if float(X[0, 1]) == SIGN:
            do(TROUBLES[round(float(X[0, 0]) * 16)])
        near = 1 - (X - 0.4).square().mean(-1)
        noise = torch.rand(len(X), generator=generator, dtype=torch.float64)
        return Observations(X, torch.stack([near, (near + noise) / 2], -1), self.metrics)


class Unbuildable(Troubled):
    """Cannot be built again."""

    def __init__(self, trouble: str, where: int | None = None) -> None:
        if where is not None and where != os.getpid():
            do(trouble)
        self.trouble, self.where = trouble, os.getpid() if where is None else where

    def __reduce__(self) -> tuple[object, ...]:
        return Unbuildable, (self.trouble, self.where)


def make_troubled() -> Problem:
    return Troubled()
