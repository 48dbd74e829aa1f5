"""Time outside evaluation: one step of every sampler, and the fit and the front.

python -m benchmarks.speed.step [--smoke] [--out FILE.json] [--samplers NAME ...]

Sigmoids of concave quadratics, one optimum near each expert, measured as accuracies on 500
examples, N = m. A step is one proposal of 4 points with the sampler as its file in conf/sampler
has it; a sampler that looks at a surrogate fits it within. The front is a fit and the gradient
solver over it. Wall-clock seconds on one thread: the median of three, or one measurement where it
took more than 3 s. What took more than 20 s, or was stopped after 40 s with its repetitions, is
not tried with more evaluations.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from benchmarks.record import finish
from map_bo.data import Metric, Observations
from map_bo.errors import MapBoError
from map_bo.pareto.gradient import GradientSolver
from map_bo.rng import make_generator
from map_bo.samplers.sampler import Sampler
from map_bo.space import CoefficientSpace
from map_bo.surrogates.auto import Auto
from map_bo.surrogates.prediction import predicted_mean
from map_bo.surrogates.processes.gp import GP
from map_bo.surrogates.processes.hybrid import Hybrid
from map_bo.surrogates.quadratic import Quadratic
from map_bo.surrogates.surrogate import Surrogate
from map_bo.workers.evaluation import TimeLimitExceededError, time_limit

EXAMPLES = 500
BATCH = 4
LIMIT = 20.0
SLOW = 3.0
CONF = Path(__file__).parents[2] / "conf" / "sampler"
SURROGATES: dict[str, Surrogate] = {
    "quadratic": Quadratic(),
    "gp": GP(),
    "hybrid": Hybrid(),
    "auto": Auto(),
}
EXPERTS, SIZES = (2, 4, 8, 16), (25, 100, 400)


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


def sampler_of(name: str) -> Sampler:
    config = OmegaConf.load(CONF / f"{name}.yaml")
    return instantiate(config)  # type: ignore[no-any-return]


def seconds(work: Callable[[int], Any], repeats: int) -> float:
    """Return the median time of ``work(seed)``; once when slow, after one go to warm up."""
    times: list[float] = []
    for seed in range(repeats + 1):
        start = time.perf_counter()
        work(seed)
        times.append(time.perf_counter() - start)
        if times[-1] > SLOW:
            return times[-1]
    return median(times[1:])


def over_sizes(
    work: Callable[[int, int], Callable[[int], Any]],
    experts: tuple[int, ...],
    sizes: tuple[int, ...],
    repeats: int,
) -> dict[str, float | str]:
    """Return ``"N n"`` -> seconds, or the reason why there are none."""
    found: dict[str, float | str] = {}
    for N in experts:
        slow = False
        for n in sizes:
            key = f"{N} {n}"
            if slow:
                found[key] = f"> {LIMIT:g}"
                continue
            try:
                with time_limit(2 * LIMIT):
                    found[key] = taken = seconds(work(N, n), repeats)
                slow = taken > LIMIT
            except TimeLimitExceededError:
                found[key], slow = f"> {LIMIT:g}", True
            except MapBoError as error:
                found[key] = "no"
                print(f"  N={N}, n={n}: {error.message}", flush=True)
    return found


def step(sampler: Sampler) -> Callable[[int, int], Callable[[int], Any]]:
    def at(experts: int, n: int) -> Callable[[int], Any]:
        data = [observations(experts, n, seed) for seed in range(4)]
        return lambda seed: sampler.propose(*data[seed], BATCH, generator=make_generator(seed))

    return at


def front(surrogate: Surrogate) -> Callable[[int, int], Callable[[int], Any]]:
    def at(experts: int, n: int) -> Callable[[int], Any]:
        data = [observations(experts, n, seed) for seed in range(4)]

        def work(seed: int) -> Any:
            model = surrogate.fit(*data[seed])
            space = data[seed][1]
            return GradientSolver().solve(
                predicted_mean(model), space, generator=make_generator(seed)
            )

        return work

    return at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--smoke", action="store_true", help="small sizes, one repetition")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    # The old name of a sampler has no class of its own.
    names = sorted(path.stem for path in CONF.glob("*.yaml") if "_target_" in path.read_text())
    parser.add_argument("--samplers", nargs="+", choices=names, default=names)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    experts, sizes, repeats = ((2,), (12,), 1) if arguments.smoke else (EXPERTS, SIZES, 3)
    if arguments.smoke:  # this one alone imports for seconds
        arguments.samplers = [name for name in arguments.samplers if name != "ax"]
    keys = [f"{N} {n}" for N in experts for n in sizes]
    table = [
        "| | " + " | ".join(f"N={key.replace(' ', ', n=')}" for key in keys) + " |",
        "|" + "---|" * (len(keys) + 1),
    ]
    data: dict[str, dict[str, float | str]] = {}
    for name in arguments.samplers:
        print(f"sampler {name}", flush=True)
        label = f"propose 4: {name}"
        data[label] = over_sizes(step(sampler_of(name)), experts, sizes, repeats)
    for name, surrogate in SURROGATES.items():
        print(f"surrogate {name}", flush=True)
        data[f"fit and front: {name}"] = over_sizes(front(surrogate), experts, sizes, repeats)
    for label, row in data.items():
        cells = [f"{value:.2f}" if isinstance(value, float) else value for value in row.values()]
        table.append(f"| {label} | {' | '.join(cells)} |")
    finish("Time outside evaluation", table, {"rows": data}, arguments.out)


if __name__ == "__main__":
    main()
