"""Reads the file that an offline wandb run writes: what a test may know of what was logged.

The file is a LevelDB log after seven bytes of its own: blocks of 32 KiB hold fragments, each with
a header of checksum (4 bytes), length (2) and kind (1); a fragment is a whole record, or its
first, middle or last part. A record is a ``wandb_internal_pb2.Record``.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK = 32 * 1024
HEADER = struct.Struct("<IHB")
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def messages(content: bytes) -> Iterator[bytes]:
    """Yield the records of a file as bytes; a torn end is passed over."""
    assert content.startswith(b":W&B"), "not a file of wandb"
    parts: list[bytes] = []
    position = HEADER.size  # the file's own seven bytes are as long as a header
    while position + HEADER.size <= len(content):
        room = BLOCK - position % BLOCK
        if room < HEADER.size:
            position += room
            continue
        _, length, kind = HEADER.unpack_from(content, position)
        position += HEADER.size
        if not kind or position + length > len(content):
            return
        parts = [*parts, content[position : position + length]]
        position += length
        if kind in (WHOLE, LAST):
            yield b"".join(parts)
            parts = []


@dataclass
class Recorded:
    """What one session wrote of a run."""

    identity: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, list[str]] = field(default_factory=dict)
    exit_code: int | None = None
    folder: Path = Path()

    def column(self, name: str) -> list[Any]:
        """Return all values that were logged under a name, in order."""
        return [row[name] for row in self.history if name in row]

    def table(self, name: str) -> tuple[list[str], list[list[Any]]]:
        """Return the columns and rows of a logged table."""
        (path,) = self.column(f"{name}/path")
        content = json.loads((self.folder / "files" / path).read_text())
        return content["columns"], content["data"]


def recorded(path: Path) -> Recorded:
    """Read a ``run-*.wandb`` file."""
    from importlib import import_module

    format_of: Any = import_module("wandb.proto.wandb_internal_pb2")

    found = Recorded(folder=path.parent)
    for message in messages(path.read_bytes()):
        record = format_of.Record.FromString(message)
        match record.WhichOneof("record_type"):
            case "run":
                run = record.run
                for name in ("run_id", "project", "run_group", "job_type", "display_name"):
                    found.identity[name] = getattr(run, name)
                found.identity["tags"] = list(run.tags)
                found.config.update(_items(run.config.update))
            case "config":
                found.config.update(_items(record.config.update))
            case "history":
                found.history.append(_items(record.history.item))
            case "summary":
                found.summary.update(_items(record.summary.update))
            case "artifact":
                contents = record.artifact.manifest.contents
                found.artifacts[record.artifact.name] = sorted(entry.path for entry in contents)
            case "exit":
                found.exit_code = record.exit.exit_code
    return found


def ended(path: Path, patience: float = 30.0) -> Recorded:
    """Read a file once its end is written, which wandb's own process does in its own time."""
    until = time.monotonic() + patience
    while (found := recorded(path)).exit_code is None and time.monotonic() < until:
        time.sleep(0.05)
    return found


def sessions(folder: Path) -> list[Recorded]:
    """Read all sessions below a folder, the oldest first."""
    paths = folder.glob("**/offline-run-*/run-*.wandb")
    return [ended(path) for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns)]


def _items(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
