"""The world that an evaluation finds, and finds again: state of torch and of the process.

Evaluators are other people's programs. What one of them changes outside the model (gradients
switched off, a default device, the working directory, a seed) must reach neither the next evaluator
nor the run nor the caller, and what the caller has set must not reach the run's own maths:

- `isolated` surrounds one evaluator: it works in the world of the caller, its random numbers are
  seeded, and afterwards everything in the tables below is as it was. What cannot be put back is an
  error with its reason.
- `known_numerics` surrounds computations of the package's own: whatever the caller has switched,
  they find gradients, float32 as the default dtype and the CPU as the default device.
- `own_maths` surrounds a run's proposals, fits and fronts: known numerics, one thread at a time.

The state of the model itself is kept by :mod:`map_bo.merging.vectors.module_state`.
"""

from __future__ import annotations

import inspect
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from map_bo.errors import EvaluationError
from map_bo.evaluators.isolation.global_state import (
    Devices,
    World,
    read_anomaly,
    read_autocast,
    seed_everything,
    write_anomaly,
    write_autocast,
)

__all__ = [
    "TimeLimitExceededError",
    "callers_dtype",
    "callers_settings",
    "callers_world",
    "isolated",
    "known_numerics",
    "own_maths",
    "stops_the_process",
]

_NUMPY_ERRORS = np.geterr()


class TimeLimitExceededError(BaseException):
    """An evaluation took longer than its limit.

    Like ``KeyboardInterrupt`` it is not an ``Exception``, so that an evaluator that catches every
    exception and carries on cannot swallow it.
    """


def stops_the_process(error: BaseException) -> bool:
    """Return whether an exception is meant for the process, not a failure of an evaluator.

    So are an interrupt, a time limit, and what a signal handler of the process raises (as some do
    that turn SIGTERM into ``SystemExit``). ``sys.exit()`` in an evaluator is a failure of it.
    """
    if isinstance(error, KeyboardInterrupt | TimeLimitExceededError):
        return True
    if isinstance(error, Exception):
        return False
    handlers = {
        inspect.unwrap(handler).__code__
        for number in signal.valid_signals()
        if inspect.isroutine(handler := signal.getsignal(number)) and not inspect.isbuiltin(handler)
    }
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code in handlers:
            return True
        trace = trace.tb_next
    return False


# Numerics: what computations in torch and numpy depend on, thread by thread except for the dtype.


@dataclass(frozen=True)
class _Numerics:
    """What the results of computations depend on.

    Attributes:
        inference: Whether inference mode is on.
        grad: Whether gradients are on.
        autocast: For each kind of device, whether it is on and to which dtype.
        dtype: The default dtype.
        devices: The default device.
        errors: What numpy does about overflow and the like.
        anomaly: Whether torch looks for anomalies in gradients, and whether for NaN.
    """

    inference: bool
    grad: bool
    autocast: tuple[tuple[bool, torch.dtype], ...]
    dtype: torch.dtype
    devices: Devices
    errors: dict[str, Any]
    anomaly: tuple[bool, bool]

    @classmethod
    def read(cls) -> _Numerics:
        return cls(
            torch.is_inference_mode_enabled(),
            torch.is_grad_enabled(),
            read_autocast(),
            torch.get_default_dtype(),
            Devices.read(),
            dict(np.geterr()),
            read_anomaly(),
        )

    def known(self) -> _Numerics:
        """Return what the package's own computations rest on."""
        return replace(
            self,
            inference=False,
            grad=True,
            autocast=tuple((False, dtype) for _, dtype in self.autocast),
            dtype=torch.float32,
            devices=self.devices.without(),
            errors=dict(_NUMPY_ERRORS),
            anomaly=(False, True),
        )

    def write(self) -> None:
        """Set all but inference mode, which a guard has to surround."""
        torch.set_grad_enabled(self.grad)
        write_autocast(self.autocast)
        if torch.get_default_dtype() != self.dtype:
            torch.set_default_dtype(self.dtype)  # noqa: TID251 (this is where it is put back)
        self.devices.write()
        if np.geterr() != self.errors:
            np.seterr(**self.errors)
        if read_anomaly() != self.anomaly:
            write_anomaly(self.anomaly)


@contextmanager
def _under(wanted: _Numerics) -> Iterator[None]:
    found = _Numerics.read()
    # The guard also puts back a mode that somebody entered inside and never left.
    with torch.inference_mode(wanted.inference):
        try:
            wanted.write()
            yield
        finally:
            found.write()


class _ThisThread(threading.local):
    """What the package has set up in this thread.

    Attributes:
        caller: The numerics of the caller while those of the package are set.
        depth: How many blocks of `own_maths` this thread is in.
    """

    caller: _Numerics | None = None
    depth: int = 0


_here = _ThisThread()
_one_at_a_time = threading.Lock()


def _after_fork() -> None:
    # The thread that held the lock may not exist in a forked process.
    global _one_at_a_time
    _one_at_a_time = threading.Lock()
    if _here.depth:
        _one_at_a_time.acquire()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def known_numerics() -> Iterator[None]:
    """Set up what the package's own computations rest on, and give the caller's state back.

    Gradients on, inference mode, autocast and anomaly detection off, float32 as the default dtype,
    no default device, numpy's usual treatment of overflow. Usable as a decorator.
    """
    if _here.caller is not None:
        yield
        return
    caller = _Numerics.read()
    _here.caller = caller
    try:
        with _under(caller.known()):
            yield
    finally:
        _here.caller = None


@contextmanager
def own_maths() -> Iterator[None]:
    """Set up `known_numerics` and keep other threads' runs out of their own maths meanwhile.

    The libraries that fits and acquisitions use have settings and random numbers that all threads
    share; two runs in two threads take turns, and so each proposes what it would alone. While an
    evaluator is at work, others may. Usable as a decorator.
    """
    if not _here.depth:
        _one_at_a_time.acquire()
    _here.depth += 1
    try:
        with known_numerics():
            yield
    finally:
        _here.depth -= 1
        if not _here.depth:
            _one_at_a_time.release()


@contextmanager
def callers_world() -> Iterator[None]:
    """Go back to the caller's numerics for a while, inside `known_numerics` or `own_maths`."""
    caller, depth = _here.caller, _here.depth
    if caller is None:
        yield
        return
    _here.caller, _here.depth = None, 0
    if depth:
        _one_at_a_time.release()
    try:
        with _under(caller):
            yield
    finally:
        if depth:
            _one_at_a_time.acquire()
        _here.caller, _here.depth = caller, depth


def callers_dtype() -> torch.dtype:
    """Return the caller's default dtype, inside `known_numerics` or outside."""
    return torch.get_default_dtype() if _here.caller is None else _here.caller.dtype


def callers_settings() -> str:
    """Return what of the caller's settings a model's outputs depend on, in words."""
    caller = _here.caller or _Numerics.read()
    matrices = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    return repr((caller.dtype, caller.autocast, *matrices))


@contextmanager
def _turn() -> Iterator[None]:
    """Hold the lock for a moment: shared state is not changed under another thread's maths."""
    if _here.depth:
        yield
        return
    with _one_at_a_time:
        yield


@contextmanager
def isolated(what: str, seed: int) -> Iterator[None]:
    """Surround one evaluation: what it does to torch and to the process is undone afterwards.

    It runs under the numerics of the caller, with the global generators of torch, numpy and Python
    seeded, so that what it draws depends on the seed alone.

    Args:
        what: What is evaluated, to begin an error with, such as ``"evaluator 'math'"``.
        seed: Seed of the global generators.

    Raises:
        EvaluationError: When something that was changed cannot be put back, and the block itself
            raised nothing.
    """
    with callers_world():
        with _turn():
            before = World()
        try:
            with _turn():
                seed_everything(seed)
            torch.clear_autocast_cache()  # it holds casts of weights that have been replaced
            with torch.inference_mode(torch.is_inference_mode_enabled()):
                torch.set_grad_enabled(before.grad)
                yield
        except BaseException:
            with _turn():
                before.restore()
            raise
        with _turn():
            troubles = before.restore()
        if troubles:
            raise EvaluationError(
                f"{what} left behind what cannot be undone: {'; '.join(troubles)}",
                hint="let it leave the process as it found it",
            )
