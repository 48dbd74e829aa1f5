from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from map_bo.errors import MergeError
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.operators.statistics.batches import call, digest_of, each_batch, evaluating, targets_of

CPU = torch.device("cpu")
X, Y = torch.arange(12.0).view(6, 2), torch.arange(6)


def sizes(batches: list[Any], limit: int | None) -> list[int]:
    return [n for _, n in each_batch(batches, CPU, limit)]


@pytest.mark.parametrize(
    ("limit", "expected"), [(None, [4, 2]), (6, [4, 2]), (5, [4, 1]), (4, [4]), (1, [1])]
)
def test_a_limit_counts_examples(limit: int | None, expected: list[int]) -> None:
    assert sizes([(X[:4], Y[:4]), (X[4:], Y[4:])], limit) == expected


def test_no_more_batches_are_asked_for_than_are_needed() -> None:
    def batches() -> Any:
        yield X[:3]
        raise AssertionError("asked for more")

    assert [n for _, n in each_batch(batches(), CPU, 3)] == [3]


def test_every_form_of_a_batch() -> None:
    forms: list[Any] = [X, (X, Y), [X, Y], {"x": X, "labels": Y}]
    found = [batch for batch, _ in each_batch(forms, CPU, None)]
    assert [type(batch) for batch in found] == [tuple, tuple, tuple, dict]
    model = nn.Linear(2, 1)
    assert torch.equal(call(model, found[0]), call(model, found[1]))
    assert torch.equal(targets_of(found[1]), Y)
    assert torch.equal(targets_of(found[3]), Y)
    assert torch.equal(targets_of({"x": X, "label": Y}), Y)
    with pytest.raises(MergeError, match="a batch has no labels"):
        targets_of(found[0])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (3, "must be a tensor, tuple, list or mapping, got a int"),
        ((), "a batch is empty"),
        ((X, 3), "entry 1 of a batch is a int"),
        ((X, torch.tensor(1.0)), "entry 1 of a batch is a Tensor, not a tensor with one row"),
        ((X, Y[:3]), r"same number of rows, got \[3, 6\]"),
    ],
)
def test_what_is_not_a_batch(batch: Any, message: str) -> None:
    with pytest.raises(MergeError, match=message):
        sizes([batch], None)


def test_modes_are_put_back_whatever_happens() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 1).eval())
    before = [module.training for module in model.modules()]

    def fail() -> None:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [module.training for module in model.modules()] == before


def test_the_digest_is_that_of_the_checkpoint_where_one_is_named() -> None:
    model, other = nn.Linear(2, 1), nn.Linear(2, 1)
    assert digest_of(model, None) == open_checkpoint(model).digest()
    assert digest_of(model, other) == open_checkpoint(other).digest() != digest_of(model, None)
