"""Ending wandb's service process, which may wait for a server without limit."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from threading import Thread
from typing import Any

__all__ = ["end_service"]

_WAY = ("_singleton", "_connection", "_proc", "_process")  # from its module to the process


def end_service(patience: float = 10.0) -> bool:
    """End the library's service process: on request, or by force when it does not answer.

    While a request to an unreachable server is under way, the service sometimes never ends, and
    the library waits for it without limit, even at the exit of the interpreter. Call this only when
    everything recorded is on disk.

    Args:
        patience: Seconds that it has to end by itself.

    Returns:
        Whether it ended by itself, or was not running.
    """
    import wandb

    process: Any = import_module("wandb.sdk.wandb_setup")
    for name in _WAY:  # private names: where they differ, nothing is forced
        process = getattr(process, name, None)

    def ask() -> None:
        # It would exit with the status of a service that failed, or was killed below.
        with suppress(Exception, SystemExit):
            wandb.teardown()

    asking = Thread(target=ask, name="wandb-teardown", daemon=True)
    asking.start()
    asking.join(patience)
    if not asking.is_alive():
        return True
    if process is not None:
        process.kill()
        asking.join(patience)
    return False
