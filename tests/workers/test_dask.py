from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from map_bo.errors import ConfigError, MissingDependencyError, WorkersError
from map_bo.workers import dask as module
from map_bo.workers.dask import Dask
from map_bo.workers.workers import Workers, WorkerSettings
from tests.contracts.cluster_contract import SOON, ClusterContract
from tests.workers.perils import Perils, task


def test_without_distributed_the_install_line_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(MissingDependencyError, match="distributed") as raised:
        Dask("tcp://127.0.0.1:8786").open(Perils())
    assert raised.value.hint == 'pip install "map-bo[dask]"'


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({}, "its address or by its scheduler file, got neither"),
        ({"address": "x", "scheduler_file": "y"}, "got both"),
        ({"address": 3}, "address must be a text, got int"),
        ({"address": "x", "count": 0}, "count"),
        ({"address": "x", "threads": 0}, "threads"),
        ({"address": "x", "patience": -1}, "patience"),
        ({"address": "x", "resources": {"GPU": -1}}, "GPU"),
    ],
)
def test_settings_are_checked(about: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Dask(**about)


def test_a_scheduler_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(WorkersError, match="there is no scheduler file"):
        Dask(scheduler_file=str(tmp_path / "none.json")).where()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextmanager
def running(*words: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "dask", *words], stdout=file, stderr=file, cwd=log.parent
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def cluster(folder: Path, workers: int, *words: str) -> Iterator[str]:
    """Start a scheduler and workers as a user does, each in a process of its own."""
    address = f"tcp://127.0.0.1:{free_port()}"
    with ExitStack() as stack:
        port = address.rpartition(":")[2]
        scheduler = ("scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard")
        file = folder / "scheduler.json"
        start = stack.enter_context
        start(running(*scheduler, "--scheduler-file", str(file), log=folder / "scheduler.log"))
        until(file.exists)
        for number in range(workers):
            start(another(address, folder, number, *words))
        yield address


def another(address: str, folder: Path, number: int, *words: str) -> Any:
    common = ("--no-dashboard", "--nthreads", "1", "--memory-limit", "0", "--name", f"w{number}")
    return running("worker", address, *common, *words, log=folder / f"worker-{number}.log")


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("distributed")
    with cluster(tmp_path_factory.mktemp("dask"), 2, "--resources", "GPU=1") as address:
        yield address


def until(what: Callable[[], object]) -> None:
    end = time.monotonic() + SOON
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


@pytest.mark.timeout(60)
def test_an_address_where_nothing_listens_is_told_in_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr(module, "_CONNECT", 1.0)
    address = f"tcp://127.0.0.1:{free_port()}"
    begun = time.monotonic()
    with pytest.raises(WorkersError, match=f"no Dask scheduler can be reached at {address}"):
        Dask(address).open(Perils())
    assert time.monotonic() - begun < 30


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # Dask's own, as it comes and goes
class TestDask(ClusterContract):
    @pytest.fixture(scope="class")
    @classmethod
    def settings(cls, two_workers: str) -> WorkerSettings:
        return Dask(two_workers, patience=90)

    @pytest.fixture(scope="class")
    @classmethod
    def elsewhere(cls, two_workers: str) -> Callable[[str], WorkerSettings]:
        return lambda factory: Dask(two_workers, factory=factory)

    @pytest.fixture(scope="class")
    @classmethod
    def workers(cls, settings: WorkerSettings) -> Iterator[Workers]:
        held = settings.open(Perils())
        yield held
        held.close()

    def test_only_workers_with_the_resources_are_used(self, two_workers: str) -> None:
        with pytest.raises(WorkersError, match="none joined"):
            Dask(two_workers, resources={"GPU": 2}, patience=1).open(Perils())
        held = Dask(two_workers, resources={"GPU": 1}, count=1).open(Perils())
        assert held.size == 1
        assert self.result(held, "nothing").observations.failures == (None,)
        held.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")
def test_a_worker_that_joins_evaluates_too_and_one_that_is_gone_loses_its_row(
    tmp_path: Path,
) -> None:
    pytest.importorskip("distributed")
    with cluster(tmp_path, 1, "--no-nanny") as address:
        workers = Dask(address, patience=90).open(Perils())
        with another(address, tmp_path, 7, "--no-nanny"):
            until(lambda: workers.size == 2)
            futures = [workers.submit(task("hang", row)) for row in range(2)]
            until(lambda: len(workers.running()) == 2)
        until(lambda: any(future.done() for future in futures))  # the second has been ended
        assert sum(future.done() for future in futures) == 1
        assert workers.size == 1
        workers.close(abandon=True)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")
def test_a_scheduler_that_is_started_again_goes_on_with_the_same_run(tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    port = str(free_port())
    address = f"tcp://127.0.0.1:{port}"
    words = ("scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard")
    with ExitStack() as stack:
        with running(*words, log=tmp_path / "scheduler.log") as scheduler:
            stack.enter_context(another(address, tmp_path, 0))
            workers = Dask(address, patience=120).open(Perils())
            assert workers.submit(task()).result(SOON).observations.failures == (None,)
            future = workers.submit(task("slow", 1))
            until(workers.running)
            scheduler.kill()
        stack.enter_context(running(*words, log=tmp_path / "again.log"))
        stack.enter_context(another(address, tmp_path, 1))
        assert future.result(SOON).observations.failures == (None,)
        workers.close()
