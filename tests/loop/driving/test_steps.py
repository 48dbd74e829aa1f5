"""Runs over workers whose results come in any order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from map_bo.data import Observations
from map_bo.errors import EvaluationError, MergeError
from map_bo.loop.driving.steps import open_workers
from map_bo.loop.run import Run
from map_bo.loop.settings import Settings
from map_bo.loop.state import replay
from map_bo.tracking.jsonl import JsonlStore, MemoryStore
from map_bo.tracking.store import Event
from map_bo.workers.workers import Outcome, Task, Workers
from tests.loop.bowls import Bowls, quick
from tests.workers.late import LateWorkers, last


def kinds(store: Any) -> list[str]:
    return [event.kind for event in store.read()]


def opened(workers: Workers, **changes: Any) -> tuple[Settings, Any]:
    """Return settings whose workers are these, however they are opened."""

    @dataclasses.dataclass(frozen=True)
    class Given:
        count: int | None = None

        def open(self, problem: object) -> Workers:
            return workers

    return quick(workers=Given(), **changes), MemoryStore()


def test_it_is_told_that_workers_are_being_started(caplog: pytest.LogCaptureFixture) -> None:
    problem = Bowls()
    settings, _ = opened(LateWorkers(problem, 3, pick=last))
    assert settings.workers is not None
    assert not isinstance(settings.workers, int)
    with caplog.at_level("INFO"):
        open_workers(settings.workers, problem)
    assert "starting the workers" in caplog.text
    assert "3 workers ready after" in caplog.text


class TestAsynchronous:
    def test_every_worker_is_given_a_row_before_any_has_ended(self) -> None:
        problem = Bowls()
        workers = LateWorkers(problem, 3, pick=last)
        settings, store = opened(workers, budget=12, verify=2)
        result = Run(problem, settings, store).drive()
        assert len(result.seen) == 10
        assert len(result.verification) == 2
        assert workers.most >= 3
        assert workers.closed is False
        begun = [event.data for event in store.read() if event.kind == "started"]
        assert all(data["worker"] for data in begun)

    def test_a_proposal_is_made_as_soon_as_one_has_ended(self) -> None:
        problem = Bowls()
        workers = LateWorkers(problem, 4)
        settings, store = opened(workers, budget=12, verify=0)
        Run(problem, settings, store).drive()
        proposed = [e.data for e in store.read() if e.kind == "proposed"]
        order = kinds(store)
        assert len(proposed) > 3  # not three batches of four
        assert "proposed" in order[order.index("observed") :]

    def test_no_row_is_proposed_twice_while_it_is_evaluated(self) -> None:
        problem = Bowls()
        settings, store = opened(LateWorkers(problem, 4, pick=last), budget=12, verify=0)
        run = Run(problem, settings, store)
        run.drive()
        assert float(torch.pdist(run.state.X).min()) > 1e-6

    def test_the_stopping_rule_is_asked_although_rows_are_in_flight(self) -> None:
        problem = Bowls()
        stop = {"criterion": "regret", "tolerance": 0.9, "patience": 1, "least": 6}
        settings, store = opened(LateWorkers(problem, 2), budget=14, verify=0, stop=stop)
        result = Run(problem, settings, store).drive()
        assert 6 <= len(result.seen) < 14
        # What was in flight when it stopped has its outcome all the same.
        begun = {e.data["index"] for e in store.read() if e.kind == "started"}
        observed = {e.data["index"] for e in store.read() if e.kind == "observed"}
        assert begun == observed


class TestBatches:
    @pytest.mark.parametrize("size", [2, 5])
    def test_proposals_are_those_of_one_process(self, size: int) -> None:
        problem = Bowls(noise=0.1)
        alone = MemoryStore()
        here = Run(problem, quick(budget=11, batch=3, verify=2), alone).drive()
        workers = LateWorkers(problem, size, pick=last)
        settings, store = opened(workers, budget=11, batch=3, verify=2, asynchronous=False)
        there = Run(problem, settings, store).drive()
        assert torch.equal(there.seen.X, here.seen.X)
        assert torch.equal(there.seen.Y, here.seen.Y)
        assert torch.equal(there.front.X, here.front.X)
        assert torch.equal(there.verification.Y, here.verification.Y)


class TestFaults:
    def test_a_lost_worker_costs_an_attempt_with_its_reason(self) -> None:
        problem = Bowls()
        workers = LateWorkers(problem, 2, loses=lambda task: task.row == 4 and not task.attempt)
        settings, store = opened(workers, budget=8, verify=0, retries=0)
        result = Run(problem, settings, store).drive()
        [attempt] = [e.data for e in store.read() if e.kind == "attempt"]
        assert "SIGSEGV" in attempt["reason"]
        assert bool(result.seen.ok.all())

    def test_a_row_that_takes_workers_along_again_and_again_is_a_failed_row(self) -> None:
        problem = Bowls()
        workers = LateWorkers(problem, 2, loses=lambda task: task.row == 4)
        settings, store = opened(workers, budget=8, verify=0, retries=1)
        result = Run(problem, settings, store).drive()
        assert result.seen.failures[4] == "the worker died: signal 11 (SIGSEGV)"
        assert int(result.seen.ok.sum()) == 7

    def test_workers_out_of_reach_end_the_run_and_lose_nothing(self) -> None:
        problem = Bowls()
        settings, store = opened(LateWorkers(problem, 3, breaks=6), budget=12, verify=0)
        with pytest.raises(RuntimeError, match="the cluster is gone"):
            Run(problem, settings, store).drive()
        order = kinds(store)
        assert order.count("observed") >= 1
        # Those that raised have no end; of others in flight the record says it.
        assert order.count("started") > order.count("observed") + order.count("interrupted")
        result = Run(problem, quick(budget=12, verify=0), store).drive()
        assert len(result.seen) == 12

    def test_what_has_landed_is_recorded_when_another_row_ends_the_run(self) -> None:
        problem = Bowls()

        class Landed(LateWorkers):
            """All tasks of a batch have ended before any is looked at; the first one raises."""

            def submit(self, task: Task) -> Future[Outcome]:
                future: Future[Outcome] = Future()
                if task.row == 3:
                    future.set_exception(MergeError("the file is gone"))
                else:
                    future.set_result(self._outcome(task))
                return future

        settings, store = opened(Landed(problem, 6), budget=12, verify=0)
        with pytest.raises(MergeError, match="the file is gone"):
            Run(problem, settings, store).drive()
        assert kinds(store).count("observed") == 5

    def test_too_many_failures_end_the_run(self) -> None:
        problem = Bowls(fails=lambda number, x: "broken")
        settings, store = opened(LateWorkers(problem, 3), budget=12, verify=0, retries=0)
        with pytest.raises(EvaluationError, match="3 of 3 evaluations failed"):
            Run(problem, settings, store).drive()

    @pytest.mark.parametrize("ends", ["failures", "interrupt"])
    def test_what_has_landed_is_recorded_when_one_of_it_ends_the_run(self, ends: str) -> None:
        problem = Bowls(fails=lambda number, x: "broken" if number <= 3 else None)

        class Landed(LateWorkers):
            def submit(self, task: Task) -> Future[Outcome]:
                future: Future[Outcome] = Future()
                future.set_result(self._outcome(task))
                return future

        class Shown:
            """Is interrupted right after the first row is recorded."""

            @contextmanager
            def over(self, total: int) -> Iterator[Shown]:
                yield self

            def done(self, count: int) -> None: ...

            def evaluating(self, what: str) -> None: ...

            count = 0

            def measured(self, outcome: Observations) -> None:
                self.count += 1
                if ends == "interrupt" and self.count == 1:
                    raise KeyboardInterrupt

        settings, store = opened(Landed(problem, 6), budget=12, verify=0)
        with pytest.raises((EvaluationError, KeyboardInterrupt)) as raised:
            Run(problem, settings, store).drive(Shown())
        if ends == "failures":
            assert "3 of 3 evaluations failed" in str(raised.value)
        assert kinds(store).count("observed") == 6


class TestKilledDrivers:
    @pytest.mark.parametrize("after", range(3, 30, 4))
    def test_rows_in_flight_are_evaluated_first_and_cost_no_death(self, after: int) -> None:
        problem = Bowls()
        settings, store = opened(LateWorkers(problem, 3, pick=last), budget=10, verify=1)
        Run(problem, settings, store).drive()
        events = list(store.read())[:after]
        waiting = replay(events, problem.metrics, 2).pending
        for _ in range(3):  # a driver that dies again and again with the same rows in flight
            events += [
                Event("started", {"index": row, "attempt": 0, "worker": True}) for row in waiting
            ]
        again = MemoryStore()
        for event in events:
            again.append(event)
        workers = LateWorkers(problem, 3)
        resumed, _ = opened(workers, budget=10, verify=1)
        result = Run(problem, resumed, again).drive()
        assert len(result.seen) == 9
        assert not any(result.seen.failures)
        indices = [task.row for task in workers.tasks if task.kind == "index"]
        assert indices[: len(waiting)] == waiting

    def test_replaying_the_record_proposes_the_same(self, tmp_path: Path) -> None:
        problem = Bowls()
        settings, _ = opened(LateWorkers(problem, 3, pick=last), budget=10, verify=0)
        store = JsonlStore.create(tmp_path / "run")
        Run(problem, settings, store).drive()
        again = MemoryStore()
        run = Run(problem, quick(budget=10, verify=0), again)
        for event in store.read():  # told by hand, in the order of the record
            if event.kind == "proposed":
                before = len(run.state.X)
                n = len(replay([event], problem.metrics, 2).X)
                run.ask(n)
                whole = replay(store.read(), problem.metrics, 2).X
                assert torch.equal(run.state.X[before:], whole[before : before + n])
            elif event.kind == "observed":
                row = event.data["index"]
                x = run.state.X[row : row + 1]
                run.tell(row, Observations(x, problem.true_values(x), problem.metrics))


def test_tasks_are_told_apart() -> None:
    one = Task("index", 3, 0, (0.5,), 7)
    others = [
        dataclasses.replace(one, attempt=1),
        dataclasses.replace(one, kind="verify"),
        dataclasses.replace(one, row=4),
        dataclasses.replace(one, seed=8),
        dataclasses.replace(one, node="root"),
    ]
    assert len({task.key for task in [one, *others]}) == 6
