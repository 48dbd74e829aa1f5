"""Where a benchmark's outcome goes: a table on the screen, JSON with its versions on disk."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from map_bo.loop.summary import commit, versions

__all__ = ["RESULTS", "finish", "machine"]

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Return what the numbers were measured on."""
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def finish(name: str, table: list[str], data: dict[str, Any], out: Path | None) -> None:
    """Print the table and, with ``out``, write it and the data as JSON."""
    print(f"\n## {name}\n")
    print("\n".join(table))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        record = {"name": name, "table": table, "data": data, "machine": machine()}
        out.write_text(json.dumps(record, indent=1) + "\n")
