from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.align.layout import FlatLayout
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.operators.statistics.known_statistics import (
    check_experts,
    load_statistic,
    match_statistics,
    refuse_negative,
    require_statistics,
    statistics_by_expert,
)
from map_bo.operators.statistics.statistics import Statistics

BASE = open_checkpoint({"a.weight": torch.ones(2, 3), "b.weight": torch.ones(4)})
LAYOUT = FlatLayout.of(BASE, {})


def known(tensors: dict[str, Tensor], **settings: Any) -> Statistics:
    return Statistics("fisher", open_checkpoint(tensors), **settings)


class TestMatch:
    def test_by_name_and_by_tied_name(self) -> None:
        tied = FlatLayout.of(BASE, {"head.weight": "a.weight"})
        one = known({"a.weight": torch.ones(2, 3)})
        other = known({"head.weight": torch.ones(2, 3)})
        third = known({"x": torch.ones(2, 3)}, ties={"a.weight": "x"})
        found = match_statistics(tied, {"one": one, "other": other, "third": third})
        assert found == {0: ["a.weight", "head.weight", "x"]}

    def test_a_tensor_that_one_expert_lacks(self) -> None:
        both = {"a.weight": torch.ones(2, 3), "b.weight": torch.ones(4)}
        given = {"one": known(both), "two": known({"a.weight": torch.ones(2, 3)})}
        with pytest.raises(MergeError, match=r"of two lack the tensor 'b.weight', .* of one have"):
            match_statistics(LAYOUT, given)

    def test_a_tensor_that_the_model_lacks(self) -> None:
        given = {"one": known({"a.weight": torch.ones(2, 3), "c": torch.ones(1)})}
        with pytest.raises(MergeError, match="'one' are of another model: the merged one has no c"):
            match_statistics(LAYOUT, given)


class TestExperts:
    def test_they_are_named_before_anything_is_read(self) -> None:
        require_statistics("fisher", "fisher", {"a": "gone", "b": "gone"}, ("a", "b"))
        with pytest.raises(MergeError, match="fisher has no statistics for b, c") as caught:
            require_statistics("fisher", "fisher", {"a": "gone"}, ("a", "b", "c"))
        assert "+operator.statistics.b=FILE" in str(caught.value.hint)

    def test_in_their_order(self) -> None:
        given = {name: known({"w": torch.ones(1)}) for name in ("b", "a")}
        assert list(statistics_by_expert(given, ("a", "b"), "fisher")) == ["a", "b"]
        with pytest.raises(MergeError, match="there are no statistics for c"):
            statistics_by_expert(given, ("a", "c"), "fisher")
        with pytest.raises(MergeError, match="inner products of layer inputs are needed"):
            statistics_by_expert(given, ("a",), "grams")

    def test_they_belong_to_their_weights(self) -> None:
        expert = open_checkpoint({"w": torch.ones(2)})
        own = known({"w": torch.ones(2)}, model=expert.digest())
        check_experts({"e": own}, {"e": expert}, "fisher")
        check_experts({"e": {"w": torch.ones(2)}}, {"e": expert}, "fisher")  # not known of whom
        other = open_checkpoint({"w": torch.zeros(2)})
        with pytest.raises(MergeError, match="computed for another model"):
            check_experts({"e": own}, {"e": other}, "fisher")


def test_a_statistic_that_is_not_finite() -> None:
    given = known({"a": torch.tensor([1.0, torch.nan]), "b": torch.ones(2).double()})
    assert load_statistic(given, "e", "b").dtype == torch.float32
    with pytest.raises(MergeError, match="'e' hold NaN or infinity in 'a'"):
        load_statistic(given, "e", "a")


def test_negative_coefficients() -> None:
    refuse_negative(torch.tensor([0.0, 1.0]))
    with pytest.raises(MergeError, match=r"must not be negative, got \[-0.5\]"):
        refuse_negative(torch.tensor([-0.5]))
