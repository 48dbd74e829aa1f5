"""Example sets: their order, and outcomes that are joined."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from map_bo.errors import DataError
from map_bo.examples.sets import ExampleOutcomes, ExampleSet, Part, check_parts, order_of, searched


@given(st.integers(1, 60), st.integers(0, 5), st.integers(1, 5))
def test_an_order_has_each_example_once_and_follows_from_the_seed(
    size: int, seed: int, labels: int
) -> None:
    strata = torch.arange(size) % labels
    examples = ExampleSet(("a",), size, "digest", strata)
    order = order_of(examples, seed, "a")
    assert sorted(order.tolist()) == list(range(size))
    assert torch.equal(order, order_of(examples, seed, "a"))


def test_orders_differ_by_seed_data_and_evaluator() -> None:
    examples = ExampleSet(("a",), 50, "digest")
    orders = [
        order_of(examples, 0, "a"),
        order_of(examples, 1, "a"),
        order_of(examples, 0, "b"),
        order_of(ExampleSet(("a",), 50, "other"), 0, "a"),
    ]
    assert len({tuple(order.tolist()) for order in orders}) == 4


@given(st.integers(2, 6), st.integers(0, 9), st.integers(10, 80))
def test_every_prefix_holds_each_label_in_its_share(labels: int, seed: int, size: int) -> None:
    strata = torch.randint(labels, (size,), generator=torch.Generator().manual_seed(seed))
    order = order_of(ExampleSet(("a",), size, "", strata), seed, "a")
    for n in range(1, size + 1):
        for label in range(labels):
            share = float((strata == label).sum()) * n / size
            assert abs(float((strata[order[:n]] == label).sum()) - share) <= 2.0 + labels / 2


def test_outcomes_are_kept_by_example_and_joined() -> None:
    first = ExampleOutcomes(torch.tensor([4, 1]), torch.tensor([1.0, 0.0]), 5, (True,))
    assert first.items.tolist() == [1, 4]
    assert first.values.flatten().tolist() == [0.0, 1.0]
    both = first.joined(ExampleOutcomes(torch.tensor([1, 0]), torch.ones(2), 5, (True,)))
    assert both.items.tolist() == [0, 1, 4]
    assert both.values.flatten().tolist() == [1.0, 1.0, 1.0]
    assert both.row().isnan().flatten().tolist() == [False, False, True, True, False]
    assert not both.complete


@pytest.mark.parametrize(
    ("items", "values", "size"),
    [([0, 0], [1.0, 1.0], 3), ([3], [1.0], 3), ([], [], 3), ([0, 1], [1.0], 3), ([-1], [1.0], 3)],
)
def test_impossible_outcomes_are_refused(items: list[int], values: list[float], size: int) -> None:
    with pytest.raises(DataError):
        ExampleOutcomes(torch.tensor(items, dtype=torch.long), torch.tensor(values), size, (True,))


def test_outcomes_of_different_sets_are_not_joined() -> None:
    one = ExampleOutcomes(torch.tensor([0]), torch.ones(1), 3, (True,))
    with pytest.raises(DataError, match="3 examples cannot be joined with some on 4"):
        one.joined(ExampleOutcomes(torch.tensor([0]), torch.ones(1), 4, (True,)))


def test_parts_are_of_different_evaluators_and_not_empty() -> None:
    assert check_parts([Part("a", 0, 2)]) == (Part("a", 0, 2),)
    for wrong in ([Part("a", 2, 2)], [Part("a", 0, 2), Part("a", 2, 4)]):
        with pytest.raises(DataError):
            check_parts(wrong)


def test_columns_are_found_by_the_metrics_names() -> None:
    one = ExampleOutcomes(torch.tensor([0]), torch.ones(1), 3, (True,))
    assert one.columns("task") == {"task": 0}
    two = ExampleOutcomes(torch.tensor([0]), torch.ones(1, 2), 3, (True, False), ("a", "b"))
    assert two.columns("task") == {"a": 0, "b": 1}
    more = ExampleOutcomes(torch.tensor([1]), torch.ones(1, 2), 3, (True, False))
    assert two.joined(more).metrics == ("a", "b")
    with pytest.raises(DataError, match="without their names"):
        more.columns("task")
    with pytest.raises(DataError, match="2 columns are of the metrics a, a"):
        ExampleOutcomes(torch.tensor([1]), torch.ones(1, 2), 3, (True, False), ("a", "a"))
    with pytest.raises(DataError, match="of a, b cannot be joined with those of b, a"):
        two.joined(ExampleOutcomes(more.items, more.values, 3, more.means, ("b", "a")))


def test_a_holdout_takes_its_share_and_leaves_something_to_search() -> None:
    assert [searched(n, 0.3) for n in (1, 2, 10, 797)] == [1, 1, 7, 558]
    assert searched(10, 0.0) == 10
    assert searched(3, 0.99) == 1


def test_outcomes_are_shown_in_short() -> None:
    found = ExampleOutcomes(torch.arange(70), torch.ones(70), 300, (True,), ("acc",))
    assert repr(found) == "<outcomes of 70 of 300 examples of acc>"
    assert repr(ExampleOutcomes(torch.arange(2), torch.ones(2), 3, (True,))) == (
        "<outcomes of 2 of 3 examples>"
    )
