"""``map-bo export`` and ``map-bo import``: a run as an Ax experiment, and back."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from map_bo.ax.recording import Recorded

__all__ = ["export_run", "import_into", "report_recorded"]


def export_run(options: argparse.Namespace) -> None:
    """Write a run into a new SQLite file as an Ax experiment."""
    from map_bo.ax.database import require_storage, write_experiment
    from map_bo.ax.experiment import experiment_of

    require_storage()  # first: report a missing package before anything is read
    experiment = experiment_of(options.run, name=options.name)
    written = write_experiment(experiment, options.to)
    trials = len(experiment.trials)
    sys.stdout.write(f"experiment {experiment.name!r} ({trials} trials) written to {written}\n")


def import_into(options: argparse.Namespace) -> None:
    """Record the trials of an Ax experiment in an existing run."""
    from map_bo.ax.database import read_experiment
    from map_bo.ax.recording import record
    from map_bo.tracking.jsonl import JsonlStore

    store = JsonlStore.open(Path(options.into))  # first: a wrong name should not wait for Ax
    report_recorded(record(read_experiment(options.database, options.name), store))
    sys.stdout.write(f"continue with `map-bo resume {shlex.quote(options.into)}`\n")


def report_recorded(recorded: Recorded) -> None:
    """Print what was recorded and what was left out, and why."""
    parts = [f"{recorded.taken} observations recorded"]
    if recorded.failed:
        parts.append(f"{recorded.failed} of them failures")
    if recorded.completed:
        parts.append(f"{recorded.completed} for points that were waiting")
    lines = [", ".join(parts), f"the run now has {recorded.evaluations} evaluations"]
    reasons: dict[str, list[str]] = {}
    for left in recorded.left_out:
        reasons.setdefault(left.reason, []).append(str(left.trial))
    for reason, trials in reasons.items():
        lines.append(f"left out: trial{'s' * (len(trials) > 1)} {', '.join(trials)}: {reason}")
    sys.stdout.write("\n".join(lines) + "\n")
