from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import map_bo
from map_bo.data import Observations
from map_bo.errors import BudgetError, DataError, MapBoError, StoreError
from map_bo.loop.reading import load_state
from map_bo.loop.run import Run
from map_bo.loop.transfer.sources import Known, take
from map_bo.loop.transfer.study import StartFrom, Study
from map_bo.tracking.jsonl import JsonlStore
from tests.loop.bowls import quick
from tests.loop.transfer.grown import Growing

CHOSEN = {name: vars(quick())[name] for name in ("sampler", "surrogate", "solver", "retries")}
ALL = ("x", "y", "z")


def grow(
    problem: Growing, known: Known | None, budget: int = 14, run_dir: Path | None = None, **how: Any
) -> map_bo.Result:
    settings = {**CHOSEN, "verify": 2, **how}
    return map_bo.optimize(
        problem, budget, known=known, run_dir=run_dir, progress=False, tracking="none", **settings
    )


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two experts and two tasks: 8 evaluations."""
    where = tmp_path_factory.mktemp("old") / "run"
    settings = {**CHOSEN, "verify": 1}
    map_bo.optimize(Growing(), 8, run_dir=where, progress=False, tracking="local", **settings)
    return where


@pytest.mark.parametrize("kind", ["run", "result", "csv", "observations"])
def test_a_study_gains_an_expert_and_a_task(old: Path, tmp_path: Path, kind: str) -> None:
    known: dict[str, Known] = {
        "run": old,
        "result": map_bo.load_result(old),
        "csv": str(old / "evaluations.csv"),
        "observations": load_state(old)[0].data,
    }
    problem = Growing(("a", "b", "c"), ALL)
    result = grow(problem, known[kind], run_dir=tmp_path / "new")
    assert result.seen.metrics == problem.metrics
    before = load_state(old)[0].data
    assert torch.equal(result.seen.X[:8, :2], before.X)
    assert torch.allclose(result.seen.Y[:8, :2], before.Y)
    anchors = [tuple(x) for x in problem.space.anchors().X.tolist()]
    # Base and the old experts are completed in the new task; the new expert and the blend are new.
    assert problem.calls[:3] == [(anchors[i], ("z",)) for i in (0, 1, 2)]
    assert problem.calls[3:5] == [(anchors[i], ALL) for i in (3, 4)]
    assert all(names == ALL for _, names in problem.calls[5:])
    assert len(result.seen) + len(result.verification) == 14
    assert int(result.seen.incomplete.sum()) == 8 - 3
    assert result.scale.is_anchored
    said = result.summary["imported"]
    assert said["evaluations"] == 8
    assert said["sources"][0]["from"] == ("python" if kind == "observations" else kind)
    assert said["sources"][0]["not_measured"] == {"z": 8}
    assert result.summary["failures"] == 0
    assert result.summary["partial"] == 0
    notes = " ".join(result.summary["notes"])
    assert "8 of the evaluations were made elsewhere and imported" in notes
    assert "not measured in the study that was imported: z at 8 points" in notes


@pytest.mark.slow
def test_the_grown_run_resumes_exactly_wherever_it_was_cut(old: Path, tmp_path: Path) -> None:
    whole = grow(Growing(("a", "b", "c"), ALL), old, run_dir=tmp_path / "whole")
    lines = (tmp_path / "whole" / "events.jsonl").read_bytes().splitlines(keepends=True)
    for cut in (1, 2, 4, 7, len(lines) - 3):
        part = tmp_path / f"cut {cut}"
        part.mkdir()
        (part / "events.jsonl").write_bytes(b"".join(lines[:cut]))
        again = grow(Growing(("a", "b", "c"), ALL), old, run_dir=part)
        assert torch.equal(again.seen.X, whole.seen.X), cut
        assert torch.equal(again.seen.Y.nan_to_num(), whole.seen.Y.nan_to_num()), cut
        assert torch.equal(again.front.X, whole.front.X), cut
    gone = grow(Growing(("a", "b", "c"), ALL), tmp_path / "moved away", run_dir=part)
    assert torch.equal(gone.front.X, whole.front.X)  # once begun, the old study is not needed


def test_a_completion_that_fails_keeps_the_old_values(old: Path) -> None:
    problem = Growing(("a", "b"), ALL, fails=frozenset({"z"}))
    with pytest.raises(MapBoError, match="evaluations failed"):
        grow(problem, old)
    healthy = Growing(("a", "b"), ALL)
    result = grow(healthy, old, retries=1)
    assert [names for _, names in healthy.calls[:4]] == [("z",)] * 4
    assert bool(result.seen.select(range(3)).ok.all())


def test_the_budget_must_leave_something_for_a_new_task() -> None:
    known = Growing().seen_at(torch.rand(12, 2, dtype=torch.float64))
    with pytest.raises(BudgetError, match="none is left to measure z"):
        grow(Growing(("a", "b"), ALL), known, budget=10)


def test_a_full_budget_still_completes_the_anchors(old: Path) -> None:
    problem = Growing(("a", "b"), ALL)
    result = grow(problem, old, budget=10)
    assert [names for _, names in problem.calls[:4]] == [("z",)] * 4
    assert len(result.seen) == 8


def test_known_anchors_are_not_measured_again(old: Path) -> None:
    problem = Growing()
    grow(problem, old, budget=12)
    anchors = {tuple(x) for x in problem.space.anchors().X.tolist()}
    assert not anchors & {x for x, _ in problem.calls}


def test_a_mapping_names_what_was_called_otherwise(old: Path) -> None:
    digests = {"maths": "a", "code": "b"}
    problem = Growing(("maths", "code"), ("z", "y"), digests)
    how = StartFrom(old, experts={"a": "maths", "b": "code"}, metrics={"x": None})
    result = grow(problem, how)
    assert result.seen.measured[4:8].tolist() == [[False, True]] * 4
    source = result.summary["imported"]["sources"][0]
    assert source["coefficients"] == {"a": "maths", "b": "code"}
    assert source["metrics"] == {"x": None}


@pytest.mark.parametrize(
    ("known", "error", "message"),
    [
        (3, DataError, "cannot start from a int"),
        ("nowhere", DataError, "there is no file or directory 'nowhere'"),
        ("empty", StoreError, "holds no run to start from"),
        ("old.json", DataError, "is not a database of Ax"),
        ("old.db", DataError, "database of another library"),
        ("begun", StoreError, "has no evaluation yet"),
    ],
)
def test_what_is_no_study_leaves_no_run_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: Any, error: type, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("old.json").write_text("{}")
    Path("old.db").write_bytes(b"SQLite format 3\x00 and more")
    Run(Growing(), quick(), JsonlStore.create(Path("begun")))
    with pytest.raises(error, match=message):
        grow(Growing(), known, run_dir=Path("new"))
    assert not Path("new").exists()


def test_a_run_that_is_going_on_is_refused(old: Path) -> None:
    code = (
        "import sys, pathlib; from map_bo.tracking.jsonl import JsonlStore\n"
        "with JsonlStore.open(pathlib.Path(sys.argv[1])).lock():\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(old)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        try:
            with pytest.raises(StoreError, match="another process"):
                take(old, Growing())
        finally:
            assert other.stdin is not None
            other.stdin.close()
    assert len(take(old, Growing()).observations) == 8


def test_a_run_that_was_cut_off_is_taken_as_far_as_it_went(old: Path, tmp_path: Path) -> None:
    lines = (old / "events.jsonl").read_bytes().splitlines(keepends=True)
    kinds = [b'"kind":"observed"' in line for line in lines]
    end = [i for i, here in enumerate(kinds) if here][4] + 1
    (tmp_path / "events.jsonl").write_bytes(b"".join(lines[:end]))
    found = take(tmp_path, Growing())
    assert len(found.observations) == 5
    assert found.source["finished"] is False


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the user may write anywhere")
def test_an_archive_can_be_read_without_a_lock(old: Path) -> None:
    old.chmod(0o555)
    try:
        assert len(take(old, Growing()).observations) == 8
    finally:
        old.chmod(0o755)


def test_other_weights_are_refused_by_the_record_of_the_run(old: Path) -> None:
    with pytest.raises(DataError, match=r"expert 'b' of the run in .* has other weights"):
        take(old, Growing(digests={"b": "other"}))
    result = replace(map_bo.load_result(old), run_dir=None, problem=Growing())
    with pytest.raises(DataError, match="expert 'b' of the given result has other weights"):
        take(result, Growing(digests={"b": "other"}))


def test_what_reads_a_study_is_a_source() -> None:
    class Another:
        def study(self) -> Study:
            seen = Growing().seen_at(torch.rand(3, 2, dtype=torch.float64))
            return Study.of(seen, Growing().space, source={"from": "another"}, title="it")

    assert take(Another(), Growing()).source["from"] == "another"


def test_observations_that_fit_are_taken_as_they_are() -> None:
    seen = Growing().seen_at(torch.rand(3, 2, dtype=torch.float64))
    found = take(seen, Growing())
    assert found.observations is seen
    assert found.source == {"from": "python"}
    partly = Observations(seen.X, torch.where(torch.eye(3, 2) > 0, torch.nan, seen.Y), seen.metrics)
    assert take(partly, Growing()).observations is partly
