"""Writing files that outlive a kill and a power loss, and what to say when that fails."""

from __future__ import annotations

import errno
import os
from pathlib import Path

__all__ = [
    "FULL",
    "hint_of",
    "new_name",
    "reason_of",
    "sync_directory",
    "sync_file",
    "write_all",
]

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of the errors that say that there is no room."""

_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
_GONE = (errno.ENOENT, errno.ESTALE, errno.ENOTDIR)


def write_all(descriptor: int, content: bytes) -> None:
    """Write all of ``content``, however many calls that takes."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def new_name(path: Path) -> Path:
    """Return ``path``, with a number where that exists: nothing is overwritten."""
    found, number = path, 1
    while found.exists():
        number += 1
        found = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return found


def sync_file(path: Path) -> None:
    """Wait until what was written to a file is on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    if os.name != "posix":
        return  # elsewhere a directory cannot be opened, and its entries are durable anyway
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason_of(error: BaseException) -> str:
    """Return why something failed, in the words of the operating system where it has some."""
    return getattr(error, "strerror", None) or str(error)


def hint_of(error: BaseException) -> str:
    """Return what to do about an error of the operating system."""
    number = error.errno if isinstance(error, OSError) else None
    if number in FULL:
        return "free some disk space"
    if number == errno.EFBIG:
        return "raise the limit on the size of files (ulimit -f)"
    if number in _DENIED:
        return "make the run directory and its files writable"
    if number in _GONE:
        return "put the run directory back where it was"
    if number == errno.EIO:
        return "look after the disk or the network file system"
    return "see to the run directory and its file system"
