from __future__ import annotations

import logging
import sys
import warnings

import pytest

from map_bo.evaluators.isolation.quiet import quiet


def test_loggers_and_those_below_are_silent_and_speak_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loud, below = logging.getLogger("loud_library"), logging.getLogger("loud_library.part")
    loud.setLevel(logging.INFO)
    with quiet("loud_library"):
        loud.error("one")
        below.critical("two")
    below.info("three")
    assert [record.message for record in caplog.records] == ["three"]
    assert loud.level == logging.INFO


def test_warnings_are_dropped_inside_only() -> None:
    with quiet():
        warnings.warn("inside", stacklevel=1)
    with pytest.warns(UserWarning, match="outside"):
        warnings.warn("outside", stacklevel=1)


@pytest.mark.parametrize("streams", [True, False])
def test_streams_are_dropped_where_asked_for(
    streams: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    found = sys.stdout, sys.stderr
    with quiet(streams=streams):
        print("out")
        print("error", file=sys.stderr)
    assert (sys.stdout, sys.stderr) == found
    assert capsys.readouterr() == (("", "") if streams else ("out\n", "error\n"))


def test_everything_is_put_back_after_an_error() -> None:
    library, found = logging.getLogger("failing_library"), (sys.stdout, list(warnings.filters))
    with pytest.raises(KeyError), quiet("failing_library", streams=True):
        raise KeyError
    assert library.level == logging.NOTSET
    assert (sys.stdout, list(warnings.filters)) == found
