from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from map_bo.errors import TreeError
from map_bo.nested.planning import (
    balanced_tree,
    grouped_tree,
    most_stages,
    order_by_affinity,
    tree_by_score,
)
from map_bo.nested.tree import Group
from map_bo.rng import make_generator
from tests.nested.trees import names_of

EVERY = [(n, s) for n in range(1, 34) for s in range(1, most_stages(n) + 1)]


def sizes(tree: Group) -> list[int]:
    return [len(node.children) for _, node in tree.nodes()]


def scores_of(count: int, seed: int = 0) -> dict[str, float]:
    values = torch.rand(count, generator=make_generator(seed)).tolist()
    return dict(zip(names_of(count), values, strict=True))


def test_most_stages_are_those_of_pairs() -> None:
    found = [most_stages(n) for n in (1, 2, 3, 4, 5, 8, 9, 32, 33)]
    assert found == [1, 1, 2, 2, 3, 3, 4, 5, 6]


def test_balanced_trees_have_the_stages_that_were_asked_for() -> None:
    for n, stages in EVERY:
        tree = balanced_tree(names_of(n), stages)
        assert tree.stage == stages, (n, stages)
        assert tree.leaves == names_of(n)  # each once, in the order given
        bound = next(k for k in range(1, n + 1) if k**stages >= n)
        assert max(sizes(tree)) <= bound, (n, stages)


def test_one_stage_is_one_group_and_the_most_stages_merge_pairs() -> None:
    for n in range(1, 34):
        assert balanced_tree(names_of(n), 1) == Group(names_of(n))
        assert max(sizes(balanced_tree(names_of(n), most_stages(n)))) <= 2


def test_groups_of_a_stage_are_as_even_as_can_be() -> None:
    for n, stages in EVERY:
        items = len(balanced_tree(names_of(n), stages).leaves)
        first = [node for _, node in balanced_tree(names_of(n), stages).nodes() if node.stage == 1]
        alone = items - sum(len(node.children) for node in first)
        held = [len(node.children) for node in first] + [1] * alone
        assert max(held) - min(held) <= 1, (n, stages)
    whole = balanced_tree(names_of(16), 2)
    assert sizes(whole) == [4, 4, 4, 4, 4]
    groups = balanced_tree(names_of(10), 2).children
    assert [len(group.children) for group in groups if isinstance(group, Group)] == [3, 4, 3]


@pytest.mark.parametrize(("count", "stages"), [(4, 3), (4, 0), (1, 2), (33, 7), (5, -1)])
def test_stages_that_cannot_be_are_refused(count: int, stages: int) -> None:
    with pytest.raises(
        TreeError, match=f"{count} experts cannot be merged in {stages} stages"
    ) as e:
        balanced_tree(names_of(count), stages)
    assert f"to {most_stages(count)} (pairs)" in str(e.value.hint)


def test_no_experts_are_refused() -> None:
    with pytest.raises(TreeError, match="no experts to merge"):
        balanced_tree((), 1)
    with pytest.raises(TreeError, match="no experts to merge"):
        grouped_tree((), 2)
    with pytest.raises(TreeError, match="no experts to merge"):
        tree_by_score({}, lambda items: items)


@given(st.integers(1, 33), st.integers(2, 9))
def test_groups_of_a_size_hold_every_leaf_and_no_more_than_that(count: int, size: int) -> None:
    tree = grouped_tree(names_of(count), size)
    assert tree.leaves == names_of(count)
    assert max(sizes(tree)) <= size
    assert tree.stage <= max(1, math.ceil(math.log(count, size) - 1e-9))


def test_a_size_that_merges_nothing_is_refused() -> None:
    assert grouped_tree(("a", "b", "c", "d"), 4) == Group(("a", "b", "c", "d"))
    with pytest.raises(TreeError, match="size of a group must be at least 2, got 1"):
        grouped_tree(("a", "b"), 1)


def test_pairs_are_taken_closest_scores_first() -> None:
    scores = {"a": 0.05, "b": 0.9, "c": 0.52, "d": 0.15, "e": 0.5, "f": 0.85}
    tree = tree_by_score(scores, lambda items: 2)
    pairs = {node.leaves for _, node in tree.nodes() if node.stage == 1}
    assert pairs == {("e", "c"), ("f", "b"), ("a", "d")}
    # Means are 0.51, 0.875 and 0.1: the first two are closest and the third stays alone.
    assert tree.plain() == [["a", "d"], [["e", "c"], ["f", "b"]]]


def test_the_closest_pair_may_leave_distant_ones_to_each_other() -> None:
    scores = {"a": 0.0, "b": 0.4, "c": 0.5, "d": 1.0}
    tree = tree_by_score(scores, lambda items: 2)
    assert {node.leaves for _, node in tree.nodes() if node.stage == 1} == {("b", "c"), ("a", "d")}


def test_an_odd_one_is_that_of_no_close_pair() -> None:
    tree = tree_by_score({"a": 0.5, "b": 0.1, "c": 0.52}, lambda items: 2)
    assert tree.plain() == ["b", ["a", "c"]]
    assert tree.stage == 2


@given(st.integers(1, 33), st.integers(2, 6), st.integers(0, 9))
def test_by_score_holds_every_leaf_once(count: int, size: int, seed: int) -> None:
    scores = scores_of(count, seed)
    for stages in (None, *range(1, most_stages(count) + 1)):
        tree = tree_by_score(scores, lambda items: size, stages)
        assert sorted(tree.leaves) == sorted(scores)
        if stages is None:
            assert max(sizes(tree)) <= max(size, 1)
        else:
            assert tree.stage == stages
            bound = next(k for k in range(1, count + 1) if k**stages >= count)
            assert max(sizes(tree)) <= bound


@given(st.integers(2, 20), st.integers(3, 6), st.integers(0, 9))
def test_larger_groups_are_neighbours_by_score(count: int, size: int, seed: int) -> None:
    scores = scores_of(count, seed)
    first = [n for _, n in tree_by_score(scores, lambda items: size).nodes() if n.stage == 1]
    held = [sorted(scores[name] for name in node.leaves) for node in first]
    for one, other in pairwise(sorted(held)):
        assert one[-1] <= other[0]


def test_one_group_by_score_is_the_flat_merge() -> None:
    tree = tree_by_score({"a": 0.3, "b": 0.1, "c": 0.2}, lambda items: items)
    assert tree == Group(("b", "c", "a"))
    assert tree_by_score({"a": 0.3}, lambda items: items) == Group(("a",))


@given(st.permutations(range(9)), st.integers(0, 99))
def test_blocks_of_an_affinity_stand_together(order: list[int], seed: int) -> None:
    block = torch.tensor(order) // 3
    noise = 0.1 * torch.rand(9, 9, generator=make_generator(seed), dtype=torch.float64)
    affinity = (block[:, None] == block[None]).double() + noise + noise.T
    found = order_by_affinity(names_of(9), affinity)
    assert sorted(found) == sorted(names_of(9))
    blocks = [int(block[int(name[1:])]) for name in found]
    assert [blocks[i] for i in (0, 3, 6)] == [blocks[i] for i in (1, 4, 7)]
    assert [blocks[i] for i in (0, 3, 6)] == [blocks[i] for i in (2, 5, 8)]


def test_neighbours_in_the_order_are_those_with_most_affinity() -> None:
    # A chain: each has affinity with the next one only.
    chain = torch.eye(5, dtype=torch.float64)
    for i in range(4):
        chain[i, i + 1] = chain[i + 1, i] = 0.8 - 0.1 * i
    order = torch.tensor([3, 0, 4, 1, 2])
    names = tuple("abcde"[i] for i in order)
    found = "".join(order_by_affinity(names, chain[order][:, order]))
    assert found in ("abcde", "edcba")


def test_few_names_keep_their_order() -> None:
    assert order_by_affinity(("b", "a"), torch.eye(2)) == ["b", "a"]
    assert order_by_affinity(("b",), torch.eye(1)) == ["b"]
    assert len(order_by_affinity(("a", "b", "c"), torch.ones(3, 3))) == 3
