"""Safetensors files made by hand, right and wrong, that the tests of the readers share."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from map_bo.errors import CheckpointError
from map_bo.merging.checkpoint import open_checkpoint

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


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
