"""Workers on a Ray cluster: actors that hold the problem, spread over its machines.

A worker that dies is replaced by another one, on another machine where its own is gone. Weights do
not pass through Ray: each actor reads them from the paths of the problem.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit

from map_bo.errors import ConfigError, MissingDependencyError, WorkersError, first_line
from map_bo.problems.problem import Problem
from map_bo.values import real_number, whole_number
from map_bo.workers.clusters.crew import Answer, Crew, Hand, OutOfReachError
from map_bo.workers.clusters.serving import Order, build, evaluate, forget
from map_bo.workers.recipe import Recipe
from map_bo.workers.workers import Task, Workers

__all__ = ["Ray"]

_CONNECT = 5.0  # seconds in which the address has to answer
_HEALTH = 20.0  # seconds in which what answers has to be a Ray cluster
_STORE = 100 * 2**20  # bytes of the object store of a cluster of our own: messages are small
_START_HINT = (
    "start a cluster with `ray start --head` and `ray start --address=HOST:6379` on the other "
    "machines, and check it with `ray status`"
)


@dataclass(frozen=True)
class Ray:
    """Workers on a Ray cluster.

    Args:
        count: How many workers; those for which the cluster has no room yet start when it has.
        address: Of the cluster: ``"HOST:PORT"`` or ``"auto"`` for a driver on one of its machines,
            ``"ray://HOST:10001"`` for one elsewhere. ``None`` takes that of ``RAY_ADDRESS`` or of
            the cluster on this machine, and starts one for the run where there is none.
        gpus_per_worker: GPUs of one worker; a fraction lets several share one.
        cpus_per_worker: Processors of one worker, which are its threads too.
        resources: Further resources of one worker, such as ``{"accelerator_type:A100": 0.01}``.
        runtime_env: Ray's own; by default none, so machines need the same packages installed.
        factory: A function, or its name ``"package.module:qualname"``, that makes the problem in
            a worker; by default the driver's own problem is made again there.
        patience: Seconds to wait for a worker: for the first, and later when none is left.
        recipe: How workers build the problem, where that is known already.
    """

    count: int
    address: str | None = None
    gpus_per_worker: float = 0
    cpus_per_worker: float = 1
    resources: Mapping[str, float] | None = None
    runtime_env: Mapping[str, Any] | None = None
    factory: str | Callable[[], Problem] | None = None
    patience: float = 600.0
    recipe: Recipe | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        hint = "give a number of workers, such as map_bo.Ray(4)"
        put(self, "count", whole_number("count", self.count, least=1, hint=hint))
        for name in ("gpus_per_worker", "cpus_per_worker"):
            value = real_number(name, getattr(self, name), least=0, hint=f"{name}=1, or a fraction")
            if value > 1 and value != int(value):
                raise ConfigError(
                    f"{name} must be a whole number or less than 1, got {value:g}",
                    hint="several workers may share one, but no worker has one and a half",
                )
            put(self, name, value)
        put(self, "patience", real_number("patience", self.patience, least=0, hint="in seconds"))
        if self.resources is not None:
            hint = "give an amount per worker"
            amounts = {
                str(name): real_number(f"resources[{name!r}]", amount, least=0, hint=hint)
                for name, amount in self.resources.items()
            }
            put(self, "resources", amounts)

    @property
    def needs(self) -> dict[str, float]:
        """What one worker takes of a machine, in Ray's words."""
        needs = {"CPU": self.cpus_per_worker, "GPU": self.gpus_per_worker, **(self.resources or {})}
        return {name: float(amount) for name, amount in needs.items() if amount}

    def with_recipe(self, recipe: Recipe) -> Ray:
        """Return the settings with a recipe, unless they have one or a factory already."""
        if self.recipe is not None or self.factory is not None:
            return self
        return replace(self, recipe=recipe)

    def open(self, problem: Problem) -> Workers:
        """Connect to the cluster, and start an actor for each worker.

        Raises:
            ConfigError: When the problem cannot be built elsewhere.
            WorkersError: When the cluster is out of reach, has no machine for a worker, or when the
                workers hold another problem than the driver.
            MissingDependencyError: When Ray is not installed.
        """
        ray = _ray()
        threads = max(1, int(self.cpus_per_worker))
        device = "cuda:0" if self.gpus_per_worker else None  # Ray shows a worker no other
        order = Order.of(
            problem, recipe=self.recipe, factory=self.factory, device=device, threads=threads
        )
        mine = _connect(ray, self.address, self.count, self.needs)
        try:
            _require_room(ray, self.needs)
        except BaseException:
            if mine:
                ray.shutdown()
            raise
        engine = _Engine(ray, self, order, mine=mine)
        crew = Crew(
            engine,
            problem.metrics,
            what="Ray worker",
            patience=self.patience,
            grace=(1.0, 0.05),  # the worker keeps the limit itself, if the evaluator lets it
        )
        crew.start()
        return crew


class _Actor:
    """What Ray keeps in a process of its own."""

    def build(self, order: Order) -> Answer:
        return build(order)

    def evaluate(self, token: str, driver: str, task: Task) -> Answer:
        return evaluate(token, driver, task)

    def forget(self, token: str, driver: str) -> None:
        forget(token, driver)


class _Handle:
    """One actor."""

    def __init__(self, ray: Any, kind: Any, order: Order, number: int) -> None:
        self._ray, self._order = ray, order
        self.name = f"{number}"
        self.ended = False
        self._actor = kind.remote()

    def build(self) -> Future[Answer]:
        return self._future(self._actor.build.remote(self._order))

    def evaluate(self, task: Task) -> Future[Answer]:
        order = self._order
        return self._future(self._actor.evaluate.remote(order.token, order.driver, task))

    def kill(self) -> None:
        self.ended = True
        with suppress(Exception):  # it may be dead, or the cluster gone
            self._ray.kill(self._actor, no_restart=True)

    @staticmethod
    def _future(reference: Any) -> Future[Answer]:
        found: Future[Answer] = reference.future()
        return found


class _Engine:
    """Keeps as many actors as were asked for.

    They are replaced by new ones here instead of by Ray's own restarts: only an actor that has
    built the problem counts as a worker, and a time limit ends one just like a crash does.
    """

    def __init__(self, ray: Any, settings: Ray, order: Order, *, mine: bool) -> None:
        self._ray, self._order, self._count, self._mine = ray, order, settings.count, mine
        options: dict[str, Any] = {
            "num_cpus": settings.cpus_per_worker,
            "num_gpus": settings.gpus_per_worker,
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": 1,
            "scheduling_strategy": "SPREAD",
        }
        if settings.resources:
            options["resources"] = dict(settings.resources)
        if settings.runtime_env:
            options["runtime_env"] = dict(settings.runtime_env)
        self._kind = ray.remote(**options)(_Actor)
        self._handles: list[_Handle] = []
        self._made = 0

    def look(self) -> Sequence[Hand]:
        if not self._ray.is_initialized():
            raise OutOfReachError("Ray has been shut down in this process")
        self._handles = [handle for handle in self._handles if not handle.ended]
        while len(self._handles) < self._count:
            self._made += 1
            self._handles.append(_Handle(self._ray, self._kind, self._order, self._made))
        return self._handles

    def blame(self, error: BaseException) -> str | None:
        return reason_of(error)

    def close(self, *, abandon: bool) -> None:
        for handle in self._handles:
            handle.kill()
        if self._mine and self._ray.is_initialized():
            self._ray.shutdown()


def reason_of(error: BaseException) -> str:
    """Say in a few words why Ray has lost an actor."""
    text = str(error)
    kind = type(error).__name__
    if kind == "OutOfMemoryError" or "memory threshold" in text or "memory pressure" in text:
        return "Ray ended it, because its machine ran out of memory"
    if "node has died" in text or "node died" in text or "NodeDied" in kind:
        return "its machine died or went out of reach"
    if "ActorUnavailable" in kind:
        return "its machine cannot be reached"
    if "creation task" in text:
        return f"it could not be started: {text.strip().splitlines()[-1].strip()}"
    if "worker process has died" in text or "ActorDied" in kind:
        return "its process died (a crash in native code, out of memory, or killed)"
    return f"{kind}: {first_line(error)}"


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # as Ray itself is going to
    try:
        return import_module("ray")
    except ImportError as error:
        raise MissingDependencyError(
            "workers on a Ray cluster need Ray, which is not installed",
            hint='pip install "map-bo[ray]"',
        ) from error


def _connect(ray: Any, address: str | None, count: int, needs: Mapping[str, float]) -> bool:
    """Connect this process to a cluster; return whether it is to disconnect at the end.

    Raises:
        WorkersError: When the cluster is out of reach.
    """
    if ray.is_initialized():
        return False  # the user's own connection
    quiet = {
        "logging_level": logging.ERROR,
        "configure_logging": False,
        "log_to_driver": False,
        "namespace": "map_bo",
    }
    given = address or os.environ.get("RAY_ADDRESS")
    if given and given not in ("auto", "local"):
        _require_cluster(given)
    try:
        if given != "local":
            try:
                ray.init(address=given or "auto", **quiet)
                return True
            except ConnectionError:
                if given:
                    raise
        ray.init(
            address="local",
            num_cpus=max(1, math.ceil(count * needs.get("CPU", 0))),
            object_store_memory=_STORE,
            include_dashboard=False,
            **quiet,
        )
    except WorkersError:
        raise
    except (Exception, SystemExit) as error:  # Ray leaves with SystemExit where it gives up
        raise WorkersError(
            f"the Ray cluster at {given or 'this machine'} cannot be used: {first_line(error)}",
            hint=_START_HINT,
        ) from error
    return True


def _require_cluster(address: str) -> None:
    """Refuse an address where no Ray cluster answers, which Ray itself would try for minutes.

    Raises:
        WorkersError: When none answers in seconds.
        ConfigError: When it is not an address.
    """
    client = address.startswith("ray://")
    try:
        parts = urlsplit(address if client else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if "://" in address and not client:
        host = None
    if not host or (port is None and not client):
        raise ConfigError(
            f"address must be HOST:PORT, ray://HOST:PORT or auto, got {address!r}",
            hint='such as address="10.0.0.1:6379"',
        )
    port = port or 10001
    try:
        with closing(socket.create_connection((host, port), timeout=_CONNECT)):
            pass
    except OSError as error:
        raise WorkersError(
            f"no Ray cluster can be reached at {address}: {first_line(error)}", hint=_START_HINT
        ) from error
    if client:
        return  # Ray's client gives up by itself, in half a minute
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check"]
    command += ["--address", f"{host}:{port}"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_HEALTH, check=False)
    except subprocess.TimeoutExpired as error:
        code, said = 1, error.stderr or b""
    else:
        code, said = done.returncode, done.stderr
    if code and b"AuthenticationError" in said:
        raise WorkersError(
            f"the Ray cluster at {address} asks for a token that this process does not have",
            hint="set RAY_AUTH_MODE=token, and copy the token of the machine that started the "
            "cluster (~/.ray/auth_token) to RAY_AUTH_TOKEN or to the same file here",
        )
    if code:
        raise WorkersError(
            f"what answers at {address} is not a Ray cluster that this version of Ray can use",
            hint=f"{_START_HINT}; all machines need the same versions of Python and Ray",
        )


def _require_room(ray: Any, needs: Mapping[str, float]) -> None:
    """Refuse a cluster of which no machine can hold a worker.

    Raises:
        WorkersError: When there is none.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for resources in machines:
        if all(resources.get(name, 0.0) >= amount for name, amount in needs.items()):
            return
    wanted = " and ".join(f"{amount:g} {name}" for name, amount in needs.items())
    has = {name: max((r.get(name, 0.0) for r in machines), default=0.0) for name in needs}
    offered = " and ".join(f"{amount:g} {name}" for name, amount in has.items())
    raise WorkersError(
        f"each worker needs {wanted}, and no machine of the Ray cluster has more than {offered}",
        hint="start a node that has it (`ray start --address=... --num-gpus=1`), or ask for less: "
        "map_bo.Ray(4, gpus_per_worker=0.5)",
    )
