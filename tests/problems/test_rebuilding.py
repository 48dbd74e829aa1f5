from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import map_bo
from map_bo.evaluators.evaluator import accuracy
from map_bo.problems.rebuilding import Rebuilt, rebuilt
from map_bo.rng import make_generator


class Made(Rebuilt):
    def __init__(self, size: int, *, module: nn.Module | None = None) -> None:
        self.size, self.module = size, module


class MadeOfModule(Made):
    _without_weights = ("module",)


@rebuilt
def make_twice(size: int) -> Made:
    return Made(2 * size)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.register_buffer("positions", torch.arange(5000.0), persistent=False)


def test_it_comes_back_from_the_call_that_made_it() -> None:
    found = pickle.loads(pickle.dumps(Made(3)))
    assert isinstance(found, Made)
    assert found.size == 3


def test_a_function_that_made_it_is_called_again_and_not_its_class() -> None:
    made = make_twice(3)
    made.size = -1
    assert pickle.loads(pickle.dumps(made)).size == 6


def test_copies_make_nothing() -> None:
    made = Made(3)
    made.size = 5
    assert copy.copy(made).size == 5


def test_large_parameters_stay_behind_and_buffers_do_not() -> None:
    module = Tied()
    found = pickle.loads(pickle.dumps(MadeOfModule(1, module=module))).module
    assert isinstance(found, Tied)
    assert found.second.weight is found.first.weight
    assert float(found.first.weight.detach().abs().sum()) == 0
    assert found.first.weight.requires_grad
    assert dict(found.named_buffers())["positions"].tolist() == list(range(5000))
    assert torch.equal(found.first.bias, module.first.bias)
    assert float(module.first.weight.detach().abs().sum()) > 0


def test_a_module_where_weights_matter_keeps_them() -> None:
    module = Tied()
    found = pickle.loads(pickle.dumps(Made(1, module=module))).module
    assert torch.equal(found.first.weight, module.first.weight)


def problem() -> map_bo.MergedModelProblem:
    draws = make_generator(0)

    def state() -> dict[str, Tensor]:
        return {
            "weight": torch.randn(3, 64, generator=draws),
            "bias": torch.randn(3, generator=draws),
        }

    inputs = torch.randn(40, 64, generator=draws)
    labels = torch.randint(3, (40,), generator=draws)
    return map_bo.MergedModelProblem(
        nn.Linear(64, 3),
        base=state(),
        experts={"a": state(), "b": state()},
        evaluators={"a": accuracy(inputs, labels), "b": accuracy(inputs, labels.flip(0))},
    )


@pytest.mark.parametrize("part", ["whole", "restricted"])
def test_a_merged_model_problem_measures_the_same_when_it_comes_back(part: str) -> None:
    mine = problem() if part == "whole" else problem().restricted(["b"])
    found = pickle.loads(pickle.dumps(mine))
    X = torch.tensor([[0.2, 0.9], [1.0, 0.1]], dtype=torch.float64)
    mine_seen = mine.evaluate(X, generator=make_generator(1))
    seen = found.evaluate(X, generator=make_generator(1))
    assert seen.metrics == mine_seen.metrics
    assert torch.equal(seen.Y, mine_seen.Y)
    assert found.describe() == mine.describe()
