"""The kill test would notice what it is there for: lines that are lost, changed or damaged."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.quality.kill import Trial, table
from benchmarks.quality.kill_stand import Stand, Whole, events, files, story
from map_bo.loop.optimize import optimize
from map_bo.pareto.gradient import GradientSolver
from map_bo.problems.synthetic import ConcaveQuadratics
from map_bo.samplers.designs.space_filling import Sobol
from map_bo.surrogates.quadratic import Quadratic


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "run"
    optimize(
        ConcaveQuadratics(3, 2), 8, seed=0, run_dir=directory, sampler=Sobol(),
        surrogate=Quadratic(), solver=GradientSolver(points=4), verify=0, progress=False,
        tracking="none",
    )  # fmt: skip
    return directory


@pytest.fixture
def trial(recorded: Path, tmp_path: Path) -> Trial:
    directory = tmp_path / "run"
    shutil.copytree(recorded, directory)
    stand = Stand(tmp_path, random.Random(0))
    return Trial(stand, "flat", directory, Whole(directory, {}), forked=True)


def changed(lines: list[bytes]) -> list[bytes]:
    return [*lines[:5], lines[5].replace(b"0", b"1", 1), *lines[6:]]


@pytest.mark.parametrize(
    ("how", "lost", "damaged"),
    [
        (lambda lines: lines, 0, False),
        (lambda lines: [*lines, b'{"torn'], 0, False),
        (lambda lines: lines[:-1], 1, False),
        (lambda lines: lines[:4] + lines[5:], None, True),
        (changed, 1, True),
    ],
)
def test_lines_that_are_lost_changed_or_damaged_are_seen(
    trial: Trial, how: Callable[[list[bytes]], list[bytes]], lost: int | None, damaged: bool
) -> None:
    path = trial.directory / "events.jsonl"
    path.write_bytes(b"".join(how(events(trial.directory))))
    trial.look()
    assert trial.lost == lost or (lost is None and trial.lost > 0)
    assert bool(trial.stand.faults) == damaged


def test_a_story_leaves_out_times_and_beginnings_alone(trial: Trial) -> None:
    path = trial.directory / "events.jsonl"
    told = story(trial.directory)
    lines = [json.loads(line) for line in events(trial.directory)]
    later = [{**line, "time": "later"} for line in lines if line["kind"] != "started"]
    path.write_text("".join(json.dumps(line) + "\n" for line in later))
    assert story(trial.directory) == told
    path.write_text("".join(json.dumps(line) + "\n" for line in later[:-2] + later[-1:]))
    assert story(trial.directory) != told


def test_a_half_export_has_other_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model.safetensors").write_bytes(b"whole")
    whole = files(tmp_path)
    (tmp_path / "a" / "model.safetensors").write_bytes(b"who")
    assert files(tmp_path).keys() == whole.keys()
    assert files(tmp_path) != whole


def test_the_table_counts_a_difference() -> None:
    good = {"same evaluations": True, "same front": True, "same events": True, "same files": True}
    row = {"kind": "flat", "by": "fork", "kills": 3, "deaths": 1, "lines lost": 0, **good}
    rows = [row, {**row, "by": "command line", "same front": False, "same events": False}]
    assert table(rows)[2] == "| flat | 6 (3) | 2 | 2 | 0 | 1 | 1 |"
