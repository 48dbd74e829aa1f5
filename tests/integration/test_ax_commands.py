"""A run to Ax and back, on the command line as a user meets it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from map_bo.app.main import main
from map_bo.ax.database import experiment_names, read_experiment, write_experiment
from map_bo.ax.observations import observations_of
from map_bo.loop.reading import load_state
from map_bo.samplers.baselines.ax_library import import_ax
from tests.ax.exported import load, own_client, same, storage
from tests.integration.conftest import SMALL, Shell

VALUES = {"rot90": (0.4, 0.01), "m_invert": (0.5, 0.01), "flip": (0.6, 0.01)}


pytestmark = pytest.mark.slow  # importing Ax takes seconds, in every process


@pytest.fixture(autouse=True, scope="module")
def _ax() -> None:
    import_ax("a test")


@pytest.fixture(scope="module")
def cut(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as a kill left it: four evaluations whole, and the last proposal waits."""
    directory = tmp_path_factory.mktemp("cut") / "run"
    directory.mkdir()
    lines = (finished / "events.jsonl").read_text().splitlines(keepends=True)
    (directory / "events.jsonl").write_text("".join(lines[:14]))
    assert json.loads(lines[13])["kind"] == "proposed"
    return directory


def failing(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    said = capsys.readouterr().err
    assert caught.value.code == 2, said
    assert "Traceback" not in said
    return said


@pytest.mark.slow
def test_a_run_is_exported_by_the_real_command_line(
    shell: Shell, finished: Path, tmp_path: Path
) -> None:
    done = shell("export", str(finished), "--to", "ax.db", "--name", "mine", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout == "experiment 'mine' (12 trials) written to ax.db\n"
    assert os.listdir(tmp_path) == ["ax.db"]
    state, space = load_state(finished)
    experiment = read_experiment(tmp_path / "ax.db")
    assert same(observations_of(experiment, space, state.metrics).observations, state.data)
    again = shell("export", str(finished), "--to", "ax.db", cwd=tmp_path)
    assert again.returncode == 2
    assert "exists and is not overwritten" in again.stderr
    assert experiment_names(tmp_path / "ax.db") == ["mine"]


@pytest.mark.slow
def test_what_ax_measured_comes_back_and_the_run_goes_on(
    shell: Shell, cut: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(cut, run)
    main(["export", str(run), "--to", str(tmp_path / "ax.db")])
    with storage(tmp_path / "ax.db") as url:
        client = load(url, "run")
        waiting = [i for i, t in client._experiment.trials.items() if t.status.is_running]
        client.complete_trial(waiting[0], VALUES)
        point = {"c_rot90": 0.3, "c_invert": 0.3, "c_flip": 0.3}
        client.complete_trial(client.attach_trial(point), VALUES)
        client.complete_trial(client.attach_trial({**point, "c_flip": 9.0}), VALUES)
    done = shell("import", "ax.db", "--into", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == "2 observations recorded, 1 for points that were waiting"
    assert lines[1].startswith("the run now has ")
    assert any("the run has it already" in line for line in lines)
    assert any("lies outside the space" in line for line in lines)
    assert "map-bo resume run" in lines[-1]
    before, _ = load_state(run)
    resumed = shell("resume", "run", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    after, _ = load_state(run)
    assert after.summary is not None
    assert after.summary["evaluations"] == 12
    assert same(after.seen.select(range(len(before.seen))), before.seen)


@pytest.fixture(scope="module")
def started(shell: Shell, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new run that began with the trials of an experiment."""
    here = tmp_path_factory.mktemp("started")
    main(["export", str(finished), "--to", str(here / "ax.db")])
    more = ["loop.budget=16", "start_from=ax.db", "hydra.run.dir=new"]
    done = shell("run", *SMALL, *more, cwd=here)
    assert done.returncode == 0, done.stderr
    assert "12 observations recorded" in done.stdout
    return here


@pytest.mark.slow
def test_a_new_run_starts_from_an_experiment(finished: Path, started: Path) -> None:
    old, _ = load_state(finished)
    state, _ = load_state(started / "new")
    assert state.summary is not None
    assert state.summary["evaluations"] == 16
    assert same(state.seen.select(range(12)), old.data)


def test_killed_before_the_trials_were_recorded_it_takes_them_when_it_goes_on(
    started: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = started / "killed"
    killed.mkdir()
    first = (started / "new" / "events.jsonl").read_text().splitlines(keepends=True)[0]
    (killed / "events.jsonl").write_text(first)
    main(["resume", str(killed)])
    assert "12 observations recorded" in capsys.readouterr().out
    state, _ = load_state(started / "new")
    again, _ = load_state(killed)
    assert torch.equal(again.data.X, state.data.X)
    assert torch.equal(again.data.Y, state.data.Y)


def test_once_recorded_the_file_is_not_needed_any_more(started: Path, tmp_path: Path) -> None:
    shutil.copytree(started / "new", tmp_path / "new")
    os.rename(started / "ax.db", started / "away.db")
    try:
        main(["resume", str(tmp_path / "new")])
    finally:
        os.rename(started / "away.db", started / "ax.db")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "nowhere", "--to", "x.db"], "holds no run"),
        (["export", "{run}"], "--to"),
        (["export", "{run}", "--to", "missing/x.db"], "cannot be written"),
        (["export", "{run}", "--to", "/proc/x.db"], "cannot be written"),
        (["export", "{run}", "--to", "text"], "exists and is not overwritten"),
        (["export", "{fresh}", "--to", "x.db"], "no evaluation yet"),
        (["import", "text", "--into", "{run}"], "is not a database of Ax"),
        (["import", "missing.db", "--into", "{run}"], "there is no file"),
        (["import", "text", "--into", "nowhere"], "holds no run"),
        (["import", "text"], "--into"),
        (["import", "other.db", "--into", "{run}"], "lacks the parameters rot90"),
        (["import", "other.db", "--into", "{run}", "--name", "x"], "holds no experiment 'x'"),
        (["run", *SMALL, "start_from=text", "hydra.run.dir=new"], "is not a database of Ax"),
        (["run", *SMALL, "start_from=other.db", "hydra.run.dir=new"], "lacks the parameters"),
    ],
)
def test_a_users_mistake_is_one_clear_error(
    finished: Path,
    cut: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("no database\n" * 100)
    (tmp_path / "fresh").mkdir()
    first = (finished / "events.jsonl").read_text().splitlines(keepends=True)[0]
    (tmp_path / "fresh" / "events.jsonl").write_text(first)
    if "other.db" in " ".join(arguments):
        write_experiment(own_client()._experiment, tmp_path / "other.db")
    before = set(os.listdir(tmp_path))
    events = (cut / "events.jsonl").read_bytes()
    places = {"run": cut, "fresh": tmp_path / "fresh"}
    said = failing(capsys, *(argument.format(**places) for argument in arguments))
    assert message in said
    assert not {name for name in os.listdir(tmp_path) if name.endswith(".tmp")}
    assert not (tmp_path / "x.db").exists()
    assert not (tmp_path / "new" / "events.jsonl").exists()
    assert before <= set(os.listdir(tmp_path))
    assert (cut / "events.jsonl").read_bytes() == events


def test_an_import_into_a_finished_run_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["export", str(finished), "--to", str(tmp_path / "ax.db")])
    with storage(tmp_path / "ax.db") as url:
        client = load(url, "finished")
        point = {"c_rot90": 0.3, "c_invert": 0.3, "c_flip": 0.3}
        client.complete_trial(client.attach_trial(point), VALUES)
    said = failing(capsys, "import", str(tmp_path / "ax.db"), "--into", str(finished))
    assert "front of this run has been solved" in said
    assert "start_from" in said


@pytest.mark.parametrize("missing", ["sqlalchemy", "tabulate"])
def test_the_missing_extra_is_told_with_the_way_to_get_it(
    cut: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    missing: str,
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    said = failing(capsys, "export", str(cut), "--to", str(tmp_path / "ax.db"))
    assert 'pip install "map-bo[ax-sql]"' in said
    assert os.listdir(tmp_path) == []
