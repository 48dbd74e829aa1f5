"""Evaluators: scoring one model, with the uncertainty of the score.

The ready-made ones are found here by name, ``map_bo.evaluators.accuracy``; each is imported when it
is first asked for, so that what one of them needs is not needed by the others.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "ExampleEvaluator": "map_bo.evaluators.examples",
    "SeveralMetrics": "map_bo.evaluators.metrics",
    "accuracy": "map_bo.evaluators.evaluator",
    "mean_loss": "map_bo.evaluators.evaluator",
    "mean_probability": "map_bo.evaluators.evaluator",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_HOME)
