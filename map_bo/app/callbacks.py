"""Hydra callbacks: refuse to overwrite a run; compare the runs of a sweep at its end."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any, NoReturn

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

__all__ = ["CompareRuns", "RefuseExistingRun"]

logger = logging.getLogger(__name__)


class RefuseExistingRun(Callback):
    """Stops before Hydra overwrites the files of a run that is already in the directory."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Exit with status 2 when the run directory holds events."""
        directory = Path(config.hydra.run.dir)
        if _holds_a_run(directory / "events.jsonl"):
            _refuse(
                f"{directory} already holds a run",
                f"continue it with `map-bo resume {directory}`, or choose another directory with "
                "hydra.run.dir=...",
            )

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Exit with status 2 when the sweep directory is the directory of a run.

        A directory with the jobs of a sweep is accepted: finished jobs are skipped and others are
        resumed.
        """
        directory = Path(config.hydra.sweep.dir)
        if _holds_a_run(directory / "events.jsonl"):
            _refuse(
                f"{directory} is the directory of a run, not of a sweep",
                "choose another directory with hydra.sweep.dir=...",
            )


class CompareRuns(Callback):
    """Writes the comparison report into the directory of a sweep after all its jobs."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write the report; exit with 1 when a job did not finish, with 2 without a report."""
        from map_bo.app.comparison import compare_directories
        from map_bo.errors import MapBoError

        directory = Path(config.hydra.sweep.dir)
        try:
            compared = compare_directories([directory], directory)
        except MapBoError as error:
            _refuse(error.message, error.hint or f"write it again with `map-bo report {directory}`")
        except (
            Exception
        ) as error:  # Hydra would turn it into a warning, and the command would succeed
            logger.exception("the comparison of %s failed", directory)
            _refuse(
                f"the runs are done, but their comparison failed: {type(error).__name__}: {error}",
                f"write it again with `map-bo report {directory}`",
            )
        sys.stdout.write(f"comparison of {compared.finished} runs: {compared.page}\n")
        if compared.missing:
            sys.stderr.write(f"error: {len(compared.missing)} jobs did not finish\n")
            for name, reason in compared.missing:
                sys.stderr.write(f"  {name}: {reason}\n")
            sys.stderr.write(
                "hint: repeat the command with "
                f"hydra.sweep.dir={directory} to continue only these\n"
            )
            raise SystemExit(1)


def _holds_a_run(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _refuse(message: str, hint: str) -> NoReturn:
    sys.stderr.write(f"error: {message}\nhint: {hint}\n")
    # Hydra turns exceptions of callbacks into warnings; SystemExit passes through.
    raise SystemExit(2)
