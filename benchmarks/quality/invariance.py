"""Invariance: the unit, the label and the order of metrics and experts change no run.

python -m benchmarks.quality.invariance [--smoke] [--seeds N] [--kinds K ...] [--out FILE.json]

Whole runs with every surrogate on small problems whose truth is known: both losses multiplied by
numbers from 1e-12 to 1e12, unbounded metrics likewise, minimised instead of maximised, shifted; an
error rate in place of an accuracy; metrics and experts in another order. What is compared is the
real hypervolume of the front that the run ends with, computed from the truth in its first unit, so
all numbers of a row are of the same thing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Generator, Tensor

import map_bo
from benchmarks.record import finish
from map_bo.data import Direction, Kind, Metric, Observations
from map_bo.pareto.indicators import hypervolume
from map_bo.samplers.designs.space_filling import Sobol
from map_bo.samplers.sampler import Sampler
from map_bo.scale import Scale
from map_bo.space import CoefficientSpace
from map_bo.surrogates.auto import Auto
from map_bo.surrogates.informed import Informed
from map_bo.surrogates.processes.gp import GP
from map_bo.surrogates.processes.hybrid import Hybrid
from map_bo.surrogates.processes.sparse import Sparse
from map_bo.surrogates.published import PublishedQuadratic
from map_bo.surrogates.quadratic import Quadratic
from map_bo.surrogates.surrogate import Surrogate

__all__ = [
    "FACTORS",
    "KINDS",
    "SURROGATES",
    "Outcome",
    "Truth",
    "optimise",
    "variants",
]

FACTORS = (1e-12, 1e-9, 1e-6, 1e-3, 1.0, 1e3, 1e6, 1e9, 1e12)
KINDS: dict[str, Kind] = {
    "loss": "loss",
    "unbounded": "unbounded",
    "accuracy": "proportion",
    "counts": "proportion",
}
NAMES = ("a", "b", "c")
CENTRES = ((0.9, 0.1, 0.2), (0.2, 0.8, 0.3), (0.1, 0.3, 0.9))
SURROGATES: dict[str, Callable[[CoefficientSpace], Surrogate]] = {
    "quadratic": lambda space: Quadratic(),
    "gp": lambda space: GP(),
    "hybrid": lambda space: Hybrid(),
    "sparse": lambda space: Sparse(),
    "auto": lambda space: Auto(),
    "informed": lambda space: Informed(Quadratic(), space, torch.eye(space.d).double(), {}),
    "published": lambda space: PublishedQuadratic(),
}


@dataclass(frozen=True, eq=False)
class Truth:
    """A problem with a known truth, as it is or written differently.

    Attributes:
        kind: ``"loss"``, ``"unbounded"``, ``"accuracy"`` (proportions that say no count) or
            ``"counts"`` (proportions of 200 examples).
        factor: What every metric is multiplied by.
        shift: What is added to every metric then, as a share of ``factor``.
        mirrored: Whether the first metric is written the other way round.
        metric_order: Which metric is which column.
        expert_order: Which expert is which coefficient.
    """

    kind: str = "loss"
    factor: float = 1.0
    shift: float = 0.0
    mirrored: bool = False
    metric_order: tuple[int, ...] = (0, 1)
    expert_order: tuple[int, ...] = (0, 1, 2)
    calls: list[list[float]] = field(default_factory=list)

    @property
    def space(self) -> CoefficientSpace:
        """The coefficients, in the order of this problem."""
        return CoefficientSpace.box([NAMES[i] for i in self.expert_order])

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics, in the order of this problem."""
        kind = KINDS[self.kind]
        every = []
        for i in range(len(self.metric_order)):
            turned = self.mirrored and i == 0
            direction: Direction = "min" if kind == "loss" or turned else "max"
            every.append(Metric(f"on {NAMES[i]}", kind=kind, direction=direction))
        return tuple(every[i] for i in self.metric_order)

    def first(self, X: Tensor) -> Tensor:
        """Return the metrics (``n x m``) at ``X`` as they are first written, experts in order."""
        centres = torch.tensor(CENTRES[: len(self.metric_order)], dtype=torch.float64)
        away = ((X.unsqueeze(1) - centres) ** 2).sum(-1)
        if self.kind == "loss":
            return 0.15 + 0.8 * away + 0.3 * away**2
        if self.kind == "unbounded":
            return 1 - away + 0.1 * torch.sin(5 * X.sum(-1, keepdim=True))
        value = torch.sigmoid(2.5 - 2 * away)
        return (200 * value).round() / 200 if self.kind == "counts" else value

    def in_order(self, X: Tensor) -> Tensor:
        """Return ``X`` with its coefficients in the first order."""
        return X[:, torch.tensor(self.expert_order).argsort()]

    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        """Return the metrics as they are written here."""
        self.calls.extend(X.tolist())
        Y = self.first(self.in_order(X.double()))
        if self.kind in ("loss", "unbounded"):
            Y = self.factor * (Y + self.shift)
        if self.mirrored and self.kind != "loss":
            Y = torch.cat([(-Y if self.kind == "unbounded" else 1 - Y)[:, :1], Y[:, 1:]], 1)
        counts = torch.full_like(Y, 200.0 if self.kind == "counts" else torch.nan)
        return Observations(X, Y[:, list(self.metric_order)], self.metrics, counts=counts)

    def volume(self, X: Tensor) -> float:
        """Return the real hypervolume of ``X`` in the first writing, by the first scale."""
        plain = Truth(kind=self.kind, metric_order=tuple(range(len(self.metric_order))))
        anchors = plain.evaluate(plain.space.anchors().X, generator=torch.Generator())
        scale = Scale.of(anchors, plain.space)
        gains = scale.gains(plain.first(self.in_order(X.double())))
        return hypervolume(gains, torch.zeros(gains.shape[-1], dtype=torch.float64))


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a run came to.

    Attributes:
        volume: Real hypervolume of the front, first writing.
        X: The points that were evaluated, coefficients in the first order.
        result: The result.
        inside: Share of front points and metrics whose truth lies in the 95 % interval.
    """

    volume: float
    X: Tensor
    result: map_bo.Result
    inside: float


def optimise(
    truth: Truth, surrogate: str, budget: int = 12, seed: int = 0, **options: Any
) -> Outcome:
    """Run and return what it came to; ``options`` are those of ``map_bo.optimize``."""
    truth = replace(truth, calls=[])
    options = {"surrogate": SURROGATES[surrogate](truth.space), **options}
    if surrogate == "published":  # no sampler can look through it
        sampler: Sampler = Sobol()
        options["sampler"] = sampler
    result = map_bo.optimize(truth, budget, seed=seed, progress=False, tracking="none", **options)
    front = result.front
    real = truth.evaluate(front.X, generator=torch.Generator()).Y
    inside = ((front.lower <= real) & (real <= front.upper)).double().mean()
    evaluated = truth.in_order(result.seen.X)
    return Outcome(truth.volume(front.X), evaluated, result, float(inside))


def variants(kind: str, factors: Sequence[float] = FACTORS) -> dict[str, Truth]:
    """Return the ways in which the problem of a kind is written, the first one first."""
    found = {"as it is": Truth(kind)}
    if kind in ("loss", "unbounded"):
        found |= {f"x {f:g}": Truth(kind, factor=f) for f in factors if f != 1.0}
    if kind == "unbounded":
        found |= {f"{shift:+g}": Truth(kind, shift=shift) for shift in (-1.0, 10.0, 1000.0)}
    if kind != "loss":
        found["mirrored"] = Truth(kind, mirrored=True)
    found["metrics in another order"] = Truth(kind, metric_order=(1, 0))
    found["experts in another order"] = Truth(kind, expert_order=(2, 0, 1))
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the mean real hypervolumes, a row for each writing and a column per surrogate."""
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        names = [name for name in SURROGATES if any(row["surrogate"] == name for row in own)]
        lines += [f"| {kind} | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
        for title in dict.fromkeys(row["written"] for row in own):
            found = {row["surrogate"]: row for row in own if row["written"] == title}
            cells = [fmean(found[name]["hypervolume"]) if name in found else None for name in names]
            shown = ["" if value is None else f"{value:.4f}" for value in cells]
            lines.append(f"| {title} | {' | '.join(shown)} |")
        lines.append("")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one surrogate, three factors")
    parser.add_argument("--budget", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--surrogates", nargs="+", choices=list(SURROGATES))
    parser.add_argument(
        "--join", nargs="+", type=Path, help="join the recorded parts instead of running"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for part in options.join or ():
        rows += json.loads(part.read_text())["data"]["rows"]
    if options.join:
        rows.sort(key=lambda row: list(KINDS).index(row["kind"]))
        finish("invariance", table(rows), {"rows": rows}, options.out)
        return
    names = options.surrogates or (["quadratic"] if options.smoke else list(SURROGATES))
    factors = (1e-12, 1.0, 1e12) if options.smoke else FACTORS
    for kind in options.kinds:
        first: dict[tuple[str, int], Outcome] = {}
        for title, truth in variants(kind, factors).items():
            for name in names:
                volumes, moved, inside = [], [], []
                for seed in range(options.seeds):
                    found = optimise(truth, name, options.budget, seed)
                    start = first.setdefault((name, seed), found)
                    volumes.append(found.volume)
                    inside.append(found.inside)
                    moved.append(float((found.X - start.X).abs().max()))
                rows.append(
                    {
                        "kind": kind,
                        "written": title,
                        "surrogate": name,
                        "hypervolume": volumes,
                        "evaluations moved by at most": moved,
                        "truth inside its interval": inside,
                    }
                )
                print(kind, title, name, volumes, f"moved {max(moved):.2g}", flush=True)
    finish("invariance", table(rows), {"rows": rows}, options.out)


if __name__ == "__main__":
    main()
