"""Constraints as a caller, a configuration and a record give them."""

from __future__ import annotations

from typing import Any

import pytest

from map_bo.constraints import (
    AtLeast,
    AtMost,
    check_constraints,
    plain_constraints,
    read_constraints,
)
from map_bo.data import Metric
from map_bo.errors import ConfigError
from map_bo.plain import from_plain, to_plain

BOTH = (AtLeast("safe", 0.9), AtMost("film", 1.7))


@pytest.mark.parametrize(
    "given",
    [
        BOTH,
        list(BOTH),
        ["safe >= 0.9", "film <= 1.7"],
        ["safe at least .9", AtMost("film", 1.7)],
        {"safe": ">= 0.9", "film": "<=1.7"},
        {"safe": [">= .9"], "film": "at most 1.7"},
    ],
)
def test_all_forms_say_the_same(given: Any) -> None:
    assert read_constraints(given) == BOTH


def test_they_go_through_plain_data_with_all_digits() -> None:
    exact = (AtLeast("a b", 0.1 + 0.2), AtMost("a b", 1 / 3), AtMost("c", 1e-12))
    assert read_constraints(plain_constraints(exact)) == exact
    assert from_plain(to_plain(exact)) == exact
    assert read_constraints(None) == ()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (3, "cannot be 3"),
        (["safe"], "is not a constraint"),
        ({"safe": 0.9}, "must read"),
        ({"safe": "> 0.9"}, "must read"),
        ({"safe": ">= nan"}, "finite number"),
        ({"safe": ">= much"}, "finite number"),
        (["a <= 1", "a <= 2"], "two constraints"),
        (["a <= 1", "a >= 2"], "cannot be at least 2 and at most 1"),
    ],
)
def test_others_are_refused(given: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_constraints(given)


@pytest.mark.parametrize("bound", [float("nan"), float("inf"), True, None, "x"])
def test_a_bound_is_a_finite_number(bound: Any) -> None:
    for kind in (AtLeast, AtMost):
        with pytest.raises(ConfigError, match="must be a finite number"):
            kind("a", bound)
    with pytest.raises(ConfigError, match="name of a metric"):
        AtLeast("", 1.0)


def test_metrics_have_to_know_them() -> None:
    metrics = (Metric("safe"), Metric("film", "min", "loss"), Metric("free", kind="unbounded"))
    check_constraints((*BOTH, AtLeast("free", -1e9), AtLeast("safe", 1.0)), metrics)
    with pytest.raises(ConfigError, match="unknown metric") as unknown:
        check_constraints([AtLeast("saef", 0.9)], metrics)
    assert "safe" in str(unknown.value.hint)
    for impossible in (AtLeast("safe", 1.1), AtMost("film", -0.1)):
        with pytest.raises(ConfigError, match="no value"):
            check_constraints([impossible], metrics)
