from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from map_bo.errors import BudgetError, TreeError
from map_bo.nested.budget import BudgetAllocator, NodeSize, least_evaluations, node_sizes
from map_bo.nested.settings import Nested
from map_bo.nested.tree import Group, NodePath, path_name
from tests.nested.trees import trees

FOUR = Group.of([["a", "b"], ["c", "d"]])
SPLITS: Any = st.sampled_from(["equal", "by_size", "adaptive"])


def sizes_of(
    tree: Group, nested: Nested, blocks: int = 1, extra: int = 0
) -> dict[NodePath, NodeSize]:
    """Sizes where every expert has one task, and ``extra`` are nobody's."""
    below = {path: len(node.leaves) for path, node in tree.nodes() if path}
    return node_sizes(tree, nested, below, blocks, len(tree.leaves) + extra)


def need(sizes: dict[NodePath, NodeSize]) -> int:
    return sum(least_evaluations(size) * size.data_sets for size in sizes.values())


def cost(planned: dict[NodePath, int], sizes: dict[NodePath, NodeSize]) -> int:
    return sum(count * sizes[path].data_sets for path, count in planned.items())


def hinted(error: BudgetError) -> int:
    found = re.search(r"a budget of (\d+)", str(error.hint))
    assert found, error.hint
    return int(found[1])


def how(draw: st.DrawFn) -> Nested:
    promote: Any = draw(st.sampled_from(["point", "points", "surrogate"]))
    count = draw(st.integers(0, 3)) if promote == "point" else 0
    return Nested(
        promote=promote,
        points=draw(st.integers(1, 4)),
        budget_split=draw(SPLITS),
        preferences=({},) * count,
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[Group, Nested, dict[NodePath, NodeSize]]:
    tree, nested = draw(trees(fewest=1)), how(draw)
    return tree, nested, sizes_of(tree, nested, draw(st.integers(1, 2)), draw(st.integers(0, 2)))


@given(cases(), st.integers(0, 2000))
def test_the_plan_costs_no_more_than_there_is_and_leaves_no_node_short(
    case: tuple[Group, Nested, dict[NodePath, NodeSize]], more: int
) -> None:
    tree, nested, sizes = case
    total = need(sizes) + more
    planned = BudgetAllocator(tree, nested, sizes, total).plan()
    assert set(planned) == set(sizes)
    assert cost(planned, sizes) <= total
    assert all(planned[path] >= least_evaluations(size) for path, size in sizes.items())
    # What is not planned would not pay for one more evaluation everywhere.
    weight = max(size.runs * (size.coefficients + 2) for size in sizes.values())
    assert total - cost(planned, sizes) < weight * sum(s.data_sets for s in sizes.values())


@given(cases(), st.floats(0, 0.999))
def test_too_little_is_refused_and_the_hint_is_enough(
    case: tuple[Group, Nested, dict[NodePath, NodeSize]], share: float
) -> None:
    tree, nested, sizes = case
    with pytest.raises(BudgetError, match="its anchors and one more") as caught:
        BudgetAllocator(tree, nested, sizes, int(share * need(sizes)))
    everything = sizes[()].data_sets
    budget = hinted(caught.value)
    BudgetAllocator(tree, nested, sizes, budget * everything)
    with pytest.raises(BudgetError):
        BudgetAllocator(tree, nested, sizes, (budget - 1) * everything)


def test_the_hint_counts_what_is_set_aside() -> None:
    sizes = sizes_of(FOUR, Nested())
    with pytest.raises(BudgetError) as caught:
        BudgetAllocator(FOUR, Nested(), sizes, 0, reserved=7)
    assert hinted(caught.value) == -(-need(sizes) // 4) + 7


def test_the_hint_counts_what_was_given_to_single_nodes() -> None:
    nested = Nested(budgets={"root": 50})
    sizes = sizes_of(FOUR, nested)
    with pytest.raises(BudgetError, match="node 0 would have") as caught:
        BudgetAllocator(FOUR, nested, sizes, need(sizes))
    budget = hinted(caught.value)
    assert BudgetAllocator(FOUR, nested, sizes, budget * 4).plan()[()] == 50


@pytest.mark.parametrize(
    "settings", [{"budgets": {"0": 4}}, {"stage_budgets": (4, 20)}, {"budgets": {"0": -1}}]
)
def test_a_node_that_was_given_too_little_is_told_so(settings: dict[str, Any]) -> None:
    nested = Nested(**settings)
    with pytest.raises(BudgetError, match=r"node 0 would have -?\d evaluations and needs 5") as e:
        BudgetAllocator(FOUR, nested, sizes_of(FOUR, nested), 10_000)
    assert "nested.budgets or nested.stage_budgets" in str(e.value.hint)


def test_budgets_of_all_nodes_may_not_exceed_the_whole() -> None:
    nested = Nested(stage_budgets=(10, 20))
    sizes = sizes_of(FOUR, nested)
    assert cost(BudgetAllocator(FOUR, nested, sizes, 120).plan(), sizes) == 120
    with pytest.raises(BudgetError, match="add up to 120 measurements of one task, more than 119"):
        BudgetAllocator(FOUR, nested, sizes, 119)


def test_sizes_are_those_of_what_children_promote() -> None:
    tree = Group.of([["a", "b"], "c"])
    for settings, coefficients in (
        ({"points": 3}, 3 + 1),
        ({"points": 1}, 1 + 1),
        ({"promote": "point"}, 1 + 1),
        ({"promote": "surrogate"}, 3),
    ):
        sizes = sizes_of(tree, Nested(**settings))
        assert sizes == {(0,): NodeSize(2, 2), (): NodeSize(coefficients, 3)}
    assert sizes_of(tree, Nested(points=3), blocks=2, extra=4) == {
        (0,): NodeSize(4, 2),
        (): NodeSize(3 + 2, 7),
    }
    three = Nested(promote="point", preferences=({},) * 3)
    assert sizes_of(tree, three) == {(0,): NodeSize(2, 2, 1), (): NodeSize(2, 3, 3)}
    assert least_evaluations(NodeSize(2, 3, 3)) == 15


def test_equal_numbers_where_none_needs_more() -> None:
    nested = Nested(budget_split="equal", points=1)
    sizes = sizes_of(FOUR, nested)
    # 2 + 2 + 4 data sets an evaluation of each.
    assert set(BudgetAllocator(FOUR, nested, sizes, 87).plan().values()) == {10}


def test_equal_numbers_but_for_those_that_need_more() -> None:
    nested = Nested(budget_split="equal", points=4)
    # A pair promotes three at most, so the root has 6 coefficients and needs 9.
    sizes = sizes_of(FOUR, nested)
    planned = BudgetAllocator(FOUR, nested, sizes, 4 * 9 + 2 * 2 * 6 + 3).plan()
    assert planned == {(0,): 6, (1,): 6, (): 9}


def test_by_size_is_what_each_needs_and_the_rest_in_proportion() -> None:
    nested = Nested(points=1)
    sizes = sizes_of(Group.of([["a", "b", "c"], "d"]), nested)
    # 6 evaluations of 3 tasks and 5 of 4; then 5 and 4 for each further unit of 3 * 5 + 4 * 4.
    planned = BudgetAllocator(Group.of([["a", "b", "c"], "d"]), nested, sizes, 38 + 2 * 31).plan()
    assert planned == {(0,): 6 + 10, (): 5 + 8}


def test_stage_budgets_and_budgets_come_before_the_split() -> None:
    nested = Nested(stage_budgets=(7, 12), budgets={"1": 9}, budget_split="equal")
    allocator = BudgetAllocator(FOUR, nested, sizes_of(FOUR, nested), 10_000)
    assert allocator.plan() == {(0,): 7, (1,): 9, (): 12}
    assert [allocator.allocate(path, 0) for path in ((0,), (1,), ())] == [7, 9, 12]
    part = Nested(budgets={"root": 20}, budget_split="equal")
    allocator = BudgetAllocator(FOUR, part, sizes_of(FOUR, part), 20 * 4 + 6 * 4)
    assert allocator.plan() == {(0,): 6, (1,): 6, (): 20}


def test_names_and_stages_that_there_are_not_are_refused() -> None:
    nested = Nested(budgets={"2": 9})
    with pytest.raises(TreeError, match=r"names a node '2' that") as caught:
        BudgetAllocator(FOUR, nested, sizes_of(FOUR, nested), 10_000)
    assert caught.value.hint == "nodes are 0, 1, root"
    nested = Nested(stage_budgets=(9, 9, 9))
    with pytest.raises(BudgetError, match="has 3 numbers for 2 stages"):
        BudgetAllocator(FOUR, nested, sizes_of(FOUR, nested), 10_000)


@pytest.mark.parametrize("split", ["equal", "by_size"])
def test_without_adaptive_nothing_is_left_to_others(split: Any) -> None:
    nested = Nested(budget_split=split)
    allocator = BudgetAllocator(FOUR, nested, sizes_of(FOUR, nested), 200)
    planned = allocator.plan()
    assert {path: allocator.allocate(path, 0) for path in planned} == planned


@given(cases(), st.integers(0, 500), st.data())
def test_adaptive_leaves_the_rest_to_later_nodes(
    case: tuple[Group, Nested, dict[NodePath, NodeSize]], more: int, data: st.DataObject
) -> None:
    tree, nested, sizes = case
    total = need(sizes) + more
    adaptive = Nested(
        promote=nested.promote, preferences=nested.preferences, budget_split="adaptive"
    )
    allocator = BudgetAllocator(tree, adaptive, sizes, total)
    planned, spent = allocator.plan(), 0
    for path, size in sizes.items():
        given = allocator.allocate(path, spent)
        assert given >= planned[path], path_name(path)
        spent += size.data_sets * data.draw(st.integers(least_evaluations(size), given))
        assert spent <= total


def test_all_that_is_left_goes_to_the_root() -> None:
    nested = Nested(budget_split="adaptive", points=1)
    sizes = sizes_of(FOUR, nested)
    allocator = BudgetAllocator(FOUR, nested, sizes, 200)
    first = allocator.allocate((0,), 0)
    second = allocator.allocate((1,), 10)  # the first spent 5 evaluations of 2 tasks
    assert second > first == allocator.plan()[(0,)]
    assert allocator.allocate((), 20) == (200 - 20) // 4


def test_a_node_gets_the_fewest_whatever_others_spent() -> None:
    nested = Nested(budget_split="adaptive")
    allocator = BudgetAllocator(FOUR, nested, sizes_of(FOUR, nested), 200)
    assert allocator.allocate((0,), 0) > 5
    assert allocator.allocate((1,), 190) == 5
