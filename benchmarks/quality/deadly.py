"""The digits problem with an evaluator in which the process sometimes dies; see `kill`.

What it does is said by the environment, not by the configuration, so that a run that dies and one
that does not are the same run:

    MAP_BO_DEADLY_CALLS   a file to which every call of an evaluator appends one byte
    MAP_BO_DEADLY_EVERY   the process dies in every call whose number is a multiple of this
    MAP_BO_DEADLY_EXPERT  the process dies whenever the model is this expert (or the base), unmixed
    MAP_BO_DEADLY_HOW     how it dies then: segfault, abort or exit
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from map_bo.evaluators.evaluator import Evaluator, Returned
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.problems.zoo.digits import DigitsZoo, digits_problem

__all__ = ["WAYS", "calls", "deadly_digits"]

WAYS = ("segfault", "abort", "exit")


def die(how: str) -> None:
    """End this process as native code does: no handler, no clean-up, no word."""
    if how == "segfault":
        ctypes.string_at(0)
    elif how == "abort":
        os.abort()
    else:
        os._exit(0)  # the exit status of a success


def calls(path: Path) -> int:
    """Return how often evaluators were called."""
    return path.stat().st_size if path.exists() else 0


@dataclass(frozen=True)
class _Deadly:
    """An evaluator, and when its process dies in it."""

    inner: Evaluator
    expert: Mapping[str, Tensor] | None

    def __call__(self, model: nn.Module) -> Returned:
        number = _count()
        every = int(os.environ.get("MAP_BO_DEADLY_EVERY", "0"))
        if every and number % every == 0:
            die(WAYS[(number // every - 1) % len(WAYS)])  # a segmentation fault first
        if self.expert is not None and _is(model, self.expert):
            die(os.environ["MAP_BO_DEADLY_HOW"])
        return self.inner(model)


def _count() -> int:
    file = os.open(os.environ["MAP_BO_DEADLY_CALLS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, b".")
        return os.fstat(file).st_size
    finally:
        os.close(file)


def _is(model: nn.Module, expert: Mapping[str, Tensor]) -> bool:
    return all(torch.allclose(p, expert[name]) for name, p in model.named_parameters())


def deadly_digits(**options: Any) -> MergedModelProblem:
    """Return `digits_problem` of these options, with evaluators in which the process may die."""
    problem = digits_problem(**options)
    name = os.environ.get("MAP_BO_DEADLY_EXPERT")
    files = DigitsZoo(options["experts"], epochs=options["epochs"]).checkpoints()
    expert = load_file({"base": files.base, **files.experts}[name]) if name else None
    problem._evaluators = {
        task: _Deadly(inner, expert) for task, inner in problem._evaluators.items()
    }
    return problem
