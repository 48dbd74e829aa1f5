"""All files that a run leaves in its directory for people, each written whole or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from map_bo.errors import DataError
from map_bo.foreign import understood
from map_bo.report.files import remove_stale, write_whole
from map_bo.report.normalised import OwnScores
from map_bo.report.run.page import write_html
from map_bo.report.run.plots import write_plots
from map_bo.report.run.tables import write_evaluations_csv, write_front_csv
from map_bo.report.view import RunView

__all__ = ["remove_report", "write_report", "write_summary"]

_HINT = "restore the record of the run from a copy if it was edited by hand"


def write_report(view: RunView, directory: Path) -> None:
    """Write the tables, the summary, the plots and the page of a run into ``directory``.

    They are ``evaluations.csv``, ``front.csv``, ``summary.json``, ``plots/*.png`` and
    ``report.html``. The plain files are written first, so that they exist even when a plot cannot
    be drawn.

    Raises:
        OSError: When a file cannot be written; the file is then as it was before.
        DataError: When the summary is of a form that map_bo does not write.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    remove_stale(directory, directory / "plots")
    with understood(DataError, f"what is recorded of {view.title}", hint=_HINT):
        write_evaluations_csv(view, view.space, directory / "evaluations.csv")
        own = OwnScores.of(view.seen, view.space) if view.normalised else None
        write_front_csv(view.front, view.space, directory / "front.csv", own)
        write_summary(view.summary, directory / "summary.json")
        plots = write_plots(view, directory / "plots")
        write_html(view, directory / "report.html", plots)


def remove_report(directory: Path) -> None:
    """Remove what :func:`write_report` wrote of a run that goes on: it tells of another front.

    Plots of other formats and whatever else is in the directory stay, and so does what cannot be
    removed.
    """
    names = ("summary.json", "front.csv", "evaluations.csv", "report.html")
    for path in [*(directory / name for name in names), *directory.glob("plots/*.png")]:
        with suppress(OSError):
            path.unlink()
    with suppress(OSError):
        (directory / "plots").rmdir()


def write_summary(summary: Mapping[str, Any], path: Path) -> None:
    """Write ``summary`` as strict, indented JSON; NaN and infinity become null."""
    text = json.dumps(_strict(summary), indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(path, text + "\n")


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _strict(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
