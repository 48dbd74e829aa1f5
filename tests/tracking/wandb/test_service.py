"""The end of wandb's service process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from map_bo.tracking.wandb.service import end_service

wandb = pytest.importorskip("wandb")


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A running service process."""
    for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name.lower()))
    end_service()
    wandb.setup(settings=wandb.Settings(silent=True)).ensure_service()
    singleton = import_module("wandb.sdk.wandb_setup")._singleton
    process = singleton._connection._proc._process
    assert process.poll() is None
    yield process
    process.kill()


def test_a_service_that_answers_ends_by_itself(service: Any) -> None:
    assert end_service()
    assert service.returncode == 0


def test_a_service_that_hangs_is_ended_by_force(service: Any) -> None:
    os.kill(service.pid, signal.SIGSTOP)
    start = time.monotonic()
    assert not end_service(patience=0.5)
    assert time.monotonic() - start < 60
    assert service.returncode == -signal.SIGKILL


def test_without_a_service_nothing_happens() -> None:
    assert end_service()
    assert end_service()
