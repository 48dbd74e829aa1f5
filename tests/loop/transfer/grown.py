from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import DataError
from map_bo.space import CoefficientSpace


@dataclass(eq=False)
class Growing:
    """Bowls about one point per task, of any number of experts and tasks; it can be divided.

    ``calls`` holds the points that were measured and in which metrics; ``fails`` the names of
    metrics that fail.
    """

    experts: tuple[str, ...] = ("a", "b")
    tasks: tuple[str, ...] = ("x", "y")
    digests: dict[str, str] = field(default_factory=dict)
    fails: frozenset[str] = frozenset()
    upper: float = 1.0
    calls: list[tuple[tuple[float, ...], tuple[str, ...]]] = field(default_factory=list)

    @property
    def space(self) -> CoefficientSpace:
        return CoefficientSpace.box(self.experts, upper=self.upper)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return tuple(Metric(name, kind="unbounded") for name in self.tasks)

    def describe(self) -> dict[str, Any]:
        experts = {name: {"digest": self.digests.get(name, name)} for name in self.experts}
        base = {"digest": self.digests.get("base", "base")}
        return {"kind": "growing", "base": base, "experts": experts}

    def restricted(self, names: Sequence[str]) -> Growing:
        if set(names) - set(self.tasks):
            raise DataError("there is no such metric")
        part = Growing(self.experts, tuple(names), self.digests, self.fails, self.upper)
        part.calls = self.calls
        return part

    def true_values(self, X: Tensor) -> Tensor:
        values = []
        for task in self.tasks:
            place = {"x": 0, "y": 1, "z": 2}[task]
            centre = torch.full((X.shape[-1],), 0.3, dtype=torch.float64)
            centre[place % X.shape[-1]] = 0.9
            values.append(1 - (X - centre).square().sum(-1))
        return torch.stack(values, -1)

    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        Y = self.true_values(X)
        reasons: list[str | None] = [None] * len(X)
        for i, x in enumerate(X.tolist()):
            self.calls.append((tuple(x), self.tasks))
            for j, name in enumerate(self.tasks):
                if name in self.fails:
                    Y[i, j], reasons[i] = torch.nan, f"{name} failed"
        return Observations(X, Y, self.metrics, failures=tuple(reasons))

    def seen_at(self, X: Tensor) -> Observations:
        return Observations(X, self.true_values(X), self.metrics)
