"""Jobs of a sweep: their names, and what is done with one that finished, stopped or failed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from map_bo.app.jobs import job_name, register_job_name, run_job
from map_bo.app.schema import register
from map_bo.app.task import drive
from map_bo.tracking.jsonl import JsonlStore
from tests.unsealed import unseal

TOLD = {"overrides": ["seed=0"], "choices": {"surrogate": "quadratic"}}
SMALL = [
    "problem=sigmoid",
    "problem.d=2",
    "problem.m=2",
    "surrogate=quadratic",
    "sampler=sobol",
    "solver.points=20",
    "loop.budget=8",
    "loop.verify=1",
    "progress=false",
]


@pytest.fixture(autouse=True)
def hydra() -> Iterator[None]:
    register()
    with initialize_config_module("map_bo.conf", version_base="1.3"):
        yield


def composed(*overrides: str) -> DictConfig:
    return compose("config", overrides=[*SMALL, *overrides])


@given(st.text(max_size=200))
def test_a_name_can_be_a_directory(overrides: str) -> None:
    name = job_name(overrides)
    assert name == job_name(overrides)
    assert 0 < len(name.encode()) <= 255
    assert not set(name) & set("/\\\0:*?\"<>|{}' \n")
    assert name not in (".", "..")
    assert not name.startswith(".")


@given(st.sets(st.text(max_size=100), min_size=2, max_size=2))
def test_different_jobs_have_different_names(overrides: set[str]) -> None:
    assert len({job_name(text) for text in overrides if text}) == len(overrides - {""})


def test_plain_overrides_are_the_name() -> None:
    assert job_name("seed=0,surrogate=gp") == "seed=0,surrogate=gp"
    assert job_name("").startswith("defaults")
    assert job_name("problem.base=a/b").startswith("problem.base=a_b-")


def test_the_name_of_a_job_is_without_what_only_shows_it() -> None:
    register_job_name()
    telling = ["surrogate=gp", "seed=0"]
    shown = [
        "progress=false",
        "tracking=[local,wandb]",
        "tracking.wandb.project=x",
        "+tracking@a=b",
    ]
    named = OmegaConf.create({"told": telling, "name": "${map_bo.job_name:${told}}"})
    assert named.name == "seed=0,surrogate=gp"
    for more in shown:
        named.told = [more, *telling]
        assert named.name == "seed=0,surrogate=gp"
    named.told = ["problem.progress=false", *telling]
    assert named.name == "problem.progress=false,seed=0,surrogate=gp"


def test_a_finished_job_is_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = tmp_path / "job"
    value = run_job(composed(), job, TOLD)
    assert value > 0
    events = (job / "events.jsonl").read_bytes()
    created = json.loads(events.splitlines()[0])["data"]["config"]
    assert created["overrides"] == ["seed=0"]
    assert created["choices"] == {"surrogate": "quadratic"}
    capsys.readouterr()
    assert run_job(composed("progress=true"), job, TOLD) == value
    assert "already finished" in capsys.readouterr().out
    assert (job / "events.jsonl").read_bytes() == events


def test_a_job_of_version_0_1_is_not_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tmp_path / "job"
    value = run_job(composed(), job, TOLD)
    unseal(job)
    record = (job / "events.jsonl").read_text()
    old = record.replace("map_bo.samplers.designs.space_filling", "map_bo.samplers.space_filling")
    assert old != record
    (job / "events.jsonl").write_text(old)
    capsys.readouterr()
    assert run_job(composed(), job, TOLD) == value
    assert "already finished" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("lines", [0, 1, 6, -1])
def test_an_unfinished_job_goes_on_where_it_was(tmp_path: Path, lines: int) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_job(composed(), whole, TOLD)
    cut.mkdir()
    recorded = (whole / "events.jsonl").read_text().splitlines(keepends=True)
    (cut / "events.jsonl").write_text("".join(recorded[:lines]))
    run_job(composed(), cut, TOLD)

    def observed(job: Path) -> list[object]:
        events = [json.loads(line) for line in (job / "events.jsonl").read_text().splitlines()]
        return [
            {k: v for k, v in event["data"]["observation"].items() if k != "cost"}
            for event in events
            if event["kind"] == "observed"
        ]

    assert observed(cut) == observed(whole)
    assert (cut / "report.html").exists()


def test_a_finished_job_of_other_settings_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tmp_path / "job"
    run_job(composed(), job, TOLD)
    assert math.isnan(run_job(composed("loop.budget=9"), job, TOLD))
    said = capsys.readouterr().err
    assert "loop.budget was 8 and is 9" in said
    assert json.loads((job / "failure.json").read_text())["refused"] is True


def test_a_job_goes_on_with_another_tracking(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tmp_path / "job"
    value = run_job(composed("tracking=none"), job, TOLD)
    assert not (job / "report.html").exists()
    events = (job / "events.jsonl").read_bytes()
    capsys.readouterr()
    assert run_job(composed("tracking=none"), job, TOLD) == value
    assert "already finished" in capsys.readouterr().out
    # What shows it is made up for, from the record.
    assert run_job(composed("tracking=local"), job, TOLD) == value
    assert (job / "report.html").exists()
    assert (job / "events.jsonl").read_bytes() == events
    monkeypatch.setattr("map_bo.app.jobs.is_mirrored", lambda directory: True)
    capsys.readouterr()
    run_job(composed("tracking=wandb"), job, TOLD)
    assert "already finished" in capsys.readouterr().out


def test_an_option_that_nothing_reads_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert math.isnan(run_job(composed("+sampelr=sobol"), tmp_path / "job", TOLD))
    said = capsys.readouterr().err
    assert "there is no option 'sampelr'" in said
    assert "did you mean 'sampler'?" in said


def test_a_failing_job_leaves_its_reason_and_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tmp_path / "job"
    assert math.isnan(run_job(composed("problem.d=0"), job, TOLD))
    assert json.loads((job / "failure.json").read_text())["reason"]
    assert not (job / "events.jsonl").exists()
    assert "error: job:" in capsys.readouterr().err
    # The job is fixed and repeated.
    run_job(composed(), job, TOLD)
    assert not (job / "failure.json").exists()


def test_an_unforeseen_error_is_kept_with_its_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("map_bo.app.task.drive", broken)
    assert math.isnan(run_job(composed(), tmp_path / "job", TOLD))
    told = json.loads((tmp_path / "job" / "failure.json").read_text())
    assert told["reason"] == "RuntimeError: a bug"
    assert "Traceback" in told["trace"]


def test_the_seed_of_a_job_is_its_own_override() -> None:
    plain = OmegaConf.to_container(composed("seed=7"))
    assert isinstance(plain, dict)
    assert plain["seed"] == 7


@pytest.mark.slow
def test_a_job_that_was_extended_by_hand_goes_on_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tmp_path / "job"
    run_job(composed(), job, TOLD)
    config = composed("loop.budget=11")
    drive(composed(), job, changed=config, changes={})
    events = (job / "events.jsonl").read_bytes()
    capsys.readouterr()
    assert run_job(composed(), job, TOLD) > 0
    assert "already finished" in capsys.readouterr().out
    assert (job / "events.jsonl").read_bytes() == events
    store = JsonlStore.open(job)
    whole = [json.loads(line)["kind"] for line in events.splitlines()]
    store.keep(whole.index("extended") + 1)
    run_job(composed(), job, TOLD)
    assert json.loads((job / "summary.json").read_text())["evaluations"] == 11
