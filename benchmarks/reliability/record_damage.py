"""Damage to the record of a run: how much of it goes unseen.

python -m benchmarks.reliability.record_damage [--smoke] [--damages N] [--out FILE.json]

A flat run, a nested run and a run of version 0.1 that this version went on with are recorded.
Each damage changes one copy: a flipped bit, or a line that is deleted, doubled, swapped with
another, or replaced by the line of another run. Then the run is read as `map-bo choose` and
`map-bo resume` read it, and what came of it is counted:

    refused     reading it is an error of the package that names the line
    by check    reading it is no error, and `map-bo check` says that it is damaged
    the same    the events that were read are those that were written
    silent      other events were read, and nothing said so
    traceback   an error that is not of the package

A whole line that is missing at the end can only be seen by `map-bo check`, and only where the run
had finished. The last row is the record of version 0.1 as it was written, without checksums: it
shows what they are for, and is not part of the sum.

As many damages as to each record are done to the file of outcomes beside that of a flat run with
examples (`outcomes.bin`): a flipped bit, a cut, bytes that are left out, the file of another run,
and no file. Bytes that are added at its end belong to no event, and are no damage.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from benchmarks.record import finish
from map_bo.app.record_commands import verdict_of
from map_bo.data import Observations
from map_bo.errors import MapBoError
from map_bo.examples.sets import ExampleOutcomes
from map_bo.loop.optimize import optimize
from map_bo.loop.reading import load_state
from map_bo.nested.optimize import optimize_nested
from map_bo.nested.settings import Nested
from map_bo.pareto.gradient import GradientSolver
from map_bo.problems.synthetic import ConcaveQuadratics
from map_bo.samplers.adaptive import Adaptive
from map_bo.samplers.designs.space_filling import Sobol
from map_bo.samplers.posterior.front_uncertainty import FrontUncertainty
from map_bo.surrogates.quadratic import Quadratic
from map_bo.tracking.jsonl import JsonlStore
from map_bo.tracking.store import Event

KINDS = ("flip", "delete", "double", "swap", "replace")
ENDS = ("refused", "by check", "the same", "silent", "traceback")
OLD = Path(__file__).parents[2] / "tests" / "records_of_0_1" / "python"


def flat(directory: Path, seed: int) -> None:
    optimize(ConcaveQuadratics(3, 2), 14, seed=seed, run_dir=directory, **PARTS)


def nested(directory: Path, seed: int) -> None:
    problem = ConcaveQuadratics(4, 4)
    tasks = {name: (f"f{i + 1}",) for i, name in enumerate(problem.space.names)}
    how = Nested(stages=2, tasks=tasks)
    optimize_nested(problem, 28, nested=how, seed=seed, run_dir=directory, **PARTS)


PARTS: dict[str, Any] = {
    "progress": False,
    "tracking": "none",
    "sampler": Sobol(),
    "surrogate": Quadratic(),
    "solver": GradientSolver(points=10, steps=10),
}


def continued(directory: Path, seed: int) -> None:
    """Go on with the first half of the run that version 0.1 recorded."""
    untouched(directory, seed)
    path = directory / "events.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: len(lines) // 2 + seed]))
    acquisition = FrontUncertainty(surrogate=Quadratic(), reference={"f1": 0.0, "f2": 0.0}, draws=8)
    optimize(
        ConcaveQuadratics(2, 2), 9, seed=1, run_dir=directory, progress=False, tracking="none",
        verify=1, solver=GradientSolver(points=8), surrogate=Quadratic(),
        sampler=Adaptive(acquisition=acquisition), stop={"criterion": "regret", "tolerance": 1e-4},
    )  # fmt: skip


def untouched(directory: Path, seed: int) -> None:
    shutil.copytree(OLD, directory)


@dataclass(frozen=True)
class Scored(ConcaveQuadratics):
    """The same problem, whose metrics have outcomes of 5,000 examples each."""

    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        seen = super().evaluate(X, generator=generator)

        def outcomes() -> ExampleOutcomes:
            values = torch.rand(5000, 1, generator=generator, dtype=torch.float64)
            return ExampleOutcomes(torch.arange(5000), values, 5000, (True,))

        rows = tuple({metric.name: outcomes() for metric in self.metrics} for _ in X)
        return replace(seen, examples=rows)


def with_outcomes(directory: Path, seed: int) -> None:
    optimize(Scored(3, 2), 14, seed=seed, run_dir=directory, **PARTS)


BESIDE = ("flip", "cut", "leave out", "replace", "remove")


def damage_beside(kind: str, path: Path, whole: bytes, other: bytes, dice: random.Random) -> None:
    """Write the file of outcomes ``whole`` with one damage; ``other`` is that of another run."""
    at = dice.randrange(len(whole))
    match kind:
        case "flip":
            path.write_bytes(damage("flip", whole, other, dice))
        case "cut":
            path.write_bytes(whole[:at])
        case "leave out":
            path.write_bytes(whole[:at] + whole[at + dice.randint(1, 5000) :])
        case "replace":
            path.write_bytes(other)
        case "remove":
            path.unlink(missing_ok=True)


RECORDS = {
    "flat": flat,
    "nested": nested,
    "0.1, continued": continued,
    "0.1, untouched": untouched,
}


def record(make: Callable[[Path, int], None], directory: Path, seed: int) -> bytes:
    """Make a run in ``directory`` and return its record."""
    make(directory, seed)
    state, _ = load_state(directory)
    assert state.summary is not None
    (directory / "summary.json").write_text(json.dumps(dict(state.summary)))
    return (directory / "events.jsonl").read_bytes()


def damage(kind: str, whole: bytes, other: bytes, dice: random.Random) -> bytes:
    """Return the record ``whole`` with one damage; ``other`` is that of another run."""
    if kind == "flip":
        at, data = dice.randrange(len(whole)), bytearray(whole)
        data[at] ^= 1 << dice.randrange(8)
        return bytes(data)
    lines = whole.splitlines(keepends=True)
    at = dice.randrange(len(lines))
    match kind:
        case "delete":
            del lines[at]
        case "double":
            lines.insert(dice.randrange(len(lines) + 1), lines[at])
        case "swap":
            to = dice.randrange(len(lines))
            lines[at], lines[to] = lines[to], lines[at]
        case "replace":
            others = other.splitlines(keepends=True)
            lines[at] = others[min(at, len(others) - 1)]
    return b"".join(lines)


def outcome(directory: Path, written: Sequence[Event]) -> str:
    """Return what comes of reading the run in ``directory``."""
    try:
        read = list(JsonlStore.open(directory).read())
        load_state(directory)
        if read == written:
            return "the same"
        return "silent" if verdict_of(directory).damage is None else "by check"
    except MapBoError:
        return "refused"
    except Exception:
        return "traceback"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a few damages")
    parser.add_argument("--damages", type=int, default=3000, help="over the records with checksums")
    parser.add_argument("--seed", type=int, default=0, help="of the damages")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    each = 5 if options.smoke else math.ceil(options.damages / (len(RECORDS) - 1))
    dice, counts = random.Random(options.seed), dict[str, Counter[str]]()
    with tempfile.TemporaryDirectory() as folder:
        for name, make in RECORDS.items():
            place = Path(folder) / name
            whole = record(make, place, 0)
            # A run of version 0.1 exists once; its lines are replaced by those of the flat run.
            source = flat if make is untouched else make
            other = record(source, place.with_name(f"{name}, other"), 1)
            written = list(JsonlStore.open(place).read())
            counts[name] = Counter()
            for number in range(each):
                kind = KINDS[number % len(KINDS)]
                (place / "events.jsonl").write_bytes(damage(kind, whole, other, dice))
                counts[name][outcome(place, written)] += 1
        place, name = Path(folder) / "scored", "outcomes beside a flat one"
        record(with_outcomes, place, 0)
        record(with_outcomes, Path(folder) / "scored, other", 1)
        whole = (place / "outcomes.bin").read_bytes()
        other = (Path(folder) / "scored, other" / "outcomes.bin").read_bytes()
        written = list(JsonlStore.open(place).read())
        counts[name] = Counter()
        for number in range(each):
            kind = BESIDE[number % len(BESIDE)]
            damage_beside(kind, place / "outcomes.bin", whole, other, dice)
            counts[name][outcome(place, written)] += 1
    beside = counts[name]
    table = ["| record | damages | " + " | ".join(ENDS) + " |", "|---" * (len(ENDS) + 2) + "|"]
    for name, found in counts.items():
        numbers = " | ".join(str(found[end]) for end in ENDS)
        table.append(f"| {name} | {found.total()} | {numbers} |")
    sealed = [counts[name] for name in RECORDS if name != "0.1, untouched"]
    silent, total = sum(found["silent"] for found in sealed), sum(found.total() for found in sealed)
    said = f"{silent} of {total} damages of records with checksums were silent, and "
    said += f"{beside['silent']} of {beside.total()} of the outcomes beside one."
    table += ["", said]
    finish("Damage to records", table, {name: dict(c) for name, c in counts.items()}, options.out)


if __name__ == "__main__":
    main()
