"""What a region that fails and what a constraint cost, against runs that do not know of them.

python -m benchmarks.quality.constraints --out benchmarks/results/constraints.json
python -m benchmarks.quality.constraints --smoke             one seed of each: does it run?

It takes some seconds per run on one core, a quarter of an hour for five seeds.

Failing regions: the share of evaluations of the search that failed, the share of the front's points
that fail, and the real hypervolume of those that work, as a share of the best that can be had; with
``failures=learn`` and ``ignore``. Constraints: the share of evaluations after the anchors that keep
the constraint, and the real hypervolume of the front's points that keep it, as a share of the best
that can be had; with ``constraints`` and, filtered afterwards, without.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Generator, Tensor

import map_bo
from benchmarks.record import finish
from map_bo import CoefficientSpace, Metric, Observations
from map_bo.pareto.indicators import hypervolume
from map_bo.surrogates.quadratic import Quadratic

_DENSE = 20_000  # points by which the best that can be had is known

Rule = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Bowls:
    """Two quadratics to maximise, and a third value that has to be at least a bound.

    Attributes:
        name: Of the case.
        centres: ``2 x d`` best points.
        value: Maps ``n x d`` to the ``n`` third values.
        bound: What is to be kept.
        fails: Whether what breaks it fails; else it is a metric.
        budget: Evaluations.
    """

    name: str
    centres: Tensor
    value: Rule
    bound: float
    fails: bool
    budget: int

    @property
    def space(self) -> CoefficientSpace:
        """The box of the coefficients."""
        return CoefficientSpace.box([f"e{i}" for i in range(self.centres.shape[-1])])

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Two objectives and, unless it fails, what has to be kept."""
        names = ("u", "v") if self.fails else ("u", "v", "safe")
        return tuple(Metric(name, kind="unbounded") for name in names)

    def objectives(self, X: Tensor) -> Tensor:
        """Return the two objectives, ``n x 2``."""
        return 1 - (X.unsqueeze(1) - self.centres).square().sum(-1)

    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        """Return the measurements."""
        Y, value = self.objectives(X), self.value(X)
        if not self.fails:
            return Observations(X, torch.cat([Y, value.unsqueeze(-1)], -1), self.metrics)
        bad = value < self.bound
        reasons = tuple("diverged" if one else None for one in bad.tolist())
        Y = Y.masked_fill(bad.unsqueeze(-1), torch.nan)
        return Observations(X, Y, self.metrics, failures=reasons)

    def volume(self, X: Tensor) -> float:
        """Return the real hypervolume of the points that can be had, reference at the anchors."""
        anchors = self.space.anchors()
        low = self.objectives(anchors.X[:-1]).amin(0)
        Y = self.objectives(X)[self.value(X) >= self.bound]
        return hypervolume(Y - low, torch.zeros(2, dtype=torch.float64)) if len(Y) else 0.0

    def best(self) -> float:
        """Return the volume of a dense sample of the space."""
        d = self.centres.shape[-1]
        engine = torch.quasirandom.SobolEngine(d, scramble=True, seed=0)  # type: ignore[no-untyped-call]
        return self.volume(engine.draw(_DENSE, dtype=torch.float64))


def _centres(*rows: Sequence[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


CASES = (
    Bowls("sum", _centres([0.95, 0.75], [0.75, 0.95]), lambda X: -X.sum(-1), -1.3, True, 24),
    Bowls(
        name="one expert",
        centres=_centres([0.9, 0.6, 0.2], [0.9, 0.2, 0.6]),
        value=lambda X: -X[:, 0],
        bound=-0.6,
        fails=True,
        budget=24,
    ),
    Bowls(
        name="far from the centre",
        centres=_centres([0.9, 0.9, 0.4, 0.2], [0.4, 0.9, 0.9, 0.2]),
        value=lambda X: -(X - 0.4).square().sum(-1),
        bound=-0.3,
        fails=True,
        budget=32,
    ),
    Bowls(
        name="safe bowl",
        centres=_centres([0.9, 0.2, 0.1], [0.2, 0.9, 0.1]),
        value=lambda X: 1 - 1.2 * (X - _centres([0.35, 0.35, 0.75])).square().sum(-1),
        bound=0.9,
        fails=False,
        budget=24,
    ),
    Bowls("norm", _centres([0.9, 0.5], [0.5, 0.9]), lambda X: -X.square().sum(-1), -0.6, False, 20),
    Bowls(
        name="narrow",
        centres=_centres([0.9, 0.2, 0.5, 0.5], [0.2, 0.9, 0.5, 0.5]),
        value=lambda X: 1 - (X[:, 0] - X[:, 1]).square() - (X[:, 2] - 0.1).square(),
        bound=0.95,
        fails=False,
        budget=30,
    ),
)


def measure(case: Bowls, seed: int, *, told: bool) -> dict[str, Any]:
    """Return what one run gives.

    Args:
        case: The case.
        seed: Of the run.
        told: Whether the run learns from failures, or knows the constraint.
    """
    settings: dict[str, Any] = {"failures": "learn" if told else "ignore"}
    if told and not case.fails:
        settings["constraints"] = [map_bo.AtLeast("safe", case.bound)]
    result = map_bo.optimize(
        case,
        case.budget,
        seed=seed,
        retries=0,
        max_failure_share=1.0,
        progress=False,
        tracking="none",
        surrogate=Quadratic(),
        **settings,
    )
    later = result.seen.X[len(case.space.anchors()) :]
    kept = (case.value(later) >= case.bound).double().mean()
    front = (case.value(result.front.X) >= case.bound).double().mean()
    chosen = result.choose().x.unsqueeze(0)
    return {
        "case": case.name,
        "seed": seed,
        "told": told,
        "fails": case.fails,
        "evaluations kept": float(kept),
        "front kept": float(front),
        "chosen kept": float(case.value(chosen) >= case.bound),
        "hypervolume": case.volume(result.front.X) / case.best(),
    }


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the means over seeds as a Markdown table."""
    columns = ("evaluations kept", "front kept", "chosen kept", "hypervolume")
    lines = [f"| case | run | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    for case in CASES:
        for told in (False, True):
            own = [row for row in rows if row["case"] == case.name and row["told"] == told]
            if own:
                words = ("ignore", "learn") if case.fails else ("without", "with")
                means = " | ".join(f"{mean(row[name] for row in own):.2f}" for name in columns)
                lines.append(f"| {case.name} | {words[told]} | {means} |")
    return lines


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in range(1 if given.smoke else given.seeds):
        for case in CASES:
            rows += [measure(case, seed, told=told) for told in (False, True)]
            print(rows[-2], rows[-1], sep="\n", flush=True)
    finish("Failing regions and constraints", table(rows), {"rows": rows}, given.out)


if __name__ == "__main__":
    main()
