from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SMALL = [
    "problem.experts=3",
    "+problem.epochs=2",
    "surrogate=quadratic",
    "sampler=sobol",
    "solver.points=40",
    "loop.budget=12",
    "loop.verify=2",
    "progress=false",
]

Shell = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def shell(zoo_cache: Path) -> Shell:
    """The real command line in a process of its own."""

    def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "MAP_BO_CACHE": str(zoo_cache), "COLUMNS": "80"}
        return subprocess.run(
            [sys.executable, "-m", "map_bo.app.main", *arguments],
            capture_output=True,
            text=True,
            cwd=cwd,
            env=environment,
            timeout=100,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def finished(shell: Shell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was done by the real command line."""
    directory = tmp_path_factory.mktemp("runs") / "finished"
    done = shell("run", *SMALL, f"hydra.run.dir={directory}")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    (directory / "stdout.txt").write_text(done.stdout)
    return directory
