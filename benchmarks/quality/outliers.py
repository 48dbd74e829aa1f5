"""What a diverged value costs, and what setting outliers aside does to values that are none.

python -m benchmarks.quality.outliers --out benchmarks/results/outliers.json
python -m benchmarks.quality.outliers --smoke      one seed of a case: does it run?
python -m benchmarks.quality.outliers --screen     false alarms: clean evaluations of a design

The first table has the share of the clean run's real hypervolume that is kept with the outliers
kept and with them set aside (mean and least over seeds), and how many were set aside; the clean
rows compare the clean run with ``auto`` to that with ``keep``. Evaluation 2 is an expert: it is
one end of the scale. The second has, over seeds, sizes of
the design and surrogates, how many values of a clean case are set aside.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from benchmarks.quality.cases import case
from benchmarks.quality.cases_core import Case
from benchmarks.record import finish
from map_bo.data import Metric, Observations
from map_bo.loop.optimize import optimize
from map_bo.loop.result import Result
from map_bo.pareto.indicators import hypervolume
from map_bo.problems.problem import Problem
from map_bo.rng import child, make_generator
from map_bo.samplers.designs.space_filling import Sobol
from map_bo.space import CoefficientSpace
from map_bo.surrogates.auto import Auto
from map_bo.surrogates.outliers import Screened
from map_bo.surrogates.quadratic import Quadratic
from map_bo.surrogates.surrogate import Surrogate

__all__ = ["Losses", "Spoilt", "false_alarms", "kept_volume"]

CLEAN = (
    *("losses", "concave-2", "concave-2-noisy", "concave-4-noisy", "sigmoid-2-noisy"),
    *("sigmoid-4", "bumps-2", "bumps-4-noisy", "botorch-branin-currin"),
    *("digits-mlp-2", "digits-mlp-4-noisy", "digits-cnn-4"),
)
# Case -> evaluations (from 1) and values of the first metric that are put in their place.
SPOILT: dict[str, tuple[dict[int, float], ...]] = {
    "losses": ({6: 5.0}, {12: 50.0}, {2: 1e3}, {6: 50.0, 12: 1e3}),
    "sigmoid-2-noisy": ({6: 0.0}, {12: 0.0}),
    "botorch-branin-currin": (),  # it has real cliffs
    "concave-2-noisy": ({6: -50.0}, {12: -5.0}, {9: 50.0}),
    "digits-mlp-2": ({6: 0.0}, {12: 0.1}),
}


@dataclass(frozen=True, eq=False)
class Losses:
    """Two losses, .1 to 1.5, with a known trade-off: bowls about two centres."""

    @property
    def space(self) -> CoefficientSpace:
        """Two experts."""
        return CoefficientSpace.box(("a", "b"))

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Two losses."""
        return tuple(Metric(name, "min", "loss") for name in ("x", "y"))

    def true_values(self, X: Tensor) -> Tensor:
        """Return the losses, ``n x 2``."""
        centres = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
        return (X.unsqueeze(1) - centres).square().sum(-1) + 0.1

    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        """Measure both at every row of ``X`` (``n x d``), exactly."""
        return Observations(X, self.true_values(X), self.metrics)


@dataclass(eq=False)
class Spoilt:
    """A problem whose evaluations return other values of the first metric at some calls.

    Attributes:
        inner: The problem.
        values: Number of the evaluation, from 1 -> the value in its place.
    """

    inner: Problem
    values: dict[int, float]
    calls: int = field(default=0, init=False)

    @property
    def space(self) -> CoefficientSpace:
        """That of the problem."""
        return self.inner.space

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Those of the problem."""
        return self.inner.metrics

    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        """Measure every metric at every row of ``X`` (``n x d``)."""
        seen = self.inner.evaluate(X, generator=generator)
        Y = seen.Y.clone()
        for i in range(len(X)):
            self.calls += 1
            Y[i, 0] = self.values.get(self.calls, float(Y[i, 0]))
        return Observations(X, Y, seen.metrics, seen.Yvar, seen.counts, seen.cost, seen.failures)


def _case(name: str) -> tuple[Problem, Case | None]:
    if name == "losses":
        return Losses(), None
    found = case(name)
    return found.problem, found


def kept_volume(name: str, X: Tensor) -> float:
    """Return the real hypervolume of points ``X`` (``k x d``) of a case."""
    problem, found = _case(name)
    if found is not None:
        gains = found.gains(X)
    else:
        assert isinstance(problem, Losses)
        gains = 1.2 - problem.true_values(X)
    return hypervolume(gains, torch.zeros(gains.shape[-1], dtype=torch.float64))


def _run(
    name: str,
    values: dict[int, float],
    outliers: Literal["auto", "keep"],
    seed: int,
    budget: int,
    surrogate: Surrogate,
) -> Result:
    problem = Spoilt(_case(name)[0], values)
    with tempfile.TemporaryDirectory() as folder:
        return optimize(
            problem,
            budget,
            seed=seed,
            run_dir=Path(folder) / "run",
            progress=False,
            tracking="none",
            outliers=outliers,
            surrogate=surrogate,
        )


def compare(name: str, seeds: int, budget: int, surrogate: Surrogate) -> Iterator[str]:
    """Yield the rows of a case."""
    clean = {
        (how, seed): _run(name, {}, how, seed, budget, surrogate)
        for seed in range(seeds)
        for how in ("keep", "auto")
    }
    volumes = {key: kept_volume(name, result.front.X) for key, result in clean.items()}
    change = [volumes["auto", s] / volumes["keep", s] for s in range(seeds)]
    aside = sum(len(clean["auto", s].summary["outliers"]) for s in range(seeds))
    total = sum(clean["auto", s].seen.Y.numel() for s in range(seeds))
    yield f"| {name} | none |  | {_shares(change)} | {aside} of {total} |"
    for values in SPOILT.get(name, ()):
        shares: dict[str, list[float]] = {"keep": [], "auto": []}
        hits = 0
        for seed in range(seeds):
            for how in shares:
                result = _run(name, values, how, seed, budget, surrogate)  # type: ignore[arg-type]
                share = kept_volume(name, result.front.X) / volumes["keep", seed]
                shares[how].append(share)
                hits += len(result.summary["outliers"]) if how == "auto" else 0
        what = ", ".join(f"{value:g} at {at}" for at, value in values.items())
        yield (
            f"| {name} | {what} | {_shares(shares['keep'])} | {_shares(shares['auto'])} | "
            f"{hits} of {seeds * len(values)} |"
        )


def _shares(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.3f} ({min(values):.3f})"


def false_alarms(
    name: str, surrogate: Surrogate, sizes: Sequence[int], seeds: int
) -> tuple[int, int]:
    """Return how many values of clean evaluations are set aside, and how many there are."""
    problem, _ = _case(name)
    space, count, total = problem.space, 0, 0
    for seed in range(seeds):
        source = make_generator(seed)
        empty = Observations.empty(space.d, problem.metrics)
        X = Sobol().propose(empty, space, max(sizes), generator=child(source, "design"))
        seen = Observations.joined(
            [
                problem.evaluate(x.unsqueeze(0), generator=child(source, "evaluate", i))
                for i, x in enumerate(X)
            ],
            space.d,
            problem.metrics,
        )
        for size in sizes:
            part = seen.select(range(size))
            count += len(Screened(surrogate).screen(part, space).outliers)
            total += part.Y.numel()
    return count, total


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--screen", action="store_true", help="false alarms alone")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--cases", nargs="+", default=[])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budget", type=int, default=20)
    parser.add_argument("--surrogates", nargs="+", default=["quadratic"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    kinds: dict[str, Any] = {"quadratic": Quadratic(), "auto": Auto()}
    if given.screen:
        print("| case | surrogate | set aside |\n|---|---|---|")
        for name in given.cases or CLEAN:
            for kind in given.surrogates:
                count, total = false_alarms(name, kinds[kind], (10, 16, 24), given.seeds)
                print(f"| {name} | {kind} | {count} of {total} |", flush=True)
        return
    names = given.cases or (["losses"] if given.smoke else list(SPOILT))
    lines = [
        "| surrogate | case | diverged | keep | auto | set aside |",
        "|---|---|---|---|---|---|",
    ]
    for kind in given.surrogates:
        for name in names:
            seeds = 1 if given.smoke else given.seeds
            for row in compare(name, seeds, given.budget, kinds[kind]):
                lines.append(f"| {kind} {row}")
                print(lines[-1], flush=True)
    data = {"seeds": given.seeds, "budget": given.budget}
    finish("Outliers", lines, data, given.out)


if __name__ == "__main__":
    main()
