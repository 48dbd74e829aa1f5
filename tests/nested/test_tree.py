from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given

from map_bo.errors import TreeError
from map_bo.nested.tree import Group, draw_tree, path_name
from tests.nested.trees import trees

UNEVEN = Group.of([[["a", "b"], "c"], ["d", "e"], "f"])


@given(trees(fewest=1))
def test_plain_data_gives_the_tree_back(tree: Group) -> None:
    plain = json.loads(json.dumps(tree.plain()))
    assert Group.of(plain, tree.leaves) == tree


@given(trees())
def test_nodes_come_after_all_that_they_are_made_of(tree: Group) -> None:
    nodes = list(tree.nodes())
    done: set[tuple[int, ...]] = set()
    for path, node in nodes:
        inner = [i for i, child in enumerate(node.children) if isinstance(child, Group)]
        assert {(*path, i) for i in inner} <= done
        done.add(path)
        stages = [child.stage for child in node.children if isinstance(child, Group)]
        assert node.stage == 1 + max(stages, default=0)
    assert nodes[-1] == ((), tree)
    assert len(done) == len(nodes)


def test_paths_lead_to_their_nodes() -> None:
    assert [(path_name(path), node.plain()) for path, node in UNEVEN.nodes()] == [
        ("0.0", ["a", "b"]),
        ("0", [["a", "b"], "c"]),
        ("1", ["d", "e"]),
        ("root", [[["a", "b"], "c"], ["d", "e"], "f"]),
    ]


def test_leaves_stand_from_left_to_right_and_stages_are_heights() -> None:
    assert UNEVEN.leaves == ("a", "b", "c", "d", "e", "f")
    assert {path_name(path): node.stage for path, node in UNEVEN.nodes()} == {
        "0.0": 1,
        "0": 2,
        "1": 1,
        "root": 3,
    }
    assert Group(("only",)).leaves == ("only",)
    assert Group(("only",)).stage == 1


def test_tuples_are_trees_too() -> None:
    assert Group.of((("a", "b"), "c")) == Group.of([["a", "b"], "c"])
    children: Any = ["a", "b"]
    assert Group(children) == Group(("a", "b"))
    assert len({Group(children), Group(("a", "b"))}) == 1


@pytest.mark.parametrize(
    ("plain", "match"),
    [
        ([["a", "b"], "c"], "the tree lacks d"),
        ([["a", "b"], ["c", "a", "d"]], "the tree repeats a"),
        ([["a", "b"], ["c", "d", "y", "x"]], "the tree invents x, y"),
        ([["a", "x"], "a"], "the tree lacks b, c, d"),
    ],
)
def test_experts_that_are_missing_repeated_or_unknown_are_named(plain: Any, match: str) -> None:
    with pytest.raises(TreeError, match=match) as caught:
        Group.of(plain, ("a", "b", "c", "d"))
    assert caught.value.hint == "name each of these exactly once: a, b, c, d"
    assert Group.of(plain)  # without the experts nobody can know


@pytest.mark.parametrize(
    ("plain", "match"),
    [
        ("ab", "a tree must be a list of lists of names, got 'ab'"),
        (None, "a tree must be a list of lists of names, got None"),
        ({"a": "b"}, "a tree must be a list of lists of names"),
        (3, "got 3"),
        (["a", 3], "must be a name or a list, got 3"),
        ([["a", None], "b"], "must be a name or a list, got None"),
        ([], "a group of the tree is empty"),
        (["a", []], "a group of the tree is empty"),
        ([["a", "b"]], "the group of a, b has only one child"),
        ([[["a", "b"]], "c"], "the group of a, b has only one child"),
        ([["a"], "b"], "the group of a has only one child"),
        ([["a", "b"], ["c"]], "the group of c has only one child"),
        ([["a"]], "the group of a has only one child"),
    ],
)
def test_what_is_no_tree_is_refused(plain: Any, match: str) -> None:
    with pytest.raises(TreeError, match=match) as caught:
        Group.of(plain)
    assert caught.value.hint


def test_one_expert_is_a_tree() -> None:
    assert Group.of(["a"], ("a",)).plain() == ["a"]
    assert [path for path, _ in Group.of(["a"]).nodes()] == [()]


def test_text_shows_the_tree() -> None:
    assert draw_tree(UNEVEN, {(): "ten points", (0, 0): "four points"}) == "\n".join(
        [
            "[stage 3]  ten points",
            "├─ [stage 2]",
            "│  ├─ [stage 1]  four points",
            "│  │  ├─ a",
            "│  │  └─ b",
            "│  └─ c",
            "├─ [stage 1]",
            "│  ├─ d",
            "│  └─ e",
            "└─ f",
        ]
    )


@given(trees(fewest=1))
def test_text_has_a_line_for_every_leaf_and_group(tree: Group) -> None:
    lines = draw_tree(tree).splitlines()
    assert len(lines) == len(tree.leaves) + len(list(tree.nodes()))
    shown = [line.split("─ ")[-1] for line in lines if "[stage" not in line]
    assert tuple(shown) == tree.leaves


def test_labels_of_long_groups_are_short_and_say_how_many() -> None:
    assert Group(("a", "b", "c")).label == "a+b+c"
    just = Group(("x" * 19, "y" * 20))
    assert just.label == f"{'x' * 19}+{'y' * 20}"
    long = Group((Group(("first", "x" * 30)), "middle", "last"))
    assert long.label == "first+..+last (4)"
