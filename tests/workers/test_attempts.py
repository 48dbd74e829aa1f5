from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from map_bo.data import Observations
from map_bo.problems.problem import Problem
from map_bo.rng import child, make_generator
from map_bo.workers.attempts import Attempts
from map_bo.workers.flights import Flights
from map_bo.workers.inline import InlineWorkers
from tests.loop.bowls import Bowls
from tests.workers.test_flights import ByHand, outcome, task

X = torch.tensor([0.25, 0.5], dtype=torch.float64)


def attempts(problem: Problem, flights: Flights, retries: int = 1) -> tuple[Attempts, list[Any]]:
    events: list[Any] = []

    def record(kind: str, data: Mapping[str, Any]) -> None:
        events.append((kind, dict(data)))

    generator = make_generator(3)
    return (
        Attempts(
            problem, flights, generator=generator, record=record, retries=retries, timeout=None
        ),
        events,
    )


class Seeds(Bowls):
    """Measures the seed that it is given."""

    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        Y = torch.tensor([[generator.initial_seed(), 1.0]], dtype=torch.float64)
        return Observations(X, Y, self.metrics)


def test_an_attempt_has_the_run_s_child_generator() -> None:
    mine, _ = attempts(Seeds(), Flights(InlineWorkers(Seeds())))
    mine.begin("index", 4, X, attempt=1, deaths=0)
    [ended] = mine.ended()
    assert ended.outcome.Y[0, 0] == child(make_generator(3), "evaluate", 4, 1).initial_seed()


def test_it_is_recorded_before_it_begins() -> None:
    class Stopped(Bowls):
        def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
            raise KeyboardInterrupt

    mine, events = attempts(Stopped(), Flights(InlineWorkers(Stopped())))
    with pytest.raises(KeyboardInterrupt):
        mine.begin("verify", 2, X, attempt=0, deaths=0)
    assert events == [("started", {"verify": 2, "attempt": 0}), ("interrupted", {"verify": 2})]


def test_a_point_that_takes_the_process_along_is_given_up() -> None:
    problem = Bowls()
    mine, events = attempts(problem, Flights(InlineWorkers(problem)))
    mine.begin("index", 0, X, attempt=0, deaths=2)
    [ended] = mine.ended()
    assert ended.given_up
    assert ended.outcome.failures == ("the process ended during this evaluation 2 times",)
    assert problem.calls == []
    assert events == []


def test_what_was_ended_at_once_takes_a_place_until_it_is_seen() -> None:
    mine, _ = attempts(Bowls(), Flights(ByHand(2)))
    mine.begin("index", 0, X, attempt=0, deaths=9)
    assert mine.free == 1
    assert mine.in_flight("index") == {0}
    mine.begin("index", 1, X, attempt=0, deaths=0)
    assert mine.free == 0
    assert mine.in_flight("index") == {0, 1}
    assert mine.in_flight("verify") == set()


def test_what_is_in_flight_is_recorded_as_interrupted_when_the_run_ends() -> None:
    workers = ByHand(2)
    mine, events = attempts(Bowls(), Flights(workers))
    mine.begin("index", 0, X, attempt=0, deaths=0)
    mine.begin("index", 1, X, attempt=0, deaths=0)
    mine.interrupt()
    assert events[2:] == [("interrupted", {"index": 0}), ("interrupted", {"index": 1})]


class Doubled:
    """A node: its points are half those of the problem that workers hold."""

    def __init__(self, known: bool) -> None:
        self.whole, self.known = Bowls(), known
        self.space, self.metrics = self.whole.space, self.whole.metrics

    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        raise AssertionError("the driver does not evaluate")

    def request(self, x: Tensor) -> tuple[Tensor, tuple[str, ...]]:
        return 2 * x, () if self.known else ("near a",)

    def receive(self, x: Tensor, seen: Observations | None) -> Observations:
        value = 7.0 if seen is None else float(seen.Y[0, 0])
        return Observations(x.unsqueeze(0), torch.tensor([[value, 0.5]]), self.metrics)


def test_rows_of_a_node_travel_as_rows_of_the_whole_problem() -> None:
    workers = ByHand(1)
    mine, _ = attempts(Doubled(known=False), Flights(workers))
    mine.begin("index", 0, X, attempt=0, deaths=0)
    assert workers.tasks[0].x == (0.5, 1.0)
    assert workers.tasks[0].metrics == ("near a",)
    done = outcome(task(0))
    workers.futures[0].set_result(type(done)(workers.tasks[0].key, done.observations))
    [ended] = mine.ended()
    assert ended.outcome.X.tolist() == [[0.25, 0.5]]
    assert ended.outcome.Y.tolist() == [[0.0, 0.5]]


def test_a_row_of_a_node_that_is_known_travels_nowhere() -> None:
    workers = ByHand(1)
    mine, events = attempts(Doubled(known=True), Flights(workers))
    mine.begin("index", 0, X, attempt=0, deaths=0)
    assert workers.futures == []
    [ended] = mine.ended()
    assert ended.outcome.Y.tolist() == [[7.0, 0.5]]
    assert events == []
