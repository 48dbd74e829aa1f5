from __future__ import annotations

from concurrent.futures import Future

import pytest
import torch

from map_bo.data import Observations
from map_bo.errors import WorkersError
from map_bo.workers.flights import Flights
from map_bo.workers.inline import InlineWorkers
from map_bo.workers.workers import Outcome, Task
from tests.loop.bowls import Bowls


class ByHand:
    """Workers whose futures a test resolves."""

    local = False

    def __init__(self, size: int) -> None:
        self.size = size
        self.tasks: list[Task] = []
        self.futures: list[Future[Outcome]] = []

    def submit(self, task: Task) -> Future[Outcome]:
        self.tasks.append(task)
        self.futures.append(Future())
        return self.futures[-1]

    def running(self) -> list[tuple[str, Task, float]]:
        return []

    def close(self, *, abandon: bool = False) -> None: ...


def task(row: int) -> Task:
    return Task("index", row, 0, (0.0, 0.0), row)


def outcome(of: Task, seconds: float = 1.0) -> Outcome:
    X = of.point.unsqueeze(0)
    return Outcome(
        of.key,
        Observations(X, torch.tensor([[0.0, 1.0]]), Bowls().metrics, cost=torch.tensor([seconds])),
    )


def test_tasks_land_in_the_order_in_which_they_end_and_at_their_owner() -> None:
    workers = ByHand(3)
    flights, one, other = Flights(workers), object(), object()
    for row, owner in enumerate([one, other, one]):
        flights.launch(owner, task(row))
    assert flights.free == 0
    assert not flights.wait(0.0)
    for row in (2, 1, 0):
        workers.futures[row].set_result(outcome(task(row)))
    assert flights.free == 0  # until they were looked at
    assert flights.wait(0.0)
    assert [settled.task.row for settled in flights.landed(one)] == [2, 0]
    assert [settled.task.row for settled in flights.landed(other)] == [1]
    assert flights.landed(one) == []
    assert flights.free == 3


def test_waiting_ends_where_something_landed_that_nobody_has_asked_for() -> None:
    workers = ByHand(2)
    flights, one, other = Flights(workers), object(), object()
    flights.launch(one, task(0))
    flights.launch(other, task(1))
    workers.futures[1].set_result(outcome(task(1)))
    assert flights.landed(one) == []
    assert flights.wait(0.0)


@pytest.mark.parametrize(
    ("proposing", "ahead"), [(0.0, 0), (0.01, 0), (0.5, 1), (2.0, 4), (100.0, 4)]
)
def test_tasks_wait_at_the_workers_only_where_proposals_take_long(
    proposing: float, ahead: int
) -> None:
    workers = ByHand(4)
    flights = Flights(workers)
    flights.launch(self := object(), task(0))
    workers.futures[0].set_result(outcome(task(0), seconds=2.0))
    flights.landed(self)
    flights.look_ahead(proposing)
    assert flights.free == 4 + ahead


def test_the_outcome_of_another_task_is_refused() -> None:
    workers = ByHand(1)
    flights = Flights(workers)
    flights.launch(self := object(), task(0))
    workers.futures[0].set_result(outcome(task(5)))
    with pytest.raises(WorkersError, match="another task for evaluation 1"):
        flights.landed(self)


def test_what_workers_cancel_is_told() -> None:
    workers = ByHand(1)
    flights = Flights(workers)
    flights.launch(self := object(), task(0))
    workers.futures[0].cancel()
    workers.futures[0].set_running_or_notify_cancel()
    with pytest.raises(WorkersError, match="was cancelled"):
        flights.landed(self)


def test_utilisation_is_a_share() -> None:
    workers = ByHand(2)
    flights = Flights(workers)
    assert flights.utilisation == 0.0
    flights.launch(self := object(), task(0))
    workers.futures[0].set_result(outcome(task(0), seconds=1e6))
    flights.landed(self)
    assert flights.utilisation == 1.0
    assert flights.measured == 1


def test_what_a_summary_says_of_workers_and_nothing_of_the_drivers_process() -> None:
    workers = ByHand(2)
    flights = Flights(workers)
    flights.launch(flights, task(0))
    workers.futures[0].set_result(outcome(task(0), 1e6))
    flights.landed(flights)
    assert flights.describe() == {"workers": {"count": 2, "evaluations": 1, "utilisation": 1.0}}
    assert Flights(InlineWorkers(Bowls())).describe() == {}
