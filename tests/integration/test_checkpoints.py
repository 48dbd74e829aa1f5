"""A user's own module, own files and own evaluators, through the command line and in Python."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import map_bo
from map_bo.app.main import main
from map_bo.errors import EvaluationError

TASK = """
import torch


def build_model():
    return torch.nn.Linear(2, 1)


def pulls_left(model):
    return torch.sigmoid(-model.weight[0, 0]).item()


def pulls_up(model):
    return torch.sigmoid(model.weight[0, 1]).item()


def breaks(model):
    raise RuntimeError("the data set is gone")
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's directory: a task module, a base and two experts."""
    name = f"own_task_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(TASK)
    generator = torch.Generator().manual_seed(0)
    base = {"weight": torch.randn(1, 2, generator=generator), "bias": torch.ones(1)}
    save_file(base, tmp_path / "base.safetensors")
    for expert, delta in (("left", [-0.6, -0.3]), ("up", [0.3, 0.6])):
        tensors = {"weight": base["weight"] + torch.tensor([delta]), "bias": base["bias"]}
        save_file(tensors, tmp_path / f"{expert}.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def own(project: Path) -> str:
    """The name of the user's module."""
    (module,) = (path.stem for path in project.glob("own_task_*.py"))
    return module


def overrides(project: Path, second: str = "pulls_up") -> list[str]:
    module = own(project)
    return [
        "problem=checkpoints",
        f"problem.model={module}:build_model",
        "problem.base=base.safetensors",
        "+problem.experts.left=left.safetensors",
        "+problem.experts.up=up.safetensors",
        f"+problem.evaluators.left={module}:pulls_left",
        f"+problem.evaluators.up={module}:{second}",
        "surrogate=quadratic",
        "sampler=sobol",
        "solver.points=20",
        "loop.budget=8",
        "progress=false",
        "hydra.run.dir=run",
    ]


def test_from_files_to_a_merged_model(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", *overrides(project)])
    assert f"--out merged --trust {own(project)}\n" in capsys.readouterr().out
    main(["choose", "run", "--prefer", "left=1"])
    main(["merge", "run", "--prefer", "left=1", "--out", "merged", "--trust", own(project)])
    merged = load_file("merged/model.safetensors")
    assert float(merged["weight"][0, 0]) < float(load_file("base.safetensors")["weight"][0, 0])


def test_relative_paths_mean_what_they_meant_at_the_start(
    project: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["run", *overrides(project)])
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    main(["resume", "--trust", own(project), str(project / "run")])
    main(["merge", str(project / "run"), "--point", "0", "--out", "here", "--trust"])
    assert (elsewhere / "here" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("problem.base=base.safetensors", "problem.base=gone.safetensors"), "gone.safetensors"),
        (("left=left.safetensors", "left=base.safetensors"), "left"),
        ((":build_model", ":build_modle"), "build_modle"),
        ((":pulls_left", ""), "module:function"),
    ],
)
def test_wrong_files_and_names_are_told(
    project: Path,
    capsys: pytest.CaptureFixture[str],
    change: tuple[str, str],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["run", *(text.replace(*change) for text in overrides(project))])
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert message in said
    assert "Traceback" not in said


def test_an_evaluator_that_always_raises_stops_the_run_with_its_reason(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["run", *overrides(project, second="breaks")])
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert "the data set is gone" in said
    assert "resume" in said


def test_the_public_face_with_own_everything(tmp_path: Path) -> None:
    first = torch.nn.Linear(2, 3)
    model = torch.nn.Sequential(first, torch.nn.Linear(3, 1))
    base = {name: value.clone() for name, value in model.state_dict().items()}
    experts = {
        name: {key: value + shift for key, value in base.items()}
        for name, shift in (("math", 0.3), ("code", -0.2))
    }

    def score(sign: float) -> map_bo.Measurement:
        return map_bo.Measurement(0.5 + sign * first.bias.mean().item() / 10, count=100)

    problem = map_bo.MergedModelProblem(
        model,
        base=base,
        experts=experts,
        evaluators={"math": lambda m: score(1), "code": lambda m: score(-1)},
    )
    result = map_bo.optimize(problem, budget=8, seed=0, progress=False, run_dir=tmp_path / "run")
    choice = result.choose({"math": 2, "code": 1}, at_least={"code": 0.3})
    written = choice.export(tmp_path / "merged")
    assert (written / "recipe.yaml").exists()
    for name, value in model.state_dict().items():
        assert torch.equal(value, base[name]), "the model is left as it was found"


def test_a_failing_evaluator_in_python(tmp_path: Path) -> None:
    model = torch.nn.Linear(1, 1)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    expert = {name: value + 0.1 for name, value in base.items()}

    def broken(m: torch.nn.Module) -> float:
        raise ValueError("no such data")

    problem = map_bo.MergedModelProblem(
        model, base=base, experts={"one": expert}, evaluators={"one": broken}
    )
    with pytest.raises(EvaluationError, match="no such data"):
        map_bo.optimize(problem, budget=8, progress=False)
