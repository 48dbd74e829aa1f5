"""What all workers keep to. Subclass, and give a fixture of workers over `Troubled`."""

from __future__ import annotations

from concurrent.futures import wait

import pytest
import torch

from map_bo.errors import MergeError
from map_bo.rng import make_generator
from map_bo.workers.workers import Outcome, Task, Workers
from tests.workers.troubled import SIGN, Troubled, point


def task(
    row: int = 0,
    trouble: str = "none",
    *,
    second: float = SIGN,
    seed: int = 11,
    timeout: float | None = None,
    metrics: tuple[str, ...] | None = None,
) -> Task:
    return Task("index", row, 0, point(trouble, second), seed, metrics, timeout)


def result(workers: Workers, one: Task) -> Outcome:
    return workers.submit(one).result(timeout=60)


class WorkersContract:
    @pytest.fixture
    def workers(self) -> Workers:
        raise NotImplementedError

    def test_they_are_workers_and_there_is_one_at_least(self, workers: Workers) -> None:
        assert isinstance(workers, Workers)
        assert workers.size >= 1

    def test_outcomes_are_those_of_the_problem_to_the_last_bit(self, workers: Workers) -> None:
        outcome = result(workers, task(3, second=0.123))
        expected = Troubled().evaluate(
            task(second=0.123).point.unsqueeze(0), generator=make_generator(11)
        )
        assert outcome.key == task(3, second=0.123).key
        assert torch.equal(outcome.observations.Y, expected.Y)
        assert torch.equal(outcome.observations.X, expected.X)
        assert not outcome.lost

    def test_every_task_has_its_own_outcome_however_many_there_are(self, workers: Workers) -> None:
        tasks = [task(row, second=row / 20, seed=row) for row in range(3 * workers.size + 2)]
        futures = [workers.submit(one) for one in tasks]
        assert not wait(futures, timeout=60).not_done
        for one, future in zip(tasks, futures, strict=True):
            assert future.result().key == one.key
            assert future.result().observations.X[0].tolist() == list(one.x)
        assert list(workers.running()) == []

    def test_a_task_that_is_given_twice_has_the_same_outcome_twice(self, workers: Workers) -> None:
        first, second = (result(workers, task(5)) for _ in range(2))
        assert first.key == second.key
        assert torch.equal(first.observations.Y, second.observations.Y)

    def test_some_metrics_alone(self, workers: Workers) -> None:
        if workers.local:
            pytest.skip("the driver's own problem is asked for the metrics itself")
        row = result(workers, task(metrics=("noisy",))).observations
        assert [metric.name for metric in row.metrics] == ["noisy"]
        assert torch.equal(row.Y[:, 0], result(workers, task()).observations.Y[:, 1])

    def test_a_failure_is_an_outcome(self, workers: Workers) -> None:
        outcome = result(workers, task(1, "raise"))
        assert outcome.observations.failures == ("RuntimeError: no such layer",)
        assert not outcome.lost

    def test_what_makes_all_evaluations_fail_is_raised(self, workers: Workers) -> None:
        with pytest.raises(MergeError, match="does not fit"):
            result(workers, task(1, "set-up"))
        assert result(workers, task(2)).observations.failures == (None,)

    def test_a_time_limit_holds_and_the_next_task_is_evaluated(self, workers: Workers) -> None:
        outcome = result(workers, task(1, "sleep", timeout=0.3))
        assert outcome.observations.failures == ("it took longer than 0.3 s",)
        assert result(workers, task(2, timeout=5.0)).observations.failures == (None,)


class IsolationContract(WorkersContract):
    """What workers keep to that are processes of their own."""

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("trouble", "words"),
        [
            ("segfault", "SIGSEGV"),
            ("abort", "SIGABRT"),
            ("kill", "SIGKILL"),
            ("leave with 0", "exit code 0"),
            ("leave with 3", "exit code 3"),
        ],
    )
    def test_a_death_is_an_outcome_and_the_workers_are_whole_again(
        self, workers: Workers, trouble: str, words: str
    ) -> None:
        size = workers.size
        outcome = result(workers, task(1, trouble))
        assert outcome.lost
        assert words in (outcome.observations.failures[0] or "")
        tasks = [workers.submit(task(row)) for row in range(2 * size)]
        assert [future.result(timeout=60).observations.failures for future in tasks] == [
            (None,)
        ] * (2 * size)
        assert workers.size == size

    @pytest.mark.slow
    @pytest.mark.parametrize("trouble", ["hang with signals blocked", "swallow", "stop"])
    def test_a_time_limit_holds_by_the_worker_s_death(self, workers: Workers, trouble: str) -> None:
        outcome = result(workers, task(1, trouble, timeout=1.0))
        assert "it took longer than 1 s" in (outcome.observations.failures[0] or "")
        assert result(workers, task(2)).observations.failures == (None,)
