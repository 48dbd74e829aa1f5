from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from map_bo.tracking.durable import (
    hint_of,
    new_name,
    reason_of,
    sync_directory,
    sync_file,
    write_all,
)


def test_all_is_written_where_the_system_takes_a_part_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data[:3])))
    with open(tmp_path / "file", "wb", buffering=0) as file:
        write_all(file.fileno(), b"ten  bytes")
    assert (tmp_path / "file").read_bytes() == b"ten  bytes"
    sync_file(tmp_path / "file")
    sync_directory(tmp_path)


def test_no_name_is_taken_twice(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a-2.jsonl", "a-3.jsonl"):
        found = new_name(tmp_path / "a.jsonl")
        assert found.name == name
        found.touch()


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.EDQUOT, "free some disk space"),
        (errno.EFBIG, "ulimit"),
        (errno.EPERM, "writable"),
        (errno.ESTALE, "put the run directory back"),
        (errno.EIO, "look after the disk"),
        (errno.EBUSY, "see to the run directory"),
    ],
)
def test_the_hint_fits_the_error(number: int, hint: str) -> None:
    error = OSError(number, os.strerror(number))
    assert hint in hint_of(error)
    assert reason_of(error) == os.strerror(number)


def test_an_error_of_another_kind_says_what_it_says() -> None:
    assert reason_of(ValueError("odd")) == "odd"
    assert "see to" in hint_of(ValueError("odd"))
