"""Asking and telling from the command line, by one process and by several."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import map_bo
from map_bo.app.main import main
from map_bo.loop.optimize import open_run
from map_bo.loop.reading import load_result, load_state
from map_bo.loop.run import Run
from map_bo.problems.told import told_problem
from map_bo.tracking.jsonl import JsonlStore
from tests.integration.mistakes import failing
from tests.loop.bowls import Bowls, quick

DOCS = (Path(__file__).parents[3] / "docs" / "ask-and-tell.md").read_text()
SMALL = ["sampler=sobol", "surrogate=quadratic", "solver.points=20", "progress=false"]


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run that waits to be asked."""
    monkeypatch.chdir(tmp_path)
    problem = told_problem(["math", "code"], ["gsm8k", "humaneval"])
    Run(problem, quick(8, verify=0), JsonlStore.create(tmp_path / "study"))
    return "study"


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    main(["ask", *words, "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_rows_are_proposed_listed_and_told(
    study: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = asked(capsys, study, "-n", "3")
    assert [row["row"] for row in found["rows"]] == [0, 1, 2]
    assert found["metrics"] == {"gsm8k": "max", "humaneval": "max"}
    assert (found["told"], found["waiting"], found["left"]) == (0, 3, 5)
    assert set(found["rows"][0]["coefficients"]) == {"math", "code"}
    assert "merge" not in found["rows"][0], "nothing is known of its models"
    main(["tell", study, "1", "--json", '{"gsm8k": 0.5, "humaneval": {"value": 0.2, "n": 50}}'])
    monkeypatch.setattr("sys.stdin", io.StringIO('{"failed": "out of memory"}'))
    main(["tell", study, "0", "--json", "-"])
    Path("outcome.json").write_text('{"gsm8k": 0.4, "humaneval": 0.3}')
    assert [row["row"] for row in asked(capsys, study, "--waiting")["rows"]] == [2]
    main(["tell", study, "2", "--json", "outcome.json"])
    assert "row 2 told: 3 told, 0 waiting, 5 left" in capsys.readouterr().out
    seen = load_state(study)[0].seen
    assert seen.failures == ("out of memory", None, None)
    assert seen.Y[1:].tolist() == [[0.5, 0.2], [0.4, 0.3]]


def test_what_ask_prints_for_people_can_be_pasted(
    study: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["ask", study])
    said = capsys.readouterr().out
    assert "row 0: math=0  code=0" in said
    assert f"""map-bo tell {study} 0 --json '{{"gsm8k": VALUE, "humaneval": VALUE}}'""" in said


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        ('{"gsm8k": NaN, "humaneval": 0.3}', "must be finite, got nan"),
        ('{"gsmk": 1, "humaneval": 0.3}', "did you mean 'gsm8k'"),
        ('{"gsm8k": 1}', "the outcome lacks 'humaneval'"),
        ("[1, 2]", "must map metrics to values, got a list"),
        ("{bad", "the outcome is not JSON"),
        ("no-such-file", "neither JSON nor a file"),
    ],
)
def test_what_is_no_outcome_is_refused(
    study: str, outcome: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["ask", study])
    assert message in failing(capsys, "tell", study, "0", "--json", outcome)
    assert "row 5 does not wait" in failing(capsys, "tell", study, "5", "--json", '{"failed": "x"}')
    assert load_state(study)[0].pending == [0]


def test_asking_keeps_to_the_budget_and_says_how_to_go_on(
    study: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(asked(capsys, study, "-n", "20")["rows"]) == 8
    assert "all 8 evaluations of the search have been proposed" in failing(capsys, "ask", study)
    assert "-n must be a whole number of at least 1" in failing(capsys, "ask", study, "-n", "0")
    for row in range(8):
        main(["tell", study, str(row), "--json", '{"gsm8k": 0.5, "humaneval": 0.5}'])
    assert f"the search is complete: `map-bo resume {study}`" in capsys.readouterr().out


def test_a_run_made_in_python_is_asked_by_its_record_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "run"
    Run(Bowls(noise=0.5), quick(8), JsonlStore.create(place)).ask(1)
    assert [row["row"] for row in asked(capsys, str(place))["rows"]] == [1]
    two = map_bo.open_run(place)
    assert two.state.pending == [0, 1]
    assert Run(Bowls(noise=0.5), quick(8), JsonlStore.open(place)).state.pending == [0, 1]


ASKING = """
import sys
from map_bo.loop.optimize import open_run
run = open_run(sys.argv[1])
for _ in range(4):
    [row] = run.ask(1)
    x = run.state.X[row].tolist()
    run.tell(row, {"gsm8k": x[0], "humaneval": x[1]})
"""


@pytest.mark.slow
def test_processes_that_ask_and_tell_at_once_share_the_rows(study: str) -> None:
    words = [sys.executable, "-c", ASKING, study]
    several = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in several:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    state = load_state(study)[0]
    assert (len(state.X), state.pending) == (8, [])
    assert len(torch.unique(state.X, dim=0)) == 8
    assert torch.equal(state.seen.Y, state.X), "every outcome belongs to its row"


@pytest.mark.slow
def test_a_told_run_from_the_command_line_to_its_front(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["problem.experts=[math,code]", "problem.metrics=[gsm8k,humaneval]"]
    main(["run", "problem=told", *names, *SMALL, "loop.budget=6", "hydra.run.dir=study"])
    assert "map-bo ask study" in capsys.readouterr().out
    rows = asked(capsys, "study", "-n", "6")["rows"]
    said = failing(capsys, "resume", "study")
    assert "6 of 6 evaluations have no outcome yet (6 rows wait)" in said
    assert "loop.budget=6" not in said  # which would change nothing
    assert "tell those that will never be made as failed" in said
    for row in rows:
        values = dict(zip(("gsm8k", "humaneval"), row["x"], strict=True))
        main(["tell", "study", str(row["row"]), "--json", json.dumps(values)])
    main(["resume", "study"])
    assert (tmp_path / "study" / "report.html").exists()
    said = failing(capsys, "resume", "study", "loop.budget=8")
    assert "2 of 8 evaluations have no outcome yet" in said
    assert len(asked(capsys, "study", "-n", "9")["rows"]) == 2


@pytest.mark.slow
def test_a_run_that_could_evaluate_itself_is_only_created(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    zoo_cache: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    digits = ["problem.experts=2", "+problem.epochs=1"]
    main(["run", *digits, *SMALL, "loop.budget=8", "drive=false", "hydra.run.dir=run"])
    [row] = asked(capsys, "run")["rows"]
    assert row["merge"] == "map-bo merge run --row 0 --out row-0"
    main(row["merge"].split()[1:])
    assert (tmp_path / "row-0").is_dir()
    assert "--row is 7" in failing(capsys, "merge", "run", "--row", "7", "--out", "x")
    main(["resume", "run"])
    assert load_result("run").summary["evaluations"] == 8


@pytest.mark.slow
def test_the_cluster_of_the_docs_runs(study: str, tmp_path: Path) -> None:
    [snippet] = re.findall(r"<!-- snippet -->\n```python\n(.*?)```", DOCS, flags=re.DOTALL)
    (tmp_path / "cluster.py").write_text(
        "def measure(c):\n    return {'gsm8k': c['math'], 'humaneval': c['code']}\n"
    )
    open_run(study).ask(2)  # by a driver that was killed
    (tmp_path / "driver.py").write_text(snippet)
    words = [sys.executable, "driver.py"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    state = load_state(study)[0]
    assert state.summary is not None
    assert torch.equal(state.seen.Y, state.X)
