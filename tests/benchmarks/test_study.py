"""The study goes on where it was killed, repeats nothing, and lets no cell stop another."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.quality import study as study_module
from benchmarks.quality.cells import Cell, cell_path, digest, load
from benchmarks.quality.methods import METHODS, Parts, everywhere, matching, method, unavailable
from benchmarks.quality.protocol import batch_at, checkpoints, run
from benchmarks.quality.study import Study, work
from benchmarks.quality.tidy import read
from map_bo.errors import ConfigError
from map_bo.samplers.designs.space_filling import Sobol, Uniform
from map_bo.surrogates.auto import Auto
from map_bo.surrogates.quadratic import Quadratic
from tests.benchmarks import fake_cases

ROOT = Path(__file__).parents[2]
SOURCE = "tests.benchmarks.fake_cases"


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "log"
    path.touch()
    monkeypatch.setenv("FAKE_LOG", str(path))
    return path


def count(log: Path) -> int:
    return len(log.read_text().splitlines())


def small(folder: Path, **changes: Any) -> Study:
    plain = Study(
        cases=("plain",),
        methods=("random", "uniform-blend"),
        seeds=2,
        budget=8,
        direct=60,
        jobs=0,
        source=SOURCE,
        cache=folder / "cells",
        results=folder / "results",
    )
    return replace(plain, **changes)


def silent(line: str) -> None: ...


SECONDS = ("propose_s", "fit_s", "solve_s")


def outcomes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in SECONDS} for row in rows]


def test_nothing_is_run_twice(tmp_path: Path, log: Path) -> None:
    study = small(tmp_path)
    rows = study.run(silent)
    assert count(log) == 2 * 8
    assert len(rows) == 2 * 2 * 2  # methods, seeds, checkpoints at 6 and 8
    study.run(silent)
    assert count(log) == 16
    for path in (tmp_path / "cells").glob("*/*"):
        path.unlink()  # the committed table alone is enough
    study.run(silent)
    assert count(log) == 16


def test_a_larger_budget_goes_on_where_the_smaller_one_ended(tmp_path: Path, log: Path) -> None:
    small(tmp_path, budget=6).run(silent)
    assert count(log) == 12
    grown = small(tmp_path, budget=12).run(silent)
    assert count(log) == 24
    whole = small(tmp_path / "other", budget=12).run(silent)
    assert count(log) == 48
    assert outcomes(grown) == outcomes(whole)


@pytest.mark.slow
def test_killed_in_the_middle_it_ends_like_one_never_killed(tmp_path: Path, log: Path) -> None:
    code = (
        "from pathlib import Path; from tests.benchmarks.test_study import small, silent;"
        f"small(Path({str(tmp_path)!r})).run(silent)"
    )
    environment = {**os.environ, "FAKE_EXIT_AFTER": "15"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=False)
    assert done.returncode == 9
    assert count(log) == 15
    rows = small(tmp_path).run(silent)
    # The first cell was whole; the second had been saved at 6 of the 7 evaluations it had begun.
    assert count(log) == 15 + 2
    whole = small(tmp_path / "other").run(silent)
    assert outcomes(rows) == outcomes(whole)


@pytest.mark.slow
def test_a_cell_is_the_same_every_time(tmp_path: Path) -> None:
    names = ("random+surrogate",)
    first = small(tmp_path / "a", methods=names, cases=("noisy",)).run(silent)
    second = small(tmp_path / "b", methods=names, cases=("noisy",)).run(silent)
    assert outcomes(first) == outcomes(second)
    assert {row["seed"] for row in first} == {0, 1}
    volumes = {row["hypervolume"] for row in first}
    assert len(volumes) == len(first)


def test_a_failing_cell_is_recorded_and_stops_nobody(tmp_path: Path) -> None:
    study = small(tmp_path, cases=("missing-data", "broken", "plain", "absent"))
    lines: list[str] = []
    rows = study.run(lines.append)
    by_case = {case: [r for r in rows if r["case"] == case] for case in study.cases}
    assert all("FileNotFoundError" in row["failure"] for row in by_case["missing-data"])
    broken = [row for row in by_case["broken"] if row["method"] == "random"]
    assert broken
    assert all("no evaluation succeeded" in row["failure"] for row in broken)
    assert all(row["failure"] == "" and row["share"] > 0 for row in by_case["plain"])
    assert by_case["absent"] == []
    assert any("its data are not here" in line for line in lines)
    assert list(study.left(study.plan()[0], read(study.table))) == []
    again = replace(study, retry=True)
    assert {cell.case for cell in again.left(study.plan()[0], [])} == {"missing-data"}


@pytest.mark.slow
def test_workers_share_the_cells_and_a_dying_one_takes_none_with_it(tmp_path: Path) -> None:
    study = small(tmp_path, cases=("deadly", "plain"), jobs=2)
    rows = study.run(silent)
    alone = small(tmp_path / "alone", cases=("plain",)).run(silent)
    assert outcomes([row for row in rows if row["case"] == "plain"]) == outcomes(alone)
    deadly = [row for row in rows if row["case"] == "deadly"]
    assert {row["failure"] for row in deadly} == {"the worker process died"}


def test_a_deadline_leaves_the_rest_for_later(tmp_path: Path, log: Path) -> None:
    study = small(tmp_path, deadline=0.0)
    assert study.run(silent) == []
    cell = Cell("plain", "random", 0, 8)
    assert work(cell, study, until=0.0).status == "unfinished"
    assert count(log) == 6
    assert work(cell, study, until=None).status == "done"
    assert count(log) == 8


def test_order_is_truth_first_then_seed_by_seed(tmp_path: Path) -> None:
    names = ("sobol", "default, without guard", "random", "default", "direct")
    cells, left_out = small(tmp_path, methods=names, cases=("plain", "noisy")).plan()
    assert left_out == {}
    assert [cell.method for cell in cells[:4]] == ["direct"] * 4
    assert [cell.seed for cell in cells[4:12]] == [0] * 4 + [1] * 4
    assert {cell.method for cell in cells[4:12]} == {"random", "default"}
    assert cells[-1].method == "sobol"


def test_the_direct_search_is_the_best_known(tmp_path: Path) -> None:
    rows = small(tmp_path, methods=("direct", "random", "best-expert"), direct=400).run(silent)
    direct = [row for row in rows if row["method"] == "direct"]
    others = [row for row in rows if row["method"] != "direct"]
    assert {row["evaluations"] for row in direct} == {400}
    assert all(row["share"] > 0.99 for row in direct)
    assert all(row["igd_plus"] < 0.05 for row in direct)
    assert all(0 <= row["share"] < 1 and row["regret"] > 0 for row in others)


def test_rows_of_other_settings_give_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = small(tmp_path)
    before = {row["digest"] for row in study.run(silent)}
    monkeypatch.setattr(fake_cases, "DIGEST", "2")
    study_module._version.cache_clear()
    after = study.run(silent)
    assert len(after) == 8
    assert not before & {row["digest"] for row in after}
    assert {row["version"] for row in after} == {"2"}
    study_module._version.cache_clear()


def test_the_digest_knows_the_settings_behind_the_name() -> None:
    entry = METHODS["random"]
    key = digest(entry, "plain", 1, direct=60)
    assert key == digest(entry, "plain", 1, direct=90)
    assert key != digest(entry, "noisy", 1, direct=60)
    assert key != digest(entry, "plain", 2, direct=60)
    assert key != digest(replace(entry, noise="ignored"), "plain", 1, direct=60)
    assert key != digest(replace(entry, make=METHODS["sobol"].make), "plain", 1, direct=60)
    truth = METHODS["direct"]
    assert digest(truth, "plain", 1, direct=60) != digest(truth, "plain", 1, direct=90)


@pytest.mark.slow
def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    study = small(tmp_path, methods=("random+surrogate",), seeds=1)
    study.run(silent)
    cell = Cell("plain", "random+surrogate", 0, 8)
    record = load(cell_path(study.cache, cell, study.key(cell)))
    assert record is not None
    assert record.seen is not None
    _, fresh = run(fake_cases.case("plain"), method(cell.method), 0, 8)
    assert fresh.seen is not None
    assert torch.equal(record.seen.X, fresh.seen.X)
    assert torch.equal(record.seen.Y, fresh.seen.Y)
    np.testing.assert_allclose(record.checkpoints[8].real, fresh.checkpoints[8].real, atol=1e-6)
    assert len(record.checkpoints[8].real) <= 100
    assert record.checkpoints[8].chosen.shape == (60, 2)


def test_schedule() -> None:
    seen, sizes = 0, []
    while seen < 120:
        sizes.append(batch_at(seen))
        seen += sizes[-1]
    assert seen == 120
    assert sizes == [1] * 24 + [4] * 10 + [8] * 7
    assert checkpoints(50) == (6, 8, 12, 16, 24, 32, 48)
    with pytest.raises(ConfigError, match="has no checkpoint"):
        checkpoints(5)


def test_unknown_names_are_told_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'optuna-tpe'"):
        method("optuna_tpe")
    with pytest.raises(ConfigError, match="'ablation'"):
        matching(["ablations"])
    assert {entry.tier for entry in matching(["ablation", "random"])} == {"ablation", "core"}
    assert len(matching(["all"])) == len(METHODS)


def test_what_cannot_run_says_why() -> None:
    entry = METHODS["random"]
    assert unavailable(entry) is None
    assert "up to 4 metrics" in str(unavailable(replace(entry, most_metrics=4), metrics=8))
    assert "not installed" in str(unavailable(replace(entry, needs=("no_such_library",))))

    def absent(budget: int) -> Parts:
        raise ModuleNotFoundError("no module named 'later'")

    def mistaken(budget: int) -> Parts:
        raise KeyError("a mistake")

    assert "later" in str(unavailable(replace(entry, make=absent)))
    with pytest.raises(KeyError):
        unavailable(replace(entry, make=mistaken))  # no reason to leave a method out


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_built(name: str) -> None:
    entry = METHODS[name]
    if all(find_spec(library) for library in entry.needs):
        assert unavailable(entry) is None
        assert (entry.make(12).sampler is None) == (entry.answer in ("blend", "expert", "direct"))


def test_no_ablation_is_the_default_itself() -> None:
    default = METHODS["default"].describe()
    same = [n for n, m in METHODS.items() if m.tier == "ablation" and m.describe() == default]
    assert same == []


def test_settings_are_changed_wherever_they_are() -> None:
    assert everywhere(Sobol(), anchors=False) == Sobol(anchors=False)
    nested = Auto(candidates=(("quadratic", Quadratic()),))
    changed = everywhere(nested, link="identity")
    assert changed.link == "identity"
    assert changed.candidates == (("quadratic", Quadratic(link="identity")),)
    assert everywhere(Uniform(), sums=0.0) == Uniform()
