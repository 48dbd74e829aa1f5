"""Merges that are interrupted or killed: what they leave, and what becomes of it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from map_bo.merging.export.model import merge_checkpoints
from tests.merging.large_checkpoints import merging, write_family

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Checkpoints whose merge takes long enough to be interrupted."""
    family = write_family(tmp_path_factory.mktemp("family"), 60)
    return {**family, "operator": {"name": "della"}, "threads": 2}


@pytest.fixture
def started(given: dict[str, Any], tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is in the middle of writing ``tmp_path / "new" / "m"``."""
    with merging({**given, "out": str(tmp_path / "new" / "m")}) as process:
        deadline = time.monotonic() + 60
        while not any(_written(path) for path in tmp_path.glob("new/.m.*/*.safetensors")):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.002)
        yield process
        process.kill()


def _written(path: Path) -> bool:
    """Whether more than the header is there; files have their full length from the start."""
    try:
        return path.stat().st_blocks * 512 > 1 << 16
    except FileNotFoundError:
        return False


def test_an_interrupt_leaves_nothing(started: subprocess.Popen[str], tmp_path: Path) -> None:
    started.send_signal(signal.SIGINT)
    _, errors = started.communicate(timeout=30)
    assert started.returncode not in (0, -signal.SIGKILL)
    assert "KeyboardInterrupt" in errors
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_merge_leaves_is_removed_by_the_next(
    started: subprocess.Popen[str], given: dict[str, Any], tmp_path: Path
) -> None:
    os.kill(started.pid, signal.SIGKILL)
    started.wait(timeout=30)
    (draft,) = (tmp_path / "new").iterdir()
    assert draft.name.startswith(".m.")
    assert draft.name.endswith(".partial")
    merge_checkpoints(
        given["base"],
        {"math": given["experts"]["math"]},
        {"math": 0.5},
        tmp_path / "new" / "m",
        progress=False,
    )
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["m"]
