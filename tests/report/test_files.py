from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from map_bo.report.files import remove_stale, write_whole


def test_files_are_replaced_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_whole(path, "old")
    write_whole(path, "new \u2713")
    assert path.read_text(encoding="utf-8") == "new \u2713"
    write_whole(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_a_failing_write_keeps_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    write_whole(path, "old")
    whole = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        whole(self, data[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_half_surrogates_are_escaped(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", "\ud800")
    assert (tmp_path / "a").read_bytes() == b"\\ud800"


def test_what_a_killed_report_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    plots = tmp_path / "plots"
    plots.mkdir()
    gone = [tmp_path / f".{name}.{ended.pid}.tmp" for name in ("report.html", "summary.json")]
    gone.append(plots / f".front.png.{ended.pid}.tmp")
    kept = [
        tmp_path / f".report.html.{os.getppid()}.tmp",  # of a report that still runs
        tmp_path / f".notes.html.{ended.pid}.tmp",
        tmp_path / f".mine.png.{ended.pid}.tmp",
        tmp_path / f"report.html.{ended.pid}.tmp",
        tmp_path / ".report.html.tmp",
        tmp_path / "report.html",
    ]
    for path in (*gone, *kept):
        path.write_text("x")
    folder = tmp_path / f".front.csv.{ended.pid}.tmp"
    folder.mkdir()
    remove_stale(tmp_path, plots, tmp_path / "nowhere")
    assert not [path for path in gone if path.exists()]
    assert [path for path in kept if path.exists()] == kept
    assert folder.is_dir()


def test_a_link_in_the_place_of_the_temporary_file_is_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("theirs")
    (tmp_path / f".a.txt.{os.getpid()}.tmp").symlink_to(other)
    write_whole(tmp_path / "a.txt", "new")
    assert other.read_text() == "theirs"
    assert (tmp_path / "a.txt").read_text() == "new"
