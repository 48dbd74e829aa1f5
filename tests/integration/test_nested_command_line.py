"""Nested merging through the real command line: run, resume, choose, merge, report, sweep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from map_bo.loop.reading import load_result
from map_bo.nested.reading import load_nested
from map_bo.problems.zoo.digits import digits_problem
from tests.integration.conftest import Shell
from tests.integration.mistakes import failing
from tests.tracking.wandb_reader import sessions

NESTED = [
    "problem.experts=4",
    "+problem.epochs=2",
    "surrogate=quadratic",
    "sampler=sobol",
    "solver.points=40",
    "loop.budget=18",
    "loop.verify=1",
    "progress=false",
    "nested=fronts",
]


@pytest.fixture(scope="module")
def nested(shell: Shell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "nested"
    done = shell("run", *NESTED, "tracking=[local,wandb]", f"hydra.run.dir={directory}")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    (directory / "stdout.txt").write_text(done.stdout)
    return directory


@pytest.mark.slow
def test_a_nested_run_says_what_it_merged_and_what_that_cost(nested: Path) -> None:
    said = (nested / "stdout.txt").read_text()
    assert "[stage 2]" in said
    assert "├─ rot90" in said.replace("│  ", "")
    summary = json.loads((nested / "summary.json").read_text())["nested"]
    assert summary["stages"] == 2
    assert summary["data_sets"] <= 18 * 4
    assert [node["node"] for node in summary["nodes"]] == ["0", "1", "root"]
    page = (nested / "report.html").read_text()
    assert "The merge tree" in page
    assert "measurements of one task at one point" in page


@pytest.mark.slow
def test_wandb_has_the_numbers_of_every_node(nested: Path) -> None:
    logged = {key for row in sessions(nested)[0].history for key in row}
    assert any(key.startswith("nested/0/metric/") for key in logged)
    assert any(key.startswith("nested/root/metric/") for key in logged)
    assert "nested/data_sets" in logged


@pytest.mark.slow
def test_a_choice_is_solved_for_and_its_model_is_what_was_chosen(
    shell: Shell, nested: Path, tmp_path: Path
) -> None:
    chosen = shell("choose", str(nested), "--prefer", "rot90=3", "--prefer", "flip=1", "--json")
    assert chosen.returncode == 0, chosen.stderr
    told = json.loads(chosen.stdout)
    assert list(told["coefficients"]) == ["rot90", "invert", "flip", "permute"]
    out = tmp_path / "merged"
    done = shell(
        "merge", str(nested), "--prefer", "rot90=3", "--prefer", "flip=1", "--out", str(out)
    )
    assert done.returncode == 0, done.stderr
    weights = load_file(out / "model.safetensors")
    problem = digits_problem(4, epochs=2)
    x = torch.tensor([list(told["coefficients"].values())], dtype=torch.float64)
    expected = problem.merged(problem.space.project(x)[0])
    for name, tensor in weights.items():
        assert torch.allclose(tensor, expected[name], atol=1e-6), name


@pytest.mark.slow
def test_a_nested_run_goes_on_after_it_was_cut_off(
    shell: Shell, nested: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "cut"
    directory.mkdir()
    lines = (nested / "events.jsonl").read_bytes().splitlines(keepends=True)
    (directory / "events.jsonl").write_bytes(b"".join(lines[: len(lines) // 2]))
    done = shell("resume", str(directory))
    assert done.returncode == 0, done.stderr
    one, two = load_result(nested), load_result(directory)
    assert torch.equal(one.seen.X, two.seen.X)
    assert torch.equal(one.front.X, two.front.X)
    assert load_nested(directory).data_sets == load_nested(nested).data_sets
    refused = shell("resume", str(directory), "--retry-failed")
    assert refused.returncode == 2
    assert "later nodes depend on them" in refused.stderr


@pytest.mark.slow
def test_a_sweep_over_stages_is_compared_at_equal_cost(shell: Shell, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    done = shell("run", "-m", *NESTED, "nested.stages=1,2", f"hydra.sweep.dir={sweep}")
    assert done.returncode == 0, done.stderr
    text = (sweep / "report.md").read_text()
    assert "nested.stages=1" in text
    assert "nested.stages=2" in text


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["nested.stages=3"], "4 experts cannot be merged in 3 stages"),
        (["nested.stages=null", "nested.tree=[[rot90,invert],flip]"], "the tree lacks permute"),
        (["nested.order=similar"], "did you mean 'similarity'?"),
        (["loop.budget=8"], "a budget of"),
        (["+nested.stage=2"], "nested has no option 'stage'"),
        (["nested=preferences", "nested.preferences=[{rot90:1}]"], "does not name invert"),
        (["start_from=ax.db"], "cannot start from an older study"),
    ],
)
def test_mistakes_are_told_without_a_trace(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, overrides: list[str], said: str
) -> None:
    directory = f"hydra.run.dir={tmp_path / 'run'}"
    assert said in failing(capsys, "run", *NESTED, *overrides, directory)
