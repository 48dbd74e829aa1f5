from __future__ import annotations

from pathlib import Path

import pytest
import torch

import map_bo
from map_bo.data import Metric, Observations
from map_bo.errors import DataError, MapBoError, SpaceError, StoreError
from map_bo.loop.known import include
from map_bo.loop.reading import load_state
from map_bo.loop.run import Run
from map_bo.loop.state import advance
from map_bo.tracking.codec import encode_observations
from map_bo.tracking.jsonl import JsonlStore, MemoryStore
from map_bo.tracking.store import Event
from tests.loop.bowls import Bowls, quick


def seen_at(*points: tuple[float, float]) -> Observations:
    problem = Bowls()
    return problem.evaluate(torch.tensor(points).double(), generator=torch.Generator())


def test_rows_that_wait_get_their_outcome_and_others_are_added(tmp_path: Path) -> None:
    run = Run(Bowls(), quick(), JsonlStore.create(tmp_path))
    run.ask(3)
    second = tuple(run.state.X[1].tolist())
    found = seen_at((0.3, 0.4), second, second)  # measured twice: the second time is a new row
    after = include(found, run.store, run.state, {"from": "test"})
    assert after.pending == [0, 2]
    assert sorted(after.outcomes) == [1, 3, 4]
    assert torch.equal(after.X[3:], found.X[[0, 2]])
    assert torch.equal(after.seen.Y, found.Y[[1, 0, 2]])
    assert set(after.imported) == {1, 3, 4}
    state, _ = load_state(tmp_path)
    assert torch.equal(state.X, after.X)
    assert state.imported[3] == {"from": "test"}


def test_a_run_goes_on_with_what_was_known_in_its_budget(tmp_path: Path) -> None:
    problem, known = Bowls(), seen_at((0.3, 0.4), (0.9, 0.1), (0.2, 0.8))
    settings = vars(quick())
    names = ("sampler", "surrogate", "solver", "verify", "retries")
    chosen = {name: settings[name] for name in names}

    def optimize(run_dir: Path | None) -> map_bo.Result:
        return map_bo.optimize(
            problem, 8, run_dir=run_dir, known=known, progress=False, tracking="none", **chosen
        )

    result = optimize(tmp_path / "run")
    assert len(problem.calls) == 5
    assert len(result.seen) == 6
    assert "3 of the evaluations were made elsewhere" in result.summary["notes"][0]
    assert torch.equal(result.seen.X[:3], known.X)
    problem.calls.clear()
    assert torch.equal(optimize(tmp_path / "run").front.X, result.front.X)  # and not twice
    assert problem.calls == []
    assert torch.equal(optimize(None).front.X, result.front.X)


def test_sobol_points_are_not_lost_to_what_was_known() -> None:
    problem, store = Bowls(), MemoryStore()
    run = Run(problem, quick(20), store)
    include(seen_at((0.3, 0.4)), store, run.state, {})
    again = Run(problem, quick(20), store)
    assert again.ask(2) == [1, 2]
    assert not torch.isin(again.state.X[1:], again.state.X[:1]).all()


def test_nothing_is_recorded_for_nothing() -> None:
    run = Run(Bowls(), quick(), MemoryStore())
    assert include(seen_at((0.3, 0.4)).select([]), run.store, run.state, {}) is run.state
    assert len(list(run.store.read())) == 1


def test_a_solved_front_takes_no_more() -> None:
    store = MemoryStore()
    Run(Bowls(), quick(), store).drive()
    run = Run(Bowls(), quick(), store)
    with pytest.raises(StoreError, match="front of this run has been solved"):
        include(seen_at((0.3, 0.4)), store, run.state, {})


@pytest.mark.parametrize(
    ("known", "error"),
    [
        (Observations(torch.rand(2, 2), torch.rand(2, 1), (Metric("other"),)), DataError),
        (Observations(torch.rand(2, 3), torch.rand(2, 2), Bowls().metrics), DataError),
        (Observations(torch.full((1, 2), 2.0), torch.rand(1, 2), Bowls().metrics), SpaceError),
    ],
)
def test_what_is_of_another_run_leaves_no_run_behind(
    tmp_path: Path, known: Observations, error: type[MapBoError]
) -> None:
    with pytest.raises(error):
        map_bo.optimize(Bowls(), 8, run_dir=tmp_path / "run", known=known, progress=False)
    assert not (tmp_path / "run").exists()


def test_a_record_with_a_gap_is_refused() -> None:
    run = Run(Bowls(), quick(), MemoryStore())
    found = encode_observations(seen_at((0.3, 0.4)))
    event = Event("imported", {"indices": [4], "observations": found, "source": {}})
    with pytest.raises(StoreError, match="imported rows have numbers"):
        advance(run.state, event)
