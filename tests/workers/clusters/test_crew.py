from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

import pytest
import torch

from map_bo.data import Observations
from map_bo.errors import ConfigError, WorkersError
from map_bo.workers.clusters import crew as module
from map_bo.workers.clusters.crew import (
    Answer,
    Built,
    Crew,
    Hand,
    Missing,
    OutOfReachError,
    Refused,
    failed_outcome,
)
from map_bo.workers.workers import Outcome, Task
from tests.loop.bowls import Bowls

SOON = 10.0  # seconds for what should take milliseconds


class FakeHand:
    """A worker whose futures a test resolves."""

    def __init__(self, name: str, *, builds: bool = True) -> None:
        self.name = name
        self.builds, self.killed = builds, False
        self.tasks: list[Task] = []
        self.built: Future[Answer] = Future()
        self.answers: list[Future[Answer]] = []

    def build(self) -> Future[Answer]:
        if self.builds:
            self.built.set_result(Built(self.name, "here", 1))
        return self.built

    def evaluate(self, task: Task) -> Future[Answer]:
        self.tasks.append(task)
        self.answers.append(Future())
        return self.answers[-1]

    def kill(self) -> None:
        self.killed = True


class FakeEngine:
    """A cluster whose workers a test lists."""

    def __init__(self, *hands: FakeHand) -> None:
        self.hands = list(hands)
        self.silent = False
        self.closed: bool | None = None

    def look(self) -> Sequence[Hand]:
        if self.silent:
            raise OutOfReachError("no answer")
        return [hand for hand in self.hands if not hand.killed]

    def blame(self, error: BaseException) -> str | None:
        return None if isinstance(error, ConnectionError) else f"it died: {error}"

    def close(self, *, abandon: bool) -> None:
        self.closed = abandon


@pytest.fixture(autouse=True)
def _quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK", 0.02)
    monkeypatch.setattr(module, "_LATE", 0.1)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(FakeHand("one"), FakeHand("two"))


@pytest.fixture
def crew(engine: FakeEngine) -> Iterator[Crew]:
    made = opened(engine)
    yield made
    made.close(abandon=True)


def opened(engine: FakeEngine, patience: float = SOON) -> Crew:
    made = Crew(engine, Bowls().metrics, what="worker", patience=patience, grace=(0.0, 0.0))
    made.start()
    return made


def task(row: int, timeout: float | None = None) -> Task:
    return Task("index", row, 0, (0.0, 0.0), row, timeout=timeout)


def outcome(of: Task) -> Outcome:
    X = of.point.unsqueeze(0)
    return Outcome(of.key, Observations(X, torch.tensor([[0.0, 1.0]]), Bowls().metrics))


def until(what: object) -> None:
    assert callable(what)
    end = time.monotonic() + SOON
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def reason(future: Future[Outcome]) -> str | None:
    return future.result(SOON).observations.failures[0]


def test_each_worker_has_one_task_and_the_others_wait_in_their_order(
    engine: FakeEngine, crew: Crew
) -> None:
    futures = [crew.submit(task(row)) for row in range(4)]
    one, two = engine.hands
    until(lambda: one.tasks and two.tasks)
    time.sleep(0.1)
    assert [t.row for t in one.tasks + two.tasks] == [0, 1]
    assert [(name, t.row) for name, t, _ in crew.running()] == [("one", 0), ("two", 1)]
    two.answers[0].set_result(outcome(two.tasks[0]))
    assert futures[1].result(SOON).worker == "two"
    until(lambda: len(two.tasks) == 2)
    assert two.tasks[1].row == 2
    assert not futures[0].done()


def test_a_worker_that_dies_takes_its_row_along_and_no_other(
    engine: FakeEngine, crew: Crew
) -> None:
    futures = [crew.submit(task(row)) for row in range(2)]
    one, two = engine.hands
    until(lambda: one.tasks and two.tasks)
    one.answers[0].set_exception(RuntimeError("signal 11"))
    lost = futures[0].result(SOON)
    assert lost.lost
    assert lost.observations.failures == ("worker one: it died: signal 11",)
    assert lost.key == task(0).key
    assert crew.size == 1
    engine.hands.append(FakeHand("three"))
    until(lambda: crew.size == 2)
    two.answers[0].set_result(outcome(two.tasks[0]))
    assert not futures[1].result(SOON).lost


def test_a_worker_that_the_cluster_no_longer_has_is_lost(engine: FakeEngine, crew: Crew) -> None:
    future = crew.submit(task(0))
    until(lambda: engine.hands[0].tasks)
    del engine.hands[0]
    assert future.result(SOON).lost


def test_a_time_limit_is_kept_by_the_death_of_the_worker(engine: FakeEngine, crew: Crew) -> None:
    future = crew.submit(task(0, timeout=0.1))
    late = crew.submit(task(1, timeout=SOON))
    assert reason(future) == "it took longer than 0.1 s"
    assert not future.result().lost  # the row's own failure
    one, two = engine.hands
    assert one.killed
    assert not two.killed
    assert not late.done()
    assert float(future.result().observations.cost) >= 0.1


def test_what_comes_after_the_limit_is_not_used(engine: FakeEngine, crew: Crew) -> None:
    one = engine.hands[0]
    future = crew.submit(task(0, timeout=0.05))
    assert reason(future) is not None
    one.answers[0].set_result(outcome(task(0)))
    other = crew.submit(task(1))
    two = engine.hands[1]
    until(lambda: two.tasks)
    two.answers[0].set_result(outcome(task(1)))
    assert reason(other) is None


def test_a_process_without_the_problem_is_another_than_before(
    engine: FakeEngine, crew: Crew
) -> None:
    future = crew.submit(task(0))
    until(lambda: engine.hands[0].tasks)
    engine.hands[0].answers[0].set_result(Missing())
    assert future.result(SOON).lost
    assert engine.hands[0].killed


def test_where_the_driver_lost_the_cluster_the_same_task_goes_to_the_same_worker_again(
    engine: FakeEngine, crew: Crew
) -> None:
    crew.submit(task(0))
    future = crew.submit(task(1))
    until(lambda: engine.hands[1].tasks)
    engine.silent = True
    for hand in engine.hands:
        hand.answers[0].set_exception(ConnectionError("cut"))
    until(lambda: not crew.running())
    old, engine.hands = engine.hands, [FakeHand("two"), FakeHand("one")]
    time.sleep(0.1)
    assert not future.done()
    engine.silent = False
    until(lambda: all(hand.tasks for hand in engine.hands))
    assert [hand.tasks[0].key for hand in engine.hands] == [task(1).key, task(0).key]
    assert not any(hand.killed for hand in old)
    engine.hands[0].answers[0].set_result(outcome(task(1)))
    assert reason(future) is None


def test_a_cluster_that_does_not_come_back_ends_the_run_in_the_end(engine: FakeEngine) -> None:
    crew = opened(engine, patience=0.2)
    future = crew.submit(task(0))
    engine.silent = True
    with pytest.raises(WorkersError, match=r"had no worker for .*: no answer") as raised:
        future.result(SOON)
    assert "resume" in str(raised.value.hint)
    with pytest.raises(WorkersError, match="no answer"):
        crew.submit(task(1)).result(SOON)
    crew.close(abandon=True)


def test_a_cluster_without_workers_is_told_when_it_is_opened() -> None:
    engine = FakeEngine()
    with pytest.raises(WorkersError, match="none joined"):
        opened(engine, patience=0.1)
    assert engine.closed is True


def test_workers_that_never_build_the_problem_are_told() -> None:
    with pytest.raises(WorkersError, match="1 of its workers have not built the problem"):
        opened(FakeEngine(FakeHand("slow", builds=False)), patience=0.1)


def test_a_worker_that_refuses_the_problem_is_an_error_at_once() -> None:
    bad = FakeHand("bad", builds=False)
    bad.built.set_result(Refused(ConfigError("another problem", hint="the same files")))
    engine = FakeEngine(bad)
    with pytest.raises(ConfigError, match="another problem"):
        opened(engine)
    assert engine.closed is True


def test_a_worker_that_joins_later_with_another_problem_is_not_used(
    engine: FakeEngine, crew: Crew, caplog: pytest.LogCaptureFixture
) -> None:
    bad = FakeHand("bad", builds=False)
    bad.built.set_result(Refused(WorkersError("holds another problem")))
    engine.hands.append(bad)
    until(lambda: "holds another problem" in caplog.text)
    assert crew.size == 2
    futures = [crew.submit(task(row)) for row in range(3)]
    until(lambda: all(hand.tasks for hand in engine.hands[:2]))
    time.sleep(0.1)
    assert bad.tasks == []
    assert not any(future.done() for future in futures)


def test_workers_that_die_as_they_build_end_the_run_instead_of_being_replaced_for_ever() -> None:
    class Dying(FakeEngine):
        def look(self) -> Sequence[Hand]:
            hand = FakeHand(f"number {len(self.hands)}", builds=False)
            hand.built.set_exception(RuntimeError("signal 9"))
            if all(each.killed for each in self.hands):
                self.hands.append(hand)
            return super().look()

    engine = Dying()
    with pytest.raises(WorkersError, match=r"3 workers in a row .* signal 9"):
        opened(engine)
    assert len(engine.hands) == 3


def test_an_error_of_the_set_up_ends_the_run(engine: FakeEngine, crew: Crew) -> None:
    futures = [crew.submit(task(row)) for row in range(3)]
    until(lambda: engine.hands[0].tasks)
    engine.hands[0].answers[0].set_result(Refused(ConfigError("does not fit")))
    for future in futures:
        with pytest.raises(ConfigError, match="does not fit"):
            future.result(SOON)


def test_closing_waits_for_what_is_at_work(engine: FakeEngine) -> None:
    crew = opened(engine)
    future = crew.submit(task(0))
    hand = engine.hands[0]
    until(lambda: hand.tasks)
    threading.Timer(0.1, lambda: hand.answers[0].set_result(outcome(task(0)))).start()
    crew.close()
    assert reason(future) is None
    assert engine.closed is False
    assert not any(hand.killed for hand in engine.hands)
    with pytest.raises(WorkersError, match="closed"):
        crew.submit(task(1)).result(SOON)


def test_abandoned_workers_end_what_they_do_at_once(engine: FakeEngine) -> None:
    crew = opened(engine)
    futures = [crew.submit(task(row)) for row in range(3)]
    until(lambda: engine.hands[1].tasks)
    crew.close(abandon=True)
    assert all(future.cancelled() for future in futures)
    assert all(hand.killed for hand in engine.hands)
    assert engine.closed is True


def test_the_size_follows_the_cluster(engine: FakeEngine, crew: Crew) -> None:
    assert crew.size == 2
    engine.hands.append(FakeHand("three"))
    until(lambda: crew.size == 3)
    engine.hands.clear()
    time.sleep(0.1)
    assert crew.size == 1  # never none: a run waits for one


def test_a_lost_row_has_the_metrics_that_were_asked_for() -> None:
    asked = Task("index", 0, 0, (0.5, 0.5), 0, metrics=("far from b",))
    lost = failed_outcome(asked, Bowls().metrics, "gone", worker="w", lost=True)
    assert [metric.name for metric in lost.observations.metrics] == ["far from b"]
    assert lost.observations.failures == ("gone",)
