from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from map_bo.errors import BudgetError, TreeError
from map_bo.nested.budget import NodeSize, Purse, fewest, node_sizes
from map_bo.nested.settings import Nested
from map_bo.nested.tree import Group, Path, path_name
from tests.nested.trees import trees

FOUR = Group.of([["a", "b"], ["c", "d"]])
SPLITS: Any = st.sampled_from(["equal", "by_size", "adaptive"])


def sizes_of(tree: Group, nested: Nested, blocks: int = 1, extra: int = 0) -> dict[Path, NodeSize]:
    """Sizes where every expert has one task, and ``extra`` are nobody's."""
    below = {path: len(node.leaves) for path, node in tree.nodes() if path}
    return node_sizes(tree, nested, below, blocks, len(tree.leaves) + extra)


def need(sizes: dict[Path, NodeSize]) -> int:
    return sum(fewest(size) * size.data_sets for size in sizes.values())


def cost(planned: dict[Path, int], sizes: dict[Path, NodeSize]) -> int:
    return sum(count * sizes[path].data_sets for path, count in planned.items())


def hinted(error: BudgetError) -> int:
    found = re.search(r"a budget of (\d+)", str(error.hint))
    assert found, error.hint
    return int(found[1])


def how(draw: st.DrawFn) -> Nested:
    hand_up: Any = draw(st.sampled_from(["point", "points", "surrogate"]))
    count = draw(st.integers(0, 3)) if hand_up == "point" else 0
    return Nested(
        hand_up=hand_up,
        points=draw(st.integers(1, 4)),
        budget_split=draw(SPLITS),
        preferences=({},) * count,
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[Group, Nested, dict[Path, NodeSize]]:
    tree, nested = draw(trees(fewest=1)), how(draw)
    return tree, nested, sizes_of(tree, nested, draw(st.integers(1, 2)), draw(st.integers(0, 2)))


@given(cases(), st.integers(0, 2000))
def test_the_plan_costs_no_more_than_there_is_and_leaves_no_node_short(
    case: tuple[Group, Nested, dict[Path, NodeSize]], more: int
) -> None:
    tree, nested, sizes = case
    total = need(sizes) + more
    planned = Purse(tree, nested, sizes, total).planned()
    assert set(planned) == set(sizes)
    assert cost(planned, sizes) <= total
    assert all(planned[path] >= fewest(size) for path, size in sizes.items())
    # What is not planned would not pay for one more evaluation everywhere.
    weight = max(size.runs * (size.coefficients + 2) for size in sizes.values())
    assert total - cost(planned, sizes) < weight * sum(s.data_sets for s in sizes.values())


@given(cases(), st.floats(0, 0.999))
def test_too_little_is_refused_and_the_hint_is_enough(
    case: tuple[Group, Nested, dict[Path, NodeSize]], share: float
) -> None:
    tree, nested, sizes = case
    with pytest.raises(BudgetError, match="its anchors and one more") as caught:
        Purse(tree, nested, sizes, int(share * need(sizes)))
    everything = sizes[()].data_sets
    budget = hinted(caught.value)
    Purse(tree, nested, sizes, budget * everything)
    with pytest.raises(BudgetError):
        Purse(tree, nested, sizes, (budget - 1) * everything)


def test_the_hint_counts_what_is_set_aside() -> None:
    sizes = sizes_of(FOUR, Nested())
    with pytest.raises(BudgetError) as caught:
        Purse(FOUR, Nested(), sizes, 0, aside=7)
    assert hinted(caught.value) == -(-need(sizes) // 4) + 7


def test_the_hint_counts_what_was_given_to_single_nodes() -> None:
    nested = Nested(budgets={"root": 50})
    sizes = sizes_of(FOUR, nested)
    with pytest.raises(BudgetError, match="node 0 would have") as caught:
        Purse(FOUR, nested, sizes, need(sizes))
    budget = hinted(caught.value)
    assert Purse(FOUR, nested, sizes, budget * 4).planned()[()] == 50


@pytest.mark.parametrize(
    "settings", [{"budgets": {"0": 4}}, {"stage_budgets": (4, 20)}, {"budgets": {"0": -1}}]
)
def test_a_node_that_was_given_too_little_is_told_so(settings: dict[str, Any]) -> None:
    nested = Nested(**settings)
    with pytest.raises(BudgetError, match=r"node 0 would have -?\d evaluations and needs 5") as e:
        Purse(FOUR, nested, sizes_of(FOUR, nested), 10_000)
    assert "nested.budgets or nested.stage_budgets" in str(e.value.hint)


def test_budgets_of_all_nodes_may_not_exceed_the_whole() -> None:
    nested = Nested(stage_budgets=(10, 20))
    sizes = sizes_of(FOUR, nested)
    assert cost(Purse(FOUR, nested, sizes, 120).planned(), sizes) == 120
    with pytest.raises(BudgetError, match="come to 120 measurements of one task, more than 119"):
        Purse(FOUR, nested, sizes, 119)


def test_sizes_are_those_of_what_children_hand_up() -> None:
    tree = Group.of([["a", "b"], "c"])
    for settings, coefficients in (
        ({"points": 3}, 3 + 1),
        ({"points": 1}, 1 + 1),
        ({"hand_up": "point"}, 1 + 1),
        ({"hand_up": "surrogate"}, 3),
    ):
        sizes = sizes_of(tree, Nested(**settings))
        assert sizes == {(0,): NodeSize(2, 2), (): NodeSize(coefficients, 3)}
    assert sizes_of(tree, Nested(points=3), blocks=2, extra=4) == {
        (0,): NodeSize(4, 2),
        (): NodeSize(3 + 2, 7),
    }
    three = Nested(hand_up="point", preferences=({},) * 3)
    assert sizes_of(tree, three) == {(0,): NodeSize(2, 2, 1), (): NodeSize(2, 3, 3)}
    assert fewest(NodeSize(2, 3, 3)) == 15


def test_equal_numbers_where_none_needs_more() -> None:
    nested = Nested(budget_split="equal", points=1)
    sizes = sizes_of(FOUR, nested)
    # 2 + 2 + 4 data sets an evaluation of each.
    assert set(Purse(FOUR, nested, sizes, 87).planned().values()) == {10}


def test_equal_numbers_but_for_those_that_need_more() -> None:
    nested = Nested(budget_split="equal", points=4)
    # A pair hands up three at most, so the root has 6 coefficients and needs 9.
    sizes = sizes_of(FOUR, nested)
    planned = Purse(FOUR, nested, sizes, 4 * 9 + 2 * 2 * 6 + 3).planned()
    assert planned == {(0,): 6, (1,): 6, (): 9}


def test_by_size_is_what_each_needs_and_the_rest_in_proportion() -> None:
    nested = Nested(points=1)
    sizes = sizes_of(Group.of([["a", "b", "c"], "d"]), nested)
    # 6 evaluations of 3 tasks and 5 of 4; then 5 and 4 for each further unit of 3 * 5 + 4 * 4.
    planned = Purse(Group.of([["a", "b", "c"], "d"]), nested, sizes, 38 + 2 * 31).planned()
    assert planned == {(0,): 6 + 10, (): 5 + 8}


def test_stage_budgets_and_budgets_come_before_the_split() -> None:
    nested = Nested(stage_budgets=(7, 12), budgets={"1": 9}, budget_split="equal")
    purse = Purse(FOUR, nested, sizes_of(FOUR, nested), 10_000)
    assert purse.planned() == {(0,): 7, (1,): 9, (): 12}
    assert [purse.take(path, 0) for path in ((0,), (1,), ())] == [7, 9, 12]
    part = Nested(budgets={"root": 20}, budget_split="equal")
    purse = Purse(FOUR, part, sizes_of(FOUR, part), 20 * 4 + 6 * 4)
    assert purse.planned() == {(0,): 6, (1,): 6, (): 20}


def test_names_and_stages_that_there_are_not_are_refused() -> None:
    nested = Nested(budgets={"2": 9})
    with pytest.raises(TreeError, match=r"names the node '2'") as caught:
        Purse(FOUR, nested, sizes_of(FOUR, nested), 10_000)
    assert caught.value.hint == "nodes are 0, 1, root"
    nested = Nested(stage_budgets=(9, 9, 9))
    with pytest.raises(BudgetError, match="has 3 numbers for 2 stages"):
        Purse(FOUR, nested, sizes_of(FOUR, nested), 10_000)


@pytest.mark.parametrize("split", ["equal", "by_size"])
def test_without_adaptive_nothing_is_handed_on(split: Any) -> None:
    nested = Nested(budget_split=split)
    purse = Purse(FOUR, nested, sizes_of(FOUR, nested), 200)
    planned = purse.planned()
    assert {path: purse.take(path, 0) for path in planned} == planned


@given(cases(), st.integers(0, 500), st.data())
def test_adaptive_hands_leftovers_up(
    case: tuple[Group, Nested, dict[Path, NodeSize]], more: int, data: st.DataObject
) -> None:
    tree, nested, sizes = case
    total = need(sizes) + more
    adaptive = Nested(
        hand_up=nested.hand_up, preferences=nested.preferences, budget_split="adaptive"
    )
    purse = Purse(tree, adaptive, sizes, total)
    planned, spent = purse.planned(), 0
    for path, size in sizes.items():
        given = purse.take(path, spent)
        assert given >= planned[path], path_name(path)
        spent += size.data_sets * data.draw(st.integers(fewest(size), given))
        assert spent <= total


def test_all_that_is_left_goes_to_the_root() -> None:
    nested = Nested(budget_split="adaptive", points=1)
    sizes = sizes_of(FOUR, nested)
    purse = Purse(FOUR, nested, sizes, 200)
    first = purse.take((0,), 0)
    second = purse.take((1,), 10)  # the first spent 5 evaluations of 2 tasks
    assert second > first == purse.planned()[(0,)]
    assert purse.take((), 20) == (200 - 20) // 4


def test_a_node_gets_the_fewest_whatever_others_spent() -> None:
    nested = Nested(budget_split="adaptive")
    purse = Purse(FOUR, nested, sizes_of(FOUR, nested), 200)
    assert purse.take((0,), 0) > 5
    assert purse.take((1,), 190) == 5
