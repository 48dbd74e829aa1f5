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
        if (directory / "events.jsonl").exists():
            sys.stderr.write(
                f"error: {directory} already holds a run\n"
                f"hint: go on with `map-bo resume {directory}`, or choose another directory "
                "with hydra.run.dir=...\n"
            )
            # Hydra turns exceptions of callbacks into warnings; this passes through.
            raise SystemExit(2)
