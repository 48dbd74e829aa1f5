"""The state of torch and of the process, to compare before and after."""

from __future__ import annotations

import gc
import locale
import logging
import os
import random
import signal
import sys
import warnings
from typing import Any

import numpy as np
import torch

__all__ = ["surroundings"]


def surroundings() -> dict[str, Any]:
    """Return the state of torch and of the process."""
    return {
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": torch.is_autocast_enabled("cpu"),
        "defaults": (torch.get_default_dtype(), torch.get_default_device()),
        "deterministic": torch.get_deterministic_debug_mode(),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "mkldnn": torch.backends.mkldnn.enabled,
        "anomaly": torch.is_anomaly_enabled(),
        "denormal": sys.float_info.min / 2,
        "random": (
            torch.default_generator.get_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),  # type: ignore[index]  # noqa: NPY002
        ),
        "signals": [signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGINT)],
        "timer": signal.getitimer(signal.ITIMER_REAL)[0] > 1,  # the time limit of the test
        "mask": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        "directory": os.getcwd(),
        "environment": dict(os.environ),
        "sys": (list(sys.argv), list(sys.path), sys.getrecursionlimit(), sys.excepthook),
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "warnings": (list(warnings.filters), warnings.showwarning),
        "logging": (logging.root.level, list(logging.root.handlers), logging.root.manager.disable),
        "logger": logging.getLogger("map_bo").level,
        "locale": locale.setlocale(locale.LC_ALL),
        "numpy": np.geterr(),
        "gc": (gc.isenabled(), gc.get_threshold()),
    }
