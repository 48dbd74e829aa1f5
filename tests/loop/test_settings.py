from __future__ import annotations

from typing import Any

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
        ({"budget": 8, "timeout": 0}, ConfigError, "timeout must be positive, got 0"),
        (
            {"budget": 8, "max_failure_share": 2},
            ConfigError,
            "must be between 0 and 1, got 2",
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
