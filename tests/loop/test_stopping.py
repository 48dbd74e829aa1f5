from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from map_bo.errors import ConfigError
from map_bo.loop.settings import Settings
from map_bo.loop.stopping import Stop, notes_on, stop_record
from map_bo.plain import to_plain
from map_bo.space import CoefficientSpace


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"criterion": "regrets"}, "no stopping criterion 'regrets'", "did you mean 'regret'"),
        ({"criterion": "time"}, "no stopping criterion 'time'", "regret, hypervolume"),
        ({"tolerance": 0.0}, "between 0 and 1, got", "0.005"),
        ({"tolerance": -1}, "between 0 and 1, got", "0.005"),
        ({"tolerance": 1.0}, "between 0 and 1, got 1.0", "0.005"),
        ({"tolerance": float("nan")}, "got nan$", "0.005"),
        ({"tolerance": "small"}, "got 'small'$", "0.005"),
        ({"tolerance": True}, "got True$", "0.005"),
        ({"patience": 0}, "stop.patience must be .* at least 1, got 0", "default"),
        ({"patience": 1.5}, "stop.patience must be a whole number.* got 1.5", "default"),
        ({"least": 2}, "stop.least must be .* at least 3, got 2", "default"),
    ],
)
def test_a_rule_out_of_range_is_refused(changes: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Stop(**changes)
    assert re.search(message, caught.value.message)
    assert hint in (caught.value.hint or "")


def test_a_rule_is_read_from_plain_data() -> None:
    assert Stop.of(None) is None
    assert Stop.of({"criterion": None, "tolerance": 0.005, "patience": 2}) is None
    assert Stop.of({"criterion": "hypervolume"}) == Stop("hypervolume")
    rule = Stop(tolerance=0.1)
    assert Stop.of(rule) is rule
    assert Stop.of(asdict(rule)) == rule


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"tolerence": 0.1}, "stop has no option 'tolerence'"),
        ({"criterion": None, "patience": 3}, "stop.patience is given and stop.criterion is not"),
        ("regret", "stop must be a Stop or a mapping, got 'regret'"),
    ],
)
def test_plain_data_that_are_no_rule_are_refused(given_: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Stop.of(given_)


def test_settings_take_a_rule_or_its_fields() -> None:
    assert Settings(budget=24).stop is None
    settings = Settings.checked(budget=24, stop={"criterion": "regret", "patience": 1})
    assert settings.stop == Stop(patience=1)
    assert to_plain(settings)["fields"]["stop"]["fields"] == {
        "criterion": "regret",
        "tolerance": 0.005,
        "patience": 1,
        "least": None,
    }
    with pytest.raises(ConfigError, match="after 22 evaluations, and the search has 22") as caught:
        Settings(budget=24, stop=Stop(least=22))
    assert "lower stop.least" in (caught.value.hint or "")
    assert Settings(budget=24, stop=Stop(least=21)).stop is not None


@pytest.mark.parametrize(("experts", "first"), [(2, 10), (4, 10), (5, 12), (8, 18)])
def test_the_first_check_waits_for_the_design(experts: int, first: int) -> None:
    space = CoefficientSpace.box([f"e{i}" for i in range(experts)])
    assert Stop().first(space) == first
    assert Stop(least=4).first(space) == 4


@given(
    gains=st.lists(st.floats(0, 0.1), max_size=8),
    patience=st.integers(1, 4),
    tolerance=st.floats(0.001, 0.05),
)
def test_it_stops_exactly_when_the_last_gains_are_small(
    gains: list[float], patience: int, tolerance: float
) -> None:
    reason = Stop(tolerance=tolerance, patience=patience).reason(gains)
    last = gains[-patience:]
    small = len(last) == patience and all(gain <= tolerance for gain in last)
    assert (reason is not None) == small
    if reason is not None:
        assert reason.startswith(f"expected regret still to be gained at most {tolerance:g}")


def check(evaluations: int, gain: float, **more: Any) -> dict[str, Any]:
    return {"evaluations": evaluations, "gain": gain, "floor": None, "stop": None, **more}


def test_the_whole_series_is_told() -> None:
    checks = [
        check(10, 0.02, floor=0.001),
        check(11, 0.004),
        check(12, 0.003, stop="small enough"),
    ]
    summary = stop_record(Stop(), checks, 9)
    assert summary is not None
    assert summary["series"] == [[10, 0.02], [11, 0.004], [12, 0.003]]
    assert (summary["reason"], summary["unused"]) == ("small enough", 9)
    assert (summary["least_gain"], summary["floor"]) == (0.003, 0.001)
    assert notes_on(summary) == []
    assert stop_record(None, [], 0) is None
    assert notes_on(None) == []


def test_a_tolerance_that_was_not_reached_is_told_with_the_least_gain() -> None:
    (note,) = notes_on(stop_record(Stop(), [check(10, 0.03), check(11, 0.02)], 0))
    assert "at least 0.02, and the rule needs at most 0.005" in note
    (note,) = notes_on(stop_record(Stop(), [], 0))
    assert "before the first check of its stopping rule" in note


def test_a_tolerance_below_what_the_noise_allows_is_told_with_the_floor() -> None:
    notes = notes_on(stop_record(Stop(), [check(10, 0.03, floor=0.012)], 0))
    assert "below 0.012" in notes[-1]
    assert "larger tolerance" in notes[-1]
