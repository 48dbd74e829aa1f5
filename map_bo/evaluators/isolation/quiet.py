"""Silence for libraries that speak while they are used: their logs, warnings and progress bars."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

__all__ = ["quiet"]

_SILENT = logging.CRITICAL + 1


class _Nowhere(io.TextIOBase):
    """A stream that keeps nothing of what is written."""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return len(text)


@contextlib.contextmanager
def quiet(*loggers: str, streams: bool = False) -> Iterator[None]:
    """Silence libraries inside; levels, filters and streams are put back, also after an error.

    Args:
        loggers: Names of the loggers to silence, each with those below it.
        streams: Whether what is written to ``sys.stdout`` and ``sys.stderr`` is dropped too, as
            progress bars are. It is for steps that nobody watches.
    """
    levels = [(logger := logging.getLogger(name), logger.level) for name in loggers]
    nowhere = _Nowhere()
    try:
        for logger, _ in levels:
            logger.setLevel(_SILENT)
        with contextlib.ExitStack() as inside:
            inside.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            if streams:
                inside.enter_context(contextlib.redirect_stdout(nowhere))
                inside.enter_context(contextlib.redirect_stderr(nowhere))
            yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)
