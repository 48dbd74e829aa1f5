from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from map_bo.data import Metric, Observations
from map_bo.loop.settings import Settings
from map_bo.pareto.gradient import GradientSolver
from map_bo.samplers.designs.space_filling import Sobol
from map_bo.space import CoefficientSpace
from map_bo.surrogates.quadratic import Quadratic


@dataclass
class Bowls:
    """Two bowls with a known trade-off; counts its evaluations and can be told to fail.

    ``flaky`` holds the seeds of the attempts that fail, so a failure does not depend on how many
    processes have worked on the run.
    """

    names: tuple[str, ...] = ("a", "b")
    fails: Callable[[int, Tensor], str | None] = lambda number, x: None
    flaky: frozenset[int] = frozenset()
    noise: float = 0.0
    where: str = "here"
    calls: list[list[float]] = field(default_factory=list)

    @property
    def space(self) -> CoefficientSpace:
        return CoefficientSpace.box(self.names)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (Metric("near a", kind="unbounded"), Metric("far from b", "min", "loss"))

    def describe(self) -> dict[str, Any]:
        return {"type": "Bowls", "noise": self.noise, "base": {"source": self.where}}

    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        X = self.space.check(X)
        reasons = []
        for x in X:
            self.calls.append(x.tolist())
            flaky = "flaky" if generator.initial_seed() in self.flaky else None
            reasons.append(self.fails(len(self.calls), x) or flaky)
        Y = self.true_values(X)
        Y = Y + self.noise * torch.rand(Y.shape, generator=generator, dtype=torch.float64)
        Y[[reason is not None for reason in reasons]] = torch.nan
        return Observations(X, Y, self.metrics, failures=tuple(reasons))

    def true_values(self, X: Tensor) -> Tensor:
        a, b = torch.eye(2, dtype=torch.float64)
        return torch.stack([1 - (X - a).square().sum(-1), 0.1 + (X - b).square().sum(-1)], -1)


@dataclass
class SafeBowls(Bowls):
    """The same with a third metric on which base and experts tie.

    ``drop`` is how much the uniform blend loses of it.
    """

    safe: float = 1.0
    drop: float = 0.0

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (*super().metrics, Metric("safe", kind="unbounded"))

    def true_values(self, X: Tensor) -> Tensor:
        safe = self.safe - 4 * self.drop * X.prod(-1, keepdim=True)
        return torch.cat([super().true_values(X), safe], -1)


def quick(budget: int = 8, **changes: Any) -> Settings:
    """Settings whose fit and front take milliseconds."""
    values: dict[str, Any] = {
        "sampler": Sobol(),
        "surrogate": Quadratic(),
        "solver": GradientSolver(points=20, steps=20),
        "verify": 2,
        "retries": 0,
        **changes,
    }
    return Settings(budget=budget, **values)
