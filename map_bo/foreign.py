"""JSON and YAML in files of others: bounded before they are expanded, and refused in one way.

Files of a few kilobytes can name gigabytes: YAML whose aliases multiply or contain themselves,
JSON nested a hundred thousand deep, a link to a device that never ends. What is refused here is
refused with a :class:`ValueError`, and :func:`understood` turns whatever malformed data make of the
code that reads them into one error of the family.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from map_bo.errors import MapBoError, first_line

__all__ = ["parse_json", "parse_yaml", "read_json", "read_text", "read_yaml", "understood"]

MOST_BYTES = 100_000_000
"""Largest file of text that is read, in bytes; the tokenizers of large models have 40 million."""

_DEEPEST = 100
_FREE = 10_000  # nodes that aliases may add in any case
_TIMES = 10  # and how many times the nodes that are written


def read_text(path: Path, *, most: int = MOST_BYTES) -> str:
    """Return the text of a file, as UTF-8.

    Args:
        path: The file.
        most: Largest number of bytes.

    Raises:
        OSError: When it cannot be read.
        ValueError: When it is not a file of that size, or not UTF-8.
    """
    # Not blocking: a pipe would wait for its writer for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("it is not a regular file")
        if about.st_size > most:
            raise ValueError(f"it has {about.st_size} bytes, and {most} are the most that are read")
        return file.read(most + 1).decode("utf-8")


def read_json(path: Path) -> Any:
    """Return what a file of JSON says; errors are those of `read_text` and `parse_json`."""
    return parse_json(read_text(path))


def read_yaml(path: Path) -> Any:
    """Return what a file of YAML says; errors are those of `read_text` and `parse_yaml`."""
    return parse_yaml(read_text(path))


def parse_json(text: str) -> Any:
    """Return what JSON says.

    Raises:
        ValueError: When it is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_yaml(text: str) -> Any:
    """Return what YAML says, in plain data.

    Raises:
        ValueError: When it is not YAML, is nested more than 100 deep, contains itself, or has
            aliases that repeat more than ten times what is written.
    """
    try:
        _require_bounded(text)
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(first_line(error)) from error
    # Its constructors raise what dates, numbers and keys of a wrong form make of them.
    except (RecursionError, OverflowError, TypeError, AttributeError, LookupError) as error:
        raise ValueError(f"a value cannot be read: {first_line(error)}") from error


def _require_bounded(text: str) -> None:
    """Refuse YAML that is small only as long as its aliases are not followed."""
    written = expanded = 0
    sizes: dict[str, int] = {}
    within: list[tuple[str | None, int]] = []  # anchors, and how much there was before each
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, before = within.pop()
            if anchor is not None:
                sizes[anchor] = expanded - before
        elif isinstance(event, yaml.AliasEvent):
            name = str(event.anchor)
            if any(anchor == name for anchor, _ in within):
                raise ValueError(f"the alias *{name[:80]} contains itself")
            expanded += sizes.get(name, 0)
        elif isinstance(event, yaml.NodeEvent):
            written, before, expanded = written + 1, expanded, expanded + 1
            if isinstance(event, yaml.CollectionStartEvent):
                within.append((event.anchor, before))
            elif event.anchor is not None:
                sizes[event.anchor] = 1
        if len(within) > _DEEPEST:
            raise ValueError(f"it is nested more than {_DEEPEST} deep")
        if expanded > _TIMES * written + _FREE:
            raise ValueError("its aliases repeat too much")


@contextmanager
def understood(kind: type[MapBoError], what: str, *, hint: str) -> Iterator[None]:
    """Raise one error for whatever malformed data make of the block that reads them.

    Errors of the family and of the system pass through.

    Args:
        kind: Kind of the error.
        what: What cannot be read, to begin the message with.
        hint: What to do about it.
    """
    try:
        yield
    except (MapBoError, OSError):
        raise
    except Exception as error:  # data of any form can make any error of code that expects another
        said = f"{type(error).__name__}: {first_line(error)}"
        raise kind(f"{what} cannot be read: {said}", hint=hint) from error
