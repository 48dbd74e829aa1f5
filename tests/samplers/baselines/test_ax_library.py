from __future__ import annotations

import logging
import sys
import warnings

import pytest

from map_bo.errors import MissingDependencyError
from map_bo.samplers.baselines.ax_library import import_ax, quiet


def test_what_needs_ax_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ax.api.client", None)
    with pytest.raises(MissingDependencyError, match="this thing needs Ax"):
        import_ax("this thing")


def chatter() -> None:
    logging.getLogger("ax.api.client").warning("chatter")
    warnings.warn("chatter", DeprecationWarning, stacklevel=1)


def test_it_is_quiet_for_the_block_only(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("ax")
    before = (logger.handlers, logger.propagate)
    with quiet():
        chatter()
    assert (logger.handlers, logger.propagate) == before
    assert not caplog.records
    with pytest.warns(DeprecationWarning, match="chatter"):
        chatter()
