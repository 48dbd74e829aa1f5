"""Examining the lines of a record: which are whole, and where and why it stops being so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from map_bo.errors import StoreError
from map_bo.tracking.chain import Link, is_whole, verify
from map_bo.tracking.codec import decode_event
from map_bo.tracking.store import Event

__all__ = ["DamageError", "Examination", "Line", "examine", "walk"]


_START = Link()


class DamageError(Exception):
    """A line that is not what was written; it is turned into a `StoreError` that names the file.

    Attributes:
        number: Number of the line, counted from 1.
        start: Where in the file it begins.
        reason: What is wrong with it.
        hint: What to do about it where that is not to repair the record, such as an update.
        last: Whether nothing follows it.
    """

    def __init__(self, number: int, start: int, reason: str, hint: str | None, last: bool) -> None:
        super().__init__(reason)
        self.number, self.start, self.reason = number, start, reason
        self.hint, self.last = hint, last


@dataclass(frozen=True)
class Line:
    """One whole line.

    Attributes:
        event: What it holds.
        link: Where the chain stands after it.
        end: Where in the file it ends.
    """

    event: Event
    link: Link
    end: int


def walk(file: BinaryIO, link: Link = _START, start: int = 0) -> Iterator[Line]:
    """Yield the whole lines of a record, one in memory at a time.

    It ends at a last line without its newline: that is the beginning of a line that was never
    acknowledged, because its writer was killed.

    Args:
        file: The record, opened for reading.
        link: Where the chain stands at ``start``.
        start: Where to begin.

    Raises:
        DamageError: At the first line that is not what was written.
    """
    file.seek(start)
    line = file.readline()
    while line.endswith(b"\n"):
        following = file.readline()
        number = link.lines + 1
        try:
            event = decode_event(line)
            link = verify(line, link)
        except ValueError as error:
            reason = f"it is not JSON ({error})"
            raise DamageError(number, start, reason, None, not following) from error
        except StoreError as error:
            raise DamageError(number, start, error.message, error.hint, not following) from error
        start += len(line)
        yield Line(event, link, start)
        line = following
    if line and _goes_on(line):
        reason = "it goes on after its end, or its newline was changed"
        raise DamageError(link.lines + 1, start, reason, None, last=True)


def _goes_on(tail: bytes) -> bool:
    """Return whether a last line without newline is more than the beginning of a line."""
    if is_whole(tail):
        return True
    try:
        content, end = json.JSONDecoder().raw_decode(tail.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "v" in content and end < len(tail)


@dataclass(frozen=True)
class Examination:
    """What is whole in the file of a record.

    Attributes:
        events: The events of the whole lines, up to the first damaged one.
        link: Where the chain stands after them.
        end: Where in the file they end.
        unfinished: Bytes after them that a killed writer left.
        damage: The first damaged line, if there is one.
    """

    events: tuple[Event, ...]
    link: Link
    end: int
    unfinished: int
    damage: DamageError | None


def examine(path: Path) -> Examination:
    """Read the file of a record to its end, or to its first damaged line.

    Raises:
        OSError: When it cannot be read.
    """
    lines: list[Line] = []
    damage = None
    with open(path, "rb") as file:
        try:
            lines.extend(walk(file))
        except DamageError as error:
            damage = error
        size = file.seek(0, 2)
    link, end = (lines[-1].link, lines[-1].end) if lines else (Link(), 0)
    unfinished = 0 if damage is not None else size - end
    return Examination(tuple(line.event for line in lines), link, end, unfinished, damage)
