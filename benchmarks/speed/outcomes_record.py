"""A record with outcomes of examples: megabytes on disk, and seconds to write and to open it.

python -m benchmarks.speed.outcomes_record [--smoke] [--out FILE.json]

A run of 200 evaluations on 8 tasks with 5,000 examples each is written event by event, as a driver
does (the wait for the disk included), and then opened as `map-bo resume`, `choose` and `report`
open one: its lines and outcomes are checked and the state is rebuilt. Outcomes are zeros and ones
(half of them, so they cannot be compressed), or losses (log-normal, rounded to half precision as
the record rounds them). Beside them the same record without outcomes; and one whose evaluations
score a random fifth of the examples and are topped up four times by another fifth. The time of the
processor stands beside that of the clock, as others on the same machine disturb it less.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import finish
from map_bo.data import Metric, Observations
from map_bo.examples.sets import ExampleOutcomes
from map_bo.loop.reading import load_state
from map_bo.loop.run import Run
from map_bo.loop.settings import Settings
from map_bo.problems.told import ToldProblem
from map_bo.rng import make_generator
from map_bo.samplers.designs.space_filling import Sobol
from map_bo.space import CoefficientSpace
from map_bo.surrogates.quadratic import Quadratic
from map_bo.tracking.codec import encode_observations
from map_bo.tracking.jsonl import JsonlStore
from map_bo.tracking.store import Event

GOALS = {"megabytes": 20.0, "seconds to open": 5.0}
KINDS = ("none", "zeros and ones", "losses", "losses, topped up")


def outcomes(n: int, size: int, kind: str, generator: torch.Generator) -> ExampleOutcomes:
    items = torch.randperm(size, generator=generator)[:n]
    values = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    values = (values > 0).double() if kind == "zeros and ones" else (0.5 * values).exp()
    return ExampleOutcomes(items, values, size, (True,))


def write(directory: Path, kind: str, rows: int, tasks: int, size: int) -> float:
    """Write a record and return the seconds that it took, one evaluation on average."""
    generator = make_generator(0)
    metrics = tuple(
        Metric(f"task {i}", "min", "loss") if kind.startswith("losses") else Metric(f"task {i}")
        for i in range(tasks)
    )
    problem = ToldProblem(CoefficientSpace.box([f"e{i}" for i in range(tasks)]), metrics)
    store = JsonlStore.create(directory)
    settings = Settings(budget=rows, verify=0, sampler=Sobol(), surrogate=Quadratic())
    run = Run(problem, settings, store)
    parts = 5 if kind == "losses, topped up" else 1
    spent = 0.0
    with store.lock():
        run.ask(rows)
        for row in range(rows):
            names = [metric.name for metric in metrics] if kind != "none" else []
            whole = {name: outcomes(size, size, kind, generator) for name in names}
            Y = torch.rand(1, tasks, generator=generator, dtype=torch.float64)
            seen = Observations(run.state.X[row : row + 1], Y, metrics)
            for part in range(parts):
                scored = {
                    name: ExampleOutcomes(
                        one.items[part::parts], one.values[part::parts], size, (True,)
                    )
                    for name, one in whole.items()
                }
                begun = time.perf_counter()
                told = dataclasses.replace(seen, examples=(scored,))
                data = {"index": row, "observation": encode_observations(told)}
                if parts > 1:
                    edges = (part * size // parts, (part + 1) * size // parts)
                    data |= {"parts": [[name, *edges] for name in names], "share": 1 / parts}
                store.append(Event("scored" if part else "observed", data))
                spent += time.perf_counter() - begun
    return spent / rows


def measure(kind: str, rows: int, tasks: int, size: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place) / "run"
        writing = write(directory, kind, rows, tasks, size)
        sizes = {
            name: (directory / name).stat().st_size / 1e6 if (directory / name).exists() else 0.0
            for name in ("events.jsonl", "outcomes.bin")
        }
        begun, spent = time.perf_counter(), time.process_time()
        state, _ = load_state(directory)
        opening, processor = time.perf_counter() - begun, time.process_time() - spent
        assert len(state.outcomes) == rows
        count = sum(len(one) for row in state.seen.examples for one in row.values())
    return {
        "outcomes": kind,
        "kept": count,
        "megabytes": sum(sizes.values()),
        "of them in events.jsonl": sizes["events.jsonl"],
        "seconds to open": opening,
        "of them of the processor": processor,
        "milliseconds to write an evaluation": 1e3 * writing,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--smoke", action="store_true", help="small sizes")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, tasks, size = (5, 2, 300) if arguments.smoke else (200, 8, 5000)
    table = [
        "| outcomes | kept in the last state | MB on disk (goal < 20) | of them in events.jsonl "
        "| s to open (goal < 5) | of the processor | ms to write an evaluation |",
        "|" + "---|" * 7,
    ]
    data = [measure(kind, rows, tasks, size) for kind in KINDS]
    for found in data:
        table.append(
            f"| {found['outcomes']} | {found['kept']} | {found['megabytes']:.1f} "
            f"| {found['of them in events.jsonl']:.1f} | {found['seconds to open']:.2f} "
            f"| {found['of them of the processor']:.2f} "
            f"| {found['milliseconds to write an evaluation']:.1f} |"
        )
    title = f"Record of {rows} evaluations on {tasks} tasks with {size} examples each"
    finish(title, table, {"rows": data, "goals": GOALS}, arguments.out)


if __name__ == "__main__":
    main()
