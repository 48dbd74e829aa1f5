"""The file beside a record that holds its large outcomes of examples: ``outcomes.bin``.

It is appended to before the event that refers to it, and both are on the disk before the run goes
on. The event holds, in place of the packed outcomes, where they stand (``offset``, ``length``) and
their SHA-256 (``sha256``), so the checksum of the event's line covers them. No byte is changed
afterwards. What a killed process left at the end of it without an event belongs to nobody and is
passed over.

Readers of events see the packed outcomes themselves, wherever they stand
(:mod:`map_bo.tracking.outcomes`); small ones stand in the event's line.
"""

from __future__ import annotations

import base64
import binascii
import errno
import hashlib
import itertools
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from map_bo.errors import StoreError
from map_bo.tracking.chain import Link, verify
from map_bo.tracking.codec import decode_event, encode_line
from map_bo.tracking.durable import reason_of, sync_directory, write_all
from map_bo.tracking.outcomes import map_outcomes
from map_bo.tracking.store import Event

__all__ = ["OUTCOMES", "Lost", "SideFile", "without_lost"]

OUTCOMES = "outcomes.bin"

_INLINE = 8192  # characters of all outcomes of an event, up to which they stand in its line
_SMALL = 512  # characters of outcomes that stand there in any case


@dataclass(frozen=True)
class Lost:
    """Outcomes that an event refers to and that are not there.

    Attributes:
        line: Number of the event's line, counted from 1.
        place: Which of the outcomes of the event they are, counted from 0.
        evaluator: Whose outcomes they are.
        reason: What is wrong.
    """

    line: int
    place: int
    evaluator: str
    reason: str


class SideFile:
    """The large outcomes of one record.

    Only the holder of the record's lock calls :meth:`put` and :meth:`take_back`.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._put: tuple[int, int] | None = None  # where what was put last begins and ends

    # Writing

    def put(self, event: Event) -> Event:
        """Write the large outcomes of an event, wait until they are on disk, and refer to them.

        Returns:
            The event as its line is to hold it; the same one where nothing is large.

        Raises:
            OSError: When they cannot be written; the file is then as it was before.
            StoreError: When another process wrote at the same moment.
        """
        self._put = None
        if sum(_lengths(event)) <= _INLINE:
            return event
        large: list[bytes] = []
        start = self.size

        def refer(evaluator: str, one: Mapping[str, Any]) -> Mapping[str, Any]:
            content = _large(one.get("packed"))
            if content is None:
                return one
            offset = start + sum(map(len, large))
            large.append(content)
            digest = hashlib.sha256(content).hexdigest()
            return {**one, "packed": {"offset": offset, "length": len(content), "sha256": digest}}

        stored = map_outcomes(event, refer)
        if large:
            self._append(b"".join(large), start)
        return stored

    def _append(self, content: bytes, start: int) -> None:
        descriptor = self._open()
        try:
            before = os.fstat(descriptor).st_size
            try:
                write_all(descriptor, content)
                os.fsync(descriptor)
                end = os.fstat(descriptor).st_size
            except BaseException:
                with suppress(OSError):  # what is left of it belongs to no event
                    os.ftruncate(descriptor, before)
                raise
        finally:
            os.close(descriptor)
        if before != start or end != start + len(content):  # locks do not work here
            raise StoreError(
                f"{self._path} is not as this process left it: another process wrote at the same "
                "moment",
                hint="drive a run in one process alone: stop the other one, and resume",
            )
        self._put = (start, end)
        if not start:  # a new name is durable only once the directory that holds it was written
            try:
                sync_directory(self._path.parent)
            except BaseException:
                self.take_back()
                raise

    def _open(self) -> int:
        """Open the file for appending; a run from somebody else may have put a link there."""
        how = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        how |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe would wait for its reader
        try:
            descriptor = os.open(self._path, how, 0o666)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENXIO):
                raise
        else:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                return descriptor
            os.close(descriptor)
        raise OSError(
            errno.ELOOP,
            f"{self._path.name} is not a regular file, and a record is not written through a link",
        )

    def take_back(self) -> None:
        """Cut off what was put last, as the event that refers to it was not written."""
        if self._put is None:
            return
        start, end = self._put
        self._put = None
        # What cannot be cut off belongs to no event and is passed over.
        with suppress(OSError):
            descriptor = os.open(self._path, os.O_WRONLY)
            try:
                if os.fstat(descriptor).st_size == end:
                    os.ftruncate(descriptor, start)
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)

    # Reading

    @property
    def size(self) -> int:
        """How many bytes there are; 0 where there is no file."""
        try:
            return os.stat(self._path).st_size
        except OSError:
            return 0

    def restore(self, events: Iterable[Event], line: int = 1) -> Iterator[Event]:
        """Yield events with their outcomes in place of where they stand.

        Args:
            events: Events as their lines hold them, in order.
            line: Number of the first one's line, for errors.

        Raises:
            StoreError: When outcomes are not there as they were written.
        """
        end = 0
        for number, event in enumerate(events, start=line):
            found, lost, end = self._resolved(event, number, end)
            if lost:
                raise StoreError(
                    f"outcomes of the examples of {lost[0].evaluator[:40]!r} in line {number} of "
                    f"the record in {self._path.parent} cannot be read: {lost[0].reason}",
                    hint=f"put the {self._path.name} of this run back; or leave out the outcomes "
                    f"that are lost, and keep all values, with `map-bo repair "
                    f"{self._path.parent}`",
                )
            yield found

    def examine(self, events: Iterable[Event]) -> tuple[list[Event], list[Lost], int]:
        """Look at everything that the events of a record refer to.

        Args:
            events: All events, as their lines hold them.

        Returns:
            The events with their outcomes, or without those that are lost; what is lost; and the
            number of bytes of the file that no event refers to.
        """
        kept, gone, end, used = [], [], 0, 0
        for number, event in enumerate(events, start=1):
            found, lost, end = self._resolved(event, number, end)
            used += sum(_lengths(event, elsewhere=True))
            kept.append(found)
            gone += lost
        return kept, gone, max(0, self.size - used)

    def _resolved(self, event: Event, line: int, begin: int) -> tuple[Event, list[Lost], int]:
        """Return the event with its outcomes, what is lost, and where those that it has end.

        What events refer to stands in their order and apart, so events of a few bytes cannot name
        the same large outcomes many times.

        Args:
            event: The event.
            line: Number of its line.
            begin: Where the outcomes of the events before it end.
        """
        lost: list[Lost] = []
        end, number = begin, -1

        def resolve(evaluator: str, one: Mapping[str, Any]) -> Mapping[str, Any] | None:
            nonlocal end, number
            number += 1
            place = one.get("packed")
            if not isinstance(place, Mapping):
                return one
            found = self._content(place, end)
            if isinstance(found, str):
                lost.append(Lost(line, number, str(evaluator), found))
                return None
            end = place["offset"] + place["length"]
            return {**one, "packed": base64.b64encode(found).decode("ascii")}

        return map_outcomes(event, resolve), lost, end

    def _content(self, place: Mapping[str, Any], begin: int) -> bytes | str:
        """Return the bytes at a place, or why they are not what was written."""
        offset, length, digest = (place.get(name) for name in ("offset", "length", "sha256"))
        if type(offset) is not int or type(length) is not int or offset < 0 or length < 0:
            return "where they stand is not told"
        if offset < begin:
            return "they stand where others do"
        try:
            # Not blocking: a pipe would wait for its writer for ever.
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return f"there is no {self._path.name}"
        except OSError as error:
            return f"{self._path.name}: {reason_of(error)}"
        try:
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode):
                return f"{self._path.name} is not a regular file"
            if about.st_size < offset + length:
                return f"{self._path.name} has {about.st_size} bytes and ends before them"
            content = os.pread(descriptor, length, offset)
        except OSError as error:
            return f"{self._path.name}: {reason_of(error)}"
        finally:
            os.close(descriptor)
        if hashlib.sha256(content).hexdigest() != digest:
            return f"{self._path.name} holds other bytes there than were written"
        return content


def _large(packed: Any) -> bytes | None:
    """Return the bytes of packed outcomes that are not to stand in the line of their event."""
    if not isinstance(packed, str) or len(packed) <= _SMALL:
        return None
    try:
        content = base64.b64decode(packed.encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error):
        return None
    return content if base64.b64encode(content).decode("ascii") == packed else None


def _lengths(event: Event, *, elsewhere: bool = False) -> list[int]:
    """Return how long the outcomes of an event are, in characters; or ``elsewhere``, in bytes."""
    found: list[int] = []

    def look(evaluator: str, one: Mapping[str, Any]) -> Mapping[str, Any]:
        packed = one.get("packed")
        length = packed.get("length") if isinstance(packed, Mapping) else None
        if isinstance(packed, str) and not elsewhere:
            found.append(len(packed))
        elif elsewhere and type(length) is int and length >= 0:
            found.append(length)
        return one

    map_outcomes(event, look)
    return found


def without_lost(lines: Sequence[bytes], lost: Sequence[Lost]) -> list[bytes]:
    """Return the lines of a record without outcomes that are lost; all values stay.

    Lines before the first of them are the same, and those from it on carry new checksums.

    Args:
        lines: Whole lines, from the first one on.
        lost: What is lost.
    """
    gone = {(one.line, one.place) for one in lost}
    if not gone:
        return list(lines)
    first = min(line for line, _ in gone) - 1
    kept, link = list(lines[:first]), Link()
    for line in kept:
        link = verify(line, link)
    for number, line in enumerate(lines[first:], start=first + 1):
        places = itertools.count()

        def leave_out(
            evaluator: str,
            one: Mapping[str, Any],
            number: int = number,
            places: Iterator[int] = places,
        ) -> Mapping[str, Any] | None:
            return None if (number, next(places)) in gone else one

        again, link = encode_line(map_outcomes(decode_event(line), leave_out), link)
        kept.append(again)
    return kept
