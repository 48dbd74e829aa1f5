"""Hydra callbacks: refuse to run over a run; compare the runs of a sweep at its end."""

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
    """Stops before Hydra writes its own files over those of the run that is already there."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Exit with status 2 when the run directory holds events."""
        directory = Path(config.hydra.run.dir)
        if _holds_a_run(directory / "events.jsonl"):
            _refuse(
                f"{directory} already holds a run",
                f"go on with `map-bo resume {directory}`, or choose another directory with "
                "hydra.run.dir=...",
            )

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Exit with status 2 when the sweep directory itself is that of a run.

        One that holds the jobs of a sweep is welcome: finished jobs are skipped, others go on.
        """
        directory = Path(config.hydra.sweep.dir)
        if _holds_a_run(directory / "events.jsonl"):
            _refuse(
                f"{directory} is the directory of a run, not of a sweep",
                "choose another directory with hydra.sweep.dir=...",
            )


class CompareRuns(Callback):
    """Writes the comparison report into the directory of a sweep when all its jobs are through."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write the report and say where; exit with 1 when a job did not finish, 2 without one."""
        from map_bo.app.comparing import compare_directories
        from map_bo.errors import MapBoError

        directory = Path(config.hydra.sweep.dir)
        try:
            compared = compare_directories([directory], directory)
        except MapBoError as error:
            _refuse(error.message, error.hint or f"`map-bo report {directory}` writes it again")
        except Exception as error:  # Hydra would make a warning of it, and the command a success
            logger.exception("the comparison of %s failed", directory)
            _refuse(
                f"the runs are done, and their comparison failed: {type(error).__name__}: {error}",
                f"`map-bo report {directory}` writes it again",
            )
        sys.stdout.write(f"comparison of {compared.finished} runs: {compared.page}\n")
        if compared.missing:
            sys.stderr.write(f"error: {len(compared.missing)} jobs did not finish\n")
            for name, reason in compared.missing:
                sys.stderr.write(f"  {name}: {reason}\n")
            sys.stderr.write(
                "hint: repeat the command with "
                f"hydra.sweep.dir={directory} to go on with these alone\n"
            )
            raise SystemExit(1)


def _holds_a_run(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _refuse(message: str, hint: str) -> NoReturn:
    sys.stderr.write(f"error: {message}\nhint: {hint}\n")
    # Hydra turns exceptions of callbacks into warnings; this passes through.
    raise SystemExit(2)
