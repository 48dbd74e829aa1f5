from __future__ import annotations

import pytest
from torch import Generator, Tensor

from map_bo.data import Observations
from map_bo.errors import MergeError
from map_bo.workers.inline import InlineWorkers
from map_bo.workers.workers import Task, Workers
from tests.contracts.workers_contract import WorkersContract
from tests.loop.bowls import Bowls
from tests.workers.troubled import Troubled


def test_it_evaluates_when_it_is_given_a_task() -> None:
    problem = Bowls(noise=0.5)
    workers: Workers = InlineWorkers(problem)
    task = Task("index", 0, 0, (1.0, 0.0), 11)
    future = workers.submit(task)
    assert future.done()
    again = workers.submit(task).result()
    assert future.result().observations.Y.tolist() == again.observations.Y.tolist()
    assert problem.calls == [[1.0, 0.0], [1.0, 0.0]]


def test_a_failure_is_an_outcome_and_an_error_of_the_set_up_is_not() -> None:
    class Broken(Bowls):
        def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
            if float(X[0, 0]) == 1.0:
                raise RuntimeError("no such layer")
            raise MergeError("the checkpoint does not fit")

    workers = InlineWorkers(Broken())
    row = workers.submit(Task("index", 0, 0, (1.0, 0.0), 1)).result().observations
    assert row.failures == ("RuntimeError: no such layer",)
    with pytest.raises(MergeError, match="does not fit"):
        workers.submit(Task("index", 1, 0, (0.0, 0.0), 1))


class TestInline(WorkersContract):
    @pytest.fixture
    def workers(self) -> Workers:
        return InlineWorkers(Troubled())
