"""Values of a run's problem that confirm on other examples; the commands themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from map_bo.app.main import main
from map_bo.app.runs.measuring import with_values
from map_bo.errors import ConfigError

TREE = {"problem": {"tasks": {"math": {"data": "a.csv", "limit": 5}}, "experts": 2}, "seed": 1}


def test_values_replace_settings_of_the_problem_alone() -> None:
    config = OmegaConf.create(TREE)
    changed = with_values(config, ["tasks.math.data=b.csv", "problem.tasks.math.limit=9"])
    assert changed.problem.tasks.math == {"data": "b.csv", "limit": 9}
    assert changed.seed == 1
    assert config.problem.tasks.math.data == "a.csv"
    assert with_values(config, []) is config


@pytest.mark.parametrize("text", ["tasks.math.data", "taskz.math.data=b.csv", "seed=3"])
def test_other_values_are_refused_with_what_there_is(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a setting of the run's problem") as error:
        with_values(OmegaConf.create(TREE), [text])
    assert error.value.hint is not None
    assert "tasks, experts" in error.value.hint


@pytest.mark.slow
def test_a_choice_is_measured_confirmed_and_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    quick = ["problem=digits", "problem.experts=2", "loop.budget=6", "sampler=sobol"]
    main(["run", *quick, "surrogate=quadratic", f"hydra.run.dir={run}", "progress=false"])
    capsys.readouterr()
    main(["choose", run, "--measure", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["measured"]["where"] == "the examples of the search"
    assert None not in said["real"].values()
    assert set(said["measured"]["optimism"]) == {"rot90", "invert"}
    main(["check", run])
    assert "whole" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["confirm", run])
    assert "saw all examples" in capsys.readouterr().err
    main(["report", run])
    assert "Measured after the run" in (tmp_path / "run" / "report.html").read_text()
