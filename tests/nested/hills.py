from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from map_bo.data import Metric, Observations
from map_bo.loop.settings import Settings
from map_bo.nested.optimize import optimize_nested
from map_bo.nested.result import NestedResult
from map_bo.nested.settings import Nested
from map_bo.pareto.gradient import GradientSolver
from map_bo.samplers.designs.space_filling import Sobol
from map_bo.space import CoefficientSpace
from map_bo.surrogates.quadratic import Quadratic


@dataclass
class Hills:
    """Each expert has a task that wants its own coefficient high and the others low.

    Counts, task by task, what it measures.
    """

    experts: tuple[str, ...] = ("a", "b", "c", "d")
    only: tuple[str, ...] = ()
    box: CoefficientSpace | None = None
    fails: Callable[[Tensor], str | None] = lambda x: None
    measured: list[tuple[str, tuple[float, ...]]] = field(default_factory=list)

    @property
    def space(self) -> CoefficientSpace:
        return self.box or CoefficientSpace.box(self.experts)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return tuple(Metric(name, kind="unbounded") for name in self.only or self.experts)

    def restricted(self, names: Sequence[str]) -> Hills:
        return Hills(self.experts, tuple(names), self.box, self.fails, self.measured)

    def describe(self) -> dict[str, Any]:
        return {"type": "Hills", "experts": list(self.experts)}

    def truth(self, X: Tensor) -> Tensor:
        own = torch.eye(len(self.experts), dtype=torch.float64)
        pull = own - 0.3 * (1 - own) * torch.linspace(0.5, 1.5, len(self.experts)).double()
        gains = X @ pull.T - 0.2 * X.square().sum(-1, keepdim=True)
        return gains[:, [self.experts.index(metric.name) for metric in self.metrics]]

    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        X = self.space.check(X)
        reasons = [self.fails(x) for x in X]
        for x in X:
            self.measured += [(metric.name, tuple(x.tolist())) for metric in self.metrics]
        Y = self.truth(X)
        Y[[reason is not None for reason in reasons]] = torch.nan
        return Observations(X, Y, self.metrics, failures=tuple(reasons))


def quick(budget: int = 24, **changes: Any) -> Settings:
    """Settings whose fits and fronts take milliseconds."""
    return Settings(budget=budget, **options(**changes))


def options(**changes: Any) -> dict[str, Any]:
    return {
        "sampler": Sobol(),
        "surrogate": Quadratic(),
        "solver": GradientSolver(points=20, steps=20),
        "verify": 1,
        "retries": 0,
        **changes,
    }


def nested(problem: Any = None, budget: int = 24, **settings: Any) -> NestedResult:
    how = Nested(**{k: settings.pop(k) for k in list(settings) if k in Nested.__dataclass_fields__})
    return optimize_nested(
        problem or Hills(),
        budget,
        nested=how,
        progress=False,
        tracking="none",
        **options(**settings),
    )


def outcome(result: NestedResult) -> list[Any]:
    front, seen = result.front, result.seen
    tensors = [seen.X, seen.Y, front.X, front.mean, front.std, front.real, result.verification.Y]
    told = [tensor.nan_to_num(-99.0).tolist() for tensor in tensors]
    return [*told, seen.failures, result.data_sets, [node.describe() for node in result.nodes]]


VARIANTS: dict[str, dict[str, Any]] = {
    "points": {"stages": 2},
    "pairs": {"stages": 2, "points": 1, "budget_split": "equal"},
    "informed": {"stages": 2, "inform": True},
    "surrogate": {"stages": 2, "promote": "surrogate"},
    "point": {"stages": 2, "promote": "point"},
    "published": {"group_size": 2, "order": "score", "promote": "point", "measure": "children"},
    "preferences": {
        "stages": 2,
        "promote": "point",
        "preferences": (
            {"a": 1, "b": 1, "c": 1, "d": 1},
            {"a": 3, "b": 0, "c": 1, "d": 0},
        ),
    },
    "refined": {"stages": 2, "refine": 4},
    "adaptive": {"stages": 2, "budget_split": "adaptive"},
    "conflict": {"stages": 2, "order": "conflict", "probe": 6},
}
