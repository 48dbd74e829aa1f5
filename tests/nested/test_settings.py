from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from map_bo.errors import ConfigError
from map_bo.nested.settings import Nested
from map_bo.plain import from_plain, to_plain


def test_two_stages_unless_a_size_or_a_tree_is_given() -> None:
    assert Nested().stages == 2
    assert Nested(stages=3).stages == 3
    assert Nested(group_size=4).stages is None
    assert Nested(tree=[["a", "b"], "c"]).stages is None


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"order": "scores"}, "'scores' is not a value of nested.order"),
        ({"promote": "front"}, "'front' is not a value of nested.promote"),
        ({"budget_split": "fair"}, "'fair' is not a value of nested.budget_split"),
        ({"measure": "child"}, "'child' is not a value of nested.measure"),
        ({"stages": 0}, "nested.stages must be a whole number of at least 1, got 0"),
        ({"stages": 2.0}, "nested.stages must be .*, got 2.0"),
        ({"stages": True}, "nested.stages must be .*, got True"),
        ({"group_size": 1}, "nested.group_size must be .* at least 2, got 1"),
        ({"points": 0}, "nested.points must be .*, got 0"),
        ({"points": None}, "nested.points must be .*, got None"),
        ({"refine": -1}, "nested.refine must be .* at least 0, got -1"),
        ({"probe": 0}, "nested.probe must be .*, got 0"),
        ({"probe": -4}, "nested.probe must be .*, got -4"),
        ({"probe": 1.5}, "nested.probe must be .*, got 1.5"),
        ({"stages": 2, "group_size": 3}, "nested.stages and nested.group_size were both given"),
        ({"stages": 2, "tree": ["a"]}, "nested.stages and nested.tree were both given"),
        ({"preferences": ({"a": 1},)}, "have no effect with nested.promote=points"),
        ({"measure": "children"}, "needs a preference, and nested.promote=points has none"),
        ({"tolerance": 0.0}, "nested.tolerance must be positive, got 0.0"),
        ({"tolerance": float("nan")}, "nested.tolerance must be positive, got nan"),
        ({"memory": -1.0}, "nested.memory must be at least 0, got -1.0"),
    ],
)
def test_values_that_cannot_be_are_refused_with_a_hint(
    settings: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        Nested(**settings)
    assert caught.value.hint


def test_a_slip_of_the_pen_is_recognised() -> None:
    with pytest.raises(ConfigError) as caught:
        Nested(order="similarty")  # type: ignore[arg-type]
    assert caught.value.hint == "did you mean 'similarity'?"
    with pytest.raises(ConfigError) as caught:
        Nested(order="xyz")  # type: ignore[arg-type]
    assert caught.value.hint == "choose from given, score, similarity, conflict"


def test_values_are_kept_as_plain_immutable_data() -> None:
    preference = {"a": 1.0}
    settings: dict[str, Any] = {
        "promote": "point",
        "preferences": [preference],
        "stage_budgets": [7, 9],
        "budgets": {"root": 9, 0: 8},
        "tasks": {"a": "one", "b": ["two", "three"]},
    }
    nested = Nested(**settings)
    preference["a"] = 5.0
    assert nested.preferences == ({"a": 1.0},)
    assert nested.stage_budgets == (7, 9)
    assert nested.budgets == {"root": 9, "0": 8}
    assert nested.tasks == {"a": ("one",), "b": ("two", "three")}
    with pytest.raises(dataclasses.FrozenInstanceError):
        nested.points = 4  # type: ignore[misc]


def test_nodes_are_informed_where_it_was_asked_for_or_pays() -> None:
    two = ({"a": 1}, {"a": 2})
    assert not Nested().informed
    assert Nested(promote="surrogate").informed
    assert not Nested(promote="point", preferences=two[:1]).informed
    assert Nested(promote="point", preferences=two).informed
    assert not Nested(promote="point", preferences=two, inform=False).informed
    assert not Nested(promote="surrogate", inform=False).informed
    assert Nested(inform=True).informed


def test_description_is_plain_and_gives_the_settings_back() -> None:
    nested = Nested(
        promote="point",
        tree=(("a", "b"), "c"),
        preferences=({"a": 1.0, "b": 0.0, "c": 2.0},),
        budgets={"root": 9},
        stage_budgets=(7, 8),
        tasks={"a": ("x", "y")},
        probe=5,
    )
    written = json.loads(json.dumps(to_plain(nested)))
    assert from_plain(written) == nested
    assert to_plain(Nested()) != to_plain(Nested(points=4))


def test_the_old_name_of_promote_works_and_warns() -> None:
    with pytest.warns(DeprecationWarning, match="nested.hand_up is now nested.promote"):
        old = Nested(hand_up="surrogate")
    assert old == Nested(promote="surrogate")
    assert dataclasses.replace(old, promote="point").promote == "point"  # and warns no more
    with (
        pytest.warns(DeprecationWarning, match="is now nested.promote"),
        pytest.raises(ConfigError, match="'front' is not a value"),
    ):
        Nested(hand_up="front")  # type: ignore[arg-type]
