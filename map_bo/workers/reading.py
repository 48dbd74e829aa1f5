"""Settings of workers from what a user may give for them."""

from __future__ import annotations

from concurrent.futures import Executor

from map_bo.errors import ConfigError
from map_bo.values import whole_number
from map_bo.workers.workers import WorkerSettings

__all__ = ["read_workers"]


def read_workers(given: object) -> WorkerSettings | None:
    """Return settings of workers from what a user may give.

    Args:
        given: None or 0 for the driver's own process; a number of processes; settings; or an
            executor (:class:`map_bo.workers.pool.Pool`).

    Raises:
        ConfigError: When it is none of these.
    """
    if given is None or isinstance(given, WorkerSettings):
        return None if given is None else given
    if isinstance(given, Executor):
        from map_bo.workers.pool import Pool

        return Pool(given)
    if isinstance(given, int | float | str) and not isinstance(given, bool):
        hint = "give a number of processes, such as workers=4"
        count = whole_number("workers", given, least=0, hint=hint)
        if not count:
            return None
        from map_bo.workers.processes import Processes

        return Processes(count)
    raise ConfigError(
        f"workers must be a number of processes or settings of workers, got {given!r:.80}",
        hint="give workers=4, map_bo.Processes(4, devices=[...]), or map_bo.Pool(executor)",
    )
