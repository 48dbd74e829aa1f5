"""Run stores: an append-only file of JSON lines that survives kills and full disks, and memory."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from map_bo.errors import StoreError
from map_bo.tracking.chain import Link
from map_bo.tracking.codec import decode_event, encode_line
from map_bo.tracking.durable import (
    FULL,
    hint_of,
    new_name,
    reason_of,
    sync_directory,
    sync_file,
    write_all,
)
from map_bo.tracking.examine import DamageError, Line, examine, walk
from map_bo.tracking.side_file import OUTCOMES, Lost, SideFile, without_lost
from map_bo.tracking.store import Event

__all__ = ["JsonlStore", "MemoryStore", "is_run"]

logger = logging.getLogger(__name__)

_EVENTS = "events.jsonl"
_LOCK = "run.lock"
_OWNER = "run.owner"
_STEP = ", for one step"  # ends the owner's name while it holds the lock for a moment only
_TAIL = 64  # bytes at the end of the file by which it is recognised: the last checksum among them
_LONGEST_STEP = 600.0  # seconds to wait for the step of another process, such as a slow proposal
_SETTLES = 0.3  # seconds in which the name of the lock's owner may still be that of the one before

_PASSING = (*FULL, errno.EIO)
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)

_MEASUREMENTS = frozenset({"observed", "scored", "verified", "measured"})
_NOT_AWAITED = frozenset({"started"})
"""Kinds of events that need not outlive a power loss: that an evaluation had begun is of interest
when its process dies and the machine lives on, and then what was written is there."""


class MemoryStore:
    """A store for runs without a directory. Events go through the same codec as on disk."""

    def __init__(self) -> None:
        self._lines: list[bytes] = []
        self._link = Link()
        self._thread_lock = threading.RLock()

    def append(self, event: Event) -> None:
        """Add one event.

        Raises:
            StoreError: When its data are not plain data.
        """
        with self._thread_lock:
            line, self._link = encode_line(event, self._link)
            self._lines.append(line)

    def read(self) -> Iterator[Event]:
        """Yield all events in the order they were appended."""
        return (decode_event(line) for line in tuple(self._lines))

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Keep other threads from appending; see :class:`map_bo.tracking.store.SharedStore`."""
        with self._thread_lock:
            yield

    def lock(self) -> AbstractContextManager[None]:
        """Do nothing: no other process can write here."""
        return nullcontext()

    def after(self, count: int) -> list[Event]:
        """Return the events after the first ``count``."""
        return [decode_event(line) for line in self._lines[count:]]


@dataclass(frozen=True)
class _Left:
    """How this handle left the file, or found it when it last read all of it."""

    link: Link
    size: int
    file: tuple[int, int]  # device and inode
    tail: bytes


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

    An event is durable when :meth:`append` returns, and not written at all when it raises. Every
    line carries its number and a checksum over itself and all lines before it
    (:mod:`map_bo.tracking.chain`), so a line that is not what was written is an error that names
    it; lines of version 0.1 have no checksum and are covered by that of the first line added to
    them. Two things at the end of the file are no errors: a last line without its newline, which
    a killed process never acknowledged, is skipped by readers and cut off by the next writer; and
    a damaged last line, which readers refuse, is copied to a file beside the record by the next
    writer, which says so and goes on without it.

    Large outcomes of examples stand in a file beside it (:mod:`map_bo.tracking.side_file`); the
    events that are read hold them all the same.

    Only the holder of the lock writes: :meth:`lock` for a process that drives the run,
    :meth:`turn` for one step of several processes that ask and tell. :meth:`append` takes a turn
    where neither is held; reading needs no lock. Where locks do not work, a handle still notices
    before it writes that the file is not as it left it.

    Args:
        directory: The run's directory; :meth:`create` and :meth:`open` check it.

    Attributes:
        patience: Seconds for which an event that finds no room on the disk is kept and tried
            again, before it is printed and given up.
    """

    patience = 30.0

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        # An evaluator may change the working directory.
        self._path = self.directory.absolute() / _EVENTS
        self._side = SideFile(self._path.with_name(OUTCOMES))
        self._owner = self._path.with_name(_OWNER)
        self._file_lock = FileLock(self._path.with_name(_LOCK), thread_local=False)
        self._thread_lock = threading.RLock()
        self._left: _Left | None = None
        self._half_written = False

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
                sync_directory(changed)
        except OSError as error:
            raise StoreError(
                f"the run directory {store.directory} cannot be created: {reason_of(error)}",
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
        if not os.path.isfile(store._path):  # any name; pathlib raises on a long one
            raise StoreError(
                f"{store.directory} holds no run: there is no {_EVENTS} in it",
                hint="name a directory that `map-bo run` or `optimize(run_dir=...)` wrote",
            )
        return store

    # Whose turn it is

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from writing to this run; the lock of a killed process is free.

        Raises:
            StoreError: When another process drives the run, when the lock cannot be taken, or
                when the record is damaged before its last line.
        """
        with self._locked(step=False):
            with self._thread_lock:
                if self._left is None:
                    self._look()
            yield

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Keep others from writing for one step, after waiting for those who are at one.

        Raises:
            StoreError: As :meth:`lock`, or when the turn did not come in ten minutes.
        """
        with self._thread_lock, self._locked(step=True):
            yield

    @contextmanager
    def _locked(self, *, step: bool) -> Iterator[None]:
        if self._file_lock.is_locked:  # by this handle
            with self._file_lock:
                yield
            return
        self._wait_for_lock()
        try:
            # It is only used in messages and to wait, so a full disk does not matter here.
            with suppress(OSError):
                name = f"pid {os.getpid()}, host {socket.gethostname()}"
                self._owner.write_text(name + (_STEP if step else ""))
            yield
        finally:
            with suppress(OSError):
                self._owner.unlink()
            try:
                self._file_lock.release()
            except OSError:  # an evaluator has closed its descriptor, and the lock went with it
                self._file_lock = FileLock(self._path.with_name(_LOCK), thread_local=False)

    def _wait_for_lock(self) -> None:
        begun, pause = time.monotonic(), 0.01
        while True:
            try:
                self._file_lock.acquire(blocking=False)
                return
            except Timeout:
                owner, waited = self._owner_name(), time.monotonic() - begun
                if waited > (_LONGEST_STEP if owner.endswith(_STEP) else _SETTLES):
                    raise StoreError(
                        f"another process ({owner}) is working on this run: {self.directory}",
                        hint="wait until it has finished, or stop it",
                    ) from None
                time.sleep(pause)
                pause = min(2 * pause, 0.2)
            except (OSError, NotImplementedError) as error:
                number = error.errno if isinstance(error, OSError) else errno.ENOSYS
                if number in _NO_LOCKS:
                    hint = "its file system has no locks: put the run on a local disk, or on a "
                    hint += "network file system that is mounted with locks"
                else:
                    hint = hint_of(error)
                raise StoreError(
                    f"the run in {self.directory} cannot be locked: {reason_of(error)}",
                    hint=f"{hint}; no measurement is lost",
                ) from error

    def _owner_name(self) -> str:
        with suppress(OSError):
            if text := self._owner.read_text().strip():
                return text
        return "unknown"

    # Writing

    def append(self, event: Event) -> None:
        """Write one event as one line and wait until it is on disk.

        Where the disk is full or fails, it is tried again for :attr:`patience` seconds.

        Raises:
            StoreError: When it cannot be written (the file is then as it was before, a measurement
                is printed, and the event may be appended again later), when another process is
                writing or has written since this handle last read or wrote, when its data are not
                plain data, or when the file is damaged before its last line.
        """
        with self.turn():
            left = self._look() if self._left is None else self._left
            line, link = encode_line(event, left.link)  # as it is printed where it is not written
            self._left = self._write(line, link, event, left)

    def _write(self, line: bytes, link: Link, event: Event, left: _Left) -> _Left:
        begun, pause = time.monotonic(), 0.25
        awaited = event.subject not in _NOT_AWAITED
        while True:
            try:
                stored = self._side.put(event)  # first: what an event refers to is there
                short, after = (line, link) if stored is event else encode_line(stored, left.link)
                try:
                    self._try_to_write(short, left, sync=awaited)
                except BaseException:
                    self._side.take_back()
                    raise
                return _Left(after, left.size + len(short), left.file, short[-_TAIL:])
            except OSError as error:
                waited = time.monotonic() - begun
                if error.errno not in _PASSING or waited >= self.patience:
                    self._print(line, event)
                    raise StoreError(
                        f"an event cannot be written to {self._path}: {reason_of(error)}",
                        hint=f"{hint_of(error)} and resume; no earlier measurement is lost",
                    ) from error
                if pause == 0.25:
                    logger.warning(
                        "%s: %s; the event in hand (%s) is kept and tried again for %g s",
                        self._path, reason_of(error), event.subject, self.patience,
                    )  # fmt: skip
                try:
                    time.sleep(min(pause, self.patience - waited))
                except BaseException:
                    self._print(line, event)
                    raise
                pause = min(2 * pause, 5.0)

    def _try_to_write(self, line: bytes, left: _Left, *, sync: bool) -> None:
        descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND)
        try:
            if self._half_written:
                os.ftruncate(descriptor, left.size)
                self._half_written = False
            self._check(descriptor, left)
            try:
                self._half_written = True
                write_all(descriptor, line)
                if sync:
                    os.fsync(descriptor)
                end = os.fstat(descriptor).st_size
            except BaseException:
                os.ftruncate(descriptor, left.size)
                os.fsync(descriptor)
                self._half_written = False
                raise
            self._half_written = False
            if end != left.size + len(line):  # locks do not work, and another wrote just now
                if os.pread(descriptor, len(line), end - len(line)) == line:
                    os.ftruncate(descriptor, end - len(line))
                raise self._changed("another process wrote at the same moment")
        finally:
            os.close(descriptor)

    def _check(self, descriptor: int, left: _Left) -> None:
        """Refuse to go on when the file is not as this handle left it."""
        now = os.fstat(descriptor)
        if (now.st_dev, now.st_ino) != left.file:
            raise self._changed("another file is in its place")
        if now.st_size != left.size:
            raise self._changed(f"it has {now.st_size} bytes and had {left.size}")
        if os.pread(descriptor, _TAIL, max(0, left.size - _TAIL)) != left.tail:
            raise self._changed("its last line is another one")

    def _changed(self, how: str) -> StoreError:
        return StoreError(
            f"{self._path} is not as this process left it: {how}",
            hint="another process is writing to the run, so this one stops; nothing was "
            "overwritten. Resume the run once, in one process (`map-bo check RUN` tells whether "
            "the record is whole)",
        )

    def _print(self, line: bytes, event: Event) -> None:
        """Print a measurement that could not be written, so that it is not lost."""
        if event.subject not in _MEASUREMENTS:
            return
        with suppress(OSError):
            sys.stderr.write(
                "a measurement could not be recorded; save the next line in a file and add it "
                f"with `map-bo repair {self.directory} --append FILE`:\n{line.decode('ascii')}"
            )
            sys.stderr.flush()

    def _look(self) -> _Left:
        """Read the file in a turn, cut off what is unfinished, and set a damaged last line aside.

        Raises:
            StoreError: When the file cannot be read, or is damaged before its last line.
        """
        self._left, _ = self._walk_on(None)
        return self._left

    def _walk_on(self, left: _Left | None) -> tuple[_Left, list[Event]]:
        """Return how the file is now and the events since ``left``; see :meth:`_look`."""
        link, end = (Link(), 0) if left is None else (left.link, left.size)
        events: list[Event] = []
        try:
            with open(self._path, "r+b", buffering=1 << 16) as file:
                line: Line
                try:
                    for line in walk(file, link, end):
                        events.append(line.event)
                        link, end = line.link, line.end
                except DamageError as damage:
                    if not damage.last or damage.hint is not None:
                        raise self._damaged(damage) from damage
                    self._set_aside(damage)
                size = file.seek(0, os.SEEK_END)
                if size > end:
                    file.truncate(end)
                    os.fsync(file.fileno())
                file.seek(max(0, end - _TAIL))
                tail = file.read(_TAIL)
                status = os.fstat(file.fileno())
        except OSError as error:
            raise StoreError(
                f"{self._path} cannot be opened for writing: {reason_of(error)}",
                hint=hint_of(error),
            ) from error
        return _Left(link, end, (status.st_dev, status.st_ino), tail), events

    def _set_aside(self, damage: DamageError) -> None:
        """Copy the damaged last line to a file beside the record, and say so."""
        with open(self._path, "rb") as file:
            file.seek(damage.start)
            line = file.read()
        path = new_name(self._path.with_name(f"events.line-{damage.number}.damaged"))
        with open(path, "xb") as copy:
            copy.write(line)
            copy.flush()
            os.fsync(copy.fileno())
        logger.warning(
            "the last line (%d) of %s is damaged: %s; it was moved to %s, and the run goes on "
            "without it", damage.number, self._path, damage.reason, path,
        )  # fmt: skip

    # Reading

    def read(self) -> Iterator[Event]:
        """Yield all events in the order they were appended, one line in memory at a time.

        Raises:
            StoreError: When a line is not what was written, other than an unfinished last one.
        """
        try:
            with open(self._path, "rb") as file:
                yield from self._side.restore(line.event for line in walk(file))
        except DamageError as damage:
            raise self._damaged(damage) from damage
        except OSError as error:
            raise StoreError(
                f"{self._path} cannot be read: {reason_of(error)}",
                hint="make the file readable, or name another run",
            ) from error

    def after(self, count: int) -> list[Event]:
        """Return the events after the first ``count``; to be called in a turn.

        From then on this handle appends to what it has returned.

        Raises:
            StoreError: When the file is damaged, or does not continue what this handle knows.
        """
        with self.turn():
            left = self._left
            if left is None:
                self._left, events = self._walk_on(None)
                return self.restored(events)[count:]
            news = self._news(left)
            if count < left.link.lines:
                return list(self.read())[count:]
            return self.restored(news, left.link.lines + 1)[count - left.link.lines :]

    def restored(self, events: Iterable[Event], line: int = 1) -> list[Event]:
        """Return events as their lines hold them with their large outcomes in place.

        Args:
            events: The events.
            line: Number of the first one's line.

        Raises:
            StoreError: When outcomes are not there as they were written.
        """
        return list(self._side.restore(events, line))

    def examine_outcomes(self, events: Iterable[Event]) -> tuple[list[Event], list[Lost], int]:
        """Look at all that events refer to; see :meth:`.side_file.SideFile.examine`."""
        return self._side.examine(events)

    def _news(self, left: _Left) -> list[Event]:
        try:
            now = os.stat(self._path)
            if (now.st_dev, now.st_ino) != left.file:
                raise self._changed("another file is in its place")
            if now.st_size < left.size:
                raise self._changed(f"it has {now.st_size} bytes and had {left.size}")
            with open(self._path, "rb") as file:
                file.seek(max(0, left.size - _TAIL))
                if file.read(min(_TAIL, left.size)) != left.tail:
                    raise self._changed("its last line is another one")
        except OSError as error:
            raise StoreError(
                f"{self._path} cannot be read: {reason_of(error)}", hint=hint_of(error)
            ) from error
        if now.st_size == left.size:
            return []
        self._left, events = self._walk_on(left)
        return events

    def _damaged(self, damage: DamageError) -> StoreError:
        before = damage.number - 1
        hint = "no line before it is whole, so nothing can be saved: restore the file from a copy"
        if before:
            hint = f"lines 1 to {before} are whole; `map-bo check {self.directory}` says what they "
            hint += f"hold, and `map-bo repair {self.directory}` keeps them and puts a copy of the "
            hint += "file beside it"
        return StoreError(
            f"line {damage.number} of {self._path} cannot be read: {damage.reason}",
            hint=damage.hint or hint,
        )

    def keep(self, lines: int, lost: Sequence[Lost] = ()) -> Path:
        """Cut the record after its first ``lines``, which are whole, with a copy of it beside.

        Args:
            lines: How many.
            lost: Outcomes of examples to leave out, as they are lost.

        Returns:
            The copy.

        Raises:
            StoreError: When the run is in use, when so many lines are not whole, or when the files
                cannot be written; the record is then as it was.
        """
        with self._thread_lock, self._locked(step=True):
            copy = new_name(self._path.with_name("events.before-repair.jsonl"))
            new = self._path.with_name(f".{_EVENTS}.{os.getpid()}.tmp")
            try:
                shutil.copyfile(self._path, copy)
                sync_file(copy)
                with open(self._path, "rb") as old, open(new, "wb") as file:
                    file.writelines(without_lost(old.readlines()[:lines], lost))
                found = examine(new)
                if found.link.lines != lines or found.damage is not None:
                    new.unlink()
                    copy.unlink()
                    raise StoreError(
                        f"the first {lines} lines of {self._path} are not whole",
                        hint=f"see `map-bo check {self.directory}`",
                    )
                sync_file(new)
                new.replace(self._path)
                sync_directory(self._path.parent)
            except OSError as error:
                raise StoreError(
                    f"the record in {self.directory} cannot be repaired: {reason_of(error)}",
                    hint=hint_of(error),
                ) from error
            self._left = None
            return copy


def is_run(directory: str | Path) -> bool:
    """Return whether a directory holds the record of a run."""
    path = Path(directory) / _EVENTS
    return path.is_file() and path.stat().st_size > 0
