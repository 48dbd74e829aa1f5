from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from map_bo.report.comparison.bootstrap import Estimate, mean_interval, paired_difference

VALUES = st.lists(st.floats(-100, 100), min_size=2, max_size=12)


@given(VALUES)
def test_the_interval_lies_among_the_values_and_holds_the_mean(values: list[float]) -> None:
    found = mean_interval(values, resamples=500)
    assert found is not None
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9
    assert found.mean == pytest.approx(sum(values) / len(values), abs=1e-9)
    assert found.count == len(values)


@given(VALUES, st.floats(-10, 10))
def test_a_constant_shift_is_told_exactly(values: list[float], shift: float) -> None:
    other = dict(enumerate(values))
    own = {seed: value + shift for seed, value in other.items()}
    found = paired_difference(own, other, resamples=200)
    assert found is not None
    assert [found.mean, found.low, found.high] == pytest.approx([shift] * 3, abs=1e-9)


def test_the_interval_covers_about_as_often_as_it_says() -> None:
    import numpy as np

    source = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        found = mean_interval(source.normal(size=30).tolist(), resamples=500)
        assert found is not None
        hits += found.low <= 0 <= found.high
    assert 0.88 <= hits / 200 <= 0.99


def test_only_shared_seeds_are_pairs() -> None:
    found = paired_difference({0: 1.0, 1: 5.0, 7: 9.0}, {0: 0.0, 1: 2.0, 3: 4.0})
    assert found is not None
    assert found.count == 2
    assert found.mean == 2.0
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    assert mean_interval([]) is None


def test_a_single_value_has_no_interval() -> None:
    found = mean_interval([3.0])
    assert found is not None
    assert found.mean == 3.0
    assert math.isnan(found.low)
    assert math.isnan(found.high)


@pytest.mark.parametrize(
    ("estimate", "reading"),
    [
        (Estimate(1.0, 0.5, 1.5, 5), "higher"),
        (Estimate(-1.0, -1.5, -0.5, 5), "lower"),
        (Estimate(0.1, -0.5, 0.5, 5), "no clear difference"),
        (Estimate(1.0, 0.5, 1.5, 4), "too few pairs"),
    ],
)
def test_a_difference_is_read_by_its_interval(estimate: Estimate, reading: str) -> None:
    assert estimate.reading == reading
