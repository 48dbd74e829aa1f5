from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from map_bo.data import Metric
from map_bo.report.numbers import (
    better,
    coefficient,
    coefficients,
    distinct,
    interval,
    metric_value,
    seconds,
    share,
    shorten,
)
from map_bo.space import CoefficientSpace
from tests.choices import CHOICE

ACC, LOSS = Metric("acc"), Metric("loss", "min", "loss")


@pytest.mark.parametrize(
    ("value", "metric", "text"),
    [
        (0.98765, ACC, "0.988"),
        (0.0001, ACC, "0.0001"),
        (1e-9, ACC, "1e-09"),
        (0.0, ACC, "0.000"),
        (1.0, ACC, "1.000"),
        (0.9995, ACC, "0.99950"),
        (0.9999, ACC, "0.99990"),
        (0.999, ACC, "0.999"),
        (1e-9, LOSS, "1e-09"),
        (2e-308, LOSS, "0.000"),
        (0.0001234, LOSS, "0.0001234"),
        (0.0, LOSS, "0.000"),
        (2.30259, LOSS, "2.303"),
        (12345.678, LOSS, "1.235e+04"),
        (87.4321, Metric("percent", upper=100.0), "87.43"),
        (math.nan, ACC, ""),
    ],
)
def test_metric_values_have_as_many_digits_as_mean_something(
    value: float, metric: Metric, text: str
) -> None:
    assert metric_value(value, metric) == text


def test_missing_values_say_what_they_are_told_to() -> None:
    assert metric_value(math.nan, ACC, missing="not measured") == "not measured"
    assert interval(math.nan, 1.0, ACC, missing="-") == "-"


def test_intervals_can_hold_negative_ends() -> None:
    assert interval(-0.5, 0.25, LOSS) == "-0.500 to 0.250"


@pytest.mark.parametrize(("value", "text"), [(0.125, "0.12"), (-1e-9, "0.00"), (-0.3, "-0.30")])
def test_coefficients_have_two_decimals(value: float, text: str) -> None:
    assert coefficient(value) == text


def test_directions_are_said_in_words() -> None:
    assert (better(ACC), better(LOSS)) == ("higher is better", "lower is better")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.071, "0.07 s"), (12.34, "12.3 s"), (600, "10 min"), (3 * 3600 + 61, "3 h 01 min")],
)
def test_durations_have_the_unit_that_suits(value: float, text: str) -> None:
    assert seconds(value) == text


@given(name=st.text(min_size=1, max_size=60), length=st.integers(8, 30))
def test_shortened_names_are_one_line_and_never_empty(name: str, length: int) -> None:
    short = shorten(name, length)
    assert 0 < len(short) <= length
    assert "\n" not in short


def test_names_that_would_look_alike_are_numbered() -> None:
    names = ["a" * 20 + "x" + "b" * 20, "a" * 20 + "y" + "b" * 20, "c"]
    short = distinct(names, 12)
    assert len(set(short)) == 3
    assert short[2] == "c"
    assert all(len(name) <= 12 for name in short)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0.00"), (0.001, "<0.01"), (0.5, "0.50"), (0.999, ">0.99"), (1.0, "1.00")],
)
def test_a_probability_that_is_not_quite_certain_does_not_read_as_if(
    value: float, shown: str
) -> None:
    assert share(value) == shown
    assert share(float("nan")) == ""


def test_a_row_has_the_name_of_its_option_and_nothing_inactive() -> None:
    assert coefficients([0.5, 1.0, 1.0, 0.25], CHOICE) == ["0.50", "1.00", "ties", "0.25"]
    assert coefficients([0.5, 1.0, 2.0, 0.2], CHOICE) == ["0.50", "1.00", "slerp", ""]
    assert coefficients([0.5, -0.001], CoefficientSpace.box(("a", "b"), lower=-1)) == [
        "0.50",
        "0.00",
    ]
