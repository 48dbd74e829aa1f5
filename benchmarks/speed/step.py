"""Time outside evaluation of one step, and of the front at the end, on one thread.

python -m benchmarks.speed.step [--smoke] [--out FILE.json]

Sigmoids of concave quadratics, one optimum near each expert, measured as accuracies on 500
examples. A step is what a run spends between two evaluations: with the default sampler that is one
proposal. With up to four metrics the proposal fits the surrogate and maximises the acquisition;
above, it is a point of the design, and the fit is counted as well, as a run that looks at its
surrogate after every evaluation would pay it. The front is a fit and the gradient solver over
it. Seconds are medians over repetitions, each with data of its own: wall clock, and processor
time beside it, which others on the same machine disturb less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.record import finish
from map_bo.data import Metric, Observations
from map_bo.pareto.gradient import GradientSolver
from map_bo.rng import make_generator
from map_bo.samplers.adaptive import Adaptive
from map_bo.samplers.hypervolume import QLogNEHVI
from map_bo.space import CoefficientSpace
from map_bo.surrogates.gp import GP
from map_bo.surrogates.hybrid import Hybrid
from map_bo.surrogates.prediction import predicted_mean
from map_bo.surrogates.quadratic import Quadratic
from map_bo.surrogates.surrogate import Surrogate

EXAMPLES = 500
SURROGATES: dict[str, Surrogate] = {"quadratic": Quadratic(), "gp": GP(), "hybrid": Hybrid()}
SIZES = [(4, 50, 0.5), (8, 200, 2.0)]  # experts, evaluations, goal with the quadratic
SMOKE = [(2, 12, None), (5, 14, None)]


def observations(experts: int, n: int, seed: int) -> tuple[Observations, CoefficientSpace]:
    generator = make_generator(seed)
    space = CoefficientSpace.box([f"e{i}" for i in range(experts)])
    anchors = space.anchors().X
    X = torch.cat([anchors, space.sample(n - len(anchors), generator=generator)])
    optima = 0.1 + 0.7 * torch.eye(experts, dtype=torch.float64)
    truth = torch.sigmoid(2.5 - 16 / experts * (X.unsqueeze(1) - optima).square().sum(-1))
    hits = torch.binomial(torch.full_like(truth, EXAMPLES), truth, generator=generator)
    metrics = tuple(Metric(f"task {i}") for i in range(experts))
    counts = torch.full_like(truth, EXAMPLES)
    return Observations(X, hits / EXAMPLES, metrics, counts=counts), space


def timed(work: Callable[..., Any], *given: Any, **named: Any) -> tuple[float, float, Any]:
    """Return wall-clock seconds, processor seconds and what ``work`` returned."""
    wall, processor = time.perf_counter(), time.process_time()
    result = work(*given, **named)
    return time.perf_counter() - wall, time.process_time() - processor, result


def measure(surrogate: Surrogate, experts: int, n: int, repeats: int) -> dict[str, Any]:
    sampler, solver = Adaptive(QLogNEHVI(surrogate=surrogate)), GradientSolver()
    seconds: dict[str, list[tuple[float, float]]] = {"fit": [], "propose": [], "solve": []}
    sizes = []
    for repeat in range(repeats + 1):
        seen, space = observations(experts, n, repeat)
        generator = make_generator(repeat)
        *fit, model = timed(surrogate.fit, seen, space)
        *propose, _ = timed(sampler.propose, seen, space, 1, generator=generator)
        *solve, front = timed(solver.solve, predicted_mean(model), space, generator=generator)
        if repeat:  # the first one warms up: lazy imports, caches
            sizes.append(len(front))
            for name, (wall, processor) in zip(seconds, (fit, propose, solve), strict=True):
                seconds[name].append((wall, processor))
    fits_itself = experts <= 4
    parts = {
        "fit": seconds["fit"],
        "propose": seconds["propose"],
        "step": seconds["propose"] if fits_itself else added(seconds["fit"], seconds["propose"]),
        "fit and front": added(seconds["fit"], seconds["solve"]),
    }
    return {
        "wall": {name: median(wall for wall, _ in values) for name, values in parts.items()},
        "processor": {name: median(cpu for _, cpu in values) for name, values in parts.items()},
        "front": median(sizes),
    }


def added(
    left: list[tuple[float, float]], right: list[tuple[float, float]]
) -> list[tuple[float, float]]:
    return [(a + c, b + d) for (a, b), (c, d) in zip(left, right, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--smoke", action="store_true", help="small sizes, one repetition")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions (default 5)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = ["fit", "propose", "step", "fit and front"]
    table = [
        "| N = m | n | surrogate | sampler | "
        + " | ".join(f"{name} s (processor)" for name in names)
        + " | front points | goal for a step |",
        "|" + "---|" * (len(names) + 6),
    ]
    data: list[dict[str, Any]] = []
    for experts, n, goal in SMOKE if arguments.smoke else SIZES:
        for name, surrogate in SURROGATES.items():
            result = measure(surrogate, experts, n, 1 if arguments.smoke else arguments.repeats)
            sampler = "qLogNEHVI" if experts <= 4 else "Sobol"
            cells = [
                f"{result['wall'][part]:.2f} ({result['processor'][part]:.2f})" for part in names
            ]
            aim = f"< {goal:g} s" if goal and name == "quadratic" else "reported"
            table.append(
                f"| {experts} | {n} | {name} | {sampler} | {' | '.join(cells)} "
                f"| {result['front']:.0f} | {aim} |"
            )
            data.append({"experts": experts, "n": n, "surrogate": name, "goal": goal, **result})
    finish("Time outside evaluation", table, {"rows": data}, arguments.out)


if __name__ == "__main__":
    main()
