from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from map_bo.errors import ConfigError, MissingDependencyError, WorkersError
from map_bo.workers import ray as module
from map_bo.workers.ray import Ray, reason_of
from map_bo.workers.workers import Workers, WorkerSettings
from tests.contracts.cluster_contract import ClusterContract
from tests.workers.perils import Perils, task


def test_without_ray_the_install_line_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match="Ray") as raised:
        Ray(2).open(Perils())
    assert raised.value.hint == 'pip install "map-bo[ray]"'


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"count": 0}, "count must be a whole number of at least 1, got 0"),
        ({"count": 2, "gpus_per_worker": -1}, "gpus_per_worker"),
        ({"count": 2, "gpus_per_worker": 1.5}, "must be a whole number or less than 1, got 1.5"),
        ({"count": 2, "cpus_per_worker": "x"}, "cpus_per_worker"),
        ({"count": 2, "patience": -1}, "patience"),
        ({"count": 2, "resources": {"A100": -1}}, "A100"),
    ],
)
def test_settings_are_checked(about: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Ray(**about)


@pytest.mark.parametrize("address", ["somewhere", "http://x:1", "ray://", "host:port"])
def test_an_address_is_checked(address: str) -> None:
    with pytest.raises(ConfigError, match="address"):
        module._require_cluster(address)


def test_an_address_where_nothing_listens_is_told_in_seconds() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begun = time.monotonic()
    with pytest.raises(WorkersError, match=f"no Ray cluster can be reached at 127.0.0.1:{port}"):
        module._require_cluster(f"127.0.0.1:{port}")
    assert time.monotonic() - begun < 10


class Nodes:
    """As much of Ray as tells what machines have."""

    def __init__(self, *machines: dict[str, float]) -> None:
        self._machines = machines

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": resources} for resources in self._machines]


def test_a_machine_that_can_hold_a_worker_is_needed() -> None:
    needs = Ray(4, gpus_per_worker=1, resources={"disk": 2}).needs
    assert needs == {"CPU": 1.0, "GPU": 1.0, "disk": 2.0}
    with pytest.raises(WorkersError, match=r"1 GPU and 2 disk, and no machine .* than 4 CPU and 0"):
        module._require_room(Nodes({"CPU": 4.0}, {"CPU": 2.0, "disk": 2.0}), needs)
    module._require_room(Nodes({"CPU": 4.0}, {"CPU": 2.0, "GPU": 1.0, "disk": 2.0}), needs)


class ActorDiedError(Exception):
    """Named as Ray's."""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("The actor died because its node has died. Node Id: 1", "its machine died"),
        ("The actor is dead because its worker process has died.", "its process died"),
        ("error raised in its creation task, x\nValueError: no", "ValueError: no"),
        ("killed due to memory pressure (OOM)", "ran out of memory"),
    ],
)
def test_what_became_of_an_actor_is_told_in_a_few_words(text: str, reason: str) -> None:
    found = reason_of(ActorDiedError(text))
    assert reason in found
    assert len(found) < 120


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[str]:
    """A cluster of two nodes on this machine, with one processor each; the driver's is a third."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    store = 80 * 2**20
    cluster: Any = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": store, "include_dashboard": False},
    )
    for _ in range(2):
        cluster.add_node(num_cpus=1, object_store_memory=store)
    yield cluster.address
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # Ray's own, as it comes and goes
class TestRay(ClusterContract):
    @pytest.fixture(scope="class")
    @classmethod
    def settings(cls, two_nodes: str) -> WorkerSettings:
        return Ray(2, address=two_nodes, cpus_per_worker=0.5, patience=90)

    @pytest.fixture(scope="class")
    @classmethod
    def elsewhere(cls, two_nodes: str) -> Callable[[str], WorkerSettings]:
        return lambda factory: Ray(2, address=two_nodes, cpus_per_worker=0.5, factory=factory)

    @pytest.fixture(scope="class")
    @classmethod
    def workers(cls, settings: WorkerSettings) -> Iterator[Workers]:
        held = settings.open(Perils())
        yield held
        held.close()

    def test_a_worker_without_a_machine_is_told(self, two_nodes: str, workers: Workers) -> None:
        with pytest.raises(WorkersError, match="needs 1 CPU and 1 GPU, and no machine"):
            Ray(2, address=two_nodes, gpus_per_worker=1).open(Perils())
        assert self.result(workers, "nothing").observations.failures == (None,)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")
def test_a_machine_that_dies_takes_its_row_along_and_one_that_joins_takes_its_place() -> None:
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    store = 80 * 2**20
    cluster: Any = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": store, "include_dashboard": False},
    )
    try:
        nodes = [cluster.add_node(num_cpus=1, object_store_memory=store) for _ in range(2)]
        workers = Ray(2, address=cluster.address, patience=120).open(Perils())
        try:
            until(lambda: workers.size == 2)
            future = [workers.submit(task("hang", row)) for row in range(2)]
            until(lambda: len(workers.running()) == 2)
            cluster.remove_node(nodes[0], allow_graceful=False)
            until(lambda: any(one.done() for one in future))
            lost = next(one for one in future if one.done()).result()
            assert lost.lost
            assert "machine" in (lost.observations.failures[0] or "")
            assert workers.size == 1
            cluster.add_node(num_cpus=1, object_store_memory=store)
            found = workers.submit(task("nothing", 2)).result(120)
            assert found.observations.failures == (None,)
            assert workers.size == 2
        finally:
            workers.close(abandon=True)
    finally:
        cluster.shutdown()


def until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
