"""The trackers of a run by name: its local files for people, and services that show it.

``"local"`` writes tables, plots and a page into the run's directory when the run has ended;
``"wandb"`` is a mirror on Weights & Biases. Both are made from the record and never read back.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from map_bo.errors import ConfigError, did_you_mean
from map_bo.loop.reading import load_result
from map_bo.loop.result import Result
from map_bo.report.run.artifacts import write_report
from map_bo.report.view import RunView
from map_bo.tracking.store import Event
from map_bo.tracking.tracker import Tracker, Trackers, Tracking
from map_bo.tracking.wandb.mirror import Wandb

__all__ = ["Local", "publish", "trackers", "view_of"]

logger = logging.getLogger(__name__)


def view_of(result: Result, *, normalised: bool = False) -> RunView:
    """Return the view of a run that its report is made from: the search, then the verification.

    Args:
        result: The run.
        normalised: Whether to show scores normalised by each expert's own too.
    """
    found = [one.summary() for one in result.confirmed]
    confirmed = {"confirmed": found} if found else {}
    return RunView(
        title=result.run_dir.name if result.run_dir is not None else "run",
        space=result.space,
        front=result.front,
        seen=result.seen.append(result.verification),
        scale=result.scale,
        summary={**result.summary, **confirmed},
        normalised=normalised,
    )


def publish(result: Result, *, normalised: bool = False) -> None:
    """Write the report of ``result`` into its run directory.

    The record is complete before this is called, so a failure here (a full disk, a plot that
    cannot be drawn) is only logged; ``map-bo report RUN`` writes the report again.
    """
    if result.run_dir is None:
        return
    try:
        write_report(view_of(result, normalised=normalised), result.run_dir)
    except Exception as error:
        logger.warning("the report could not be written: %s: %s", type(error).__name__, error)


@dataclass(frozen=True)
class Local:
    """Tables, plots and a page in the run directory, written when the run has ended.

    Attributes:
        normalised: Whether to show scores normalised by each expert's own too.
    """

    normalised: bool = False

    def open(self, directory: Path | None) -> Tracker:
        """See :class:`map_bo.tracking.tracker.Tracking`."""
        return _Directory(directory, self.normalised)


@dataclass(frozen=True)
class _Directory:
    directory: Path | None
    normalised: bool

    def observe(self, event: Event) -> None:
        """Do nothing: the files are made from the complete record."""

    def finish(self, *, whole: bool) -> None:
        """Write the files from the record."""
        if self.directory is not None and whole:
            publish(load_result(self.directory), normalised=self.normalised)


def trackers(given: str | Tracking | Sequence[str | Tracking], directory: Path | None) -> Trackers:
    """Open the trackers of the run in ``directory``.

    Args:
        given: One or several of ``"none"``, ``"local"``, ``"wandb"`` and settings of trackers.
        directory: The run's directory, or None for a run that is kept in memory.

    Returns:
        The trackers as one; the local files come first, because others may show them.

    Raises:
        ConfigError: On an unknown name, or an object that is not the settings of a tracker.
    """
    several = [given] if isinstance(given, str | Tracking) else list(given)
    settings = [part for one in several for part in _settings(one)]
    settings.sort(key=lambda part: not isinstance(part, Local))
    return Trackers([part.open(directory) for part in settings])


def _settings(given: object) -> list[Tracking]:
    known: dict[str, list[Tracking]] = {"none": [], "local": [Local()], "wandb": [Wandb()]}
    if isinstance(given, str) and given in known:
        return known[given]
    if isinstance(given, Tracking):
        return [given]
    raise ConfigError(
        f"there is no tracker {given!r}",
        hint=f"{did_you_mean(given, known)} (or give settings that have `open(directory)`)",
    )
