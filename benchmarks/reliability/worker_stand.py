"""What trials of workers stand on: a problem whose evaluations leave traces, and a driver.

python -m benchmarks.reliability.worker_stand KIND FOLDER [--address A] [--count N] [...]

drives one run in FOLDER/run, or goes on with it: the process that trials kill. Proposals do not
depend on outcomes (Sobol's points), so every run of the same budget has the same evaluations,
whatever happened to its workers, and can be compared bit by bit with one that nobody disturbed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

import map_bo
from map_bo.app.record_commands import verdict_of
from map_bo.data import Metric, Observations
from map_bo.errors import MapBoError
from map_bo.loop.optimize import optimize
from map_bo.loop.reading import load_state
from map_bo.pareto.gradient import GradientSolver
from map_bo.problems.problem import Problem
from map_bo.samplers.designs.space_filling import Sobol
from map_bo.space import CoefficientSpace
from map_bo.surrogates.quadratic import Quadratic
from map_bo.workers.workers import WorkerSettings

__all__ = ["KINDS", "Traced", "driver_words", "faults_of", "lines", "traces"]

KINDS = ("processes", "ray", "dask")
RETRIES = 30  # so that no point is given up: its kills are fewer


@dataclass(frozen=True)
class Traced:
    """Two rough bowls; an evaluation takes its time, and writes which process began it.

    Attributes:
        folder: Where ``calls`` has a line for each evaluation that began, and where ``doom`` says
            how the process that finds it is to die.
        seconds: How long an evaluation takes.
    """

    folder: str
    seconds: float = 0.3

    @property
    def space(self) -> CoefficientSpace:
        return CoefficientSpace.box(("a", "b"))

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (Metric("near a", kind="unbounded"), Metric("far from b", "min", "loss"))

    def describe(self) -> dict[str, Any]:
        return {"type": "Traced"}

    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        folder = Path(self.folder)
        line = json.dumps([os.getpid(), generator.initial_seed(), time.time()])
        with (folder / "calls").open("a") as file:
            file.write(line + "\n")
        time.sleep(self.seconds * (0.5 + float(X[0, 0])))
        with suppress(FileNotFoundError):  # it has been found by one
            os.rename(folder / "doom", folder / f"doom-{os.getpid()}")
            die((folder / f"doom-{os.getpid()}").read_text())
        rough = (1e3 * X).sin()  # the same in every attempt, whose generators differ
        a, b = torch.eye(2, dtype=torch.float64)
        bowls = [1 - (X - a).square().sum(-1), 0.1 + (X - b).square().sum(-1)]
        return Observations(X, torch.stack(bowls, -1) + 0.01 * rough, self.metrics)


def die(how: str) -> None:
    """End this process as native code does."""
    if how == "segfault":
        ctypes.string_at(0)
    # What native code does without memory: nothing more can be allocated, and it aborts.
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, resource.RLIM_INFINITY))
    try:
        torch.zeros(2**28)
    except (MemoryError, RuntimeError):
        os.abort()


def settings_of(kind: str, options: argparse.Namespace) -> WorkerSettings | None:
    """Return the workers of a kind; None evaluates in the driver's process."""
    if kind == "processes":
        return map_bo.Processes(options.count)
    if kind == "ray":
        return map_bo.Ray(
            options.count, address=options.address, cpus_per_worker=0.5, patience=options.patience
        )
    if kind == "dask":
        return map_bo.Dask(options.address, count=options.count, patience=options.patience)
    return None


def drive(kind: str, options: argparse.Namespace) -> None:
    """Drive the run, from wherever it is."""
    optimize(
        problem_in(options.folder, options.seconds),
        options.budget,
        seed=5,
        run_dir=options.folder / "run",
        progress=False,
        tracking="none",
        sampler=Sobol(),
        surrogate=Quadratic(),
        solver=GradientSolver(points=10, steps=10),
        verify=2,
        retries=RETRIES,
        timeout=options.timeout,
        workers=settings_of(kind, options),
    )


def problem_in(folder: Path, seconds: float) -> Problem:
    return Traced(str(folder), seconds)


def driver_words(kind: str, folder: Path, **options: object) -> list[str]:
    """Return the command that drives a run."""
    words = [sys.executable, "-m", "benchmarks.reliability.worker_stand", kind, str(folder)]
    for name, value in options.items():
        if value is not None:
            words += [f"--{name}", str(value)]
    return words


# What came of it


def lines(folder: Path) -> list[bytes]:
    """Return the complete lines of the record."""
    path = folder / "run" / "events.jsonl"
    text = path.read_bytes() if path.exists() else b""
    return text[: text.rfind(b"\n") + 1].splitlines(keepends=True)


def traces(folder: Path) -> list[list[Any]]:
    """Return process, seed and time of each evaluation that began."""
    path = folder / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def observed(folder: Path) -> Counter[str]:
    """Return how often each row has been told, of the search and of the verification."""
    found: Counter[str] = Counter()
    for line in lines(folder):
        event = json.loads(line)
        if event["kind"] == "observed":
            found[f"row {event['data']['index']}"] += 1
        elif event["kind"] == "verified":
            found[f"front point {event['data']['row']}"] += 1
    return found


def faults_of(folder: Path, whole: Path, budget: int) -> tuple[dict[str, int], list[str]]:
    """Compare a run that has ended with one that nobody disturbed.

    Returns:
        Counts (results lost, results doubled, attempts that were repeated), and faults in words.
    """
    faults: list[str] = []
    (state, _), (other, _) = load_state(folder / "run"), load_state(whole / "run")
    told = observed(folder)
    doubled = sum(count - 1 for count in told.values())
    missing = budget - len(state.outcomes) - len(state.verified)
    failed = sum(reason is not None for reason in state.seen.failures)
    if state.summary is None:
        faults.append("the run has not ended")
    if doubled or missing or failed:
        faults.append(f"{doubled} results are doubled, {missing} missing, {failed} failed")
    mine = {index: (row.X, row.Y) for index, row in state.outcomes.items()}
    theirs = {index: (row.X, row.Y) for index, row in other.outcomes.items()}
    wrong = [
        index
        for index in theirs
        if index not in mine
        or not torch.equal(mine[index][0], theirs[index][0])
        or not torch.equal(mine[index][1], theirs[index][1])
    ]
    if wrong:
        faults.append(f"rows {wrong} differ from those of a run that nobody disturbed")
    if len(state.seen) != len(other.seen):
        faults.append(f"the fit has {len(state.seen)} rows instead of {len(other.seen)}")
    try:
        damage = verdict_of(folder / "run").damage
    except MapBoError as error:
        damage = error.message
    if damage is not None:
        faults.append(f"the record is damaged: {damage}")
    counts = {
        "results lost": missing + failed,
        "results doubled": doubled,
        "evaluations begun": len(traces(folder)),
        "attempts lost": sum(json.loads(line)["kind"] == "attempt" for line in lines(folder)),
        "interrupted": sum(json.loads(line)["kind"] == "interrupted" for line in lines(folder)),
    }
    return counts, faults


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=[*KINDS, "inline"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--address")
    parser.add_argument("--count", type=int, default=2)
    parser.add_argument("--budget", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--timeout", type=float, default=30.0)
    parser.add_argument("--patience", type=float, default=300.0)
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    torch.set_num_threads(1)
    drive(options.kind, options)


if __name__ == "__main__":
    # Workers import the problem by its module's name, which is another one in a script.
    from benchmarks.reliability import worker_stand

    worker_stand.main()
