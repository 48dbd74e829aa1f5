"""Records as version 0.1 wrote them: without checksums, so that a test may edit them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path


def unseal(run: Path, edit: Callable[[str], str] = str) -> None:
    """Take the checksums out of a run's record, and then ``edit`` its text."""
    path = run / "events.jsonl"
    lines = [unsealed(line).decode() for line in path.read_bytes().splitlines()]
    path.write_text(edit("".join(lines)))


def unsealed(line: bytes) -> bytes:
    """Return a line as version 0.1 wrote it."""
    content = json.loads(line)
    old = {"v": 1} | {name: content[name] for name in ("kind", "time", "data")}
    return json.dumps(old, separators=(",", ":")).encode("ascii") + b"\n"
