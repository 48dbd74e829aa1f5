from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import pytest

from map_bo.errors import ConfigError, WorkersError
from map_bo.workers.pool import Pool
from map_bo.workers.reading import read_workers
from map_bo.workers.workers import Workers, WorkerSettings
from tests.contracts.cluster_contract import SOON, ClusterContract
from tests.workers.perils import Perils, task


class Threads(Executor):
    """An executor of one's own, whose workers turn out to be threads of the driver."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(1)

    def submit(self, *args: Any, **more: Any) -> Future[Any]:
        return self._threads.submit(*args, **more)

    def shutdown(self, *args: Any, **more: Any) -> None:
        self._threads.shutdown()


def spawned(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def test_threads_are_refused_with_the_fix() -> None:
    with (
        ThreadPoolExecutor(2) as threads,
        pytest.raises(ConfigError, match="ThreadPoolExecutor cannot evaluate") as raised,
    ):
        Pool(threads)
    assert "map_bo.Processes" in str(raised.value.hint)


def test_threads_in_disguise_are_refused_too() -> None:
    with Threads() as threads, pytest.raises(WorkersError, match="threads of the driver's own"):
        Pool(threads, 1).open(Perils())


def test_an_executor_tells_how_many_workers_it_has_or_the_user_does() -> None:
    with spawned(3) as processes:  # none is started before something is submitted
        assert Pool(processes).count == 3
        assert Pool(processes, 2).count == 2
        read = read_workers(processes)
        assert read is not None
        assert read.count == 3
    with Threads() as threads:
        with pytest.raises(ConfigError, match="Threads does not tell how many"):
            Pool(threads)
        with pytest.raises(ConfigError, match="count"):
            Pool(threads, 0)


def test_something_else_is_refused() -> None:
    with pytest.raises(ConfigError, match="takes an executor"):
        Pool(4)  # type: ignore[arg-type]


def test_an_executor_that_was_shut_down_is_told() -> None:
    processes = spawned(1)
    processes.shutdown()
    with pytest.raises(WorkersError, match="cannot schedule new futures after shutdown"):
        Pool(processes).open(Perils())


@pytest.mark.slow
def test_forks_are_refused() -> None:
    forks = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork"))
    with forks, pytest.raises(WorkersError, match="forks of the driver") as raised:
        Pool(forks).open(Perils())
    assert "spawn" in str(raised.value.hint)


@pytest.mark.slow
@pytest.mark.timeout(600)
class TestPool(ClusterContract):
    survives = False

    @pytest.fixture(scope="class")
    @classmethod
    def executor(cls) -> Iterator[ProcessPoolExecutor]:
        with spawned(2) as processes:
            yield processes

    @pytest.fixture(scope="class")
    @classmethod
    def settings(cls, executor: ProcessPoolExecutor) -> WorkerSettings:
        return Pool(executor)

    @pytest.fixture(scope="class")
    @classmethod
    def elsewhere(cls, executor: ProcessPoolExecutor) -> Callable[[str], WorkerSettings]:
        return lambda factory: Pool(executor, factory=factory)

    @pytest.fixture(scope="class")
    @classmethod
    def workers(cls, settings: WorkerSettings) -> Iterator[Workers]:
        held = settings.open(Perils())
        yield held
        held.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_process_that_dies_breaks_the_executor_and_the_message_says_what_was_lost() -> None:
    with spawned(2) as processes:
        workers = Pool(processes).open(Perils())
        other = workers.submit(task("slow", 4))
        future = workers.submit(task("segfault", 2))
        with pytest.raises(WorkersError, match="executor is broken") as raised:
            future.result(SOON)
        assert "evaluation 3" in raised.value.message
        assert "resume" in str(raised.value.hint)
        with pytest.raises(WorkersError, match="executor is broken"):
            other.result(SOON)
        workers.close(abandon=True)
