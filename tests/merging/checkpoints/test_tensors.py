"""Whether numbers are finite."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from map_bo.merging.checkpoints.tensors import all_finite, exceeds_range

FLOATING = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
]


@given(
    st.lists(st.floats(width=32), max_size=40),
    st.sampled_from(FLOATING),
)
def test_it_is_what_testing_every_number_says(numbers: list[float], dtype: torch.dtype) -> None:
    values = torch.tensor(numbers, dtype=torch.float32).to(dtype)
    assert all_finite(values) == bool(torch.isfinite(values).all())


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_number_among_many_is_found(dtype: torch.dtype, bad: float) -> None:
    values = torch.linspace(-1, 1, 100_003).to(dtype)
    assert all_finite(values)
    values[77_777] = bad
    assert not all_finite(values)


def test_infinities_that_cancel_are_found() -> None:
    assert not all_finite(torch.tensor([math.inf, -math.inf, 1.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_finite_numbers_may_overflow_their_sum(dtype: torch.dtype) -> None:
    assert all_finite(torch.full((8,), torch.finfo(dtype).max, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_tested_too(dtype: torch.dtype) -> None:
    values = torch.ones(9).to(dtype)
    assert all_finite(values)
    values.view(torch.uint8)[4] = 0x7F  # NaN in both
    assert not all_finite(values)


def test_what_has_no_infinity_is_finite() -> None:
    assert all_finite(torch.arange(5))
    assert all_finite(torch.tensor([True, False]))
    assert all_finite(torch.empty(0))


def test_weights_that_are_trained_are_tested_without_their_gradients() -> None:
    assert all_finite(torch.nn.Parameter(torch.ones(3)))


@pytest.mark.parametrize(
    ("dtype", "within", "beyond"),
    [
        (torch.float8_e4m3fn, 463.0, 465.0),  # its conversion saturates at 448
        (torch.float8_e5m2, 61_000.0, 62_000.0),
        (torch.float8_e4m3fnuz, 240.0, 250.0),
        (torch.float16, 65_510.0, 65_530.0),
        (torch.bfloat16, 3.38e38, 3.4e38),
        (torch.float32, 3e38, 3.4e38),
    ],
)
def test_numbers_beyond_the_range_of_a_dtype(
    dtype: torch.dtype, within: float, beyond: float
) -> None:
    for sign in (1, -1):
        values = sign * torch.tensor([1.0, within])
        assert not exceeds_range(values, values.to(dtype))
        values = sign * torch.tensor([1.0, beyond])
        assert exceeds_range(values, values.to(dtype)) == (dtype != torch.float32)
