"""A study that grows, on the command line as a user meets it."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

from map_bo.app.main import main
from map_bo.loop.reading import load_state
from tests.integration.conftest import SMALL

GROWN = [text for text in SMALL if not text.startswith(("problem.experts", "loop."))]
GROWN += ["problem.experts=4", "loop.budget=18", "loop.verify=2"]


def failing(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    said = capsys.readouterr().err
    assert caught.value.code == 2, said
    assert "Traceback" not in said
    return said


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["run", "csv"])
def test_a_run_gains_an_expert_and_its_task(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    old = tmp_path / "old"
    shutil.copytree(finished, old)
    source = "old" if kind == "run" else "old/evaluations.csv"
    main(["run", *GROWN, f"start_from={source}", "hydra.run.dir=new"])
    said = capsys.readouterr().out
    assert "12 evaluations recorded" in said
    assert "base, experts or blend to be measured first: 6" in said
    state, space = load_state(tmp_path / "new")
    before, _ = load_state(finished)
    assert space.experts == ("rot90", "invert", "flip", "permute")
    assert torch.equal(state.seen.X[:12, :3], before.data.X)
    assert torch.equal(state.seen.X[:12, 3], torch.zeros(12).double())
    assert torch.allclose(state.seen.Y[:12, :3], before.data.Y)
    whole = state.seen.ok[:12]
    assert int(whole.sum()) == 4  # the base and three experts
    summary = json.loads((tmp_path / "new" / "summary.json").read_text())
    assert summary["imported"]["evaluations"] == 12
    assert summary["imported"]["sources"][0]["not_measured"] == {"permute": 12}
    assert summary["evaluations"] == 18
    assert summary["failures"] == 0
    with (tmp_path / "new" / "evaluations.csv").open() as file:
        rows = list(csv.DictReader(file))
    lacking = [row["y:permute"] == "" for row in rows[:12]]
    assert lacking == (~whole).tolist()
    assert all(row["failure"] == "" for row in rows)
    page = (tmp_path / "new" / "report.html").read_text()
    assert "not measured" in page
    assert "made elsewhere and imported" in page
    shutil.rmtree(old)  # once recorded, it is not needed any more
    lines = (tmp_path / "new" / "events.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "events.jsonl").write_bytes(b"".join(lines[:7]))
    main(["resume", "cut"])
    again, _ = load_state(tmp_path / "cut")
    assert torch.equal(again.seen.X, state.seen.X)
    assert again.front is not None
    assert state.front is not None
    assert torch.equal(again.front.X, state.front.X)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["start_from=nowhere"], "there is no file or directory 'nowhere'"),
        (["start_from=."], "holds no run to start from"),
        (["start_from=typo.csv"], "column 'rot9' of typo.csv is neither"),
        (["start_from=text.csv"], "line 2 of text.csv has 'good' as y:flip"),
        (["start_from=outside.csv"], "line 3: rot90 is 1.5, which is not in [0, 1]"),
        (["start_from.trust_data=true"], "start_from has options and no source"),
        (
            ["start_from.source=outside.csv", "start_from.experts={nobody: flip}"],
            "names 'nobody', which the old study does not have",
        ),
        (["start_from.source=outside.csv", "start_from.skip=3"], "must be true or false"),
        (["start_from=3"], "start_from must be a path or a mapping, got 3"),
    ],
)
def test_a_users_mistake_is_one_clear_error(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "typo.csv").write_text("rot9,y:flip\n0,0.5\n")
    (tmp_path / "text.csv").write_text("c:rot90,y:flip\n0,good\n")
    (tmp_path / "outside.csv").write_text("c:rot90,y:flip\n0,0.5\n1.5,0.5\n")
    said = failing(capsys, "run", *GROWN, *arguments, "hydra.run.dir=new")
    assert message in " ".join(said.split())
    assert not (tmp_path / "new" / "events.jsonl").exists()


def test_another_base_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = [text for text in GROWN if "epochs" not in text]
    other += ["+problem.epochs=1", f"hydra.run.dir={tmp_path / 'new'}"]
    said = failing(capsys, "run", *other, f"start_from={finished}")
    assert "other weights" in said or "another base" in said


@pytest.mark.slow
def test_rows_are_left_out_where_that_is_asked_for(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.csv").write_text("c:rot90,y:old name\n0,0.5\n1.5,0.5\n0.5,0.6\n")
    options = ["start_from.source=old.csv", "start_from.skip=true"]
    options += ["start_from.metrics={old name: flip}", "hydra.run.dir=new"]
    main(["run", *GROWN, *options])
    said = capsys.readouterr().out
    assert "2 evaluations recorded" in said
    assert (
        "1 of 3 rows of the imported study were left out; the first, line 3: rot90 is 1.5" in said
    )
    state, _ = load_state(tmp_path / "new")
    assert state.seen.X[1].tolist() == [0.5, 0.0, 0.0, 0.0]
