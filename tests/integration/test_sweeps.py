"""Sweeps as a user meets them: many jobs, one report; killed and gone on with; by any launcher."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from map_bo.app.main import main
from map_bo.loop.reading import load_state
from tests.integration.conftest import Shell
from tests.integration.mistakes import failing

JOB = [
    "problem=sigmoid",
    "problem.d=2",
    "problem.m=2",
    "sampler=sobol",
    "solver.points=20",
    "loop.budget=8",
    "loop.verify=1",
    "progress=false",
]


def jobs(sweep: Path) -> list[Path]:
    return sorted(path.parent for path in sweep.glob("*/events.jsonl"))


def events(sweep: Path) -> dict[str, bytes]:
    return {job.name: (job / "events.jsonl").read_bytes() for job in jobs(sweep)}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sweeps") / "study"
    main(["run", "-m", *JOB, "surrogate=quadratic,gp", "seed=0,1", f"hydra.sweep.dir={directory}"])
    return directory


@pytest.mark.slow
def test_every_job_has_a_directory_of_its_own_named_by_its_overrides(sweep: Path) -> None:
    assert len(jobs(sweep)) == 4
    states = [load_state(job)[0] for job in jobs(sweep)]
    designs = {(state.created["settings"]["seed"], state.seen.X.sum().item()) for state in states}
    assert len({seed for seed, _ in designs}) == 2
    assert all("loop.budget=8" in job.name and "progress" not in job.name for job in jobs(sweep))


def test_a_sweep_ends_in_a_comparison(sweep: Path) -> None:
    with (sweep / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["variant"] for row in rows} == {"surrogate=gp", "surrogate=quadratic"}
    assert {row["status"] for row in rows} == {"finished"}
    page = (sweep / "report.html").read_text()
    assert "Per-objective win rate" in page
    assert "reference point" in page
    assert (sweep / "report.md").read_text().startswith("# Comparison of study")
    for row in rows:  # the links of the page lead somewhere
        assert (sweep / row["run"] / "report.html").exists()


def test_the_report_is_rebuilt_from_the_stores_alone(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "study"
    for job in jobs(sweep):
        (copy / job.name).mkdir(parents=True)
        shutil.copy(job / "events.jsonl", copy / job.name)
    main(["report", str(copy)])
    assert "comparison of 4 runs written" in capsys.readouterr().out
    assert (copy / "results.csv").read_text() == (sweep / "results.csv").read_text()


def test_several_sweeps_are_compared_with_a_chosen_baseline(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(sweep, other)
    out = tmp_path / "both"
    main(["report", str(sweep), str(other), "--out", str(out)])
    text = (out / "report.md").read_text()
    assert "sweep=other, surrogate=gp" in text
    baseline = "sweep=study, surrogate=gp"
    main(["report", str(sweep), str(other), "--out", str(out), "--baseline", baseline])
    assert f"Differences from the baseline ({baseline})" in (out / "report.md").read_text()
    assert "no variant 'x'" in failing(capsys, "report", str(sweep), "--baseline", "x")
    said = failing(capsys, "report", str(jobs(sweep)[0]), "--baseline", "x")
    assert "is a single run" in said


def test_what_cannot_be_reported_is_told(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "holds no run" in failing(capsys, "report", str(tmp_path))
    assert "not a directory" in failing(capsys, "report", str(tmp_path / "nowhere"))
    assert "cannot be written" in failing(capsys, "report", str(sweep), "--out", "/proc/nowhere")


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_repeats_nothing(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(sweep, cut)
    done, torn, empty, gone = jobs(cut)
    lines = (torn / "events.jsonl").read_text().splitlines(keepends=True)
    (torn / "events.jsonl").write_text("".join(lines[:7]) + lines[7][:20])
    (empty / "events.jsonl").write_text("")
    shutil.rmtree(gone)
    kept = events(cut)
    capsys.readouterr()
    # In another order: jobs are known by their overrides.
    main(["run", "-m", "seed=1,0", "surrogate=gp,quadratic", *JOB, f"hydra.sweep.dir={cut}"])
    assert capsys.readouterr().out.count("already finished") == 1
    now = events(cut)
    assert now.keys() == events(sweep).keys()
    assert now[done.name] == kept[done.name]
    assert now[torn.name].startswith("".join(lines[:7]).encode())
    for job in jobs(sweep):
        whole, other = (load_state(where / job.name)[0] for where in (sweep, cut))
        assert torch.equal(whole.seen.X, other.seen.X)
        assert torch.equal(whole.seen.Y, other.seen.Y)


def test_a_failing_job_is_listed_and_the_others_finish(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "sweep"
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(
            [
                *("run", "-m", *JOB, "surrogate=quadratic", "problem.m=2,0"),
                f"hydra.sweep.dir={directory}",
            ]
        )
    said = capsys.readouterr().err
    assert caught.value.code == 1, said
    assert "1 jobs did not finish" in said
    assert "Traceback" not in said
    assert "Runs that did not finish" in (directory / "report.html").read_text()
    with (directory / "results.csv").open() as file:
        assert sorted(row["status"] for row in csv.DictReader(file)) == ["failed", "finished"]


def test_a_comparison_that_fails_is_no_success(
    sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr("map_bo.app.comparison.compare_directories", broken)
    words = ["run", "-m", *JOB, "surrogate=quadratic,gp", "seed=0,1", f"hydra.sweep.dir={sweep}"]
    said = failing(capsys, *words)
    assert "their comparison failed: RuntimeError: no font" in said
    assert f"`map-bo report {sweep}`" in said


def test_a_sweep_goes_on_with_another_tracking(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "another name"
    shutil.copytree(sweep, copy)
    capsys.readouterr()
    words = ["run", "-m", *JOB, "tracking=none", "surrogate=quadratic,gp", "seed=0,1"]
    main([*words, f"hydra.sweep.dir={copy}"])
    assert capsys.readouterr().out.count("already finished") == 4
    assert len(jobs(copy)) == 4


def test_a_sweep_over_an_option_that_nothing_reads_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = failing(capsys, "run", "-m", *JOB, "+sed=0,1", f"hydra.sweep.dir={tmp_path}")
    assert "there is no option 'sed'" in said
    assert "did you mean 'seed'?" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "more"),
    [
        ("joblib", ["hydra.launcher.n_jobs=2"]),
        ("submitit_local", []),
        ("ray", ["++hydra.launcher.ray.init.num_cpus=1"]),
    ],
)
def test_launchers_do_the_same_jobs(
    launcher: str,
    more: list[str],
    tmp_path: Path,
    shell: Shell,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if launcher == "ray":  # the others belong to the extra `dev`
        reason = "Hydra's launcher for Ray is not installed: pip install 'map-bo[ray-launcher]'"
        pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason=reason)
        monkeypatch.setenv("HOME", str(tmp_path))  # it keeps a token there
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    results = []
    for name, chosen in (("basic", []), (launcher, [f"hydra/launcher={launcher}", *more])):
        directory = tmp_path / name
        done = shell(
            *("run", "-m", *JOB, *chosen, "surrogate=quadratic", "seed=0,1"),
            f"hydra.sweep.dir={directory}",
        )
        assert done.returncode == 0, done.stderr
        assert "comparison of 2 runs" in done.stdout
        results.append({job.name: load_state(job)[0].seen for job in jobs(directory)})
    one, other = results
    assert one.keys() == other.keys()
    for name, seen in one.items():
        assert torch.equal(seen.X, other[name].X)
        assert torch.equal(seen.Y, other[name].Y)


@pytest.mark.slow
def test_a_study_is_swept_as_its_file_says(tmp_path: Path, shell: Shell) -> None:
    directory = tmp_path / "study"
    done = shell(
        *("run", "-m", "experiment=ablation_links", "problem.experts=2", "+problem.epochs=1"),
        *("surrogate=quadratic", "loop.budget=8", "loop.verify=1", "solver.points=20", "seed=0"),
        *("progress=false", f"hydra.sweep.dir={directory}"),
    )
    assert done.returncode == 0, done.stderr
    settings = [
        json.loads((job / "events.jsonl").read_text().splitlines()[0])["data"]["config"]["tree"]
        for job in jobs(directory)
    ]
    assert sorted(tree["surrogate"]["link"] for tree in settings) == ["auto", "identity"]
    assert os.path.getsize(directory / "report.html") > 10_000
