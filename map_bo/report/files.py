"""Files that are replaced whole: a reader sees the old content or the new, never a part."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

__all__ = ["remove_stale", "write_whole"]

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<process>\d+)\.tmp")
_WRITTEN = frozenset(
    {
        *("report.html", "report.md", "summary.json"),
        *("evaluations.csv", "front.csv", "results.csv"),
    }
)
_PLOTS = frozenset({"plots", "comparison"})  # folders of ours that hold pictures


def write_whole(path: Path, content: str | bytes) -> None:
    """Write ``content`` (text as UTF-8) to ``path`` through a temporary file in the same folder.

    Characters that UTF-8 cannot hold (halves of surrogate pairs, from broken file names) are
    written as escapes.

    Raises:
        OSError: When it cannot be written; ``path`` is then as it was before.
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with suppress(FileNotFoundError):
        temporary.unlink()  # of a killed process that had our number, or a link of somebody else
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def remove_stale(*folders: Path) -> None:
    """Remove the temporary files that killed reports left in folders.

    They are known by their names and by that the process in them has ended; those of a process
    that still runs, and everything else, stay. What cannot be removed stays too.
    """
    for folder in folders:
        with suppress(OSError):
            for path in list(folder.iterdir()):
                found = _TEMPORARY.fullmatch(path.name)
                if found is None:
                    continue
                plot = folder.name in _PLOTS and found["name"].endswith(".png")
                ours = plot or found["name"] in _WRITTEN
                if ours and path.is_file() and not _runs(int(found["process"])):
                    with suppress(OSError):
                        path.unlink()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is somebody else's
        return True
    return True
