from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from map_bo.errors import ConfigError
from map_bo.loop.settings import Settings
from map_bo.loop.stopping import Stop, notes_on, told
from map_bo.plain import to_plain
from map_bo.space import CoefficientSpace


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"criterion": "regrets"}, "no stopping criterion 'regrets'", "did you mean 'regret'"),
        ({"criterion": "time"}, "no stopping criterion 'time'", "regret, hypervolume"),
        ({"tolerance": 0.0}, "never quite 0", "0.005"),
        ({"tolerance": -1}, "never quite 0", "0.005"),
        ({"tolerance": 1.0}, "everything is under it", "0.005"),
        ({"tolerance": float("nan")}, "tolerance is nan$", "0.005"),
        ({"tolerance": "small"}, "tolerance is 'small'$", "0.005"),
        ({"tolerance": True}, "tolerance is True$", "0.005"),
        ({"patience": 0}, "patience of the stopping rule is 0", "at least 1"),
        ({"patience": 1.5}, "patience of the stopping rule is 1.5", "whole number"),
        ({"least": 2}, "least of the stopping rule is 2", "at least 3"),
    ],
)
def test_a_rule_that_means_nothing_is_refused(
    changes: dict[str, Any], message: str, hint: str
) -> None:
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
        ("regret", "stop is 'regret'"),
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
def test_the_first_look_waits_for_the_design(experts: int, first: int) -> None:
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
    reason = Stop(tolerance=tolerance, patience=patience).reached(gains)
    last = gains[-patience:]
    small = len(last) == patience and all(gain <= tolerance for gain in last)
    assert (reason is not None) == small
    if reason is not None:
        assert reason.startswith(f"expected regret still to be gained at most {tolerance:g}")


def look(evaluations: int, gain: float, **more: Any) -> dict[str, Any]:
    return {"evaluations": evaluations, "gain": gain, "floor": None, "stop": None, **more}


def test_the_whole_series_is_told() -> None:
    checks = [look(10, 0.02, floor=0.001), look(11, 0.004), look(12, 0.003, stop="small enough")]
    summary = told(Stop(), checks, 9)
    assert summary is not None
    assert summary["series"] == [[10, 0.02], [11, 0.004], [12, 0.003]]
    assert (summary["reason"], summary["unused"]) == ("small enough", 9)
    assert (summary["least_gain"], summary["floor"]) == (0.003, 0.001)
    assert notes_on(summary) == []
    assert told(None, [], 0) is None
    assert notes_on(None) == []


def test_a_tolerance_that_was_not_reached_is_told_with_the_least_gain() -> None:
    (note,) = notes_on(told(Stop(), [look(10, 0.03), look(11, 0.02)], 0))
    assert "0.02 at the least, over the tolerance of 0.005" in note
    (note,) = notes_on(told(Stop(), [], 0))
    assert "before its stopping rule looked" in note


def test_a_tolerance_below_what_the_noise_allows_is_told_with_the_floor() -> None:
    notes = notes_on(told(Stop(), [look(10, 0.03, floor=0.012)], 0))
    assert "below 0.012" in notes[-1]
    assert "larger tolerance" in notes[-1]
