"""A merge that is not linear in its coefficients, as operator and by hand, and a problem of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.space import CoefficientSpace
from tests.merging.small_models import build, family, inputs

_SMALL = 0.08
State = Mapping[str, Tensor]


def elected(base: Tensor, deltas: Tensor, c: Tensor) -> Tensor:
    """Merge by trimming small changes and adding those of the sign that weighs more."""
    kept = torch.where(deltas.abs() < _SMALL, 0.0, deltas) * c.to(deltas).reshape(
        -1, *[1] * (deltas.dim() - 1)
    )
    sign = kept.sum(0).sign()
    return base + torch.where(kept.sign() == sign, kept, 0.0).sum(0)


@dataclass(frozen=True)
class Elect:
    """Settings of the operator, of which there are none."""

    def space(self, experts: tuple[str, ...], *, lower: float, upper: float) -> CoefficientSpace:
        return CoefficientSpace.box(experts, lower=lower, upper=upper)

    def prepare(self, deltas: TaskVectors) -> PreparedElect:
        return PreparedElect(deltas)

    def describe(self) -> dict[str, Any]:
        return {"name": "elect"}


@dataclass(frozen=True, eq=False)
class PreparedElect:
    vectors: TaskVectors

    def write(self, c: Tensor, out: Tensor) -> None:
        out.copy_(elected(self.vectors.base, self.vectors.deltas, c))
        self.vectors.keep_variances(out)


def by_hand(base: State, experts: Mapping[str, State], c: Tensor) -> dict[str, Tensor]:
    """Merge state dicts tensor by tensor."""
    return {
        name: elected(pre, torch.stack([e[name] - pre for e in experts.values()]), c)
        for name, pre in base.items()
    }


@cache
def models(kind: str, count: int) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Return base and experts as state dicts."""
    base, experts = family(kind, count)
    return dict(base.state_dict()), {n: dict(model.state_dict()) for n, model in experts.items()}


def closeness(kind: str, expert: State) -> Callable[[nn.Module], float]:
    """Return a task: how close a model's outputs are to those of its expert."""
    model = build(kind)
    model.load_state_dict(expert)
    wanted = model(inputs(kind)).detach()

    def measured(tested: nn.Module) -> float:
        gap = (tested(inputs(kind)).detach() - wanted).square().mean()
        return float(torch.exp(-gap))

    return measured


class Counted:
    """Names of the tasks that were measured, in order."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def of(self, name: str, task: Callable[[nn.Module], float]) -> Callable[[nn.Module], float]:
        def measured(model: nn.Module) -> float:
            self.names.append(name)
            return task(model)

        return measured


def electing(
    kind: str = "mlp", count: int = 4, counted: Counted | None = None, **changes: Any
) -> MergedModelProblem:
    """Return the merging of experts ``e0``, ``e1``, ..., each with a task of its name."""
    base, experts = models(kind, count)
    tasks = {name: closeness(kind, expert) for name, expert in experts.items()}
    if counted is not None:
        tasks = {name: counted.of(name, task) for name, task in tasks.items()}
    settings: dict[str, Any] = {"operator": Elect(), **changes}
    return MergedModelProblem(
        build(kind, 5), base=base, experts=experts, evaluators=tasks, **settings
    )
