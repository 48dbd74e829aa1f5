"""The end of wandb's service process, which may wait longer for a server than anybody would."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from threading import Thread
from typing import Any

__all__ = ["end_service"]

_WAY = ("_singleton", "_connection", "_proc", "_process")  # from its module to the process


def end_service(patience: float = 10.0) -> bool:
    """End the library's service process: by asking, and by force when it does not answer.

    With a request to an unreachable server under way the service now and then never ends, and
    the library waits for it without limit, also at the exit of the interpreter. To be called
    when nothing is recorded any more that is not yet on the disk.

    Args:
        patience: Seconds it has to end by itself.

    Returns:
        Whether it ended by itself, or was not running.
    """
    import wandb

    process: Any = import_module("wandb.sdk.wandb_setup")
    for name in _WAY:  # private: where it is called otherwise, nothing is forced
        process = getattr(process, name, None)

    def ask() -> None:
        # It would exit with the code of a service that failed, or was killed below.
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
