"""Evaluations on several processes: throughput, the driver's own time, and memory.

python -m benchmarks.speed.workers [--smoke] [--only PART ...] [--gigabytes G] [--out FILE.json]

Parts:

- ``throughput``: whole runs whose evaluations sleep, with a fixed duration or a heavy-tailed one
  (log-normal, sigma 1) of the same mean: one worker, several asynchronously, several in batches of
  as many points; with Sobol's points and with the default sampler. A row's duration is drawn by its
  own generator, and the seconds are from the first evaluation's beginning to the last outcome, as
  the record has them. "Over one" compares with the sum of all durations, which is the least that
  one worker can take.
- ``overhead``: evaluations that take no time, one after another: what a task costs on its way.
- ``memory``: a model of random weights and three experts in files, evaluated in several workers,
  which map the task vectors from one file, and in one worker that holds a copy of its own:
  anonymous memory of each, and proportional memory of all, of ``/proc/PID/smaps_rollup``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

import map_bo
from benchmarks.record import finish
from map_bo.data import Metric, Observations
from map_bo.pareto.gradient import GradientSolver
from map_bo.rng import make_generator
from map_bo.samplers.designs.space_filling import Sobol
from map_bo.space import CoefficientSpace
from map_bo.surrogates.quadratic import Quadratic
from map_bo.tracking.jsonl import MemoryStore
from map_bo.workers import processes
from map_bo.workers.processes import Processes, ProcessWorkers
from map_bo.workers.workers import Task

PARTS = ("throughput", "overhead", "memory")
EXPERTS = ("a", "b", "c")


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    workers: int
    evaluations: int
    seconds: float  # mean duration of an evaluation
    tasks: int  # of the overhead
    gigabytes: float
    memory_workers: int


FULL = Sizes(8, 64, 2.0, 200, 1.0, 4)
SMOKE = Sizes(2, 6, 0.05, 5, 0.002, 1)


@dataclass(frozen=True)
class Sleeper:
    """Two bowls; an evaluation sleeps.

    Attributes:
        seconds: How long on average.
        heavy: Whether durations are log-normal.
    """

    seconds: float
    heavy: bool

    @property
    def space(self) -> CoefficientSpace:
        return CoefficientSpace(("a", "b", "c"), (0.0,) * 3, (1.0,) * 3)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return Metric("first"), Metric("second")

    def duration(self, generator: Generator) -> float:
        """Return the seconds of an evaluation; their mean is ``seconds``."""
        if not self.heavy:
            return self.seconds
        draw = torch.randn((), generator=generator, dtype=torch.float64)
        return self.seconds * float(torch.exp(draw - 0.5))

    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        seconds = self.duration(generator)
        time.sleep(seconds)
        centres = torch.tensor([[0.2, 0.6, 0.4], [0.8, 0.3, 0.5]]).double()
        Y = 1 - (X[:, None] - centres).square().mean(-1)
        return Observations(X, Y, self.metrics, cost=torch.full((len(X),), seconds))


def timed(problem: Sleeper, workers: ProcessWorkers, sizes: Sizes, **settings: Any) -> float:
    """Return the seconds of a run from its first evaluation to its last outcome."""
    store = MemoryStore()
    chosen = map_bo.Settings(
        budget=sizes.evaluations,
        seed=1,
        verify=0,
        solver=GradientSolver(points=20, steps=20),
        **settings,
    )
    map_bo.Run(problem, chosen, store).drive(workers=workers)
    events = list(store.read())
    begun = min(event.time for event in events if event.kind == "started")
    return max(event.time for event in events if event.kind == "observed") - begun


def throughput(sizes: Sizes) -> tuple[list[str], dict[str, Any]]:
    """Measure runs, and return a table and the numbers."""
    samplers: dict[str, dict[str, Any]] = {
        "sobol": {"sampler": Sobol(), "surrogate": Quadratic()},
        "default": {},
    }
    table = [
        "| durations | sampler | proposals | seconds | over one worker | over batches |",
        "| --- | --- | --- | --: | --: | --: |",
    ]
    data: list[dict[str, Any]] = []
    for heavy in (False, True):
        problem = Sleeper(sizes.seconds, heavy)
        workers = Processes(sizes.workers, threads=1).open(problem)
        try:
            for name, settings in samplers.items():
                wall = {}
                for batches in (True, False):
                    how = {"batch": sizes.workers, "asynchronous": False} if batches else {}
                    wall[batches] = timed(problem, workers, sizes, **settings, **how)
                one = one_worker(problem, sizes)
                for batches, seconds in wall.items():
                    data.append(
                        {
                            "durations": "heavy-tailed" if heavy else "fixed",
                            "sampler": name,
                            "proposals": "batches" if batches else "asynchronous",
                            "seconds": seconds,
                            "over_one": one / seconds,
                            "over_batches": wall[True] / seconds,
                            "evaluations": sizes.evaluations,
                            "driver_per_evaluation": (seconds - one / sizes.workers)
                            / sizes.evaluations,
                        }
                    )
        finally:
            workers.close()
    for row in data:
        table.append(
            f"| {row['durations']} | {row['sampler']} | {row['proposals']} | {row['seconds']:.1f} "
            f"| {row['over_one']:.2f} | {row['over_batches']:.2f} |"
        )
    return table, {"throughput": data, "workers": sizes.workers, "mean_seconds": sizes.seconds}


def one_worker(problem: Sleeper, sizes: Sizes) -> float:
    """Return the sum of the durations of a run's evaluations: what one worker takes at least."""
    generator = make_generator(1)
    seeds = (
        Task.of("index", row, 0, torch.zeros(3), generator=child_of_run(generator, row)).seed
        for row in range(sizes.evaluations)
    )
    return sum(problem.duration(make_generator(seed)) for seed in seeds)


def child_of_run(generator: Generator, row: int) -> Generator:
    """Return the generator of an evaluation, as a run makes it."""
    from map_bo.rng import child

    return child(generator, "evaluate", row, 0)


def overhead(sizes: Sizes) -> tuple[list[str], dict[str, Any]]:
    """Measure tasks that take no time."""
    problem = Sleeper(0.0, False)
    begun = time.perf_counter()
    workers = Processes(1, threads=1).open(problem)
    opened = time.perf_counter() - begun
    found = []
    try:
        for row in range(sizes.tasks):
            begun = time.perf_counter()
            workers.submit(Task("index", row, 0, (0.5, 0.5, 0.5), row)).result()
            found.append(time.perf_counter() - begun)
    finally:
        workers.close()
    median = 1000 * statistics.median(found)
    table = [
        f"A task takes {median:.1f} ms to a worker and back; a worker is ready after "
        f"{opened:.1f} s."
    ]
    return table, {"milliseconds_per_task": median, "seconds_to_open": opened}


def layers(width: int, count: int) -> nn.Module:
    """Return a model of square matrices."""
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(count)))


class Probe:
    """Scores a model by one forward pass of a single row."""

    def __init__(self, width: int) -> None:
        self.width = width

    def __call__(self, model: nn.Module) -> float:
        row = torch.ones(1, self.width) / self.width
        with torch.no_grad():
            return float(torch.sigmoid(model(row).mean()))


def memory(sizes: Sizes) -> tuple[list[str], dict[str, Any]]:
    """Measure the memory of workers."""
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["MAP_BO_CACHE"] = scratch
        problem = large_problem(Path(scratch), sizes.gigabytes)
        rows = [measured(problem, sizes.memory_workers, mapped=True)]
        rows.append(measured(problem, 1, mapped=False))
    gigabytes = sizes.gigabytes
    table = [
        f"Memory in GB with a model of {gigabytes:g} GB and {len(EXPERTS)} experts:",
        "",
        "| task vectors | workers | anonymous, each | anonymous, all | proportional, all |",
        "| --- | --: | --: | --: | --: |",
    ]
    for name, row in zip(("mapped from one file", "a copy of its own"), rows, strict=True):
        each = statistics.mean(row["anonymous"])
        table.append(
            f"| {name} | {len(row['anonymous'])} | {each / 1e9:.2f} | "
            f"{sum(row['anonymous']) / 1e9:.2f} | {sum(row['proportional']) / 1e9:.2f} |"
        )
    return table, {"memory": {"mapped": rows[0], "copies": rows[1]}, "gigabytes": gigabytes}


def large_problem(folder: Path, gigabytes: float) -> map_bo.MergedModelProblem:
    """Write a base and experts, and return the problem of merging them."""
    width = 2048 if gigabytes >= 0.1 else 128
    count = max(1, round(gigabytes * 1e9 / 4 / width**2))
    draws = make_generator(0)
    names = [f"{i}.weight" for i in range(count)]
    base = {name: torch.randn(width, width, generator=draws) / width**0.5 for name in names}
    save_file(base, folder / "base.safetensors")
    for expert in EXPERTS:
        for tensor in base.values():  # a walk: near the base, and no second copy in memory
            tensor.add_(torch.randn(width, width, generator=draws), alpha=0.01 / width**0.5)
        save_file(base, folder / f"{expert}.safetensors")
    return map_bo.MergedModelProblem(
        partial(layers, width, count),
        base=folder / "base.safetensors",
        experts={name: folder / f"{name}.safetensors" for name in EXPERTS},
        evaluators={"probe": Probe(width)},
        cache=False,
    )


def measured(
    problem: map_bo.MergedModelProblem, count: int, *, mapped: bool
) -> dict[str, list[int]]:
    """Return what each worker takes after an evaluation, in bytes."""
    before = processes._WORTH_MAPPING
    processes._WORTH_MAPPING = 0 if mapped else 1 << 60
    try:
        workers = Processes(count, threads=1).open(problem)
    finally:
        processes._WORTH_MAPPING = before
    try:
        tasks = [Task("index", row, 0, (0.3, 0.2, 0.1), row) for row in range(2 * count)]
        for future in [workers.submit(task) for task in tasks]:
            assert future.result().observations.failures == (None,)
        found = [kilobytes(pid) for pid in workers.processes()]
    finally:
        workers.close()
    return {
        "anonymous": [1024 * one["Anonymous"] for one in found],
        "proportional": [1024 * one["Pss"] for one in found],
    }


def kilobytes(pid: int) -> dict[str, int]:
    """Return the counters of a process's memory, in kB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) for line in lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--gigabytes", type=float, help="size of the model (default: 1)")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    options = parser.parse_args()
    sizes = SMOKE if options.smoke else FULL
    if options.gigabytes:
        sizes = Sizes(**{**vars(sizes), "gigabytes": options.gigabytes})
    measure = {"throughput": throughput, "overhead": overhead, "memory": memory}
    table: list[str] = []
    data: dict[str, Any] = {}
    for part in options.only:
        lines, numbers = measure[part](sizes)
        table += [*([""] if table else []), *lines]
        data |= numbers
    finish("workers", table, data, options.out)


if __name__ == "__main__":
    main()
