"""Safetensors files made by hand, right and wrong, that the tests of the readers share."""

from __future__ import annotations

import json
import resource
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from map_bo.errors import CheckpointError
from map_bo.merging.checkpoints.checkpoint import open_checkpoint

GOOD: dict[str, Any] = {
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "I16", "shape": [2, 2], "data_offsets": [8, 16]},
}
DATA = bytes(range(16))


def safetensors_bytes(header: object, data: bytes = DATA, length: int | None = None) -> bytes:
    """Return a file with this header (an object, or its very bytes) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def refused(source: Any, *parts: str) -> CheckpointError:
    """Check that a source is refused, with these words and a hint."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source)
    for part in parts:
        assert part in caught.value.message
    assert caught.value.hint
    return caught.value


@contextmanager
def little_room(room: int = 1 << 30) -> Iterator[None]:
    """Let the process ask for no more than so many bytes on top of what it has."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
