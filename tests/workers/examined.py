"""A merged model that is scored by example, for workers, with examples that go wrong."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from map_bo.data import Metric
from map_bo.evaluators.evaluator import accuracy
from map_bo.evaluators.items import Items
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.rng import make_generator
from tests.merging.small_models import build, family

SIZE = 60
INPUTS = torch.randn(SIZE, 5, generator=make_generator(1))
LABELS = torch.randint(0, 3, (SIZE,), generator=make_generator(2))
SLOW = 7  # the example that takes long, with the coefficients (1, 1, 1)


def loss(model: nn.Module, items: Tensor) -> Tensor:
    """Return the loss of each example; some fail, and one is slow at one merge."""
    found = nn.functional.cross_entropy(model(INPUTS[items]), LABELS[items], reduction="none")
    return torch.where(items % 10 == 3, torch.nan, found)


def slow(model: nn.Module, items: Tensor) -> Tensor:
    """Return ones, late where the slow example is among them."""
    if SLOW in items.tolist():
        time.sleep(20)
    return torch.ones(len(items))


def broken(model: nn.Module, items: Tensor) -> Tensor:
    """Fail."""
    raise RuntimeError("no such layer")


def plain(model: nn.Module) -> float:
    """Return a number of the whole."""
    with torch.no_grad():
        return float(model(INPUTS).softmax(-1).amax(-1).mean())


def make() -> MergedModelProblem:
    """Return the problem."""
    base, experts = family("mlp")
    return MergedModelProblem(
        build("mlp", 5),
        base=base,
        experts=experts,
        evaluators={
            "loss": Items(loss, SIZE, metric=Metric("loss", "min", "loss"), labels=LABELS),
            "ready": accuracy(INPUTS, LABELS, batch_size=16),
            "plain": plain,
            "broken": Items(broken, SIZE),
            "slow": Items(slow, SIZE),
        },
        cache=False,
    )
