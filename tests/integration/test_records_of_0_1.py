"""What version 0.1 recorded still opens: its own files, kept in ``tests/records_of_0_1``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import map_bo
from map_bo.app.main import main
from map_bo.errors import AnotherRunError
from map_bo.loop.reading import load_result
from map_bo.pareto.gradient import GradientSolver
from map_bo.problems.synthetic import ConcaveQuadratics
from map_bo.samplers.adaptive import Adaptive
from map_bo.samplers.posterior.front_uncertainty import FrontUncertainty
from map_bo.surrogates.quadratic import Quadratic

KEPT = Path(__file__).parents[1] / "records_of_0_1"
SOMEWHERE = "/home/somebody/project"  # where they were recorded
TRUST = ["--trust", "recorded_task"]
TASK = '''
"""What the recorded runs measured: a layer of four numbers, and how near it is to two targets."""

import torch


def build_model():
    return torch.nn.Linear(2, 2, bias=False)


def near(model, target):
    return (1 - (model.weight.detach() - torch.tensor(target)).square().mean().clamp(0, 1)).item()


def left(model):
    return near(model, [[-0.5, -0.25], [0.0, 0.25]])


def up(model):
    return near(model, [[0.25, 0.5], [0.25, 0.0]])
'''


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The records, with the files that they name, in the working directory."""
    shutil.copytree(KEPT, tmp_path, dirs_exist_ok=True)
    (tmp_path / "recorded_task.py").write_text(TASK)
    recipe = tmp_path / "merged" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(SOMEWHERE, str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def events(run: Path) -> list[bytes]:
    return (run / "events.jsonl").read_bytes().splitlines(keepends=True)


def cut(run: Path, kept: int) -> None:
    """Leave the first events of a run, as if it had been killed after them."""
    (run / "events.jsonl").write_bytes(b"".join(events(run)[:kept]))


def summary(run: Path) -> object:
    return json.loads(events(run)[-1])["data"].get("summary")


@pytest.mark.parametrize("run", ["configured", "nested", "python"])
def test_choose(run: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = "f1" if run == "python" else "left"
    main(["choose", run, "--prefer", f"{first}=1", "--json"])
    said = capsys.readouterr()
    assert json.loads(said.out)["preference"]["weights"] == {first: 1.0}
    assert said.err == ""


def test_the_surrogate_of_a_configured_run_is_known_by_its_old_name(project: Path) -> None:
    result = load_result("configured", refit=True)
    assert "map_bo.surrogates.gp.GP" in events(project / "configured")[0].decode()
    assert result.model is not None


def test_merge_a_run(project: Path) -> None:
    main(["merge", "configured", "--point", "0", "--out", "out", *TRUST])
    main(["merge", "nested", "--point", "0", "--out", "nested_out", *TRUST])
    assert (project / "out" / "model.safetensors").exists()
    told = (project / "out" / "recipe.yaml").read_text()
    assert "class: map_bo.operators.sparse:Ties" in told


def test_merge_a_recipe_again(project: Path) -> None:
    main(["merge", "merged", "--out", "again"])
    digest = map_bo.open_checkpoint("again").digest()
    assert f"sha256: {digest}" in (project / "merged" / "recipe.yaml").read_text()


@pytest.mark.parametrize("run", ["configured", "nested", "python"])
def test_report(run: str, project: Path) -> None:
    main(["report", run, "--out", "page"])
    assert (project / "page" / "report.html").stat().st_size > 1000


def test_report_of_several(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", "configured", "nested"])
    assert "comparison of 2 runs" in capsys.readouterr().out


@pytest.mark.parametrize(("run", "kept"), [("configured", 8), ("nested", 12)])
def test_resume(run: str, kept: int, project: Path) -> None:
    assert len(events(project / run)) > kept
    cut(project / run, kept)
    before = events(project / run)
    main(["resume", run, *TRUST])
    assert events(project / run)[:kept] == before
    assert summary(project / run)


def test_resume_a_finished_run(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = events(project / "configured")
    main(["resume", "configured", *TRUST])
    assert events(project / "configured") == before


def go_on(project: Path, *, d: int = 2, draws: int = 8) -> None:
    """Resume in Python with the settings that the recorded run was started with."""
    acquisition = FrontUncertainty(
        surrogate=Quadratic(), reference={"f1": 0.0, "f2": 0.0}, draws=draws
    )
    map_bo.optimize(
        ConcaveQuadratics(d=d, m=2),
        9,
        seed=1,
        run_dir=project / "python",
        progress=False,
        tracking="none",
        verify=1,
        solver=GradientSolver(points=8),
        surrogate=Quadratic(),
        sampler=Adaptive(acquisition=acquisition),
        stop={"criterion": "regret", "tolerance": 1e-4},
    )


def test_go_on_in_python(project: Path) -> None:
    cut(project / "python", 8)
    go_on(project)
    assert summary(project / "python")


def test_other_settings_are_told_by_their_names(project: Path) -> None:
    cut(project / "python", 8)
    before = events(project / "python")
    with pytest.raises(AnotherRunError, match=r"settings\.sampler\.acquisition\.draws was 8 and"):
        go_on(project, draws=9)
    with pytest.raises(AnotherRunError, match=r"problem\.d was 2 and is 3"):
        go_on(project, d=3)
    assert events(project / "python") == before
