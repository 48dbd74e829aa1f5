from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from map_bo.errors import ConfigError, DataError
from map_bo.values import real_number, switch, whole_number


class TestWholeNumber:
    @pytest.mark.parametrize(
        "value", [7, np.int64(7), np.int32(7), np.uint8(7), np.array(7), torch.tensor(7)]
    )
    def test_what_counts_is_kept_as_pythons_own(self, value: Any) -> None:
        found = whole_number("seed", value)
        assert found == 7
        assert type(found) is int

    @pytest.mark.parametrize(
        "value",
        [7.0, "7", None, True, np.bool_(True), np.float64(7), [7], torch.tensor(7.0), math.nan],
    )
    def test_anything_else_is_refused_with_its_value(self, value: Any) -> None:
        with pytest.raises(ConfigError, match="seed must be a whole number, got") as caught:
            whole_number("seed", value)
        assert repr(value) in caught.value.message

    @given(st.integers(), st.integers(-5, 5), st.integers(6, 9))
    def test_only_the_range_is_accepted(self, value: int, least: int, most: int) -> None:
        if least <= value <= most:
            assert whole_number("n", value, least=least, most=most) == value
        else:
            with pytest.raises(DataError, match=rf"whole number from {least} to {most}, got"):
                whole_number("n", value, least=least, most=most, error=DataError)

    @pytest.mark.parametrize("value", [2**63, -(2**70), 2**200])
    def test_size_does_not_matter(self, value: int) -> None:
        assert whole_number("seed", value) == value


class TestRealNumber:
    @pytest.mark.parametrize(
        ("value", "kind"), [(2, int), (2.5, float), (np.float32(2.5), float), (np.int64(3), int)]
    )
    def test_numbers_are_kept_as_pythons_own(self, value: Any, kind: type) -> None:
        found = real_number("timeout", value)
        assert found == value
        assert type(found) is kind

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "1", None, True, [1.0], 1j])
    def test_what_is_not_finite_or_no_number_is_refused(self, value: Any) -> None:
        with pytest.raises(ConfigError, match="timeout must be a finite number, got"):
            real_number("timeout", value)

    @pytest.mark.parametrize(
        ("limits", "good", "bad", "words"),
        [
            ({"above": 0.0}, 1e-9, 0, "above 0"),
            ({"least": 0.0}, 0, -1e-9, "of at least 0"),
            ({"least": 0.0, "most": 1.0}, 1, 1.01, "between 0 and 1"),
            ({"most": 1.0}, -5, 2, "of at most 1"),
        ],
    )
    def test_limits(self, limits: dict[str, float], good: float, bad: float, words: str) -> None:
        assert real_number("x", good, **limits) == good  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=f"x must be a number {words}, got"):
            real_number("x", bad, **limits)  # type: ignore[arg-type]


class TestSwitch:
    @pytest.mark.parametrize("value", [True, False, np.bool_(True), np.bool_(False)])
    def test_truth_values_are_kept_as_pythons_own(self, value: Any) -> None:
        found = switch("guard", value)
        assert found == bool(value)
        assert type(found) is bool

    @pytest.mark.parametrize("value", ["false", 0, 1, None])
    def test_anything_else_is_refused(self, value: Any) -> None:
        with pytest.raises(ConfigError, match="guard must be true or false, got"):
            switch("guard", value)
