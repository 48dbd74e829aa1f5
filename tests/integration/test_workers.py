"""Runs of the command line on several processes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.integration.conftest import SMALL, Shell

pytestmark = pytest.mark.slow

MINE = """
import os
from map_bo.problems.synthetic import ConcaveQuadratics

print("mine is read")

class Mine(ConcaveQuadratics):
    def evaluate(self, X, *, generator):
        assert os.getcwd() == os.path.dirname(os.path.abspath(__file__))
        return super().evaluate(X, generator=generator)
"""


def measured(run: Path) -> list[list[str]]:
    with (run / "evaluations.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [[value for name, value in row.items() if name[:2] in ("c:", "y:")] for row in rows]


def test_batches_are_the_same_for_any_number_of_workers(shell: Shell, tmp_path: Path) -> None:
    common = [*SMALL, "loop.asynchronous=false", "loop.batch=2", "sampler=sobol"]
    for name, workers in (("inline", "inline"), ("two", "2")):
        done = shell("run", f"hydra.run.dir={tmp_path / name}", *common, f"workers={workers}")
        assert done.returncode == 0, done.stderr
    assert measured(tmp_path / "inline") == measured(tmp_path / "two")
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["workers"]["count"] == 2
    assert 0 < summary["workers"]["utilisation"] <= 1
    assert (tmp_path / "two" / "workers" / "worker-2.log").exists()
    assert "workers" not in json.loads((tmp_path / "inline" / "summary.json").read_text())


def test_a_run_of_ones_own_code_goes_on_with_another_number(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    done = shell(
        *("run", "hydra.run.dir=run", "problem=concave", "problem._target_=mine.Mine"),
        *("loop.budget=6", "loop.verify=0", "sampler=sobol", "workers=1"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "mine is read" in (tmp_path / "run/workers/worker-1.log").read_text()
    more = ("resume", "run", "loop.budget=8", "workers=2")
    refused = shell(*more, cwd=tmp_path)
    assert refused.returncode == 2
    assert "--trust mine" in refused.stderr
    done = shell(*more, "--trust", "mine", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(measured(tmp_path / "run")) == 8
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["workers"]["count"] == 2


def test_a_device_that_is_not_there_leaves_no_run_behind(shell: Shell, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = shell("run", f"hydra.run.dir={run}", *SMALL, "workers=2", "workers.devices=[cuda:99]")
    assert done.returncode == 2
    assert "there is no device cuda:99 on this machine" in done.stderr
    assert not run.exists()
