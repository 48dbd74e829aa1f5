"""Entries of a cache of rows that were damaged, or are of something else."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from map_bo.merging.vectors.task_vectors import TaskVectors
from tests.merging.vectors.test_rows_cache import merged, models, the_entry


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 64)


def rename_key(path: Path) -> None:
    with safe_open(path, "pt") as file:
        about = file.metadata()["map_bo_rows"]
    save_file(load_file(path), path, {"map_bo_rows": about.replace('"key": "', '"key": "0')})


def replace_by_a_file(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.write_text("hello")


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


DAMAGES: Mapping[str, Callable[[Path], object]] = {
    "a bit of the rows": lambda entry: flip(entry / "rows", 130),
    "rows cut off": lambda entry: cut(entry / "rows"),
    "no rows": lambda entry: (entry / "rows").unlink(),
    "a bit of a floor": lambda entry: flip(
        entry / "beside.safetensors", (entry / "beside.safetensors").stat().st_size - 10
    ),
    "beside cut off": lambda entry: cut(entry / "beside.safetensors"),
    "nothing beside": lambda entry: (entry / "beside.safetensors").unlink(),
    "no safetensors": lambda entry: (entry / "beside.safetensors").write_bytes(b"hello"),
    "other safetensors": lambda entry: save_file(
        {"x": torch.ones(1)}, entry / "beside.safetensors"
    ),
    "of another key": lambda entry: rename_key(entry / "beside.safetensors"),
    "a file": replace_by_a_file,
    "an empty folder": empty,
}


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_damaged_and_foreign_entries_are_written_again(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, experts = models("cnn")
    built = TaskVectors.load(base, experts, cache=tmp_path / "rows")
    entry = the_entry(tmp_path / "rows")
    wanted = TaskVectors.load(base, experts)
    held = merged(built)
    DAMAGES[damage](entry)
    with caplog.at_level(logging.WARNING):
        found = TaskVectors.load(base, experts, cache=tmp_path / "rows")
    assert "are written again" in caplog.text
    assert torch.equal(found.rows, wanted.rows)
    assert torch.equal(merged(found), merged(wanted))
    assert the_entry(tmp_path / "rows") == entry
    if "rows" not in damage:  # those who mapped the old file go on with it
        assert torch.equal(merged(built), held)
