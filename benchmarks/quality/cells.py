"""Cells of the study, one file each: case, method and seed, with all that was seen and answered.

A file is written anew, atomically, at every checkpoint. A cell that was killed goes on from its
last checkpoint, and one that was run to a small budget goes on to a larger one; neither repeats
anything, because samplers depend on nothing but what was seen.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality.methods import Method
from map_bo.data import Metric, Observations

__all__ = ["SCHEMA", "Cell", "Checkpoint", "Record", "cell_path", "digest", "load", "save"]

SCHEMA = 1  # of what a cell measures; raise it when the protocol or a measure changes
_ARRAYS = ("predicted", "real", "chosen", "solved")
_SEEN = ("X", "Y", "Yvar", "counts", "cost")


@dataclass(frozen=True, order=True)
class Cell:
    """One run: a method on a case with a seed, up to a number of evaluations."""

    case: str
    method: str
    seed: int
    budget: int


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An answer after some evaluations, as scored against the truth.

    Attributes:
        numbers: Measures by name.
        predicted: ``k x m`` predicted gains of the answer's points, at most 100 of them.
        real: ``k x m`` their true gains.
        chosen: ``w x m`` true gains of the choice for each preference.
        solved: ``w x m`` the same with the surrogate solved for each preference, or ``None``.
        failure: Why there is no answer, or ``None``; arrays have no rows then.
    """

    numbers: Mapping[str, float]
    predicted: Tensor
    real: Tensor
    chosen: Tensor
    solved: Tensor | None = None
    failure: str | None = None


@dataclass(frozen=True, eq=False)
class Record:
    """What is kept of a cell.

    Attributes:
        about: Plain data: ``case`` and its ``version``, ``method``, ``seed``, ``digest``,
            ``budget`` reached and ``target``, ``family``, ``real_models``, ``d``, ``m``, and
            ``failure`` where the run broke off.
        seen: All evaluations, where one sequence serves all budgets.
        proposing: Cumulative seconds of proposals by number of evaluations.
        checkpoints: By number of evaluations.
        front: ``k x m`` gains of the analytic front, where the case has one (``direct`` only).
    """

    about: Mapping[str, Any]
    seen: Observations | None = None
    proposing: Mapping[int, float] = field(default_factory=dict)
    checkpoints: Mapping[int, Checkpoint] = field(default_factory=dict)
    front: Tensor | None = None


def digest(entry: Method, case: str, version: object, *, direct: int) -> str:
    """Return what makes two cells (of one seed) the same measurement, as 16 hex digits.

    Args:
        entry: The method, with the settings of its built parts.
        case: Name of the case.
        version: Version of the cases.
        direct: Evaluations of the direct search; they count for the direct search alone.
    """
    what = {"schema": SCHEMA, "case": case, "version": str(version), **entry.describe()}
    if entry.answer == "direct":
        what["direct"] = direct
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def cell_path(root: Path, cell: Cell, key: str) -> Path:
    """Return where a cell is kept."""
    name = "".join(c if c.isalnum() or c in "-+_" else "_" for c in cell.method)
    return root / cell.case / f"{name}-{cell.seed}-{key}.npz"


def save(path: Path, record: Record) -> None:
    """Write a record; the file is whole at every moment."""
    arrays: dict[str, Any] = {}
    plain: dict[str, Any] = {"about": dict(record.about), "checkpoints": {}}
    plain["proposing"] = {str(n): seconds for n, seconds in record.proposing.items()}
    if record.seen is not None:
        plain["metrics"] = [vars(metric) for metric in record.seen.metrics]
        plain["failures"] = list(record.seen.failures)
        arrays |= {f"seen/{name}": getattr(record.seen, name).numpy() for name in _SEEN}
    if record.front is not None:
        arrays["front"] = record.front.numpy()
    for n, answer in record.checkpoints.items():
        plain["checkpoints"][str(n)] = {"numbers": dict(answer.numbers), "failure": answer.failure}
        for name in _ARRAYS:
            value = getattr(answer, name)
            if value is not None:
                arrays[f"{n}/{name}"] = value.numpy().astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    with scratch.open("wb") as file:
        np.savez_compressed(file, plain=np.array(json.dumps(plain)), **arrays)
    os.replace(scratch, path)


def load(path: Path) -> Record | None:
    """Return the record of a file, ``None`` when there is none."""
    if not path.exists():
        return None
    with np.load(path) as file:
        plain = json.loads(str(file["plain"]))
        names = [name for name in file.files if name != "plain"]
        arrays = {name: torch.from_numpy(file[name]).double() for name in names}
    seen = None
    if "metrics" in plain:
        seen = Observations(
            **{name: arrays[f"seen/{name}"] for name in _SEEN},  # type: ignore[arg-type]
            metrics=tuple(Metric(**metric) for metric in plain["metrics"]),
            failures=tuple(plain["failures"]),
        )
    checkpoints = {
        int(n): Checkpoint(
            numbers=held["numbers"],
            failure=held["failure"],
            **{name: arrays.get(f"{n}/{name}") for name in _ARRAYS},  # type: ignore[arg-type]
        )
        for n, held in plain["checkpoints"].items()
    }
    proposing = {int(n): seconds for n, seconds in plain["proposing"].items()}
    return Record(plain["about"], seen, proposing, checkpoints, arrays.get("front"))
