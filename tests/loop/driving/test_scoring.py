"""Runs whose rows are measured on parts of their examples."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from map_bo.data import Observations
from map_bo.errors import BudgetError, ConfigError, StoreError
from map_bo.examples.sets import Part, order_of
from map_bo.loop.driving.scoring import Scoring
from map_bo.loop.run import Run
from map_bo.loop.settings import Settings
from map_bo.loop.state import replay
from map_bo.problems.synthetic import ConcaveQuadratics
from map_bo.samplers.allocation.allocation import Action
from map_bo.samplers.allocation.fixed import SuccessiveHalving
from map_bo.samplers.designs.space_filling import Sobol
from map_bo.surrogates.quadratic import Quadratic
from map_bo.tracking.codec import encode_observations
from map_bo.tracking.jsonl import MemoryStore
from tests.loop.items import ItemProblem, failed

QUICK: dict[str, Any] = {"sampler": Sobol(), "surrogate": Quadratic(), "verify": 1}
HALVING = SuccessiveHalving(share=0.25, factor=2)


def kinds(store: MemoryStore) -> list[str]:
    """Return the kinds of the events."""
    return [event.kind for event in store.read()]


def plain(store: MemoryStore) -> list[tuple[str, Any]]:
    """Return events without their times."""

    def timeless(data: Any) -> Any:
        if isinstance(data, Mapping):
            left_out = ("seconds", "cost", "versions", "summary")
            return {k: timeless(v) for k, v in data.items() if k not in left_out}
        return [timeless(one) for one in data] if isinstance(data, list | tuple) else data

    return [(event.kind, timeless(event.data)) for event in store.read()]


def driven(problem: ItemProblem, store: MemoryStore | None = None, **settings: Any) -> Run:
    """Return a run that was driven to its end."""
    run = Run(problem, Settings(**{**QUICK, **settings}), store or MemoryStore())
    run.drive()
    return run


def test_a_fixed_subset_buys_more_rows_for_the_same_examples() -> None:
    problem = ItemProblem(2, 100)
    run = driven(problem, budget=5, items=25)
    assert len(run.state.outcomes) == 16  # four full evaluations of the search
    assert run.state.spent == pytest.approx(4.0)
    assert problem.calls[:16] == [{"t0": 25, "t1": 25}] * 16
    assert problem.calls[16:] == [{"t0": 100, "t1": 100}]  # the verification is in full
    summary = run.state.summary
    assert summary is not None
    assert summary["full_evaluations"] == pytest.approx(5.0)  # with the verification
    assert summary["examples"]["t0"] == {
        "scored": 500,
        "full": 100,
        "held_out": 0,
        "median": 25.0,
    }


def test_all_rows_cover_the_same_examples() -> None:
    run = driven(ItemProblem(2, 100), budget=5, items=25)
    items = [row.examples[0]["t0"].items.tolist() for row in run.state.outcomes.values()]
    assert all(one == items[0] for one in items)
    order = order_of(ItemProblem(2, 100).example_sets["t0"], 0, "t0")
    assert items[0] == sorted(order[:25].tolist())


def test_rows_are_topped_up_and_their_measurement_is_that_of_all_their_examples() -> None:
    store = MemoryStore()
    run = driven(ItemProblem(2, 100), store, budget=6, items=HALVING)
    assert "scored" in kinds(store)
    for row, outcome in run.state.outcomes.items():
        for j, name in enumerate(("t0", "t1")):
            values = outcome.examples[0][name].values
            assert len(values) == run.state.covered[row][name]
            assert float(outcome.Y[0, j]) == pytest.approx(float(values.mean()))
            assert float(outcome.counts[0, j]) == len(values)
    assert run.state.spent <= 5 + 1e-9


def test_held_out_examples_are_never_scored() -> None:
    seen: set[int] = set()

    class Watching(ItemProblem):
        def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
            found = super().evaluate(X, generator=generator)
            for row in found.examples:
                seen.update(row["t0"].items.tolist())
            return found

    problem = Watching(2, 100)
    driven(problem, budget=5, holdout=0.3)
    order = order_of(problem.example_sets["t0"], 0, "t0")
    assert seen == set(order[:70].tolist())


@pytest.mark.slow
@pytest.mark.parametrize("items", [25, HALVING])
def test_a_run_goes_on_from_any_event_as_if_it_had_not_stopped(items: Any) -> None:
    whole = MemoryStore()
    driven(ItemProblem(2, 60), whole, budget=5, items=items)
    events = list(whole.read())
    stops = [i for i, event in enumerate(events) if event.kind in ("observed", "scored")]
    for stop in (stops[0], stops[len(stops) // 2], stops[-1]):
        store = MemoryStore()
        for event in events[: stop + 1]:
            store.append(event)
        driven(ItemProblem(2, 60), store, budget=5, items=items)
        for one, other in zip(plain(store), plain(whole), strict=True):
            assert one == other


class Failing(ItemProblem):
    """A task that fails once many examples of it are wanted."""

    def on_examples(self, wanted: Mapping[str, Tensor]) -> ItemProblem:
        part = super().on_examples(wanted)
        assert isinstance(part, Failing)
        return part

    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        found = super().evaluate(X, generator=generator)
        if self.wanted is not None and len(self.wanted) == 1 and "t1" in self.wanted:
            return dataclasses.replace(
                Observations.failed(X, self.metrics, "no memory"), cost=found.cost
            )
        return found


def test_a_row_whose_further_examples_fail_keeps_what_it_has_and_gets_no_more() -> None:
    store = MemoryStore()
    problem = Failing(2, 100)

    class OneTask(SuccessiveHalving):
        def next(self, standing: Any, *, generator: Generator) -> Any:
            action = super().next(standing, generator=generator)
            if action is None or action.row is None:
                return action
            return action._replace(parts=action.parts[1:])  # t1 alone

    run = driven(problem, store, budget=6, items=OneTask(share=0.25, factor=2), retries=1)
    assert run.state.closed
    for row in run.state.closed:
        assert run.state.outcomes[row].failures[0] is None
        assert run.state.covered[row]["t1"] == 25
        tries = [e for e in store.read() if e.kind == "attempt" and e.data["index"] == row]
        assert [e.data["reason"] for e in tries] == ["no memory"]
    reasons = [e.data.get("reason") for e in store.read() if e.kind == "scored"]
    assert "no memory" in reasons


def test_a_problem_without_examples_is_refused_before_anything_is_evaluated() -> None:
    store = MemoryStore()
    run = Run(ConcaveQuadratics(d=2, m=2), Settings(budget=5, items=50), store)
    with pytest.raises(
        ConfigError, match=r"loop\.items is 50, and ConcaveQuadratics does not score"
    ):
        run.drive()
    assert kinds(store) == ["created"]


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("items", "some", "there is no loop.items 'some'"),
        ("items", 0, "items must be a whole number of at least 1"),
        ("items", 2.5, "items must be a whole number"),
        ("items", SuccessiveHalving, "items must be an allocation"),
        ("holdout", 1.0, "holdout must be below 1, got 1"),
        ("holdout", -0.1, "holdout must be a number of at least 0"),
    ],
)
def test_impossible_settings_are_refused(setting: str, value: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Settings(budget=5, **{setting: value})


def test_a_record_of_parts_must_follow_from_what_came_before() -> None:
    store = MemoryStore()
    driven(ItemProblem(2, 60), store, budget=5, items=HALVING)
    events = list(store.read())
    at = next(i for i, event in enumerate(events) if event.kind == "scored")
    lying = copy.deepcopy(dict(events[at].data))
    lying["parts"][0][1] += 1
    changed = [*events[:at], dataclasses.replace(events[at], data=lying)]
    metrics = ItemProblem(2, 60).metrics
    with pytest.raises(StoreError, match="covers 25 examples of 't0' before those from 26"):
        replay(changed, metrics, 2)


def test_a_budget_grows_in_full_evaluations() -> None:
    problem = ItemProblem(2, 100)
    store = MemoryStore()
    driven(problem, store, budget=5, items=25)
    run = Run(problem, Settings(**QUICK, budget=8, items=25), store)
    run.drive()
    assert run.state.spent == pytest.approx(7.0)


def test_truth_is_found_on_a_share_of_the_examples() -> None:
    problem = ItemProblem(2, 400)
    run = driven(problem, budget=4, items=40, verify=0)
    result = run.drive()
    x = result.choose({"t0": 1, "t1": 1}).x
    blend = problem.truth(torch.tensor([0.5, 0.5]).double())
    assert float(problem.truth(x).mean()) > float(blend.mean()) - 0.05


def test_rows_whose_outcomes_are_lost_get_no_more_examples() -> None:
    """Their values would be replaced by those of the new examples alone."""
    problem = ItemProblem(2, 20)
    part = problem.on_examples({"t0": torch.arange(5), "t1": torch.arange(5)})
    X = torch.rand(4, 2, generator=torch.Generator(), dtype=torch.float64)
    seen = part.evaluate(X, generator=torch.Generator())
    rows = [dict(row) for row in seen.examples]
    del rows[1]["t1"]
    rows[2]["t0"] = dataclasses.replace(
        rows[2]["t0"], items=torch.arange(3), values=torch.ones(3, 1)
    )
    seen = dataclasses.replace(seen, examples=tuple(rows))
    state = dataclasses.replace(
        replay([], problem.metrics, 2),
        X=X,
        outcomes={i: seen.select([i]) for i in range(4)} | {3: failed(seen.select([3]), "broken")},
        covered={row: {"t0": 5, "t1": 5} for row in range(4)},
    )
    scoring = Scoring(problem, Settings(**{**QUICK, "budget": 6, "items": 5}))
    assert scoring.standing(state).busy == {1, 2}


def test_a_budget_of_few_full_evaluations_is_enough_for_rows_on_few_examples() -> None:
    run = driven(ItemProblem(2, 100), budget=2, items=25)
    assert len(run.state.outcomes) == 4
    with pytest.raises(BudgetError, match="leaves 1 evaluations for the search"):
        Settings(**QUICK, budget=2)


class Costs:
    """A reporter that keeps what it hears of costs."""

    def __init__(self) -> None:
        self.heard: list[float] = []

    @contextmanager
    def over(self, total: int) -> Iterator[Costs]:
        yield self

    def done(self, count: int) -> None: ...

    def evaluating(self, what: str) -> None: ...

    def measured(self, outcome: Observations) -> None: ...

    def paid(self, done: float) -> None:
        self.heard.append(done)


def test_a_reporter_hears_what_was_spent_before_a_resumed_run_goes_on() -> None:
    store, first, second = MemoryStore(), Costs(), Costs()
    settings = Settings(**QUICK, budget=5, items=25)
    Run(ItemProblem(2, 100), settings, store).drive(first)
    assert first.heard[0] == 0
    assert first.heard[1] == pytest.approx(0.25)
    cut = MemoryStore()
    for event in list(store.read())[:12]:
        cut.append(event)
    run = Run(ItemProblem(2, 100), settings, cut)
    spent = run.state.spent
    assert spent > 0
    run.drive(second)
    assert second.heard[0] == pytest.approx(spent)


class FirstPartFails(ItemProblem):
    """The first part of the fifth row fails, until it is repaired."""

    broken_down = True

    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        found = super().evaluate(X, generator=generator)
        if FirstPartFails.broken_down and len(self.calls) == 5:
            found = dataclasses.replace(failed(found, "boom"), cost=found.cost)
        return found


def interrupted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drive a run until its front is to be solved."""

    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_recommend", stop)
    with pytest.raises(KeyboardInterrupt):
        run.drive()


def test_a_row_whose_first_part_failed_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it covered at first was still counted, so the repetition could not be recorded."""
    problem, store = FirstPartFails(2, 100), MemoryStore()
    settings = Settings(**QUICK, budget=5, items=25, retries=0)
    interrupted(Run(problem, settings, store), monkeypatch)
    run = Run(problem, settings, store)
    assert run.reopen_failures() == 1
    run.drive()
    assert run.state.outcomes[4].failures[0] is None
    assert run.state.covered[4] == {"t0": 25, "t1": 25}
    assert run.state.spent == pytest.approx(4.0)


def test_a_run_that_is_extended_where_it_was_driven_goes_on() -> None:
    run = driven(ItemProblem(2, 100), budget=5, items=25)
    run.extend(budget=8)
    run.drive()
    assert run.state.spent == pytest.approx(7.0)


def test_further_examples_that_failed_count_as_spent() -> None:
    class OneTask(SuccessiveHalving):
        def next(self, standing: Any, *, generator: Generator) -> Any:
            action = super().next(standing, generator=generator)
            if action is None or action.row is None:
                return action
            return action._replace(parts=action.parts[1:])

    items = OneTask(share=0.25, factor=2)
    run = driven(Failing(2, 100), budget=6, items=items, retries=0)
    assert run.state.closed
    assert run.state.spent <= 5 + 1e-9
    assert run.state.summary is not None
    verified = len(run.state.verified)
    assert run.state.summary["full_evaluations"] == pytest.approx(run.state.spent + verified)


def test_rows_can_be_asked_for_while_the_budget_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are more rows than full evaluations where rows are measured on parts."""
    problem, store = ItemProblem(2, 100), MemoryStore()
    interrupted(Run(problem, Settings(**QUICK, budget=5, items=25), store), monkeypatch)
    run = Run(problem, Settings(**QUICK, budget=8, items=25), store)
    assert len(run.ask(9)) == 3


@pytest.mark.parametrize(
    ("size", "holdout", "left"), [(100, 0.99, 1), (100, 0.999, 0), (2, 0.1, 1)]
)
def test_a_holdout_that_leaves_next_to_nothing_is_refused(
    size: int, holdout: float, left: int
) -> None:
    with pytest.raises(ConfigError, match=f"leaves the search {left} of the {size} examples of"):
        driven(ItemProblem(2, size), budget=5, holdout=holdout)


@pytest.mark.parametrize(
    ("action", "said"),
    [
        (Action(None, (Part("t0", 5, 9),)), "examples 5 to 9 of 't0', of which 0 of 100"),
        (Action(None, (Part("t0", 0, 900),)), "examples 0 to 900 of 't0'"),
        (Action(None, (Part("tx", 0, 9),)), "examples 0 to 9 of 'tx', of which 0 of 0"),
        (Action(7, (Part("t0", 0, 9),)), "more examples of row 7, which gets none now"),
        (Action(None, ()), "asks for 0 full evaluations"),
    ],
)
def test_what_an_allocation_must_not_ask_for_is_refused(action: Action, said: str) -> None:
    @dataclasses.dataclass(frozen=True)
    class Foreign:
        def first(self, standing: Any) -> tuple[Part, ...]:
            return action.parts

        def next(self, standing: Any, *, generator: Generator) -> Action:
            return action

    with pytest.raises(ConfigError, match=f"the allocation Foreign asks for .*{said}|{said}"):
        driven(ItemProblem(2, 100), budget=5, items=Foreign())


@pytest.mark.parametrize("share", [-0.5, 3.0, float("nan"), float("inf")])
def test_a_record_with_an_impossible_cost_of_examples_is_refused(share: float) -> None:
    store = MemoryStore()
    driven(ItemProblem(2, 60), store, budget=5, items=HALVING)
    events = list(store.read())
    for kind in ("observed", "scored"):
        at = next(i for i, event in enumerate(events) if event.kind == kind)
        lying = {**events[at].data, "share": share}
        changed = [*events[:at], dataclasses.replace(events[at], data=lying)]
        with pytest.raises(StoreError, match="is not a number from 0 to 1"):
            replay(changed, ItemProblem(2, 60).metrics, 2)


def test_a_row_that_failed_gets_no_more_examples_in_a_record() -> None:
    store, problem = MemoryStore(), ItemProblem(2, 60)
    driven(problem, store, budget=5, items=HALVING)
    events = list(store.read())
    at = next(i for i, event in enumerate(events) if event.kind == "scored")
    row = events[at].data["index"]
    first = next(
        i for i, one in enumerate(events) if one.kind == "observed" and one.data["index"] == row
    )
    state = replay(events[:first], problem.metrics, 2)
    broken = Observations.failed(state.X[row : row + 1], problem.metrics, "boom")
    data = {**events[first].data, "observation": encode_observations(broken)}
    events[first] = dataclasses.replace(events[first], data=data)
    with pytest.raises(StoreError, match=f"row {row} gets more examples, and has failed"):
        replay(events[: at + 1], problem.metrics, 2)


def test_a_record_of_more_examples_than_there_are_is_refused() -> None:
    store = MemoryStore()
    driven(ItemProblem(2, 60), store, budget=5, items=25)
    events = list(store.read())[:8]
    state = replay(events, ItemProblem(2, 60).metrics, 2)
    state = dataclasses.replace(state, covered={0: {"t0": 25, "t1": 61}})
    scoring = Scoring(ItemProblem(2, 60), Settings(**QUICK, budget=5, items=25))
    with pytest.raises(StoreError, match="row 0 was measured on 61 examples of 't1', of which the"):
        scoring.next(state, torch.Generator())
