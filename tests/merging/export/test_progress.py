"""The progress bar of a merge: on stderr, on terminals alone, up to the last element."""

from __future__ import annotations

import os
import pty
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from rich.progress import Progress

from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.export.model import merge_checkpoints
from map_bo.merging.export.write_shards import merging_bar
from tests.merging.checkpoint_files import BASE, COEFFICIENTS, EXPERTS
from tests.merging.hard_checkpoints import hard_family

C = {"math": 0.5, "code": 0.25}


@contextmanager
def terminal() -> Iterator[Callable[[], str]]:
    """Make stderr a terminal, within a test since pytest puts its own there before it."""
    reader, writer = pty.openpty()
    os.set_blocking(reader, False)

    def said() -> str:
        text = b""
        with suppress(BlockingIOError):
            while part := os.read(reader, 1 << 16):
                text += part
        return text.decode()

    with pytest.MonkeyPatch.context() as patch, os.fdopen(writer, "w", buffering=1) as stream:
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            patch.delenv(name, raising=False)
        patch.setenv("TERM", "xterm")
        patch.setattr(sys, "stderr", stream)
        yield said
    os.close(reader)


def test_it_goes_to_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, experts = hard_family(tmp_path)
    with terminal() as said:
        merge_checkpoints(base, experts, C, tmp_path / "m")
        text = said()
    assert re.search(r"merging .* M numbers|hashing", text)
    assert "100%" in text
    assert capsys.readouterr().out == ""


def test_it_is_silent_where_it_was_not_asked_for(tmp_path: Path) -> None:
    base, experts = hard_family(tmp_path)
    with terminal() as said:
        merge_checkpoints(base, experts, C, tmp_path / "m", progress=False)
        assert said() == ""


def test_it_is_silent_where_there_is_no_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base, experts = hard_family(tmp_path)
    merge_checkpoints(base, experts, C, tmp_path / "m")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["pieces", "tensors", "ties"])
def test_every_element_is_counted(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    totals: list[float | None] = []
    advance, add_task = Progress.advance, Progress.add_task

    def counting(self: Progress, task: object, count: float = 1) -> None:
        counted.append(int(count))
        advance(self, task, count)  # type: ignore[arg-type]

    def adding(self: Progress, description: str, total: float | None = 100.0) -> int:
        totals.append(total)
        return add_task(self, description, total=total)

    monkeypatch.setattr(Progress, "advance", counting)
    monkeypatch.setattr(Progress, "add_task", adding)
    with terminal():
        if kind == "tensors":  # of float64 and complex numbers
            merge_checkpoints(BASE, EXPERTS, COEFFICIENTS, tmp_path / "m", check_base=False)
        elif kind == "pieces":
            base, experts = hard_family(tmp_path)
            merge_checkpoints(base, experts, C, tmp_path / "m")
        else:  # stored apart: both are written
            tensors = {"a": torch.ones(7), "b": torch.ones(7), "n": torch.arange(3)}
            merge_checkpoints(tensors, {"e": tensors}, {}, tmp_path / "m", ties={"b": "a"})
    assert [sum(counted)] == totals


def test_an_error_ends_the_bar() -> None:
    def fail() -> None:
        with merging_bar(open_checkpoint({"a": torch.ones(4)}), shown=True) as advance:
            assert advance is not None
            advance(2)
            raise ValueError("boom")

    with terminal() as said:
        with pytest.raises(ValueError, match="boom"):
            fail()
        assert "50%" in said()
