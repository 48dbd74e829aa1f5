"""A space with a choice, and functions over it, for the tests of whatever handles one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from map_bo.choice import ChoiceAxis
from map_bo.data import Metric, Observations
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace

METRICS = (Metric("first", kind="unbounded"), Metric("second", kind="unbounded"))
CHOICE = CoefficientSpace(
    ("a", "b", "operator", "ties.density"),
    (0.0, 0.0, 0.0, 0.1),
    (1.0, 1.0, 2.0, 0.9),
    owner=(0, 1, -1, -1),
    experts=("a", "b"),
    defaults=(0.0, 0.2),
    choice=ChoiceAxis("operator", ("sum", "ties", "slerp"), {"ties.density": "ties"}),
)


def truth(X: Tensor) -> Tensor:
    """Return two metrics (``n x 2``): their best coefficients, and levels, depend on the option."""
    code = X[:, 2].round().long()
    best = torch.tensor([[0.2, 0.8], [0.7, 0.4], [0.5, 0.5]]).double()[code]
    density = torch.where(code == 1, 1 - (X[:, 3] - 0.6).square(), 0.9)
    level = torch.tensor([[0.0, 0.5], [0.4, 0.0], [0.1, 0.1]]).double()[code]
    first = density - (X[:, :2] - best).square().sum(-1) + level[:, 0]
    second = 0.5 * X[:, 0] - X[:, 1].square() + level[:, 1]
    return torch.stack([first, second], -1)


def some_of(space: CoefficientSpace, n: int, seed: int = 0) -> Observations:
    """Return ``n`` evaluations of the truth, the anchors first."""
    X = torch.cat([space.anchors().X, space.sample(n, generator=make_generator(seed))])[:n]
    return Observations(X, truth(X), METRICS, Yvar=torch.full((n, 2), 1e-6).double())


def reordered(X: Tensor, order: list[int]) -> tuple[Tensor, CoefficientSpace]:
    """Return rows of :data:`CHOICE` under other codes: option ``k`` is now the ``order[k]``-th."""
    names = [""] * len(order)
    for code, place in enumerate(order):
        assert CHOICE.choice is not None
        names[place] = CHOICE.choice.options[code]
    moved = X.clone()
    moved[:, 2] = torch.tensor(order).double()[X[:, 2].round().long()]
    axis = ChoiceAxis("operator", tuple(names), {"ties.density": "ties"})
    return moved, replace(CHOICE, choice=axis)


@dataclass(frozen=True)
class Levels:
    """A problem over the space with a choice; the options in ``broken`` fail."""

    broken: tuple[str, ...] = ()

    @property
    def space(self) -> CoefficientSpace:
        return CHOICE

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return METRICS

    def describe(self) -> dict[str, Any]:
        return {"type": "Levels", "broken": list(self.broken)}

    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        X = CHOICE.check(X)
        options = [str(CHOICE.named(x.tolist())["operator"]) for x in X]
        failures = tuple("out of memory" if one in self.broken else None for one in options)
        Y = truth(X)
        Y[[reason is not None for reason in failures]] = torch.nan
        return Observations(X, Y, METRICS, failures=failures)
