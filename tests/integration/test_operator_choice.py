"""The operator as a searched choice, from the command line to the merged files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

from tests.integration.conftest import SMALL, Shell


@pytest.mark.slow
def test_a_run_that_chooses_the_operator(shell: Shell, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "merged"
    done = shell("run", *SMALL, "operator=choice", f"hydra.run.dir={run}")
    assert done.returncode == 0, done.stderr
    assert "operator" in done.stdout
    with (run / "front.csv").open() as file:
        rows = list(csv.DictReader(file))
    options = {row["option:operator"] for row in rows}
    assert options <= {"task_arithmetic", "ties", "dare"}
    summary = json.loads((run / "summary.json").read_text())
    assert {name for name, count in summary["choice"]["front"].items() if count} == options
    assert min(summary["choice"]["search"].values()) > 0
    chosen = shell("choose", str(run), "--point", "0")
    assert rows[0]["option:operator"] in chosen.stdout
    merged = shell("merge", str(run), "--point", "0", "--out", str(out))
    assert merged.returncode == 0, merged.stderr
    kind = {"task_arithmetic": "TaskArithmetic", "ties": "Ties", "dare": "Dare"}
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["operator"]["class"].endswith(f":{kind[rows[0]['option:operator']]}")
    again = shell("merge", str(out), "--out", str(tmp_path / "again"))
    assert again.returncode == 0, again.stderr
    resumed = shell("resume", str(run))
    assert resumed.returncode == 0, resumed.stderr


@pytest.mark.slow
def test_what_cannot_handle_the_choice_is_refused_before_it_runs(
    shell: Shell, tmp_path: Path
) -> None:
    for wrong, said in (
        ("sampler=cmaes", "the sampler is CMAES, which does not handle a choice"),
        ("surrogate=sparse", "the surrogate is Sparse, which does not handle a choice"),
        ("nested=fronts", "nested merging needs one operator"),
    ):
        run = tmp_path / wrong.replace("=", "_")
        done = shell("run", *SMALL, "operator=choice", wrong, f"hydra.run.dir={run}")
        assert done.returncode != 0
        assert said in done.stderr
        assert "Traceback" not in done.stderr
