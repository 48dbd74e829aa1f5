from __future__ import annotations

from pathlib import Path

from map_bo.ax.rows import rows_of, run_id
from map_bo.loop.known import include
from map_bo.loop.reading import load_state
from map_bo.loop.run import Run
from map_bo.tracking.jsonl import JsonlStore
from tests.ax.exported import outcome, unfinished
from tests.loop.bowls import Bowls, quick


def test_rows_say_where_they_come_from_and_when(tmp_path: Path) -> None:
    run = unfinished(tmp_path)
    problem = Bowls()
    given = outcome(problem, problem.space.bounds.mean(0) / 3, 1)
    include(given, run.store, run.state, {"from": "test"})
    state, space = load_state(tmp_path)
    events = list(JsonlStore.open(tmp_path).read())
    rows = rows_of(state, space, events)
    methods = [row.method for row in rows]
    assert methods == ["anchor"] * 4 + ["Sobol"] * 4 + ["imported"]
    assert [row.origin.get("anchor") for row in rows[:4]] == ["base", "a", "b", "uniform blend"]
    assert [row.origin["row"] for row in rows] == list(range(9))
    assert rows[7].outcome is None
    assert rows[7].finished is None
    times = [row.finished for row in rows if row.finished is not None]
    assert times == sorted(times)
    assert all(row.created <= (row.finished or row.created) for row in rows)


def test_points_to_verify_come_last(tmp_path: Path) -> None:
    Run(Bowls(), quick(), JsonlStore.create(tmp_path)).drive()
    state, space = load_state(tmp_path)
    rows = rows_of(state, space, list(JsonlStore.open(tmp_path).read()))
    assert [row.method for row in rows[-2:]] == ["verification"] * 2
    assert [row.origin["verification"] for row in rows[-2:]] == state.front_data["verify"]
    assert len(rows) == 8


def test_a_run_has_an_identity(tmp_path: Path) -> None:
    unfinished(tmp_path / "a")
    unfinished(tmp_path / "b")
    a, b = (list(JsonlStore.open(tmp_path / name).read()) for name in "ab")
    assert run_id(a) == run_id(a[:1]) != run_id(b)
    assert run_id([]) == ""


def test_points_of_a_front_that_was_set_back_are_rows_with_their_times(tmp_path: Path) -> None:
    Run(Bowls(), quick(), JsonlStore.create(tmp_path)).drive()
    Run(Bowls(), quick(11), JsonlStore.open(tmp_path)).drive()
    state, space = load_state(tmp_path)
    rows = rows_of(state, space, list(JsonlStore.open(tmp_path).read()))
    assert [row.method for row in rows[4:]] == ["Sobol"] * 2 + ["verification"] * 2 + ["Sobol"] + [
        "verification"
    ] * 2
    assert [row.origin["row"] for row in rows[:9]] == list(range(9))
    times = [row.finished or 0.0 for row in rows]
    assert 0 < min(times) <= max(times[:8]) < times[8] < min(times[9:])
