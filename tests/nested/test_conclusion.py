from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from map_bo.nested.optimize import optimize_nested
from map_bo.nested.reading import load_nested
from map_bo.nested.settings import Nested
from tests.nested.hills import VARIANTS, Hills, nested, options, outcome


def test_merges_for_given_preferences_are_the_front(tmp_path: Path) -> None:
    preferences = ({"a": 1, "b": 0, "c": 0, "d": 0}, {"a": 0, "b": 0, "c": 0, "d": 1})
    folder = tmp_path / "run"
    how = Nested(stages=2, promote="point", preferences=preferences)
    result = optimize_nested(
        Hills(), 40, nested=how, run_dir=folder, progress=False, tracking="none", **options()
    )
    assert len(result.front) == len(result.choices) == 2
    first, second = (choice.x for choice in result.choices)
    assert float(first[0]) > float(first[3])
    assert float(second[3]) > float(second[0])
    assert result.choose({"a": 1.0}).point == 0
    assert result.choose({"d": 1.0}).point == 1
    assert len(load_nested(folder).choices) == 2


@pytest.mark.slow
def test_all_runs_of_the_root_are_in_the_record() -> None:
    result = nested(budget=32, **VARIANTS["preferences"])
    assert len(result.seen) == result.nodes[-1].evaluations


@pytest.mark.slow
def test_a_chosen_merge_that_could_not_be_measured_is_not_tried_again(tmp_path: Path) -> None:
    how, folder = Nested(stages=2, promote="point"), tmp_path / "run"
    quiet: dict[str, Any] = {"nested": how, "progress": False, "tracking": "none", **options()}
    whole = Hills()
    optimize_nested(whole, 32, **quiet)
    before = len(whole.measured) - 4  # the last four are those of the choice
    problem = Hills()
    problem.fails = lambda x: "no luck" if len(problem.measured) >= before else None
    first = optimize_nested(problem, 32, run_dir=folder, **quiet)
    assert first.verification.failures == ("no luck",)
    count = len(problem.measured)
    again = optimize_nested(problem, 32, run_dir=folder, **quiet)
    assert len(problem.measured) == count
    assert outcome(again) == outcome(first)
