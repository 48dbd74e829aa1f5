"""A run that was started in Python is chosen from, on the command line, as it is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import map_bo
from map_bo.app.main import main
from map_bo.loop.reading import load_result
from map_bo.pareto.gradient import GradientSolver
from map_bo.problems.synthetic import ConcaveQuadratics
from map_bo.samplers.designs.space_filling import Sobol
from map_bo.surrogates.quadratic import Quadratic
from map_bo.surrogates.surrogate import Surrogate

PREFER = {"f1": 1.0, "f2": 0.3}
OPTIONS = ["--prefer", "f1=1", "--prefer", "f2=0.3", "--json"]
MODULE = """
from dataclasses import dataclass

from map_bo.surrogates.quadratic import Quadratic


@dataclass(frozen=True)
class Plain(Quadratic):
    shown: bool = True
"""


def started(directory: Path, surrogate: Surrogate) -> Any:
    """Return the choice from a run with a front of few points, so that solving pays."""
    result = map_bo.optimize(
        ConcaveQuadratics(d=2, m=2),
        10,
        run_dir=directory,
        progress=False,
        tracking="none",
        sampler=Sobol(),
        surrogate=surrogate,
        solver=GradientSolver(points=3),
        verify=1,
    )
    return result.choose(PREFER)


def chosen(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[Any, str]:
    capsys.readouterr()
    main(["choose", "run", *OPTIONS, *options])
    said = capsys.readouterr()
    return json.loads(said.out), said.err


def test_choose_solves_for_the_preference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    there = started(tmp_path / "run", Quadratic())
    assert there.refined
    found, said = chosen(capsys)
    assert found == json.loads(json.dumps(there.describe()))
    assert said == ""
    again = load_result("run", refit=True).choose(PREFER)
    assert again.describe() == there.describe()
    assert not load_result("run").choose(PREFER).refined


def test_a_surrogate_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_surrogates.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    import own_surrogates  # type: ignore[import-not-found]

    there = started(tmp_path / "run", own_surrogates.Plain())
    found, said = chosen(capsys)
    assert not found["refined"]  # a point of the front, and a word on how to have more
    assert "own_surrogates is not a package" in said
    assert "--trust own_surrogates" in said
    found, said = chosen(capsys, "--trust", "own_surrogates")
    assert found == json.loads(json.dumps(there.describe()))
    assert said == ""
    monkeypatch.delitem(__import__("sys").modules, "own_surrogates")
    (tmp_path / "own_surrogates.py").write_text("broken(")
    with pytest.raises(SystemExit) as caught:
        chosen(capsys, "--trust", "own_surrogates")
    assert caught.value.code == 2
    assert "own_surrogates:Plain cannot be built" in capsys.readouterr().err


def test_a_surrogate_that_is_no_dataclass_is_recorded_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Own:
        def fit(self, *args: Any) -> Any:
            return Quadratic().fit(*args)

    monkeypatch.chdir(tmp_path)
    started(tmp_path / "run", Own())
    found, said = chosen(capsys)
    assert not found["refined"]
    assert "recorded in words alone" in said
