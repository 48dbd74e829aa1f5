"""Run stores: an append-only file of JSON lines that survives kills and full disks, and memory."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from map_bo.errors import StoreError
from map_bo.tracking.codec import decode_event, encode_event
from map_bo.tracking.store import Event

__all__ = ["JsonlStore", "MemoryStore"]

_EVENTS = "events.jsonl"
_LOCK = "run.lock"
_OWNER = "run.owner"
_CHUNK = 1 << 16


class MemoryStore:
    """A store for runs without a directory. Events go through the same codec as on disk."""

    def __init__(self) -> None:
        self._lines: list[bytes] = []

    def append(self, event: Event) -> None:
        """Add one event.

        Raises:
            StoreError: When its data are not plain data.
        """
        self._lines.append(encode_event(event))

    def read(self) -> Iterator[Event]:
        """Yield all events in the order they were appended."""
        return (decode_event(line) for line in tuple(self._lines))


def absolute_directory(path: str | Path) -> Path:
    """Return a run directory by its absolute path, which no change of directory moves.

    Raises:
        StoreError: When the path is relative and the working directory does not exist any more.
    """
    try:
        return Path(path).absolute()
    except OSError as error:
        raise StoreError(
            f"the run directory {path} is relative, and the working directory does not exist",
            hint="give an absolute path, or change to a directory that exists",
        ) from error


class JsonlStore:
    """The events of a run, one per line, in ``DIRECTORY/events.jsonl``.

    An event is durable when :meth:`append` returns, and not written at all when it raises. A line
    that a killed process left unfinished was never acknowledged: readers skip it and the next
    writer cuts it off. Any other line that cannot be read is an error that names the line.

    Only the holder of the lock writes. :meth:`append` takes the lock for its own duration when
    :meth:`lock` is not held around it; reading needs no lock.

    Args:
        directory: The run's directory; :meth:`create` and :meth:`open` check it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self._path = self.directory / _EVENTS
        self._file_lock = FileLock(self.directory / _LOCK, thread_local=False)
        self._thread_lock = threading.RLock()
        self._repaired = False

    @classmethod
    def create(cls, directory: Path) -> JsonlStore:
        """Return the store of a new run, making its directory where needed.

        Raises:
            StoreError: When the directory already holds events, or cannot be created.
        """
        store = cls(directory)
        try:
            missing = [p for p in (store.directory, *store.directory.parents) if not p.exists()]
            store.directory.mkdir(parents=True, exist_ok=True)
            os.close(os.open(store._path, os.O_WRONLY | os.O_CREAT, 0o666))
            # A new name is durable only once the directory that holds it has been written.
            for changed in {store.directory, *(path.parent for path in missing)}:
                _sync_directory(changed)
        except OSError as error:
            raise StoreError(
                f"the run directory {store.directory} cannot be created: {_reason(error)}",
                hint="name a directory that you can write to",
            ) from error
        if next(store.read(), None) is not None:
            raise StoreError(
                f"{store.directory} already holds a run",
                hint=f"resume it with `map-bo resume {store.directory}`, or name another directory",
            )
        return store

    @classmethod
    def open(cls, directory: Path) -> JsonlStore:
        """Return the store of an existing run, for reading or resuming.

        Raises:
            StoreError: When the directory holds no events file.
        """
        store = cls(directory)
        if not store._path.is_file():
            raise StoreError(
                f"{store.directory} holds no run: there is no {_EVENTS} in it",
                hint="name a directory that `map-bo run` wrote",
            )
        return store

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from writing to this run; the lock of a killed process is free.

        Raises:
            StoreError: Immediately, when another process holds the lock or it cannot be taken.
        """
        owner = self.directory / _OWNER
        try:
            self._file_lock.acquire(blocking=False)
        except Timeout:
            raise StoreError(
                f"another process ({_owner(owner)}) is working on this run: {self.directory}",
                hint="wait until it has finished, or stop it",
            ) from None
        except (OSError, NotImplementedError) as error:
            raise StoreError(
                f"the run in {self.directory} cannot be locked: {_reason(error)}",
                hint="free some disk space or make the directory writable, and resume; no "
                "measurement is lost",
            ) from error
        outermost = self._file_lock.lock_counter == 1
        try:
            if outermost:
                # It is only used in the message above, so a full disk does not matter here.
                with suppress(OSError):
                    owner.write_text(f"pid {os.getpid()}, host {socket.gethostname()}")
                self._repaired = False
            yield
        finally:
            if outermost:
                with suppress(OSError):
                    owner.unlink()
            self._file_lock.release()

    def append(self, event: Event) -> None:
        """Write one event as one line and wait until it is on disk.

        Raises:
            StoreError: When it cannot be written (the file is then as it was before, and the
                event may be appended again later), when another process is writing, when its
                data are not plain data, or when the file is corrupt.
        """
        line = encode_event(event)
        with self._thread_lock:
            if self._file_lock.is_locked:
                self._append(line)
            else:
                with self.lock():
                    self._append(line)

    def _append(self, line: bytes) -> None:
        try:
            with open(self._path, "r+b", buffering=0) as file:
                if not self._repaired:
                    _cut_torn_line(file)
                    self._repaired = True
                before = file.seek(0, os.SEEK_END)
                try:
                    _write_all(file.fileno(), line)
                    os.fsync(file.fileno())
                except BaseException:
                    self._repaired = False
                    file.truncate(before)
                    os.fsync(file.fileno())
                    raise
        except OSError as error:
            raise StoreError(
                f"an event cannot be written to {self._path}: {_reason(error)}",
                hint="free some disk space and resume; no earlier measurement is lost",
            ) from error

    def read(self) -> Iterator[Event]:
        """Yield all events in the order they were appended, one line in memory at a time.

        Raises:
            StoreError: When a line other than an unfinished last one cannot be read.
        """
        try:
            with open(self._path, "rb") as file:
                line, number = file.readline(), 1
                while line.endswith(b"\n"):
                    following = file.readline()
                    try:
                        event = decode_event(line)
                    except ValueError as error:
                        if not following:
                            return
                        raise self._corrupt(number, f"it is not JSON ({error})", None) from error
                    except StoreError as error:
                        raise self._corrupt(number, error.message, error.hint) from error
                    yield event
                    line, number = following, number + 1
        except OSError as error:
            raise StoreError(
                f"{self._path} cannot be read: {_reason(error)}",
                hint="make the file readable, or name another run",
            ) from error

    def _corrupt(self, number: int, reason: str, hint: str | None) -> StoreError:
        return StoreError(
            f"line {number} of {self._path} cannot be read: {reason}",
            hint=hint
            or "restore the file from a copy, or delete that line in a copy of the directory "
            "to continue without what it recorded",
        )


def _write_all(descriptor: int, line: bytes) -> None:
    rest = memoryview(line)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _cut_torn_line(file: BinaryIO) -> None:
    """Truncate ``file`` after its last line that was written whole."""
    end = file.seek(0, os.SEEK_END)
    if not end:
        return
    start = _line_start(file, end)
    file.seek(start)
    last = file.read(end - start)
    if last.endswith(b"\n"):
        try:
            decode_event(last)
        except ValueError:
            pass
        except StoreError:
            return  # JSON of another kind was not torn: reading reports it
        else:
            return
    file.truncate(start)
    os.fsync(file.fileno())


def _line_start(file: BinaryIO, end: int) -> int:
    """Return where the last line begins; a newline that ends the file belongs to that line."""
    position = end - 1
    while position > 0:
        begin = max(0, position - _CHUNK)
        file.seek(begin)
        found = file.read(position - begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        position = begin
    return 0


def _sync_directory(path: Path) -> None:
    if os.name != "posix":
        return  # elsewhere a directory cannot be opened, and its entries are durable anyway
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _owner(path: Path) -> str:
    with suppress(OSError):
        if text := path.read_text().strip():
            return text
    return "unknown"


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)
