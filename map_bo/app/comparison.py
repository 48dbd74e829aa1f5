"""From directories of sweeps to their comparison report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from map_bo.report.comparison.comparison import Comparison

__all__ = ["Compared", "compare_directories", "publish_comparison"]


@dataclass(frozen=True)
class Compared:
    """A comparison that was written.

    Attributes:
        found: The comparison.
        page: The page that was written.
        finished: Number of runs that finished.
        missing: Name and reason of those that did not.
    """

    found: Comparison
    page: Path
    finished: int
    missing: tuple[tuple[str, str], ...]


def compare_directories(
    directories: Sequence[str | Path], out: str | Path, *, baseline: str | None = None
) -> Compared:
    """Read sweeps (or single runs) from their stores alone and write their comparison.

    Args:
        directories: Directories of sweeps or runs.
        out: Directory to write into; it is created when missing.
        baseline: Variant that the others are compared with; the first by default.

    Raises:
        StoreError: When a directory holds no run, or ``out`` cannot be written.
        DataError: When no run finished, or the runs have no metric in common.
    """
    from map_bo.errors import DataError, StoreError
    from map_bo.foreign import understood
    from map_bo.loop.reading import read_runs
    from map_bo.report.comparison.comparison import compare
    from map_bo.report.comparison.files import write_comparison

    names = [Path(directory).resolve().name for directory in directories]
    title = " and ".join(names)
    try:
        with understood(
            DataError,
            f"what is recorded of {title}",
            hint="leave out the run whose record was edited by hand, or restore it from a copy",
        ):
            records = read_runs(directories, beside=out)
            found = compare(records, title=title, baseline=baseline)
            write_comparison(found, Path(out))
    except OSError as error:
        raise StoreError(
            f"the report cannot be written to {out}: {error.strerror or error}",
            hint="make the directory writable, or name another with `map-bo report ... --out DIR`",
        ) from error
    missing = tuple((record.name, record.reason) for record in found.missing)
    return Compared(found, Path(out) / "report.html", len(found.runs), missing)


def publish_comparison(found: Comparison, *, place: str | None = None) -> tuple[str, int]:
    """Publish a comparison as a W&B Report.

    Args:
        found: The comparison.
        place: Project of the runs, ``PROJECT`` or ``ENTITY/PROJECT``, where it is not the one
            that they were recorded in.

    Returns:
        The address of the report, and how many of its runs were recorded offline.

    Raises:
        MissingDependencyError: Without ``wandb-workspaces``.
        PublishError: When no run was tracked with wandb, without a login, or when the server
            refuses the key, does not answer, or does not take the report.
    """
    from map_bo.report.wandb.publish import account, save_report
    from map_bo.report.wandb.spec import require_tracked, wandb_report

    require_tracked(found)  # first: an empty report needs no login
    who = account()
    address = save_report(wandb_report(found, entity=who.entity, place=place, site=who.site))
    offline = sum(run.record.wandb is not None and run.record.wandb.offline for run in found.runs)
    return address, offline
