"""Ax as a guest: imported when it is needed, and silent while it works for us."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from map_bo.errors import MissingDependencyError

__all__ = ["import_ax", "quiet"]


def import_ax(what: str) -> None:
    """Import Ax without its messages; a second call costs nothing.

    Args:
        what: What needs it, for the error.

    Raises:
        MissingDependencyError: When it cannot be imported.
    """
    if sys.modules.get("ax.api.client") is not None:
        return
    disabled = logging.root.manager.disable
    try:
        with warnings.catch_warnings():
            # Importing Ax warns, changes which warnings are shown, and reports its storage.
            warnings.simplefilter("ignore")
            logging.disable(max(disabled, logging.INFO))
            import ax.api.client  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"{what} needs Ax, which cannot be imported ({error})",
            hint='pip install "ax-platform>=1.3.1"',
        ) from error
    finally:
        logging.disable(disabled)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Ax from reporting every trial and warning of its own defaults, for the block only."""
    logger = logging.getLogger("ax")
    handlers, propagate = logger.handlers, logger.propagate
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.handlers, logger.propagate = [logging.NullHandler()], False
        try:
            yield
        finally:
            logger.handlers, logger.propagate = handlers, propagate
