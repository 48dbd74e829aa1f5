"""The chain of a record: every line carries its number and a checksum over itself and all before.

The checksum is BLAKE2b with 128 bits (RFC 7693, in Python's own library), taken over the checksum
of the line before and the bytes of the line. A changed bit, and a line that is missing, doubled,
moved or replaced, therefore breaks the chain at that line; by chance this goes unseen with
probability 2 ** -128, against 2 ** -32 of a cyclic redundancy check. It tells of damage, not of
forgery: whoever wants to can compute a whole new chain.

Lines of version 0.1 carry nothing. They are part of the chain all the same: the first line that a
later version adds to such a record also covers everything before it. What a chain cannot see is
that whole lines are missing at its end.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from map_bo.errors import StoreError

__all__ = ["Link", "is_whole", "seal", "verify"]

_SEAL = b',"sum":"'
_LENGTH = 32  # hexadecimal digits of 128 bits
_END = b'"}'
_OLD = b'{"v":1,'  # begins a line of version 0.1
_SEALED = re.compile(rb'\{"v":\d+,"seq":(\d{1,15}),.*,"sum":"[0-9a-f]{32}"\}', re.DOTALL)


@dataclass(frozen=True)
class Link:
    """Where a chain stands after some lines.

    Attributes:
        lines: How many lines there are so far.
        digest: The checksum over all of them.
        sealed: How many of them carry a checksum; these are the last ones.
    """

    lines: int = 0
    digest: bytes = bytes(_LENGTH // 2)
    sealed: int = 0


def _digest(before: bytes, body: bytes) -> bytes:
    return hashlib.blake2b(before + body, digest_size=_LENGTH // 2).digest()


def seal(body: bytes, link: Link) -> tuple[bytes, Link]:
    """Return the line that holds ``body``, and where the chain stands after it.

    Args:
        body: A JSON object whose ``seq`` is ``link.lines + 1``, without whitespace.
        link: Where the chain stands before it.
    """
    body = body.removesuffix(b"}")
    digest = _digest(link.digest, body)
    line = body + _SEAL + digest.hex().encode("ascii") + _END + b"\n"
    return line, Link(link.lines + 1, digest, link.sealed + 1)


def verify(line: bytes, link: Link) -> Link:
    """Return where the chain stands after ``line``, which ends with its newline.

    Raises:
        StoreError: When the line is not the one that was written there.
    """
    found = _SEALED.fullmatch(line, 0, len(line) - 1)
    if found is None:
        if link.sealed or not line.startswith(_OLD):
            raise StoreError("its checksum is missing or damaged")
        return Link(link.lines + 1, _digest(link.digest, line), 0)
    end = len(line) - 1 - len(_END) - _LENGTH - len(_SEAL)
    digest = _digest(link.digest, line[:end])
    if line[end + len(_SEAL) : -1 - len(_END)] == digest.hex().encode("ascii"):
        return Link(link.lines + 1, digest, link.sealed + 1)
    number, here = int(found[1]), link.lines + 1
    if number < here:
        raise StoreError(f"it is line {number} of the record once more: doubled, or moved")
    if number > here:
        gone = f"line {here} is" if number == here + 1 else f"lines {here} to {number - 1} are"
        raise StoreError(f"it was written as line {number}: {gone} missing before it")
    raise StoreError("it was changed after it was written, or a line before it was")


def is_whole(tail: bytes) -> bool:
    """Return whether bytes without a newline begin with a whole line and go on after its end.

    A process that is killed leaves the beginning of a line, which is never that.
    """
    found = _SEALED.match(tail)
    return found is not None and found.end() < len(tail)
