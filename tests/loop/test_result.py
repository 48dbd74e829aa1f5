from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from map_bo.errors import MergeError, PreferenceError, StoreError
from map_bo.loop.reading import created_of, load_result
from map_bo.loop.result import Result
from map_bo.loop.run import Run
from map_bo.pareto.gradient import GradientSolver
from map_bo.pareto.preferences import Preference, utility
from map_bo.tracking.jsonl import JsonlStore, MemoryStore
from map_bo.tracking.store import Event
from tests.loop.bowls import Bowls, quick


@pytest.fixture(scope="module")
def result() -> Result:
    return Run(Bowls(), quick(12), MemoryStore()).drive()


def test_a_preference_moves_the_choice(result: Result) -> None:
    towards_a = result.choose({"near a": 5, "far from b": 1})
    towards_b = result.choose({"near a": 1, "far from b": 5})
    assert towards_a.coefficients["a"] > towards_b.coefficients["a"] + 0.3
    assert towards_a.mean[0] > towards_b.mean[0]


def test_bounds_are_honoured_in_the_metrics_own_units(result: Result) -> None:
    choice = result.choose({"near a": 1}, at_most={"far from b": 0.6})
    assert float(choice.mean[1]) <= 0.6
    with pytest.raises(PreferenceError, match="far from b"):
        result.choose(at_most={"far from b": 0.01})


def test_a_choice_is_solved_for_its_preference_when_that_promises_more() -> None:
    coarse = Run(
        Bowls(), quick(12, solver=GradientSolver(points=4, steps=20)), MemoryStore()
    ).drive()
    assert coarse.model is not None
    wanted = {"near a": 2, "far from b": 1}
    by_point = replace(coarse, model=None).choose(wanted)
    solved = coarse.choose(wanted)
    assert solved.refined
    assert not by_point.refined
    assert bool(torch.isnan(solved.real).all()), "what was not measured is not real"
    scale = {"reference": coarse.reference.point, "best": coarse.reference.best}
    preference = Preference(weights=wanted)
    before, after = (
        float(utility(c.mean.unsqueeze(0), coarse.metrics, preference, **scale))
        for c in (by_point, solved)
    )
    assert after > before
    # Where it cannot gain, the front's own point stays.
    assert not coarse.choose({"near a": 1}).refined


def test_a_solved_choice_keeps_its_bounds() -> None:
    coarse = Run(
        Bowls(), quick(12, solver=GradientSolver(points=6, steps=20)), MemoryStore()
    ).drive()
    choice = coarse.choose({"near a": 1}, at_most={"far from b": 1.0})
    assert float(choice.mean[1]) <= 1.0 + 1e-6


def test_points_are_chosen_by_number(result: Result) -> None:
    assert result.point(0).point == 0
    with pytest.raises(PreferenceError, match="has no point 999"):
        result.point(999)


def test_a_choice_says_what_is_predicted_and_what_is_real(result: Result) -> None:
    verified = int(result.front.verified.nonzero()[0])
    unverified = int((~result.front.verified).nonzero()[0])
    assert result.point(verified).describe()["real"]["near a"] is not None
    assert result.point(unverified).describe()["real"]["near a"] is None
    assert set(result.point(0).describe()["coefficients"]) == {"a", "b"}


def test_a_problem_without_models_cannot_export(result: Result, tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="Bowls has no models"):
        result.choose().export(tmp_path / "out")


def test_an_unfinished_run_has_no_result(tmp_path: Path) -> None:
    run = Run(Bowls(), quick(8), JsonlStore.create(tmp_path / "run"))
    run.ask(1)
    with pytest.raises(StoreError, match="no front yet: 0 evaluations"):
        load_result(tmp_path / "run")


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        created_of(tmp_path / "nothing")
    store = JsonlStore.create(tmp_path / "odd")
    store.append(Event("note", {}))
    with pytest.raises(StoreError, match="no run was started"):
        created_of(tmp_path / "odd")


def test_a_record_changed_by_hand_is_refused(tmp_path: Path) -> None:
    run = Run(Bowls(), quick(8), JsonlStore.create(tmp_path / "run"))
    run.store.append(Event("observed", {"index": 0}))
    with pytest.raises(StoreError, match=r"event 2 .'observed'."):
        load_result(tmp_path / "run")
