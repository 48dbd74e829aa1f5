"""What a finished run leaves in its directory for people: tables, plots, a page."""

from __future__ import annotations

import logging

from map_bo.loop.result import Result
from map_bo.report.artifacts import write_report
from map_bo.report.view import RunView

__all__ = ["publish", "view_of"]

logger = logging.getLogger(__name__)


def view_of(result: Result) -> RunView:
    """Return the run as the report sees it: search first, then verification."""
    return RunView(
        title=result.run_dir.name if result.run_dir is not None else "run",
        space=result.space,
        front=result.front,
        seen=result.seen.append(result.verification),
        reference_point=result.reference.point,
        reference_rule=result.reference.rule,
        summary=result.summary,
    )


def publish(result: Result) -> None:
    """Write the report of ``result`` into its run directory.

    The record is complete before this is called, so a failure here (a full disk, a plot that
    cannot be drawn) is logged and never costs the run; ``map-bo report RUN`` writes it again.
    """
    if result.run_dir is None:
        return
    try:
        write_report(view_of(result), result.run_dir)
    except Exception as error:
        logger.warning("the report could not be written: %s: %s", type(error).__name__, error)
