from __future__ import annotations

from typing import Any

import pytest

from map_bo.data import Metric
from map_bo.errors import ConfigError
from map_bo.nested.tree import Group, Tasks

EXPERTS = ("a", "b", "c")
METRICS = tuple(Metric(name) for name in ("b", "shared", "a", "c", "nobody's"))


def test_by_default_the_metric_of_an_experts_name_is_its_own() -> None:
    tasks = Tasks.assign(EXPERTS, METRICS, {})
    assert tasks.metrics == ("b", "shared", "a", "c", "nobody's")
    assert tasks.of == {"a": ("a",), "b": ("b",), "c": ("c",)}


def test_named_tasks_take_the_place_of_the_default() -> None:
    tasks = Tasks.assign(EXPERTS, METRICS, {"a": ("shared",), "c": ("c", "shared", "b")})
    assert tasks.of == {"a": ("shared",), "b": ("b",), "c": ("c", "shared", "b")}


def test_metrics_below_a_node_stand_once_in_the_problems_order() -> None:
    tasks = Tasks.assign(EXPERTS, METRICS, {"a": ("shared", "a"), "c": ("c", "shared")})
    assert tasks.below("a") == ("shared", "a")
    assert tasks.below(Group(("a", "c"))) == ("shared", "a", "c")
    assert tasks.below(Group((Group(("c", "a")), "b"))) == ("b", "shared", "a", "c")


@pytest.mark.parametrize(
    ("named", "match", "hint"),
    [
        ({"z": ("a",), "y": ("b",)}, "unknown experts: y, z", "experts are a, b, c"),
        ({"a": ("a", "q")}, "gives expert a the unknown metrics q", "metrics are b, shared"),
        ({"a": ()}, "expert a has no task", r"nested.tasks.a=[...], out of b, shared"),
    ],
)
def test_tasks_that_cannot_be_are_refused(named: Any, match: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        Tasks.assign(EXPERTS, METRICS, named)
    assert hint in str(caught.value.hint)


def test_an_expert_without_a_metric_of_its_name_needs_one() -> None:
    with pytest.raises(ConfigError, match="expert d has no task"):
        Tasks.assign((*EXPERTS, "d"), METRICS, {})
    assert Tasks.assign((*EXPERTS, "d"), METRICS, {"d": ("shared",)}).of["d"] == ("shared",)


WHOLE = {"b": 1.0, "shared": 0.0, "a": 2.0, "c": 0.0, "nobody's": 0.5}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"a": None, "c": None}, "preference 2 of nested.preferences does not name a, c"),
        ({"z": 1.0, "y": 0.0}, "names y, z, which are not metrics"),
        ({"a": -1.0}, "not finite and at least 0: a"),
        ({"b": float("nan")}, "not finite and at least 0: b"),
        ({"c": float("inf")}, "not finite and at least 0: c"),
        (dict.fromkeys(WHOLE, 0.0), "has no weight above 0"),
    ],
)
def test_a_preference_gives_every_metric_a_weight(changes: dict[str, Any], match: str) -> None:
    tasks = Tasks.assign(EXPERTS, METRICS, {})
    tasks.check_preference(WHOLE, 1)
    weights = {k: v for k, v in {**WHOLE, **changes}.items() if v is not None}
    with pytest.raises(ConfigError, match=match):
        tasks.check_preference(weights, 2)
