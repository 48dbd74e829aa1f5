"""What workers of a cluster have to do, whatever the cluster is; slow, because they are real."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from map_bo.data import Observations
from map_bo.errors import ConfigError, WorkersError
from map_bo.loop.optimize import optimize
from map_bo.workers.inline import InlineWorkers
from map_bo.workers.workers import Outcome, Workers, WorkerSettings
from tests.workers.perils import Perils, task

SOON = 120.0  # a new worker imports torch, on a busy machine


class ClusterContract:
    """Tests of two workers; the fixtures `settings` and `workers` are the implementation's.

    Attributes:
        survives: Whether workers that die or hang are replaced.
    """

    survives = True

    def result(self, workers: Workers, *about: object, **more: object) -> Outcome:
        return workers.submit(task(*about, **more)).result(SOON)  # type: ignore[arg-type]

    def whole_again(self, workers: Workers, size: int = 2) -> None:
        end = time.monotonic() + SOON
        while workers.size < size:
            assert time.monotonic() < end
            time.sleep(0.1)

    def test_an_outcome_is_what_it_is_inline(self, workers: Workers) -> None:
        here = InlineWorkers(Perils())
        for row in range(4):
            there = self.result(workers, "nothing", row, c=row / 4)
            mine = here.submit(task("nothing", row, c=row / 4)).result()
            assert there.key == mine.key
            assert torch.equal(there.observations.Y, mine.observations.Y)
            assert there.worker
            assert not there.lost

    def test_only_the_metrics_that_are_asked_for_come_back(self, workers: Workers) -> None:
        found = self.result(workers, "nothing", metrics=("two",)).observations
        assert [metric.name for metric in found.metrics] == ["two"]

    def test_two_tasks_are_evaluated_at_a_time(self, workers: Workers) -> None:
        self.whole_again(workers)
        futures = [workers.submit(task("slow", row)) for row in range(3)]
        end = time.monotonic() + SOON
        while len(workers.running()) < 2:
            assert time.monotonic() < end
            time.sleep(0.05)
        names = [name for name, _, _ in workers.running()]
        assert len(set(names)) == 2
        found = [future.result(SOON) for future in futures]
        assert {outcome.worker for outcome in found} == set(names)

    @pytest.mark.parametrize(
        ("way", "reason"),
        [("raise", "ValueError: no such answer"), ("exhaust", "MemoryError: no room")],
    )
    def test_what_an_evaluator_raises_is_a_failed_row(
        self, workers: Workers, way: str, reason: str
    ) -> None:
        found = self.result(workers, way)
        assert found.observations.failures == (reason,)
        assert not found.lost

    @pytest.mark.parametrize("way", ["segfault", "exit", "abort"])
    def test_a_worker_that_dies_is_replaced(self, workers: Workers, way: str) -> None:
        if not self.survives:
            pytest.skip("its workers are not replaced")
        self.whole_again(workers)
        futures = [workers.submit(task(way)), workers.submit(task("slow", 1))]
        lost, other = [future.result(SOON) for future in futures]
        assert lost.lost
        assert lost.worker
        assert lost.observations.failures[0] is not None
        assert other.observations.failures == (None,)
        self.whole_again(workers)
        assert self.result(workers, "nothing", 2).observations.failures == (None,)

    @pytest.mark.parametrize("way", ["hang", "swallow", "stop", "deaf"])
    def test_a_time_limit_holds_whatever_the_evaluator_does(
        self, workers: Workers, way: str
    ) -> None:
        if not self.survives and way != "hang":
            pytest.skip("it cannot end its workers")
        self.whole_again(workers)
        begun = time.monotonic()
        found = self.result(workers, way, timeout=2.0)
        assert found.observations.failures == ("it took longer than 2 s",)
        assert not found.lost
        assert time.monotonic() - begun < 20
        self.whole_again(workers)
        assert self.result(workers, "nothing", 3).observations.failures == (None,)

    def test_workers_that_are_abandoned_end_at_once(self, settings: WorkerSettings) -> None:
        if not self.survives:
            pytest.skip("it cannot end its workers")
        workers = settings.open(Perils())
        future = workers.submit(task("hang"))
        end = time.monotonic() + SOON
        while not workers.running():
            assert time.monotonic() < end
            time.sleep(0.05)
        begun = time.monotonic()
        workers.close(abandon=True)
        assert time.monotonic() - begun < 40
        assert future.cancelled()

    def test_a_run_of_batches_is_the_run_without_workers(self, settings: WorkerSettings) -> None:
        def run(**more: Any) -> Observations:
            how: dict[str, Any] = {"retries": 0, "verify": 2, "batch": 2, **more}
            return optimize(Safe(), 10, seed=3, progress=False, tracking="none", **how).seen

        there, here = run(workers=settings, asynchronous=False), run()
        assert torch.equal(there.X, here.X)
        assert torch.equal(there.Y, here.Y)

    def test_another_problem_than_the_drivers_is_refused(
        self, elsewhere: Callable[[str], WorkerSettings]
    ) -> None:
        settings = elsewhere("tests.contracts.cluster_contract:another")
        with pytest.raises(WorkersError, match="noise"):
            settings.open(Perils())

    def test_a_problem_that_cannot_be_built_is_told_at_once(self, settings: WorkerSettings) -> None:
        with pytest.raises(WorkersError, match="no such weights"):
            settings.open(Perils(unbuildable=True))

    def test_a_problem_that_cannot_travel_is_told_before_anything_starts(
        self, settings: WorkerSettings
    ) -> None:
        class Local(Perils):
            pass

        with pytest.raises(ConfigError, match="Local"):
            settings.open(Local())


def another() -> Perils:
    return Perils(noise=0.2)


@dataclasses.dataclass(frozen=True)
class Safe(Perils):
    """The same, in which nothing ever happens to the worker."""

    def evaluate(self, X: torch.Tensor, *, generator: torch.Generator) -> Observations:
        Z = X.clone()
        Z[:, 0] = 0.0
        return dataclasses.replace(super().evaluate(Z, generator=generator), X=X)
