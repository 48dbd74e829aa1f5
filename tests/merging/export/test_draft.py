from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import map_bo
from map_bo.merging.export.draft import publish, remove_stale_drafts, writing_draft
from tests.merging.checkpoint_files import export, merged

# Writes a draft until it is killed; says so once half of it is there.
WRITER = """
import sys, time
from pathlib import Path
from map_bo.merging.export.draft import writing_draft

with writing_draft(Path(sys.argv[1])) as draft:
    (draft / "model.safetensors").write_bytes(bytes(1000))
    print(draft.name, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A live process that writes a draft of ``tmp_path / "m"``, and that draft."""
    path = f"{Path(map_bo.__file__).parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "m")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    with process:
        assert process.stdout is not None
        yield process, tmp_path / process.stdout.readline().strip()
        process.kill()


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_a_killed_export_is_cleaned_up_by_the_next_and_a_live_one_is_not(
    tmp_path: Path, writer: tuple[subprocess.Popen[str], Path]
) -> None:
    process, draft = writer
    assert draft.name.startswith(".m.")
    out = export(tmp_path / "m")
    assert (draft / "model.safetensors").is_file()
    out.rename(tmp_path / "first")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (draft / "model.safetensors").is_file()
    # An export elsewhere in the folder leaves it, the next one to the same place does not.
    for other in ("m2", "x"):
        export(tmp_path / other)
        assert draft.is_dir()
    export(tmp_path / "m")
    assert hidden(tmp_path) == []


def test_it_is_removed_before_the_space_is_counted(
    tmp_path: Path,
    writer: tuple[subprocess.Popen[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process, draft = writer
    process.kill()
    process.wait()
    import shutil

    real = shutil.disk_usage

    def usage(folder: Path) -> object:
        assert not draft.exists()
        return real(folder)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    export(tmp_path / "m")


def test_two_exports_to_one_place_in_one_process(tmp_path: Path) -> None:
    def stream() -> Iterator[object]:
        tensors = list(merged())
        yield tensors[0]
        inner = export(tmp_path / "m")
        inner.rename(tmp_path / "inner")
        yield from tensors[1:]

    export(tmp_path / "m", tensors=stream())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inner", "m"]


def test_what_is_not_known_as_a_draft_stays(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (tmp_path / ".m.abcdefgh.partial").mkdir()  # without a lock
    (tmp_path / ".m.more.abcdefgh.partial").mkdir()  # of the target m.more
    (tmp_path / ".m.more.abcdefgh.partial" / ".writer.lock").touch()
    (tmp_path / ".m.file.partial").write_text("x")
    outside.mkdir()
    (outside / ".writer.lock").touch()
    (tmp_path / ".m.ijklmnop.partial").symlink_to(outside)
    (tmp_path / ".m.young.new").mkdir()
    before = sorted(tmp_path.rglob("*"))
    remove_stale_drafts(tmp_path / "m")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_draft_that_was_never_locked_goes_after_an_hour(tmp_path: Path) -> None:
    young = tmp_path / ".m.abcdefgh.new"
    young.mkdir()
    remove_stale_drafts(tmp_path / "m")
    assert young.is_dir()
    os.utime(young, (time.time() - 4000,) * 2)
    remove_stale_drafts(tmp_path / "m")
    assert not young.exists()


def test_a_draft_that_fails_leaves_nothing_and_a_published_one_only_itself(tmp_path: Path) -> None:
    def fail(draft: Path) -> None:
        assert hidden(tmp_path) == [draft.name]
        raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"), writing_draft(tmp_path / "m") as draft:
        fail(draft)
    assert list(tmp_path.iterdir()) == []
    with writing_draft(tmp_path / "m") as draft:
        (draft / "a").write_text("x")
        publish(draft, tmp_path / "m")
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["m", "m/a"]


def test_without_locks_the_draft_is_never_taken_for_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*args: object) -> None:
        raise OSError(37, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", no_locks)
        draft_of = writing_draft(tmp_path / "m")
        draft = draft_of.__enter__()
    remove_stale_drafts(tmp_path / "m")
    assert draft.is_dir()
    publish(draft, tmp_path / "m")
    draft_of.__exit__(None, None, None)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_folders_above_the_target_are_made_and_removed_with_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="boom"), writing_draft(tmp_path / "a" / "b" / "m"):
        raise ValueError("boom")
    assert list(tmp_path.rglob("*")) == []
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="boom"), writing_draft(tmp_path / "a" / "b" / "m"):
        raise ValueError("boom")
    assert list(tmp_path.rglob("*")) == [tmp_path / "a"]
