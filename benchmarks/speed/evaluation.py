"""Processor time of one evaluation beside its evaluators: merging, and keeping them apart.

python -m benchmarks.speed.evaluation [--smoke] [--out FILE.json]

A model of 22 million parameters in float32, three experts, task arithmetic. The evaluators do
nothing, so what is measured is what an evaluation costs beside them, with one metric and with six.
Three kinds: those that leave the weights alone, as most do, so that one merge serves all of them;
those that change a weight in place, which a version counter tells; and those that change one
behind torch's back, which the checksum tells. After the latter two the candidate is merged again
for the next evaluator, which is also what every evaluation did before merges were held.

Processor seconds of all threads, the median over candidates.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import nn

from benchmarks.record import finish
from benchmarks.speed.merge_part import row, table_of
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.rng import make_generator

METRICS = (1, 6)
EXPERTS = 3


def leave_alone(model: nn.Module) -> float:
    return 0.5


def change_in_place(model: nn.Module) -> float:
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    return 0.5


def change_behind_torch(model: nn.Module) -> float:
    next(model.parameters()).data.view(-1)[0] += 1
    return 0.5


KINDS: dict[str, Callable[[nn.Module], float]] = {
    "leave the weights alone": leave_alone,
    "change a weight in place": change_in_place,
    "change a weight through `.data`": change_behind_torch,
}


def model_of(width: int, layers: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))


def problem(
    kind: Callable[[nn.Module], float], metrics: int, width: int, layers: int
) -> MergedModelProblem:
    model = model_of(width, layers)
    base = model.state_dict()
    experts = {
        f"e{i}": {name: value + 0.001 * (i + 1) for name, value in base.items()}
        for i in range(EXPERTS)
    }
    evaluators = {f"m{j}": kind for j in range(metrics)}
    return MergedModelProblem(model, base=base, experts=experts, evaluators=evaluators)


def seconds(of: MergedModelProblem, candidates: int) -> float:
    """Return the median processor seconds of an evaluation, after one to warm up."""
    of.prepare()
    points = of.space.sample(candidates + 1, generator=make_generator(0))
    times = []
    for i, x in enumerate(points):
        start = time.process_time()
        seen = of.evaluate(x[None], generator=make_generator(i))
        times.append(time.process_time() - start)
        assert bool(seen.ok.all())
    return median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--smoke", action="store_true", help="small sizes, one repetition")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    width, layers, candidates = (8, 2, 1) if arguments.smoke else (1024, 21, 15)
    found = {
        name: {str(m): seconds(problem(kind, m, width, layers), candidates) for m in METRICS}
        for name, kind in KINDS.items()
    }
    size = sum(tensor.numel() for tensor in model_of(width, layers).parameters())
    lines = [
        row(name, *(1000 * taken for taken in by_metrics.values()))
        for name, by_metrics in found.items()
    ]
    table = table_of(
        f"{size / 1e6:.1f} million parameters, {EXPERTS} experts, float32, one thread: "
        "milliseconds of processor time per evaluation.",
        ("evaluators", *(f"{m} metric{'s' * (m > 1)}" for m in METRICS)),
        lines,
    )
    finish(
        "One evaluation beside its evaluators", table, {"parameters": size, **found}, arguments.out
    )


if __name__ == "__main__":
    main()
