"""What an installed package registers is chosen, listed and trusted like what is ours."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from map_bo.app.build import build_problem, build_settings, build_tracking
from map_bo.app.installed import Installed, hidden
from map_bo.app.main import main
from map_bo.app.schema import register
from map_bo.errors import ConfigError
from map_bo.loop.mirrors import Local
from map_bo.loop.optimize import optimize
from map_bo.pareto.gradient import GradientSolver
from map_bo.plain import from_plain
from map_bo.problems.merged.imported import imported_problem
from map_bo.problems.synthetic import ConcaveQuadratics
from map_bo.samplers.designs.space_filling import Sobol
from map_bo.samplers.sampler import Sampler
from tests.installed_package import forget, write_package

ROOT = Path(__file__).parents[2]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with an installed package."""
    return write_package(tmp_path / "site")


@pytest.fixture
def theirs(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(site)
    yield
    forget()


@pytest.fixture
def hydra(theirs: None) -> Iterator[None]:
    register()
    with initialize_config_module("map_bo.conf", version_base="1.3"):
        yield


def composed(*overrides: str) -> DictConfig:
    return compose("config", overrides=list(overrides))


@pytest.mark.usefixtures("hydra")
class TestOptions:
    def test_a_sampler_with_its_settings(self) -> None:
        config = composed("sampler=halton", "sampler.strength=7", "+sampler.weights.a=1.5")
        sampler: Any = build_settings(config).sampler
        assert isinstance(build_settings(config).sampler, Sampler)
        assert (type(sampler).__name__, sampler.strength, sampler.weights) == (
            "Halton",
            7,
            {"a": 1.5},
        )

    def test_every_group(self) -> None:
        config = composed(
            "problem=theirs", "surrogate=flat", "operator=trimming", "solver=ascent", "problem.d=3"
        )
        assert type(build_settings(config).surrogate).__name__ == "Flat"
        assert config.problem.operator == config.operator  # it takes the operator that was chosen
        assert build_problem(config).space.d == 3

    def test_trackers_stand_beside_ours(self) -> None:
        config = composed("tracking=[local,theirs]", "tracking.theirs.size=2")
        local, tracker = build_tracking(config)
        assert isinstance(local, Local)
        assert type(tracker).__name__ == "Register"

    def test_a_setting_that_is_unknown_is_told(self) -> None:
        config = composed("sampler=halton", "+sampler.strenght=7")
        with pytest.raises(ConfigError, match="sampler has no option 'strenght'") as caught:
            build_settings(config)
        assert "sampler.strength" in str(caught.value.hint)

    def test_ours_win(self) -> None:
        assert composed("sampler=sobol").sampler["_target_"].startswith("map_bo.")
        [said] = hidden()
        assert said == (
            "sampler=sobol is map_bo's own; that of their-package is "
            "sampler._target_=their_package.parts.Halton"
        )

    def test_a_broken_one_is_told_when_it_is_chosen(self) -> None:
        assert composed("sampler=halton")
        with pytest.raises(ConfigError, match=r"sampler=broken of the package their-package can"):
            composed("sampler=broken")

    def test_two_of_one_name(self) -> None:
        with pytest.raises(ConfigError, match=r"registered by (another|their-package) and"):
            composed("sampler=twice")

    def test_what_is_no_class(self) -> None:
        with pytest.raises(ConfigError, match="of the package their-package names 3"):
            composed("sampler=number")

    def test_evaluators(self, monkeypatch: pytest.MonkeyPatch) -> None:
        given: dict[str, Any] = {}
        monkeypatch.setattr(
            "map_bo.problems.merged.imported.MergedModelProblem",
            lambda model, **settings: given.update(settings),
        )
        imported_problem(
            "torch.nn:Linear",
            base="b",
            experts={"a": "a"},
            evaluators={"a": "quarter", "b": "scores"},
        )
        assert given["evaluators"]["a"](None) == 0.25
        assert given["evaluators"]["b"](None) == 0.75
        config = composed("problem=checkpoints", "+evaluator@problem.evaluators.a=quarter")
        assert config.problem.evaluators.a.path == "their_package.parts.score"

    def test_the_source_lists_what_there_is(self) -> None:
        source = Installed("installed", "installed://")
        assert source.available()
        assert "sampler" in source.list("", None)
        assert source.list("sampler", None) == ["broken", "halton", "number", "sobol", "twice"]
        assert source.list("nested", None) == []
        assert source.is_group("sampler")
        assert not source.is_config("sampler/nothing")


def shell(site: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(site), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "map_bo.app.main", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": paths, "COLUMNS": "200"},
        timeout=100,
        check=False,
    )


def test_help_lists_them_and_imports_none(site: Path, tmp_path: Path) -> None:
    done = shell(site, "run", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "halton" in done.stdout
    assert "evaluator: quarter, scores" in done.stdout
    assert "note: sampler=sobol is map_bo's own" in done.stderr
    for module in ("their_package", "torch"):
        assert f"| {module}\n" not in done.stderr.replace(" ", "").replace("|", "| ")


@pytest.mark.slow
def test_a_run_with_a_sampler_of_theirs(site: Path, tmp_path: Path) -> None:
    options = ["problem=concave", "surrogate=quadratic", "loop.budget=8", "solver.points=10"]
    done = shell(
        site, "run", *options, "sampler=halton", "hydra.run.dir=run", "tracking=none", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert '"class":"their_package.parts:Halton"' in (tmp_path / "run" / "events.jsonl").read_text()
    broken = shell(site, "run", *options, "sampler=broken", cwd=tmp_path)
    assert broken.returncode == 2
    assert "error: sampler=broken of the package their-package" in broken.stderr
    assert "Traceback" not in broken.stderr
    chosen = shell(site, "choose", "run", "--prefer", "f1=1", cwd=tmp_path)
    assert chosen.returncode == 0, chosen.stderr


def test_a_choice_with_a_surrogate_of_theirs(
    theirs: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = from_plain({"class": "their_package.parts:Flat", "fields": {}})
    optimize(
        ConcaveQuadratics(d=2, m=2),
        8,
        run_dir=tmp_path / "run",
        progress=False,
        tracking="none",
        sampler=Sobol(),
        surrogate=made,
        solver=GradientSolver(points=5),
        verify=0,
    )
    main(["choose", str(tmp_path / "run"), "--prefer", "f1=1", "--prefer", "f2=1"])
    assert capsys.readouterr().err == ""  # no word on trust
