"""Runs that grow: other settings on a run that has begun, whether it has finished or not."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import map_bo
from map_bo.errors import AnotherRunError, BudgetError, ConfigError, StoreError
from map_bo.loop.growth import MAY_CHANGE, created_in_force, is_over
from map_bo.loop.reading import created_of, load_state
from map_bo.loop.result import Result
from map_bo.loop.run import Run
from map_bo.loop.settings import Settings
from map_bo.loop.state import replay
from map_bo.loop.stopping import Stop
from map_bo.rng import child
from map_bo.tracking.jsonl import JsonlStore, MemoryStore
from map_bo.tracking.store import Event
from tests.loop.bowls import Bowls, quick


def done(budget: int = 8, **changes: Any) -> MemoryStore:
    store = MemoryStore()
    Run(Bowls(), quick(budget, **changes), store).drive()
    return store


def numbers(result: Result) -> list[Any]:
    front, seen = result.front, result.seen
    tensors = [seen.X, seen.Y, front.X, front.mean, front.std, front.real, front.corrected]
    tensors += [result.verification.X, result.verification.Y]
    return [tensor.nan_to_num(-99.0).tolist() for tensor in tensors]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("cut", [False, True])
def test_without_verification_a_run_that_grew_equals_one_of_that_budget(
    batch: int, cut: bool
) -> None:
    """Six is a multiple of the batch, so that no batch is cut at the end of the first budget."""
    expected = Run(Bowls(noise=0.05), quick(9, verify=0, batch=batch), MemoryStore()).drive()
    store, bowls = MemoryStore(), Bowls(noise=0.05)
    before = quick(6, verify=0, batch=batch)
    if cut:
        run = Run(bowls, before, store)
        for index in run.ask(3):
            x = run.state.X[index : index + 1]
            run.tell(index, evaluated(run, index, x))
    else:
        Run(bowls, before, store).drive()
    found = Run(bowls, quick(9, verify=0, batch=batch), store).drive()
    assert numbers(found) == numbers(expected)
    assert len(bowls.calls) == (6 if cut else 9)


def evaluated(run: Run, index: int, x: torch.Tensor) -> map_bo.Observations:
    """What driving would have measured there."""
    return Bowls(noise=0.05).evaluate(x, generator=child(run.generator, "evaluate", index, 0))


def test_a_finished_run_keeps_all_that_was_paid_for_and_verifies_anew() -> None:
    store, bowls = done(8, verify=2), Bowls()
    before = replay(list(store.read()), bowls.metrics, 2)
    result = Run(bowls, quick(12, verify=2), store).drive()
    state = replay(list(store.read()), bowls.metrics, 2)
    assert len(bowls.calls) == 12 - 8
    assert (len(result.seen), len(result.verification)) == (10, 2)
    assert torch.equal(result.seen.X[:6], before.seen.X)
    assert torch.equal(result.seen.Y[6:8], before.verification.Y)
    assert state.front_rows == (6, 7)
    assert result.summary["budget"] == result.summary["evaluations"] == 12
    assert "the run was extended: budget from 8 to 12" in result.summary["notes"]
    assert state.created["settings"]["budget"] == 12
    assert next(iter(store.read())).data["settings"]["budget"] == 8, "the record is not rewritten"


def test_the_same_settings_change_nothing_and_record_nothing() -> None:
    store, bowls = done(8), Bowls()
    before = [(event.kind, event.data) for event in store.read()]
    Run(bowls, quick(8), store).drive()
    assert [(event.kind, event.data) for event in store.read()] == before
    assert bowls.calls == []


@functools.cache
def grown_twice() -> tuple[tuple[Event, ...], list[Any]]:
    """A run that was extended after its end, once more during its search, and finished."""
    store = done(6, verify=1)
    run = Run(Bowls(), quick(9, verify=1), store)
    run.ask(1)
    last = Run(Bowls(), quick(11, verify=2, retries=3), store)
    result = last.drive()
    return tuple(store.read()), numbers(result)


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(st.data())
def test_a_run_that_grew_and_was_killed_at_any_event_ends_as_one_never_killed(
    data: st.DataObject,
) -> None:
    events, expected = grown_twice()
    kept = data.draw(st.integers(0, len(events)))
    store = MemoryStore()
    for event in events[:kept]:
        store.append(event)
    extended = [event.kind for event in events[:kept]].count("extended")
    assert [event.kind for event in events].count("extended") == 2
    if extended == 0:
        Run(Bowls(), quick(6, verify=1), store).drive()
    if extended <= 1:
        run = Run(Bowls(), quick(9, verify=1), store)
        if len(run.state.X) == 6:
            run.ask(1)
    assert numbers(Run(Bowls(), quick(11, verify=2, retries=3), store).drive()) == expected


@pytest.mark.parametrize(
    ("budget", "changes", "least"),
    [(9, {}, 10), (7, {}, 10), (8, {"verify": 3}, 11), (5, {"verify_extra": True}, 8)],
)
def test_less_than_was_paid_for_is_refused_with_the_number(
    budget: int, changes: dict[str, Any], least: int
) -> None:
    store = done(8, verify=2)
    before = len(list(store.read()))
    with pytest.raises(
        BudgetError, match=r"8 have been made or are waiting, 6 of the search and 2"
    ) as caught:
        Run(Bowls(), quick(budget, **{"verify": 2, **changes}), store)
    assert str(caught.value.hint).endswith(f"must be at least {least}")
    assert len(list(store.read())) == before
    Run(Bowls(), quick(least, **{"verify": 2, **changes}), store)


def test_an_unfinished_run_may_shrink_to_what_was_proposed() -> None:
    store = MemoryStore()
    Run(Bowls(), quick(12, verify=0), store).ask(6)
    with pytest.raises(BudgetError, match="cannot be 5 evaluations: 6 have been made or are wait"):
        Run(Bowls(), quick(5, verify=0), store)
    assert len(Run(Bowls(), quick(6, verify=0), store).drive().seen) == 6


@pytest.mark.parametrize(
    "changes",
    [{"retries": 3}, {"timeout": 60.0}, {"max_failure_share": 0.9}, {"batch": 4}],
)
def test_what_changes_no_evaluation_leaves_the_front_as_it_is(changes: dict[str, Any]) -> None:
    store, bowls = done(8), Bowls()
    before = len(list(store.read()))
    result = Run(bowls, quick(8, **changes), store).drive()
    [event] = list(store.read())[before:]
    assert event.kind == "extended"
    assert not event.data["reopens"]
    assert set(event.data["settings"]) == set(changes)
    assert bowls.calls == []
    assert result.summary["evaluations"] == 8
    created = created_in_force(store.read())
    assert created is not None
    assert changes.items() <= created["settings"].items()


def test_verification_may_be_left_out_afterwards_and_its_points_are_fitted() -> None:
    store, bowls = done(8, verify=2), Bowls()
    result = Run(bowls, quick(8, verify=0), store).drive()
    assert (len(result.seen), len(result.verification), bowls.calls) == (8, 0, [])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 1}, r"settings\.seed was 0 and is 1"),
        ({"guard": False, "retries": 4}, r"settings\.guard was True and is False\n"),
        ({"outliers": "keep"}, r"settings\.outliers was 'auto' and is 'keep'"),
    ],
)
def test_what_may_not_change_is_refused_with_its_name_and_value(
    changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(AnotherRunError, match=told):
        Run(Bowls(), quick(12, **changes), done(8))


def test_another_problem_is_refused_whatever_the_budget() -> None:
    with pytest.raises(AnotherRunError, match=r"problem\.noise was 0\.0 and is 0\.5"):
        Run(Bowls(noise=0.5), quick(12), done(8))


def test_an_old_script_does_not_take_back_what_was_added() -> None:
    store = done(8)
    Run(Bowls(), quick(12), store)
    bowls = Bowls()
    run = Run(bowls, quick(8), store)
    assert run.settings.budget == 12
    assert run.drive().summary["evaluations"] == 12
    Run(Bowls(), quick(8, retries=5), store)
    state = replay(list(store.read()), bowls.metrics, 2)
    assert (state.created["settings"]["budget"], state.created["settings"]["retries"]) == (12, 5)


def test_extending_by_name_takes_only_what_may_change() -> None:
    run = Run(Bowls(), quick(8), done(8))
    with pytest.raises(ConfigError, match="seed cannot change on a run") as caught:
        run.extend(seed=3)
    assert ", ".join(MAY_CHANGE) in str(caught.value.hint)
    with pytest.raises(ConfigError, match="there is no setting 'bugdet'") as caught:
        run.extend(bugdet=12)
    assert "budget" in str(caught.value.hint)
    run.extend(budget=12, timeout=5)
    assert run.settings == quick(12, timeout=5)
    assert len(run.ask(9)) == 12 - 2 - 8


def test_handles_take_over_what_another_has_changed(tmp_path: Path) -> None:
    one = Run(Bowls(), quick(6, verify=0), JsonlStore.create(tmp_path / "run"))
    assert len(one.ask(6)) == 6
    two = Run(Bowls(), quick(8, verify=0, timeout=9.0), JsonlStore.open(tmp_path / "run"))
    assert one.ask(6) == [6, 7]
    assert one.settings == two.settings


def test_a_stopped_search_asks_its_rule_again() -> None:
    stop = Stop(tolerance=0.2, patience=2, least=3)
    store = MemoryStore()
    first = Run(Bowls(), quick(9, stop=stop), store).drive()
    assert first.summary["stop"]["reason"] is not None
    bowls = Bowls()
    again = Run(bowls, quick(14, stop=stop), store).drive()
    assert len(again.seen) > len(first.seen) + len(first.verification)
    assert again.summary["stop"]["reason"] is not None


def test_failed_evaluations_can_be_repeated_once_the_run_is_extended() -> None:
    store = MemoryStore()
    broken = Bowls(fails=lambda number, x: "broken" if number == 2 else None)
    Run(broken, quick(8), store).drive()
    run = Run(Bowls(), quick(10), store)
    assert run.reopen_failures() == 1
    result = run.drive()
    assert (result.summary["evaluations"], bool(result.seen.ok.all())) == (10, True)


def test_old_files_do_not_lie_while_a_run_goes_on(tmp_path: Path) -> None:
    place, told = tmp_path / "run", {"progress": False, **kept(quick(8))}
    map_bo.optimize(Bowls(), 8, run_dir=place, **told)
    names = {"summary.json", "front.csv", "evaluations.csv", "report.html"}
    (place / "notes.txt").write_text("mine")
    assert names <= {path.name for path in place.iterdir()}
    Run(Bowls(), quick(10), JsonlStore.open(place))
    assert not names & {path.name for path in place.iterdir()}
    assert (place / "notes.txt").exists()
    assert not is_over(JsonlStore.open(place).read())
    map_bo.optimize(Bowls(), 10, run_dir=place, **told)
    assert json.loads((place / "summary.json").read_text())["evaluations"] == 10
    assert created_of(place)["settings"]["budget"] == 10
    assert created_of(place, extended=False)["settings"]["budget"] == 8
    assert load_state(place)[0].summary is not None


def kept(given: Settings) -> dict[str, Any]:
    names: Sequence[str] = ("sampler", "surrogate", "solver", "verify", "retries")
    return {name: getattr(given, name) for name in names}


def test_a_damaged_extension_is_refused() -> None:
    for data in (
        {"settings": {"budget": 12}, "config": {}, "reopens": True},
        {"settings": {}, "config": {}, "reopens": "yes"},
        {"settings": {}, "reopens": False},
    ):
        store = done(8)
        store.append(Event("extended", data))
        with pytest.raises(StoreError, match="extension of the run holds"):
            Run(Bowls(), quick(8), store)
