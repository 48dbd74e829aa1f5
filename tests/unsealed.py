"""Records as version 0.1 wrote them: without checksums, so that a test may edit them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def unseal(run: Path, edit: Callable[[str], str] = str) -> None:
    """Take the checksums out of a run's record, and then ``edit`` its text."""
    path = run / "events.jsonl"
    lines = [_unsealed(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text(edit("".join(lines)))


def _unsealed(line: dict[str, Any]) -> str:
    old = {"v": 1} | {name: line[name] for name in ("kind", "time", "data")}
    return json.dumps(old, separators=(",", ":")) + "\n"
