"""A new run that is refused leaves nothing behind: neither a record nor the folder made for it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from map_bo.errors import MapBoError, StoreError
from map_bo.tracking.jsonl import JsonlStore

__all__ = ["leaving_nothing", "remove_hydra_files"]

# What is recorded before anything was measured; all else may have cost an evaluation.
_FREE = {"created", "planned", "begun", "proposed", "started", "interrupted"}


@contextmanager
def leaving_nothing(directory: Path, *, fresh: bool = True) -> Iterator[None]:
    """Remove the record that a refused run has begun, while nothing was measured.

    Files that were in the folder before stay; the folder goes where it was not there, and so do
    the folders above it that were made for it.

    Args:
        directory: The folder of the run; it may not exist yet.
        fresh: Whether the run is new. A run that goes on is never touched.
    """
    before = set(directory.iterdir()) if directory.is_dir() else None
    absent = [path for path in directory.absolute().parents if not path.exists()]
    try:
        yield
    except StoreError:
        raise  # another run may be what stands there
    except MapBoError:
        if fresh and directory.is_dir() and not _has_measured(directory):
            _remove(directory, before)
            for parent in absent:  # the innermost first; not what others have written to
                with suppress(OSError):
                    parent.rmdir()
        raise


def _has_measured(directory: Path) -> bool:
    """Return whether a record holds more than what precedes the first measurement."""
    if not (directory / "events.jsonl").is_file():
        return False
    try:
        return any(event.kind not in _FREE for event in JsonlStore.open(directory).read())
    except MapBoError:  # what cannot be read is not thrown away
        return True


def _remove(directory: Path, before: set[Path] | None) -> None:
    for path in directory.iterdir():
        if before is not None and path in before:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()
    if before is None:
        with suppress(OSError):
            directory.rmdir()


def remove_hydra_files(directory: Path) -> None:
    """Remove what Hydra writes for a run before it begins, and the folder if it is empty then.

    So goes the folder ``runs`` around it, where nothing else is in it.

    Args:
        directory: The folder of the run, in which there is no record.
    """
    if (directory / "events.jsonl").exists():
        return
    settings = directory / ".hydra"
    if settings.is_dir() and all(path.suffix == ".yaml" for path in settings.iterdir()):
        shutil.rmtree(settings, ignore_errors=True)
    left = list(directory.iterdir()) if directory.is_dir() else []
    for log in directory.glob("*.log"):
        with suppress(OSError):
            # What was said before the refusal has been shown too.
            if log.stat().st_size == 0 or left == [directory / "run.log"]:
                log.unlink()
    with suppress(OSError):
        directory.rmdir()
        if directory.absolute().parent.name == "runs":  # the default of the configuration
            directory.absolute().parent.rmdir()
