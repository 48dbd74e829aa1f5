"""What `LiveModel` rests on; the misbehaviour of whole evaluators is in tests/problems/merged."""

from __future__ import annotations

import random
from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from map_bo.merging.vectors.module_state import ModuleState, same_items


class Config:
    def __init__(self) -> None:
        self.eps = 1e-5
        self.parent: Any = self  # a cycle


def build() -> Any:
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.config = Config()
    model.queue = deque([1, 2])
    model.names = {"a", "b"}
    model.pair = ({"x": [1]}, torch.zeros(2))
    model.random = random.Random(0)
    model.numbers = np.random.default_rng(0)
    model.space = SimpleNamespace(x=1)
    return model


def state_of(model: nn.Module) -> ModuleState:
    return ModuleState(model, [*model.parameters(), *model.buffers()])


def test_same_items_asks_for_the_same_objects_in_the_same_order() -> None:
    a, b = [1], [1]
    assert same_items({"x": a, "y": b}, {"x": a, "y": b})
    assert not same_items({"x": a}, {"x": b})
    assert not same_items({"x": a, "y": a}, {"y": a, "x": a})
    assert not same_items({"x": a}, {"x": a, "y": b})


def test_nothing_changed_says_nothing() -> None:
    assert state_of(build()).restore() == ([], [])


def test_everything_that_hangs_on_the_model_comes_back() -> None:
    model = build()
    drawn = random.Random(0).random(), np.random.default_rng(0).random()
    state = state_of(model)
    for _ in range(2):
        model.config.eps = 2.0
        model.config.more = 1
        model.queue.append(3)
        model.names.clear()
        model.pair[0]["x"].append(2)
        model.pair[1].fill_(torch.nan)
        model.random.random()
        model.numbers.random()
        model.space.x = 5
        del model[0]
        state.restore()
        assert vars(model.config) == {"eps": 1e-5, "parent": model.config}
        assert (list(model.queue), model.names) == ([1, 2], {"a", "b"})
        assert model.pair[0] == {"x": [1]}
        assert model.pair[1].tolist() == [0.0, 0.0]
        assert (model.random.random(), model.numbers.random()) == drawn
        assert model.space.x == 1
        assert len(model) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: setattr(m[1], "eps", 10.0), "module 1: eps was 1e-05, is 10.0"),
        (lambda m: m.__delitem__(0), "the model: module '1' was removed"),
        (lambda m: m.__delitem__(1), "the model: module '1' was removed"),
        (lambda m: m.append(nn.Identity()), "the model: module '2' was added"),
        (lambda m: delattr(m, "0"), "the model: module '0' was removed"),
        (lambda m: setattr(m[0], "bias", None), "module 0: parameter 'bias' was replaced"),
        (lambda m: delattr(m, "queue"), "the model: queue was removed"),
        (lambda m: setattr(m, "extra", 1), "the model: extra was added"),
    ],
)
def test_changes_are_said_in_plain_words(change: Any, said: str) -> None:
    model = build()
    state = state_of(model)
    change(model)
    changes, troubles = state.restore()
    assert said in changes
    assert troubles == []


def test_a_class_is_put_back() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(Own(2, 2))
    state = state_of(model)
    Own.forward = lambda self, input: input  # type: ignore[method-assign]
    assert state.restore() == (["class Own: forward was added"], [])
    assert Own.forward is nn.Linear.forward


def test_a_tensor_whose_memory_was_given_up_gets_some() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2))
    model.loose = torch.ones(3)
    state = state_of(model)
    model.loose.untyped_storage().resize_(0)
    assert state.restore() == ([], [])
    assert model.loose.tolist() == [1.0] * 3


def test_what_cannot_be_put_back_is_said() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2))
    model.array = np.zeros(3)
    state = state_of(model)
    model.array += 1
    model.array.setflags(write=False)
    _, (trouble,) = state.restore()
    assert trouble.startswith("an array that the model holds (")
