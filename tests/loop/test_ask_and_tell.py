"""Asking and telling by hand, from one or several processes, and what a point's deaths cost."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from map_bo.data import Observations
from map_bo.errors import BudgetError, ConfigError, DataError, StoreError
from map_bo.loop.run import Run
from map_bo.tracking.codec import encode_line
from map_bo.tracking.examine import examine
from map_bo.tracking.jsonl import JsonlStore, MemoryStore
from map_bo.tracking.store import Event
from tests.loop.bowls import Bowls, quick


def measured(run: Run, index: int, **changes: Any) -> Observations:
    seen = run.problem.evaluate(run.state.X[index : index + 1], generator=torch.Generator())
    return dataclasses.replace(seen, **changes)


def test_asking_keeps_to_the_budget_and_proposes_nothing_twice(bowls: Bowls) -> None:
    run = Run(bowls, quick(8, verify=1), MemoryStore())
    assert run.ask(3) == [0, 1, 2]
    assert run.ask(25) == [3, 4, 5, 6]
    assert len(torch.unique(run.state.X, dim=0)) == 7
    with pytest.raises(BudgetError, match=r"all 7 .* proposed, and 7 of them wait") as caught:
        run.ask(1)
    assert "tell the outcomes" in str(caught.value.hint)


def test_an_outcome_is_observations_of_a_row_that_waits(bowls: Bowls) -> None:
    run = Run(bowls, quick(8), MemoryStore())
    outcome: Any = 0.5
    with pytest.raises(StoreError, match="row 0 does not wait") as caught:
        run.tell(0, Observations.failed(bowls.space.anchors().X[:1], bowls.metrics, "broken"))
    assert caught.value.hint == "no row waits for an outcome: ask for rows first"
    run.ask(1)
    with pytest.raises(DataError, match="must be Observations, got float"):
        run.tell(0, outcome)
    assert run.state.pending == [0]


@pytest.mark.parametrize("n", [0, -1, True, "x", 1.5, None])
def test_only_whole_numbers_of_rows_are_asked_for(bowls: Bowls, n: Any) -> None:
    run = Run(bowls, quick(8), MemoryStore())
    with pytest.raises(ConfigError, match=f"of at least 1, got {n!r}"):
        run.ask(n)
    assert len(run.state.X) == 0


@pytest.mark.parametrize("outcome", [None, [0.1, 0.2], torch.zeros(1, 2), "0.1"])
def test_what_is_no_observations_is_refused(bowls: Bowls, outcome: Any) -> None:
    run = Run(bowls, quick(8), MemoryStore())
    run.ask(1)
    with pytest.raises(DataError, match=f"must be Observations, got {type(outcome).__name__}"):
        run.tell(0, outcome)
    assert run.state.pending == [0]


def test_an_outcome_of_another_point_is_refused_and_single_precision_is_not(bowls: Bowls) -> None:
    run = Run(bowls, quick(8), MemoryStore())
    for index in run.ask(5):
        x = run.state.X[index : index + 1]
        with pytest.raises(StoreError, match=f"outcome of row {index} belongs to another point"):
            run.tell(index, measured(run, index, X=x + 1e-3))
        run.tell(index, measured(run, index, X=x.float().double()))
    assert torch.equal(run.state.seen.X, run.state.X)


@pytest.mark.parametrize("index", [5, -1, True, "0", 0.5])
def test_only_rows_that_wait_are_told(bowls: Bowls, index: Any) -> None:
    run = Run(bowls, quick(8), MemoryStore())
    run.ask(2)
    with pytest.raises(StoreError, match=rf"row {index} does not wait for an outcome"):
        run.tell(index, measured(run, 0))


def test_a_problem_that_answers_for_another_point_fails_there(bowls: Bowls) -> None:
    class Askew(Bowls):
        def evaluate(self, X: torch.Tensor, *, generator: torch.Generator) -> Observations:
            seen = super().evaluate(X, generator=generator)
            return dataclasses.replace(seen, X=seen.X.flip(-1))

    seen = Run(Askew(), quick(8, max_failure_share=1.0, verify=0), MemoryStore())
    first = seen.drive().seen
    assert "the outcome of another point: [0.0, 1.0]" in str(first.failures[1])
    assert first.failures[0] is None, "the base is the same from both sides"


def test_several_handles_ask_and_tell_over_one_directory(tmp_path: Path) -> None:
    one = Run(Bowls(), quick(8), JsonlStore.create(tmp_path / "run"))
    two = Run(Bowls(), quick(8), JsonlStore.open(tmp_path / "run"))
    assert (one.ask(1), two.ask(1), one.ask(2)) == ([0], [1], [2, 3])
    assert torch.equal(one.state.X[:2], two.state.X)
    two.tell(1, measured(two, 1))
    with pytest.raises(StoreError, match="row 1 does not wait for an outcome"):
        one.tell(1, measured(one, 1, Y=torch.full((1, 2), 9.0)))
    two.tell(0, measured(two, 0))
    for index in (2, 3):
        one.tell(index, measured(one, index))
    last = Run(Bowls(), quick(8), JsonlStore.open(tmp_path / "run"))
    assert last.state.pending == []
    assert torch.equal(last.state.seen.X, last.state.X)
    assert torch.equal(last.state.seen.Y, Bowls().true_values(last.state.X))


class Intruded(Bowls):
    """While it is evaluated, another process writes to the run although it must not."""

    path: Path

    def evaluate(self, X: torch.Tensor, *, generator: torch.Generator) -> Observations:
        if len(self.calls) == 3:
            line, _ = encode_line(Event("checked", {}), examine(self.path).link)
            with open(self.path, "ab") as file:
                file.write(line)
        return super().evaluate(X, generator=generator)


def test_a_driver_stops_when_another_process_writes_where_locks_lie(tmp_path: Path) -> None:
    problem = Intruded()
    problem.path = tmp_path / "run" / "events.jsonl"
    with pytest.raises(StoreError, match="another process has recorded 1 events in this run"):
        Run(problem, quick(8), JsonlStore.create(tmp_path / "run")).drive()
    kinds = [event.kind for event in JsonlStore.open(tmp_path / "run").read()]
    assert kinds[-1] == "checked"
    assert len(problem.calls) == 4


@pytest.mark.parametrize(("retries", "deaths"), [(0, 2), (1, 2), (3, 4)])
def test_a_point_is_given_up_after_too_many_deaths_and_not_before(
    retries: int, deaths: int
) -> None:
    """A death is a start without an end; how processes really die is in test_deaths.py."""
    for given in (deaths - 1, deaths):
        bowls, store = Bowls(), MemoryStore()
        Run(bowls, quick(8, retries=retries), store).ask(1)
        for _ in range(given):
            store.append(Event("started", {"index": 0, "attempt": 0}))
        result = Run(bowls, quick(8, retries=retries), store).drive()
        reason = f"the process ended during this evaluation {deaths} times"
        assert result.seen.failures[0] == (reason if given == deaths else None)
        assert result.seen.failures[1:] == (None,) * (len(result.seen) - 1)
        assert bowls.calls.count([0.0, 0.0]) == (given < deaths)


def test_an_error_that_ends_the_run_is_no_death(bowls: Bowls) -> None:
    def interrupt(number: int, x: torch.Tensor) -> str | None:
        raise KeyboardInterrupt

    store = MemoryStore()
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            Run(Bowls(fails=interrupt), quick(8), store).drive()
    run = Run(bowls, quick(8), store)
    assert run.state.deaths == {0: 0}
    assert run.drive().summary["failures"] == 0
