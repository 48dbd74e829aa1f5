"""Hydra callbacks: refuse to run into a directory that already holds a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

__all__ = ["RefuseExistingRun"]


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
        """Exit with status 2 when the sweep directory holds events of a run."""
        directory = Path(config.hydra.sweep.dir)
        if any(map(_holds_a_run, directory.glob("**/events.jsonl"))):
            _refuse(
                f"{directory} already holds the runs of a sweep",
                "choose another directory with hydra.sweep.dir=..., or go on with each run by "
                "`map-bo resume`",
            )


def _holds_a_run(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _refuse(message: str, hint: str) -> None:
    sys.stderr.write(f"error: {message}\nhint: {hint}\n")
    # Hydra turns exceptions of callbacks into warnings; this passes through.
    raise SystemExit(2)
