"""Workers on a Dask cluster: its worker processes hold the problem, each evaluating one row a time.

Dask is told which worker gets which task, never to repeat one, and nothing of the problem passes
through its scheduler but how it is built. A worker that hangs is restarted by its nanny.
"""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from map_bo.errors import ConfigError, MissingDependencyError, WorkersError, first_line
from map_bo.problems.problem import Problem
from map_bo.values import real_number, whole_number
from map_bo.workers.clusters.crew import Answer, Crew, Hand, OutOfReachError
from map_bo.workers.clusters.serving import Order, build, evaluate, forget
from map_bo.workers.recipe import Recipe
from map_bo.workers.workers import Task, Workers

__all__ = ["Dask"]

logger = logging.getLogger(__name__)

_CONNECT = 5.0  # seconds in which the scheduler has to answer
_ASK = 10.0  # seconds in which it has to say which workers there are
_FETCH = 60.0  # seconds in which a row that was evaluated has to arrive
_RESTART = 30.0  # seconds that a nanny has to end a worker and start another
_CLOSE = 15.0  # seconds that the end of a run waits for all that
_START_HINT = (
    "start a cluster with `dask scheduler` and, on each machine, `dask worker tcp://HOST:8786 "
    "--nthreads 1 --memory-limit 0`, or by dask-jobqueue"
)


@dataclass(frozen=True)
class Dask:
    """Workers on a Dask cluster.

    Args:
        address: Of the scheduler, such as ``"tcp://10.0.0.1:8786"``; of a cluster object, its
            ``scheduler_address``.
        scheduler_file: The file in which the scheduler wrote its address; one of the two is given.
        count: At most so many of its workers are used; ``None`` uses all, also those that join.
        resources: What a task takes of its worker, such as ``{"GPU": 1}``; only workers that were
            started with as much (``--resources "GPU=1"``) are used.
        device: Where the problem lives in each worker, such as ``"cuda:0"``; ``None`` leaves it
            where the driver's lives.
        threads: Threads of torch in each worker; ``None`` leaves what Dask's nanny sets, which is
            one.
        factory: A function, or its name ``"package.module:qualname"``, that makes the problem in
            a worker; by default the driver's own problem is made again there.
        patience: Seconds to wait for a worker: for the first, and later when none is left or the
            scheduler does not answer.
        recipe: How workers build the problem, where that is known already.
    """

    address: str | None = None
    scheduler_file: str | None = None
    count: int | None = None
    resources: Mapping[str, float] | None = None
    device: str | None = None
    threads: int | None = None
    factory: str | Callable[[], Problem] | None = None
    patience: float = 600.0
    recipe: Recipe | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        if (self.address is None) == (self.scheduler_file is None):
            raise ConfigError(
                "a Dask cluster is found by its address or by its scheduler file, got "
                + ("neither" if self.address is None else "both"),
                hint='such as map_bo.Dask("tcp://10.0.0.1:8786") or '
                'map_bo.Dask(scheduler_file="scheduler.json")',
            )
        for name in ("address", "scheduler_file"):
            value = getattr(self, name)
            if isinstance(value, os.PathLike) and name == "scheduler_file":
                put(self, name, os.fspath(value))
            elif value is not None and not isinstance(value, str):
                raise ConfigError(
                    f"{name} must be a text, got {type(value).__name__}",
                    hint="of a cluster object, give its scheduler_address",
                )
        for name in ("count", "threads"):
            value = getattr(self, name)
            if value is not None:
                put(self, name, whole_number(name, value, least=1, hint=f"such as {name}=4"))
        put(self, "patience", real_number("patience", self.patience, least=0, hint="in seconds"))
        if self.resources is not None:
            hint = "give an amount per worker"
            amounts = {
                str(name): real_number(f"resources[{name!r}]", amount, least=0, hint=hint)
                for name, amount in self.resources.items()
            }
            put(self, "resources", amounts)

    def with_recipe(self, recipe: Recipe) -> Dask:
        """Return the settings with a recipe, unless they have one or a factory already."""
        if self.recipe is not None or self.factory is not None:
            return self
        return replace(self, recipe=recipe)

    def open(self, problem: Problem) -> Workers:
        """Connect to the scheduler, and have its workers build the problem.

        Raises:
            ConfigError: When the problem cannot be built elsewhere.
            WorkersError: When the cluster is out of reach, has no worker, or when the workers hold
                another problem than the driver.
            MissingDependencyError: When distributed is not installed.
        """
        distributed = _distributed()
        order = Order.of(
            problem,
            recipe=self.recipe,
            factory=self.factory,
            device=self.device,
            threads=self.threads,
        )
        engine = _Engine(distributed, self, order)
        crew = Crew(engine, problem.metrics, what="Dask worker", patience=self.patience)
        crew.start()
        return crew

    def where(self) -> str:
        """Return the address of the scheduler.

        Raises:
            WorkersError: When there is no scheduler file.
        """
        if self.address is not None:
            return self.address
        assert self.scheduler_file is not None
        path = Path(self.scheduler_file)
        if not path.is_file():
            raise WorkersError(
                f"there is no scheduler file {str(path)!r}",
                hint="start one with `dask scheduler --scheduler-file FILE` in a shared folder",
            )
        return self.scheduler_file


class _Handle:
    """One worker process that the scheduler knows."""

    def __init__(self, engine: _Engine, address: str, about: Mapping[str, Any]) -> None:
        self._engine, self.address = engine, address
        self.name = f"{about.get('name', '')} at {address}".strip()
        self.ended = False
        self.nanny = bool(about.get("nanny"))

    def build(self) -> Future[Answer]:
        return self._engine.send(self, build, self._engine.order)

    def evaluate(self, task: Task) -> Future[Answer]:
        order = self._engine.order
        return self._engine.send(self, evaluate, order.token, order.driver, task)

    def kill(self) -> None:
        self.ended = True
        self._engine.end(self)


class _Engine:
    """Finds the workers of a scheduler, and sends each what it is to do."""

    def __init__(self, distributed: Any, settings: Dask, order: Order) -> None:
        self._distributed, self._settings, self.order = distributed, settings, order
        self._handles: dict[str, _Handle] = {}
        self._restarts: list[threading.Thread] = []
        self._client = self._connect()

    def _connect(self) -> Any:
        """Return a client.

        Raises:
            WorkersError: When no scheduler answers.
        """
        where = self._settings.where()
        given = "address" if self._settings.address else "scheduler_file"
        try:
            return self._distributed.Client(
                **{given: where}, timeout=_CONNECT, set_as_default=False, name="map_bo"
            )
        except Exception as error:  # what answers may be anything but a scheduler
            raise WorkersError(
                f"no Dask scheduler can be reached at {where}: "
                f"{first_line(error) or type(error).__name__}",
                hint=_START_HINT,
            ) from error

    def look(self) -> Sequence[Hand]:
        found = self._workers()
        for address in set(self._handles) - set(found):
            del self._handles[address]
        for address, about in found.items():
            if address not in self._handles and self._is_fit(about):
                self._handles[address] = _Handle(self, address, about)
        alive = [handle for handle in self._handles.values() if not handle.ended]
        return alive[: self._settings.count]

    def _workers(self) -> Mapping[str, Any]:
        """Return what the scheduler tells of its workers, by address."""
        if self._client.status in ("closed", "closing"):
            try:
                self._client = self._connect()
            except WorkersError as error:
                raise OutOfReachError(error.message) from error
        if self._client.status != "running":
            raise OutOfReachError("the connection to the scheduler is lost")
        client = self._client
        try:
            about = client.sync(client.scheduler.identity, n_workers=-1, callback_timeout=_ASK)
            workers: Mapping[str, Any] = about["workers"]
        except Exception as error:  # whatever a broken connection raises
            raise OutOfReachError(f"the scheduler does not answer: {first_line(error)}") from error
        return workers

    def _is_fit(self, about: Mapping[str, Any]) -> bool:
        needs, has = self._settings.resources or {}, about.get("resources") or {}
        return all(has.get(name, 0.0) >= amount for name, amount in needs.items())

    def send(self, handle: _Handle, function: Callable[..., Answer], *args: Any) -> Future[Answer]:
        """Have one worker call a function, once."""
        answer: Future[Answer] = Future()
        try:
            running = self._client.submit(
                function,
                *args,
                key=f"map_bo-{function.__name__}-{uuid.uuid4().hex}",
                workers=[handle.address],
                allow_other_workers=False,
                resources=dict(self._settings.resources or {}) or None,
                retries=0,
                pure=False,
            )
        except Exception as error:
            answer.set_exception(error)
            return answer

        def fetch() -> None:
            try:
                found, failed = running.result(timeout=_FETCH), None
            except BaseException as error:
                found, failed = None, error
            with suppress(InvalidStateError):
                if failed is None:
                    answer.set_result(found)
                else:
                    answer.set_exception(failed)

        # Dask calls back in one thread for all, which fetching from a dead worker would block.
        def arrived(_: object) -> None:
            if _in_thread(fetch, "map-bo-fetch") is None:
                fetch()

        running.add_done_callback(arrived)
        return answer

    def blame(self, error: BaseException) -> str | None:
        reason = getattr(error, "reason", None)
        if reason in ("scheduler-connection-lost", "scheduler-restart"):
            return None
        if self._client.status != "running":
            return None
        kind = type(error).__name__
        if kind == "KilledWorker":
            return "its process died (a crash in native code, out of memory, or killed)"
        return f"{kind}: {first_line(error)}"

    def end(self, handle: _Handle) -> None:
        """End the process of a worker, without waiting for it."""
        if self._handles.get(handle.address) is not handle:
            return  # it is gone already
        thread = _in_thread(lambda: self._restart(handle), "map-bo-restart")
        if thread is not None:
            self._restarts.append(thread)

    def _restart(self, handle: _Handle) -> None:
        client, address = self._client, handle.address
        try:
            if handle.nanny:
                client.restart_workers([address], timeout=_RESTART, raise_for_error=False)
            else:
                logger.warning("%s has no nanny, and is not replaced when it is ended", handle.name)
                client.run(_leave, workers=[address], wait=False, on_error="ignore")
                return  # its address is free when the scheduler says so
        except Exception as error:  # it is gone, or the connection is
            logger.info("%s could not be restarted: %s", handle.name, first_line(error))
        if self._handles.get(address) is handle:
            del self._handles[address]

    def close(self, *, abandon: bool) -> None:
        for thread in self._restarts:
            thread.join(_CLOSE)
        client = self._client
        if client.status == "running":
            clean = _in_thread(self._forget, "map-bo-forget")
            if clean is not None:
                clean.join(_CLOSE)
        with suppress(Exception):
            client.close(timeout=_CONNECT)

    def _forget(self) -> None:
        alive = [handle.address for handle in self._handles.values() if not handle.ended]
        with suppress(Exception):  # a worker that is gone has forgotten it
            self._client.run(
                forget, self.order.token, self.order.driver, workers=alive, on_error="ignore"
            )


def _in_thread(function: Callable[[], None], name: str) -> threading.Thread | None:
    """Call a function in a thread of its own; None where the system has no room for one."""
    thread = threading.Thread(target=function, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:  # out of memory, or of processes
        logger.error("%s: %s", name, error)
        return None
    return thread


def _leave() -> None:
    os._exit(1)


def _distributed() -> Any:
    try:
        return import_module("distributed")
    except ImportError as error:
        raise MissingDependencyError(
            "workers on a Dask cluster need distributed, which is not installed",
            hint='pip install "map-bo[dask]"',
        ) from error
