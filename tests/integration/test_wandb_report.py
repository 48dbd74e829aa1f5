"""`map-bo report SWEEP --wandb` as a user meets it; whether its panels find what runs logged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from map_bo.app.main import main
from map_bo.loop.reading import read_runs
from map_bo.report.comparison.comparison import compare
from map_bo.report.wandb.spec import (
    Bars,
    FrontTable,
    Grid,
    Images,
    Lines,
    Parallel,
    Scatter,
    wandb_report,
)
from map_bo.tracking.wandb.service import end_service
from tests.integration.mistakes import failing
from tests.integration.test_sweeps import JOB
from tests.report.wandb_server import KEY, serving
from tests.tracking.wandb_reader import sessions


@pytest.fixture(autouse=True)
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    end_service()
    yield
    end_service()


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep whose runs were recorded offline."""
    home = tmp_path_factory.mktemp("home")
    directory = tmp_path_factory.mktemp("sweeps") / "study"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NETRC", str(home / "netrc"))
        for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT"):
            patch.setenv(f"WANDB_{name}_DIR", str(home / name.lower()))
        main(
            [
                *("run", "-m", *JOB, "tracking=[local,wandb]", "tracking.wandb.project=merging"),
                *("tracking.wandb.mode=offline", "surrogate=quadratic,gp", "seed=0"),
                f"hydra.sweep.dir={directory}",
            ]
        )
    return directory


def at(config: dict[str, Any], name: str) -> Any:
    for part in name.split("."):
        config = config[part]
    return config


@pytest.mark.slow
def test_panels_name_what_the_runs_logged(sweep: Path) -> None:
    found = compare(read_runs([sweep], beside=sweep), title="study")
    report = wandb_report(found, entity="team")
    told = {one.identity["run_id"]: one for one in sessions(sweep)}
    grids = [block for block in report.blocks if isinstance(block, Grid)]
    assert grids
    for grid in grids:
        assert {run for runs in grid.runs for run in runs.ids} == told.keys()
        assert {(runs.project, runs.groups) for runs in grid.runs} == {("merging", ("study",))}
        for one in told.values():
            logged = {name for row in one.history for name in row}
            for panel in grid.panels:
                match panel:
                    case Lines():
                        assert {panel.x, *panel.y} <= logged
                    case Bars():
                        assert set(panel.names) <= one.summary.keys()
                    case Scatter():
                        assert {panel.x, panel.y} <= one.summary.keys()
                    case Parallel():
                        for column in panel.columns:
                            if column.setting:
                                assert at(one.config, column.name) is not None
                            else:
                                assert column.name in one.summary
                    case FrontTable():
                        columns, _ = one.table(panel.table)
                        assert {panel.x, panel.y} <= set(columns)
                    case Images():
                        assert {f"{name}/path" for name in panel.names} <= logged
    (varied,) = (p for g in grids for p in g.panels if isinstance(p, Parallel))
    chosen = {at(one.config, varied.columns[0].name) for one in told.values()}
    assert chosen == {"quadratic", "gp"}


@pytest.mark.slow
def test_without_a_login_the_local_report_is_written(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as caught:
        main(["report", str(sweep), "--wandb", "--out", str(out)])
    said = capsys.readouterr()
    assert caught.value.code == 1
    assert (out / "report.html").exists()
    assert "comparison of 2 runs written" in said.out
    assert said.err == (
        "error: a W&B Report needs a login, and no key was found\n"
        "hint: run `wandb login`, or set WANDB_API_KEY; then repeat the command\n"
    )


def test_with_a_login_the_report_is_saved(
    sweep: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        capsys.readouterr()
        main(["report", str(sweep), "--wandb", "--out", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert f"W&B Report: {server.url}/team/merging/reports/Comparison-of-study" in said.out
    assert "2 of its runs were recorded offline; upload them with `wandb sync`" in said.out
    assert said.err == ""
    assert len(server.saved) == 1


def test_a_server_that_is_not_there_costs_the_local_report_nothing(
    sweep: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("map_bo.report.wandb.publish._PATIENCE", 1)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["report", str(sweep), "--wandb-project", "me/x", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert caught.value.code == 1
    assert said.count("error: the W&B Report cannot be made") == 1
    assert said.count("\n") == 2
    assert (tmp_path / "out" / "report.html").exists()


def test_runs_without_wandb_are_told(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for job in sweep.glob("*/events.jsonl"):
        copy = tmp_path / "study" / job.parent.name
        copy.mkdir(parents=True)
        (copy / "events.jsonl").write_bytes(job.read_bytes())
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["report", str(tmp_path / "study"), "--wandb"])
    said = capsys.readouterr().err
    assert caught.value.code == 1
    assert "tracking=[local,wandb]" in said
    assert (tmp_path / "study" / "report.html").exists()


def test_a_single_run_has_no_comparison_to_publish(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = next(sweep.glob("*/events.jsonl")).parent
    assert "--wandb is for a comparison" in failing(capsys, "report", str(job), "--wandb")
    assert json.loads((job / "wandb.json").read_text())["offline"] is True
