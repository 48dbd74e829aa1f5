"""The command line as a user meets it: what it writes, what it says, how it fails."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from map_bo.app.main import main
from map_bo.loop.reading import load_result, load_state
from map_bo.loop.run import Run
from map_bo.tracking.jsonl import JsonlStore
from tests.integration.conftest import SMALL, Shell
from tests.integration.mistakes import failing
from tests.loop.bowls import SafeBowls, quick
from tests.tracking.wandb_reader import sessions
from tests.unsealed import unseal


def test_help_names_every_command(shell: Shell) -> None:
    done = shell("--help")
    assert done.returncode == 0
    for command in ("run", "resume", "choose", "merge", "report"):
        assert command in done.stdout
    assert shell("--version").stdout.startswith("map-bo ")


def test_run_help_and_cfg_work_as_in_any_hydra_app(shell: Shell) -> None:
    help_text = shell("run", "--help").stdout
    assert "surrogate" in help_text
    assert "hybrid" in help_text
    config = yaml.safe_load(shell("run", "--cfg", "job", "loop.budget=30").stdout)
    assert config["loop"]["budget"] == 30
    assert config["problem"]["_target_"].endswith("digits_problem")
    assert "map_bo.conf" in shell("run", "--info", "searchpath").stdout


def test_shell_completion(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_LINE", "map-bo ")
    assert "choose" in shell("-sc", "query=bash").stdout.split()
    monkeypatch.setenv("COMP_LINE", "map-bo run surrogate=")
    assert "surrogate=hybrid" in shell("-sc", "query=bash").stdout.split()
    monkeypatch.setenv("COMP_LINE", "map-bo choose x")
    assert shell("-sc", "query=bash").stdout == ""
    assert "hydra_bash_completion" in shell("-sc", "install=bash").stdout


def test_a_run_directory_is_complete(finished: Path) -> None:
    for name in (
        ".hydra/config.yaml",
        "events.jsonl",
        "evaluations.csv",
        "front.csv",
        "summary.json",
        "report.html",
    ):
        assert (finished / name).stat().st_size > 0, name
    assert list((finished / "plots").glob("*.png"))
    with (finished / "evaluations.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 12
    with (finished / "front.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sum(bool(row["real:rot90"]) for row in rows) == 2
    assert all(row["predicted:rot90"] for row in rows)
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["evaluations"] == 12
    assert set(summary["reference_point"]) == {"rot90", "invert", "flip"}


def test_the_summary_says_what_matters(finished: Path) -> None:
    said = (finished / "stdout.txt").read_text()
    for word in ("reference", "uniform blend", "best expert", "predicted", "real", "map-bo choose"):
        assert word in said.lower(), word
    assert max(len(line) for line in said.splitlines() if "/" not in line) <= 80


def test_choose_says_which_metrics_have_no_range(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    Run(SafeBowls(), quick(8), JsonlStore.create(run)).drive()
    main(["choose", str(run), "--prefer", "safe=1000", "--prefer", "near a=1"])
    said = " ".join(capsys.readouterr().out.split())
    assert "note: metric 'safe' does not differ between base and experts (1)" in said
    main(["choose", str(run), "--point", "0"])
    assert "note:" not in capsys.readouterr().out


def test_choose_prints_predicted_and_real_apart(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["choose", str(finished), "--prefer", "rot90=2", "--prefer", "invert=1"])
    said = capsys.readouterr().out.lower()
    assert "predicted" in said
    assert "real" in said
    main(["choose", str(finished), "--prefer", "rot90=2", "--at-least", "flip=0.1", "--json"])
    choice = json.loads(capsys.readouterr().out)
    assert choice["predicted"]["flip"] >= 0.1
    assert choice["preference"]["weights"] == {"rot90": 2.0}
    assert 0 < choice["probability"] <= 1
    bounded = ["choose", str(finished), "--prefer", "rot90=2", "--at-least", "flip=0.1"]
    main([*bounded, "--confidence", "0.99"])
    assert "the bounds hold with probability" in capsys.readouterr().out
    main([*bounded, "--confidence", "0", "--json"])
    assert json.loads(capsys.readouterr().out)["preference"]["confidence"] is None
    said = failing(capsys, *bounded, "--confidence", "95")
    assert "confidence must be between 0 and 1, got 95" in said


def test_an_impossible_bound_says_what_is_attainable(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = failing(capsys, "choose", str(finished), "--at-least", "flip=0.9999")
    assert "flip" in said
    front = load_result(finished).front
    told = front.mean if bool(front.corrected.isnan().any()) else front.corrected
    assert f"{float(told[:, 2].max()):.3f}"[:4] in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prefer", "rot91=1"], "rot91"),
        (["--prefer", "rot90"], "must be METRIC=NUMBER, got"),
        (["--prefer", "rot90=much"], "must be METRIC=NUMBER, got"),
        (["--prefer", "rot90=1", "--prefer", "rot90=2"], "twice"),
        (["--prefer", "rot90=-1"], "rot90"),
        (["--point", "100000"], "has no point"),
        (["--point", "0", "--prefer", "rot90=1"], "--point and a preference"),
    ],
)
def test_a_bad_preference_is_told(
    finished: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in failing(capsys, "choose", str(finished), *arguments)


def test_merge_writes_the_chosen_model(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    main(["merge", str(finished), "--point", "1", "--out", str(out)])
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    # mergekit takes Hugging Face directories only, and these experts are single files.
    assert "Hugging Face" in (out / "mergekit.yaml").read_text()
    x = load_result(finished).front.X[1]
    assert list(recipe["coefficients"].values()) == pytest.approx(x.tolist())
    merged = load_file(out / "model.safetensors")
    base = load_file(recipe["base"]["source"])
    experts = [load_file(entry["source"]) for entry in recipe["experts"].values()]
    for name, value in merged.items():
        by_hand = base[name] + sum(
            c * (expert[name] - base[name]) for c, expert in zip(x, experts, strict=True)
        )
        assert torch.allclose(value, by_hand.float(), atol=1e-5)
    said = failing(capsys, "merge", str(finished), "--point", "1", "--out", str(out))
    assert "exists" in said or "overwrite" in said or "not empty" in said


def test_report_writes_the_page_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (finished / "report.html").unlink()
    main(["report", str(finished)])
    assert (finished / "report.html").stat().st_size > 1000


def test_running_into_a_run_is_refused_before_anything_is_touched(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    said = failing(capsys, "run", *SMALL, "seed=9", f"hydra.run.dir={finished}")
    assert "already holds a run" in said
    assert "map-bo resume" in said
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


def test_a_sweep_into_a_run_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = failing(capsys, "run", "-m", *SMALL, "seed=0,1", f"hydra.sweep.dir={finished}")
    assert "is the directory of a run, not of a sweep" in said


def test_what_cannot_be_built_leaves_no_run_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(capsys, "run", "problem.experts=1", f"hydra.run.dir={tmp_path / 'run'}")
    assert not (tmp_path / "run" / "events.jsonl").exists()


def test_a_directory_that_cannot_be_written_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert "/proc" in failing(capsys, "run", "hydra.run.dir=/proc/nowhere/run")


def test_merging_other_checkpoints_than_those_of_the_run_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    unseal(copy)
    text = (copy / "events.jsonl").read_text()
    digest = json.loads(text.splitlines()[0])["data"]["problem"]["experts"]["flip"]["digest"]
    (copy / "events.jsonl").write_text(text.replace(digest, "0" * len(digest)))
    said = failing(capsys, "merge", str(copy), "--point", "0", "--out", str(tmp_path / "out"))
    assert "flip" in said
    assert not (tmp_path / "out").exists()


def test_resume_goes_on_where_the_record_ends(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "cut"
    cut.mkdir()
    lines = (finished / "events.jsonl").read_text().splitlines(keepends=True)
    (cut / "events.jsonl").write_text("".join(lines[:9]) + lines[9][:20])  # torn by a kill
    main(["resume", str(cut)])
    (whole, _), (again, _) = load_state(finished), load_state(cut)
    assert torch.equal(whole.seen.Y, again.seen.Y)
    assert whole.front is not None
    assert again.front is not None
    assert torch.equal(whole.front.X, again.front.X)
    assert torch.equal(whole.verification.Y, again.verification.Y)
    # Resuming a finished run evaluates nothing and changes no event.
    events = (cut / "events.jsonl").read_bytes()
    main(["resume", str(cut)])
    assert (cut / "events.jsonl").read_bytes() == events


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "surrogate=quadratik"], "did you mean 'quadratic'?"),
        (["run", "loop.budgett=3"], "budgett"),
        (["run", "loop.budget=few"], "few"),
        (["run", "problem.experts=99"], "from 2 to 32"),
        (["run", "experiment=nothing"], "reference"),
        (["run", "loop.budget=2"], "budget"),
        (["run", "surrogate="], "surrogate"),
        (["run", "tracking=tensorboard"], "wandb"),
        (["run", "tracking=wandb", "tracking.wandb.mode=of"], "offline"),
        (["run", "a b c="], "a b c"),
        (
            ["run", *SMALL, "operator=ties", "operator.density=2"],
            "a number between 0 and 1, got 2",
        ),
        (
            ["run", *SMALL, "operator=ties", "operator.trim=layer"],
            "one of global, tensor, got",
        ),
        (["run", *SMALL, "operator=ties", "operator.search=[trim]"], "cannot search 'trim'"),
        (
            ["run", *SMALL, "operator=dare", "operator.seed=x"],
            "a whole number, got 'x'",
        ),
        (["run", *SMALL, "operator=consensus", "operator.agreement=7"], "7 tasks must agree"),
        (["run", *SMALL, "operator=slerp", "problem.lower=-1"], "hint: use a lower bound of 0"),
        (["run", *SMALL, "operator=ties", "operator.blocks={a: nothing}"], "to no block"),
        (["run", "problem=checkpoints"], "base"),
        (["choose", "nowhere"], "nowhere"),
        (["resume", "nowhere"], "nowhere"),
        (["merge", "nowhere", "--out", "x"], "nowhere"),
        (["choose"], "RUN"),
        (["frobnicate"], "choose from"),
    ],
)
def test_a_users_mistake_is_one_clear_error(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in failing(capsys, *arguments)


def test_a_corrupt_record_is_told(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    lines = (finished / "events.jsonl").read_text().splitlines(keepends=True)
    lines[3] = "not json\n"
    (broken / "events.jsonl").write_text("".join(lines))
    assert "4" in failing(capsys, "choose", str(broken))


def test_a_run_made_in_python_cannot_be_rebuilt_from_the_command_line(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    unseal(copy)
    lines = (copy / "events.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    first["data"]["config"] = None
    lines[0] = json.dumps(first, separators=(",", ":"))
    (copy / "events.jsonl").write_text("\n".join(lines) + "\n")
    said = failing(capsys, "merge", str(copy), "--point", "0", "--out", str(tmp_path / "out"))
    assert "map_bo.optimize" in said


@pytest.mark.slow
def test_a_sweep_is_a_group_of_wandb_runs(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    sweep = f"hydra.sweep.dir={tmp_path / 'sweep'}"
    done = shell("run", "-m", *SMALL, "seed=0,1", "tracking=[local,wandb]", sweep)
    assert done.returncode == 0, done.stderr
    jobs = sorted(path.parent for path in (tmp_path / "sweep").glob("*/events.jsonl"))
    assert len(jobs) == 2
    for seed, job in enumerate(jobs):
        (told,) = sessions(job)
        assert told.identity["run_group"] == "sweep"
        assert told.identity["display_name"] == f"sweep-{job.name}"
        assert told.config["seed"] == seed
        assert told.config["loop"]["budget"] == 12
        assert (job / "report.html").exists()
