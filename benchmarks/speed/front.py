"""Front of 500 points on each surrogate: seconds and hypervolume beside NSGA-III, one thread.

python -m benchmarks.speed.front [--smoke] [--out FILE.json]

Sigmoids of concave quadratics with shapes of their own, one optimum near each expert, measured
as accuracies on 500 examples at the anchors and scrambled Sobol points, 12 evaluations per metric.
Both solvers see the same predicted mean without the guard. NSGA-III runs with as many
evaluations of it as the gradient solver used (or a few more, to fill its last generation) and a
population of the same size. Hypervolumes are of predicted values, as this compares solvers, not
surrogates: scaled between the worst of base and experts and the best expert as predicted.
Seconds are medians over repetitions, each with data of its own: wall clock, and processor time
beside it, which others on the same machine disturb less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from benchmarks.record import finish
from map_bo.data import Metric, Observations
from map_bo.pareto.evolution import NSGA3
from map_bo.pareto.gradient import GradientSolver
from map_bo.pareto.indicators import hypervolume, hypervolume_kind
from map_bo.pareto.solver import FrontSolver
from map_bo.rng import child_seed, make_generator
from map_bo.scale import widths
from map_bo.space import CoefficientSpace
from map_bo.surrogates.prediction import predicted_mean
from map_bo.surrogates.processes.gp import GP
from map_bo.surrogates.processes.hybrid import Hybrid
from map_bo.surrogates.quadratic import Quadratic
from map_bo.surrogates.surrogate import Surrogate

EXAMPLES = 500
SURROGATES: dict[str, Surrogate] = {"quadratic": Quadratic(), "gp": GP(), "hybrid": Hybrid()}
GOALS = {"quadratic": 0.5, "gp": 1.5}  # seconds


def observations(m: int, n: int, seed: int) -> tuple[Observations, CoefficientSpace]:
    generator = make_generator(seed)
    space = CoefficientSpace.box([f"e{i}" for i in range(m)])
    anchors = space.anchors().X
    engine = SobolEngine(m, scramble=True, seed=child_seed(generator, "design"))  # type: ignore[no-untyped-call]
    X = torch.cat([anchors, engine.draw(n - len(anchors), dtype=torch.float64)])
    optima = 0.25 * torch.rand(m, m, generator=generator, dtype=torch.float64)
    optima = optima + 0.6 * torch.eye(m, dtype=torch.float64)
    root = torch.randn(m, m, m, generator=generator, dtype=torch.float64) / m**0.5
    shape = root @ root.mT + 0.5 * torch.eye(m, dtype=torch.float64)
    Z = X.unsqueeze(1) - optima
    truth = torch.sigmoid(2 - 3 * torch.einsum("bmi,mij,bmj->bm", Z, shape, Z))
    hits = torch.binomial(torch.full_like(truth, EXAMPLES), truth, generator=generator)
    metrics = tuple(Metric(f"task {i}") for i in range(m))
    counts = torch.full_like(truth, EXAMPLES)
    return Observations(X, hits / EXAMPLES, metrics, counts=counts), space


def timed(
    solver: FrontSolver, mean: Callable[[Tensor], Tensor], space: CoefficientSpace, seed: int
) -> dict[str, Any]:
    """Return the front's values with seconds and the number of points evaluated."""
    asked = 0

    def counted(X: Tensor) -> Tensor:
        nonlocal asked
        asked += len(X)
        return mean(X)

    wall, processor = time.perf_counter(), time.process_time()
    X = solver.solve(counted, space, generator=make_generator(seed))
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    with torch.no_grad():
        values = mean(X)
    return {"wall": wall, "processor": processor, "asked": asked, "values": values}


def measure(surrogate: Surrogate, m: int, points: int, repeats: int) -> list[dict[str, Any]]:
    """Return the outcome of each repetition, the warming-up left out."""
    outcomes = []
    for repeat in range(repeats + 1):
        seen, space = observations(m, 12 * m, repeat)
        mean = predicted_mean(surrogate.fit(seen, space))
        with torch.no_grad():
            anchors = mean(space.anchors().X[: m + 1])  # the base, then the experts
        reference, best = anchors.amin(0), anchors[1:].amax(0)
        ours = timed(GradientSolver(points=points), mean, space, repeat)
        generations = -(-ours["asked"] // points)
        rival = NSGA3(population=points, generations=generations)
        theirs = timed(rival, mean, space, repeat)
        outcome: dict[str, Any] = {}
        for name, run in (("gradient", ours), ("nsga3", theirs)):
            values = (run.pop("values") - reference) / widths(reference, best)
            zero = torch.zeros(m, dtype=torch.float64)
            outcome[name] = {
                **run,
                "points": len(values),
                "hypervolume": hypervolume(values, zero),
                "kind": hypervolume_kind(values, zero),
            }
        if repeat:  # the first one warms up: lazy imports, caches
            outcomes.append(outcome)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--smoke", action="store_true", help="small sizes, one repetition")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions (default 3)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes, points, repeats = ([2, 3], 40, 1) if arguments.smoke else ([2, 4, 8], 500, None)
    table = [
        "| m = N | n | surrogate | gradient s (processor) | NSGA-III s (processor) | evaluations "
        "| points | gradient hypervolume over NSGA-III (least) | hypervolume | goal |",
        "|" + "---|" * 10,
    ]
    data: list[dict[str, Any]] = []
    for m in sizes:
        for name, surrogate in SURROGATES.items():
            runs = measure(surrogate, m, points, repeats or arguments.repeats)

            def middle(solver: str, key: str, runs: list[dict[str, Any]] = runs) -> float:
                return float(median(run[solver][key] for run in runs))

            ratios = [
                run["gradient"]["hypervolume"] / max(run["nsga3"]["hypervolume"], 1e-12)
                for run in runs
            ]
            goal = f"< {GOALS[name]:g} s" if name in GOALS else "reported"
            goal += ", ratio >= 1" if m >= 3 else ""
            table.append(
                f"| {m} | {12 * m} | {name} "
                f"| {middle('gradient', 'wall'):.2f} ({middle('gradient', 'processor'):.2f}) "
                f"| {middle('nsga3', 'wall'):.2f} ({middle('nsga3', 'processor'):.2f}) "
                f"| {middle('gradient', 'asked'):.0f} "
                f"| {middle('gradient', 'points'):.0f} and {middle('nsga3', 'points'):.0f} "
                f"| {median(ratios):.3f} ({min(ratios):.3f}) | {runs[0]['gradient']['kind']} "
                f"| {goal} |"
            )
            data.append({"m": m, "n": 12 * m, "surrogate": name, "ratios": ratios, "runs": runs})
    finish(f"Front of {points} points", table, {"rows": data}, arguments.out)


if __name__ == "__main__":
    main()
