from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from map_bo.errors import BudgetError, ConfigError
from map_bo.loop.settings import Settings
from map_bo.samplers.adaptive import Adaptive
from map_bo.samplers.posterior.front_uncertainty import FrontUncertainty


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"budget": 0}, BudgetError, "budget must be at least 1, got 0"),
        ({"budget": 2}, BudgetError, "leaves 2 evaluations"),
        ({"budget": 8, "verify": 6}, BudgetError, "leaves 2 evaluations"),
        ({"budget": 2.5}, ConfigError, "budget must be a whole number, got 2.5"),
        ({"budget": 8, "batch": 0}, ConfigError, "batch must be at least 1, got 0"),
        ({"budget": 8, "retries": -1}, ConfigError, "retries must be at least 0, got -1"),
        ({"budget": 8, "outliers": "drop"}, ConfigError, "must be 'auto' or 'keep', got 'drop'"),
        ({"budget": 8, "timeout": 0}, ConfigError, "timeout must be positive, got 0"),
        (
            {"budget": 8, "max_failure_share": 2},
            ConfigError,
            "must be a number between 0 and 1, got 2",
        ),
        ({"budget": 8, "surogate": None}, ConfigError, "no setting 'surogate'"),
    ],
)
def test_bad_settings_are_refused(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        Settings.checked(**changes)
    assert caught.value.hint  # type: ignore[attr-defined]


def test_the_reference_of_the_run_is_the_samplers_too() -> None:
    given = {"first": 0.1, "second": 0.2}
    sampler = Settings(budget=12, reference=given).sampler
    assert isinstance(sampler, Adaptive)
    assert sampler.acquisition.reference == given
    own = FrontUncertainty(reference={"first": 0.3})
    assert Settings(budget=12, reference=given, sampler=own).sampler == own


@pytest.mark.parametrize("name", ["sampler", "surrogate", "solver"])
@pytest.mark.parametrize("value", ["gradient", 5, None, Adaptive, object()])
def test_parts_of_the_wrong_kind_are_refused_before_anything_is_evaluated(
    name: str, value: Any
) -> None:
    with pytest.raises(ConfigError, match=f"^{name} must be ") as caught:
        Settings.checked(budget=12, **{name: value})
    assert f"{name}=" in str(caught.value.hint)


def test_one_part_is_not_another() -> None:
    with pytest.raises(ConfigError, match="surrogate must be the settings of a surrogate"):
        Settings.checked(budget=12, surrogate=Adaptive())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", "a"),
        ("seed", 1.5),
        ("seed", None),
        ("timeout", "x"),
        ("timeout", float("nan")),
        ("timeout", float("inf")),
        ("max_failure_share", "x"),
        ("verify", True),
        ("guard", "false"),
        ("verify_extra", 1),
        ("reference", 5),
        ("reference", ["a"]),
        ("reference", {"first": "x"}),
        ("reference", {"first": float("inf")}),
    ],
)
def test_values_of_the_wrong_kind_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name.partition("_")[0]) as caught:
        Settings.checked(budget=12, **{name: value})
    assert caught.value.hint


def test_numbers_of_numpy_are_kept_as_pythons_own() -> None:
    made = Settings.checked(
        budget=np.int64(12),
        seed=np.int32(-3),
        batch=np.int64(2),
        timeout=np.float32(2.5),
        reference={"first": np.float64(0.5)},
    )
    assert made == Settings(budget=12, seed=-3, batch=2, timeout=2.5, reference={"first": 0.5})
    assert {type(made.budget), type(made.seed), type(made.batch)} == {int}
    assert type(made.timeout) is float
