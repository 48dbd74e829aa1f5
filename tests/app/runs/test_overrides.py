from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from map_bo.app.arguments import with_options_last
from map_bo.app.main import main
from map_bo.app.runs.overrides import with_overrides
from map_bo.errors import ConfigError
from map_bo.loop.reading import created_of, load_state
from tests.integration.mistakes import failing

CONFIG = {
    "seed": 0,
    "progress": False,
    "loop": {"budget": 8, "verify": None, "guard": True, "stop": {"criterion": None}},
    "problem": {"_target_": "x", "d": 2},
    "tracking": {"local": {"_target_": "map_bo.loop.mirrors.Local", "normalised": False}},
}
CHOICES = {"sampler": "sobol", "problem": "bumps"}


def test_settings_and_what_shows_the_run_may_change() -> None:
    config = OmegaConf.create(CONFIG)
    words = ["loop.budget=48", "++loop.timeout=600", "tracking=none", "progress=true", "seed=0"]
    found, changes = with_overrides(config, [*words, "sampler=sobol", "problem.d=2"], CHOICES)
    assert (found.loop.budget, found.loop.timeout, found.loop.guard) == (48, 600, True)
    assert (config.loop.budget, "timeout" in config.loop) == (8, False)
    assert changes == {
        "tracking": {"from": CONFIG["tracking"], "to": {}},
        "progress": {"from": False, "to": True},
    }
    found, changes = with_overrides(config, ["tracking.local.normalised=true"])
    assert found.tracking.local.normalised is True
    assert set(changes) == {"tracking"}
    found, _ = with_overrides(config, ["workers=3", "loop.asynchronous=false"])
    assert found.workers.count == 3
    assert found.loop.asynchronous is False
    found, _ = with_overrides(config, ["tracking=[local,wandb]"])
    assert set(found.tracking) == {"local", "wandb"}


@pytest.mark.parametrize(
    ("word", "message", "hint"),
    [
        ("seed=3", r"seed cannot become 3 on a run that has begun \(it is 0\)", "loop.budget"),
        ("loop.guard=false", r"loop\.guard cannot become False .*\(it is True\)", "loop.timeout"),
        ("sampler=random", r"sampler cannot become random .*\(it is sobol\)", "new run"),
        ("problem.d=3", r"problem\.d cannot become 3 .*\(it is 2\)", "new run"),
        ("loop.stop.criterion=regret", r"criterion cannot become regret .*\(it is null\)", "may"),
        ("loop.bugdet=3", r"no option 'loop\.bugdet'", "did you mean 'loop.budget'?"),
        ("budget=30", "no option 'budget'", "did you mean loop.budget?"),
        ("trackin=none", "no option 'trackin'", "did you mean 'tracking'?"),
        ("tracking=wndb", "tracking=wndb cannot be chosen", "options of tracking"),
        ("workers=two", "workers=two cannot be chosen", "workers=4 is short for"),
        ("loop.budget=3,4", "gives several values", "map-bo run -m"),
        ("~loop.budget", "would remove a setting", "null"),
        ("loop.budget", "cannot be understood", "loop.budget=48"),
    ],
)
def test_what_may_not_change_is_told_with_what_may(word: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        with_overrides(OmegaConf.create(CONFIG), [word], CHOICES)
    assert hint in str(caught.value.hint)


def test_options_may_stand_between_the_run_and_its_changes() -> None:
    given = ["resume", "--trust", "mine", "RUN", "--retry-failed", "loop.budget=4", "seed=0"]
    last = ["resume", "RUN", "loop.budget=4", "seed=0", "--trust", "mine", "--retry-failed"]
    assert with_options_last(given) == last
    assert with_options_last(["choose", "--json", "RUN"]) == ["choose", "--json", "RUN"]


@pytest.mark.slow
def test_a_finished_run_is_extended_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["problem=bumps", "sampler=sobol", "surrogate=quadratic", "solver.points=20"]
    main(["run", *small, "loop.budget=10", "progress=false", "hydra.run.dir=run"])
    before = (tmp_path / "run" / "events.jsonl").read_bytes()
    main(["resume", "run"])
    assert (tmp_path / "run" / "events.jsonl").read_bytes() == before
    said = failing(capsys, "resume", "run", "seed=4")
    assert "seed cannot become 4" in said
    assert "cannot be 7 evaluations" in failing(capsys, "resume", "run", "loop.budget=7")
    assert (tmp_path / "run" / "events.jsonl").read_bytes() == before
    main(["resume", "run", "loop.budget=16", "--retry-failed", "loop.timeout=60"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["budget"], summary["evaluations"]) == (16, 16)
    created = created_of("run")
    assert created["settings"]["timeout"] == created["config"]["tree"]["loop"]["timeout"] == 60
    main(["resume", "run", "tracking=none"])
    assert created_of("run")["config"]["tree"]["tracking"] == {}
    assert len(load_state("run")[0].extensions) == 2
    capsys.readouterr()
    main(["check", "run"])
    assert "16 of 16 evaluations, finished" in capsys.readouterr().out
