"""A folder that appears whole or not at all: written hidden, then given its name."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from map_bo.errors import MergeError

__all__ = ["publish", "refuse_existing", "remove_stale_drafts", "writing_draft"]

_LOCK = ".writer.lock"
_SUFFIX = ".partial"
# A draft before its writer has locked it; seconds after which that writer must be dead.
_YOUNG_SUFFIX = ".new"
_YOUNG = 3600.0


def refuse_existing(target: str | Path) -> Path:
    """Return the absolute path of a folder that is to be written, if it may be.

    Raises:
        MergeError: When something of this name exists that is not an empty folder.
    """
    target = Path(target).expanduser().absolute()
    if not os.path.lexists(target):
        return target
    if not target.is_dir():
        raise MergeError(f"{target} exists and is not a folder", hint="choose another name")
    if any(target.iterdir()):
        raise MergeError(
            f"{target} exists and is not empty", hint="choose another folder, or remove it first"
        )
    return target


@contextmanager
def writing_draft(target: Path) -> Iterator[Path]:
    """Make a hidden folder beside ``target``, and remove it unless it was published.

    Folders above ``target`` that do not exist are made, and removed with it.

    While its writer lives, a lock file inside is locked: the system lets go of it when the
    process ends, however it ends. So a draft whose lock can be taken has no writer any more.

    Raises:
        OSError: When the folder cannot be made.
    """
    with _parents_of(target), _draft_of(target) as draft:
        yield draft


@contextmanager
def _parents_of(target: Path) -> Iterator[None]:
    made: list[Path] = []
    try:
        for folder in reversed(target.parents):
            if not folder.exists():
                folder.mkdir(exist_ok=True)
                made.append(folder)
        yield
    except BaseException:
        for folder in reversed(made):
            with suppress(OSError):  # another may have written into it meanwhile
                folder.rmdir()
        raise


@contextmanager
def _draft_of(target: Path) -> Iterator[Path]:
    young = Path(
        tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_YOUNG_SUFFIX, dir=target.parent)
    )
    draft = young.with_suffix(_SUFFIX)
    lock: BaseFileLock | None = None
    try:
        # Locked before it has the name that others look for, so none takes it for stale.
        lock = _lock(young)
        if lock is None:
            # Where files cannot be locked, this draft must not look like one with a dead writer.
            (young / _LOCK).unlink(missing_ok=True)
        young.rename(draft)
        yield draft
    except BaseException:
        shutil.rmtree(young, ignore_errors=True)
        shutil.rmtree(draft, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            lock.release()


def publish(draft: Path, target: Path) -> None:
    """Force a draft to the disk and give it its name; ``target`` may be an empty folder.

    Raises:
        OSError: When that fails; the draft is then as it was.
    """
    for path in [*draft.rglob("*"), draft]:
        _sync(path)
    # mkdtemp makes a folder that only its owner can read; a result is as public as any other.
    mask = os.umask(0)
    os.umask(mask)
    draft.chmod(0o777 & ~mask)
    draft.rename(target)
    # After the renaming: without its lock file a draft would never be known as stale.
    with suppress(OSError):
        (target / _LOCK).unlink()
    _sync(target.parent)


def remove_stale_drafts(target: Path) -> None:
    """Remove the drafts of ``target`` that killed writers left; those of live ones stay."""
    name = re.compile(
        rf"\.{re.escape(target.name)}\.[a-z0-9_]+({re.escape(_SUFFIX)}|{re.escape(_YOUNG_SUFFIX)})"
    )
    with suppress(OSError):
        for path in list(target.parent.iterdir()):
            if name.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                with suppress(OSError):
                    _remove_if_stale(path)


def _remove_if_stale(path: Path) -> None:
    if path.suffix == _YOUNG_SUFFIX:
        stale = time.time() - path.stat().st_mtime > _YOUNG
        lock = None
    else:
        # A folder without a lock is not known to be one of ours.
        stale = (path / _LOCK).is_file()
        lock = _lock(path) if stale else None
        stale = stale and lock is not None
    if stale:
        shutil.rmtree(path, ignore_errors=True)
    if lock is not None:
        lock.release()


def _lock(folder: Path) -> BaseFileLock | None:
    """Return the folder's lock, taken; None when another has it or files cannot be locked."""
    lock = FileLock(folder / _LOCK, timeout=0)
    try:
        lock.acquire()
    except (Timeout, OSError, NotImplementedError):
        return None
    return lock


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
