"""Global state of torch and of the process: how each part of it is read and put back."""

from __future__ import annotations

import gc
import locale
import logging
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn.modules import module as torch_modules
from torch.overrides import TorchFunctionMode
from torch.utils import _device as torch_device
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._python_dispatch import _pop_mode as _pop_dispatch_mode

from map_bo.errors import first_line
from map_bo.evaluators.isolation.descriptors import Directory, Streams

__all__ = [
    "Devices",
    "World",
    "read_anomaly",
    "read_autocast",
    "seed_everything",
    "write_anomaly",
    "write_autocast",
]

_DEVICE_TYPES = ("cpu", "cuda")

# Torch has no types for these.
_overrides: Any = torch.overrides
_cuda: Any = torch.cuda
_backends: Any = torch.backends


@dataclass(frozen=True)
class Devices:
    """The default device and other modes of torch's functions, the outermost first."""

    modes: tuple[TorchFunctionMode, ...]
    current: torch.device | None
    default: TorchFunctionMode | None

    @classmethod
    def read(cls) -> Devices:
        """Return those of this thread."""
        default = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
        modes = tuple(_overrides._get_current_function_mode_stack())
        return cls(modes, torch_device.CURRENT_DEVICE, default)

    def without(self) -> Devices:
        """Return the same without a default device."""
        kept = [mode for mode in self.modes if not isinstance(mode, torch_device.DeviceContext)]
        return Devices(tuple(kept), None, None)

    def write(self) -> None:
        """Make them those of this thread."""
        if self != Devices.read():
            while _overrides._get_current_function_mode_stack():
                _overrides._pop_mode()
            for mode in self.modes:
                _overrides._push_mode(mode)
            torch_device.CURRENT_DEVICE = self.current
            torch._GLOBAL_DEVICE_CONTEXT.device_context = self.default


def read_autocast() -> tuple[tuple[bool, torch.dtype], ...]:
    """Return, for CPU and CUDA, whether autocast is on in this thread and to which dtype."""
    return tuple(
        (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _DEVICE_TYPES
    )


def write_autocast(wanted: tuple[tuple[bool, torch.dtype], ...]) -> None:
    """Set what `read_autocast` returned."""
    for kind, (enabled, dtype) in zip(_DEVICE_TYPES, wanted, strict=True):
        if torch.is_autocast_enabled(kind) != enabled:
            torch.set_autocast_enabled(kind, enabled)
        if torch.get_autocast_dtype(kind) != dtype:
            torch.set_autocast_dtype(kind, dtype)


def read_anomaly() -> tuple[bool, bool]:
    """Return whether torch looks for anomalies in gradients, and whether for NaN."""
    return torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()


def write_anomaly(wanted: tuple[bool, bool]) -> None:
    """Set what `read_anomaly` returned."""
    torch.autograd.set_detect_anomaly(wanted[0], check_nan=wanted[1])


def seed_everything(seed: int) -> None:
    """Seed the global generators of torch, numpy and Python."""
    torch.default_generator.manual_seed(seed)
    if _cuda.is_initialized():
        _cuda.manual_seed_all(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002, TID251 (evaluators draw from it)
    random.seed(seed)


# The tables: how each part of the world is read and written.

_UNKNOWN = object()


@dataclass(frozen=True)
class _Part:
    """One part of the world: how it is read and written.

    Attributes:
        name: What it is, for messages.
        read: Returns its state, which is compared by ``==``.
        write: Puts a state back.
        always: Whether it is put back without a look: it cannot be compared, or was seeded.
        of_thread: Whether each thread has its own, or only the main thread can change it.
    """

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]
    always: bool = False
    of_thread: bool = False

    def state(self) -> Any:
        try:
            return self.read()
        except Exception:  # such as flags of torch that contradict each other
            return _UNKNOWN

    def restore(self, found: Any) -> str | None:
        """Put the state back; return why that failed, if it did."""
        if found is _UNKNOWN or (not self.always and self.state() == found):
            return None
        try:
            self.write(found)
        except Exception as error:
            return f"{self.name} ({type(error).__name__}: {first_line(error)})"
        return None


def _attribute(owner: Any, name: str, called: str) -> _Part:
    return _Part(called, lambda: getattr(owner, name), lambda value: setattr(owner, name, value))


def _read_generators() -> tuple[Any, ...]:
    cuda = _cuda.get_rng_state_all() if _cuda.is_initialized() else None
    state = torch.default_generator.get_state()
    return state, np.random.get_state(), random.getstate(), cuda  # noqa: NPY002


def _write_generators(found: tuple[Any, ...]) -> None:
    torch.default_generator.set_state(found[0])
    np.random.set_state(found[1])  # noqa: NPY002
    random.setstate(found[2])
    if found[3] is not None:
        _cuda.set_rng_state_all(found[3])


def _read_modes() -> tuple[Any, ...]:
    return (torch.is_grad_enabled(), read_autocast(), torch.is_autocast_cache_enabled())


def _write_modes(found: tuple[Any, ...]) -> None:
    torch.set_grad_enabled(found[0])
    write_autocast(found[1])
    torch.set_autocast_cache_enabled(found[2])


def _read_dispatch() -> int:
    return len(_get_current_dispatch_mode_stack())


def _write_dispatch(found: int) -> None:
    while _read_dispatch() > found:
        _pop_dispatch_mode()
    if _read_dispatch() < found:
        raise RuntimeError("it left a mode that the caller had entered")


def _flushes_denormals() -> bool:
    return sys.float_info.min / 2 == 0.0


_HOOKS = [name for name in vars(torch_modules) if name.startswith("_global_")]


def _read_hooks() -> list[tuple[Any, Any]]:
    values = [getattr(torch_modules, name) for name in _HOOKS]
    return [(value, dict(value) if isinstance(value, dict) else value) for value in values]


def _write_hooks(found: list[tuple[Any, Any]]) -> None:
    for name, (value, content) in zip(_HOOKS, found, strict=True):
        setattr(torch_modules, name, value)
        if isinstance(value, dict):
            value.clear()
            value.update(content)


def _read_functions() -> dict[str, Any]:
    return dict(vars(torch.nn.functional))


def _write_functions(found: dict[str, Any]) -> None:
    for name, value in found.items():
        if vars(torch.nn.functional).get(name, _UNKNOWN) is not value:
            setattr(torch.nn.functional, name, value)
    for name in vars(torch.nn.functional).keys() - found.keys():
        delattr(torch.nn.functional, name)


def _precision(owner: Any, called: str) -> _Part:
    return _attribute(owner, "fp32_precision", f"the float32 precision of {called}")


def _scaled_dot_product() -> tuple[bool, ...]:
    cuda = _backends.cuda
    return (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )


def _set_scaled_dot_product(found: tuple[bool, ...]) -> None:
    cuda = _backends.cuda
    cuda.enable_flash_sdp(found[0])
    cuda.enable_mem_efficient_sdp(found[1])
    cuda.enable_math_sdp(found[2])
    cuda.enable_cudnn_sdp(found[3])


def _read_cuda_device() -> int | None:
    return _cuda.current_device() if _cuda.is_initialized() else None


def _write_cuda_device(found: int | None) -> None:
    if found is not None:
        _cuda.set_device(found)


_TORCH = (
    _Part("torch's functional interface", _read_functions, _write_functions),
    _Part("torch's dispatch modes", _read_dispatch, _write_dispatch, of_thread=True),
    _Part("torch's function modes", Devices.read, Devices.write, of_thread=True),
    _Part("gradients and autocast", _read_modes, _write_modes, of_thread=True),
    _Part(
        "the default dtype",
        torch.get_default_dtype,
        torch.set_default_dtype,  # noqa: TID251
    ),
    _Part(
        "deterministic algorithms",
        torch.get_deterministic_debug_mode,
        torch.set_deterministic_debug_mode,
    ),
    _Part("the number of threads", torch.get_num_threads, torch.set_num_threads, of_thread=True),
    _Part(
        "the precision of matrix products",
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    _precision(_backends, "torch"),
    _precision(_backends.mkldnn.matmul, "products"),
    _precision(_backends.mkldnn.conv, "convolutions"),
    _precision(_backends.mkldnn.rnn, "recurrent layers"),
    _precision(_backends.cuda.matmul, "products on CUDA"),
    _precision(_backends.cudnn.conv, "convolutions on CUDA"),
    _precision(_backends.cudnn.rnn, "recurrent layers on CUDA"),
    *(
        _attribute(_backends.cudnn, name, f"cudnn.{name}")
        for name in ("enabled", "benchmark", "deterministic", "benchmark_limit")
    ),
    _attribute(_backends.mkldnn, "enabled", "mkldnn.enabled"),
    _attribute(_backends.mkldnn, "deterministic", "mkldnn.deterministic"),
    _Part("the kernels of attention", _scaled_dot_product, _set_scaled_dot_product),
    _Part("anomaly detection", read_anomaly, write_anomaly),
    _Part("denormal numbers", _flushes_denormals, torch.set_flush_denormal, of_thread=True),
    _Part("hooks of all modules", _read_hooks, _write_hooks),
    _Part("the CUDA device", _read_cuda_device, _write_cuda_device, of_thread=True),
    _Part("random states", _read_generators, _write_generators, always=True),
)


def _read_environment() -> dict[str, str]:
    return dict(os.environ)


def _write_environment(found: dict[str, str]) -> None:
    for name in os.environ.keys() - found.keys():
        del os.environ[name]
    for name, value in found.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
    if hasattr(time, "tzset"):
        time.tzset()


_SYSTEM = (
    "argv",
    "path",
    "meta_path",
    "path_hooks",
    "stdin",
    "stdout",
    "stderr",
    "displayhook",
    "excepthook",
)


def _read_system() -> list[tuple[Any, list[Any] | None]]:
    values = [getattr(sys, name) for name in _SYSTEM]
    return [(value, list(value) if isinstance(value, list) else None) for value in values]


def _write_system(found: list[tuple[Any, list[Any] | None]]) -> None:
    for name, (value, content) in zip(_SYSTEM, found, strict=True):
        setattr(sys, name, value)
        if content is not None:
            value[:] = content


def _read_closed() -> list[bool]:
    # A library may have put something in their place that cannot be asked.
    streams = (sys.stdin, sys.stdout, sys.stderr)
    return [isinstance(getattr(s, "closed", False), bool) and bool(s and s.closed) for s in streams]


def _write_closed(found: list[bool]) -> None:
    if any(now and not before for now, before in zip(_read_closed(), found, strict=True)):
        raise ValueError("it was closed")


def _read_warnings() -> tuple[Any, ...]:
    shown = (warnings.showwarning, warnings.formatwarning)
    return (_Same(warnings.filters), list(warnings.filters), *map(_Same, shown))


def _write_warnings(found: tuple[Any, ...]) -> None:
    warnings.filters = found[0].value
    warnings.filters[:] = found[1]  # type: ignore[index]
    warnings.showwarning, warnings.formatwarning = found[2].value, found[3].value
    with warnings.catch_warnings():  # makes warnings forget what they had decided by the others
        pass


@dataclass(frozen=True, eq=False)
class _Same:
    """Equal to another exactly when both hold the same object."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def _loggers() -> list[tuple[logging.Logger, tuple[Any, ...]]]:
    named = list(logging.Logger.manager.loggerDict.values())
    return [
        (each, (each.level, each.propagate, each.disabled, [*each.handlers], [*each.filters]))
        for each in (logging.root, *named)
        if isinstance(each, logging.Logger)
    ]


def _read_logging() -> tuple[Any, ...]:
    return logging.root.manager.disable, _loggers()


def _write_logging(found: tuple[Any, ...]) -> None:
    logging.disable(found[0])
    for each, (level, propagate, disabled, handlers, filters) in found[1]:
        if each.level != level:
            each.setLevel(level)
        each.propagate, each.disabled = propagate, disabled
        each.handlers[:], each.filters[:] = handlers, filters


def _read_locale() -> str:
    return locale.setlocale(locale.LC_ALL)


_SIGNALS = sorted(signal.valid_signals())


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _read_handlers() -> list[Any]:
    return [signal.getsignal(number) for number in _SIGNALS]


def _write_handlers(found: list[Any]) -> None:
    if not _in_main_thread():
        return  # elsewhere nobody can have changed one
    for number, handler in zip(_SIGNALS, found, strict=True):
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)


def _read_mask() -> set[Any]:
    return signal.pthread_sigmask(signal.SIG_BLOCK, ())


def _write_mask(found: set[Any]) -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, found)


_TIMERS = [
    getattr(signal, name)
    for name in ("ITIMER_REAL", "ITIMER_VIRTUAL", "ITIMER_PROF")
    if hasattr(signal, name)
]


_TIMER_SLACK = 0.02  # seconds


def _read_timers() -> tuple[float, list[tuple[float, float]]]:
    return time.monotonic(), [signal.getitimer(timer) for timer in _TIMERS]


def _write_timers(found: tuple[float, list[tuple[float, float]]]) -> None:
    passed = time.monotonic() - found[0]
    for timer, (left, interval) in zip(_TIMERS, found[1], strict=True):
        now, interval_now = signal.getitimer(timer)
        due = left - passed
        if not left:
            if now:
                signal.setitimer(timer, 0.0)
        elif timer != signal.ITIMER_REAL:  # it counts another time than that which passed
            if not now or interval != interval_now:
                signal.setitimer(timer, left, interval)
        elif interval != interval_now or (not interval and abs(now - due) > _TIMER_SLACK):
            signal.setitimer(timer, max(due, 1e-3), interval)


def _read_umask() -> int:
    found = os.umask(0o077)  # it can only be read by setting it: to one that gives nothing away
    os.umask(found)
    return found


def _read_printing() -> tuple[dict[str, Any], dict[str, Any]]:
    return dict(vars(torch._tensor_str.PRINT_OPTS)), dict(np.get_printoptions())


def _write_printing(found: tuple[dict[str, Any], dict[str, Any]]) -> None:
    vars(torch._tensor_str.PRINT_OPTS).update(found[0])
    np.set_printoptions(**found[1])


def _read_limits() -> list[tuple[int, tuple[int, int]]]:
    import resource

    numbers = [getattr(resource, n) for n in dir(resource) if n.startswith("RLIMIT_")]
    return [(number, resource.getrlimit(number)) for number in numbers]


def _write_limits(found: list[tuple[int, tuple[int, int]]]) -> None:
    import resource

    for number, limits in found:
        if resource.getrlimit(number) != limits:
            resource.setrlimit(number, limits)


def _read_garbage() -> tuple[Any, ...]:
    return gc.isenabled(), gc.get_threshold()


def _write_garbage(found: tuple[Any, ...]) -> None:
    (gc.enable if found[0] else gc.disable)()
    gc.set_threshold(*found[1])


_PARTS = (
    *_TORCH,
    _Part("the environment", _read_environment, _write_environment),
    _Part("attributes of sys", _read_system, _write_system),
    _Part("a standard stream", _read_closed, _write_closed),
    _Part("the recursion limit", sys.getrecursionlimit, sys.setrecursionlimit),
    _Part("the trace function", sys.gettrace, sys.settrace, of_thread=True),
    _Part("the profile function", sys.getprofile, sys.setprofile, of_thread=True),
    _Part("the switch interval", sys.getswitchinterval, sys.setswitchinterval),
    _Part("the umask", _read_umask, os.umask),
    _Part("print options", _read_printing, _write_printing),
    _Part("garbage collection", _read_garbage, _write_garbage),
    _Part("warning filters", _read_warnings, _write_warnings),
    _Part("logging", _read_logging, _write_logging),
    _Part("the locale", _read_locale, lambda found: locale.setlocale(locale.LC_ALL, found)),
    _Part("numpy's errors", np.geterr, lambda found: np.seterr(**found), of_thread=True),
    _Part("resource limits", _read_limits, _write_limits),
    _Part("signal handlers", _read_handlers, _write_handlers, of_thread=True),
    _Part("blocked signals", _read_mask, _write_mask, of_thread=True),
    _Part("timers", _read_timers, _write_timers, always=True, of_thread=True),
)


class World:
    """The state of torch and of the process at one moment.

    Reading and restoring take a fraction of a millisecond. While several threads evaluate, what
    they share is taken to be as the first of them found it, so that the last puts that back.
    """

    _inside: ClassVar[dict[int, list[World]]] = {}  # by thread, changed under `_turn` alone

    def __init__(self) -> None:
        thread = threading.get_ident()
        others = [worlds[0] for key, worlds in self._inside.items() if key != thread and worlds]
        mine = self._inside.setdefault(thread, [])
        base = (mine or others)[0] if others else None
        self.grad = torch.is_grad_enabled()
        self._streams: Streams = Streams() if base is None else base._streams.copy()
        self._directory: Directory = Directory() if base is None else base._directory.copy()
        self._found: list[Any] = [part.state() for part in _PARTS]
        if base is not None:
            self._found = [
                own if part.of_thread else shared
                for part, own, shared in zip(_PARTS, self._found, base._found, strict=True)
            ]
        mine.append(self)

    def restore(self) -> list[str]:
        """Put everything back, once; return what could not be, with the reason."""
        thread = threading.get_ident()
        self._inside[thread].remove(self)
        if not self._inside[thread]:
            del self._inside[thread]
        troubles = [self._directory.restore(), self._streams.restore()]
        troubles += [part.restore(it) for part, it in zip(_PARTS, self._found, strict=True)]
        return [trouble for trouble in troubles if trouble is not None]
