from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import pytest

from benchmarks.speed import workers
from map_bo.rng import make_generator


def test_durations_have_the_mean_that_was_asked_for() -> None:
    heavy = workers.Sleeper(2.0, True)
    drawn = [heavy.duration(make_generator(seed)) for seed in range(3000)]
    assert statistics.mean(drawn) == pytest.approx(2.0, rel=0.1)
    assert max(drawn) > 10
    assert workers.Sleeper(2.0, False).duration(make_generator(0)) == 2.0


def test_one_worker_takes_the_sum_of_the_durations() -> None:
    assert workers.one_worker(workers.Sleeper(2.0, False), workers.FULL) == 128.0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_it_measures_in_a_smoke_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAP_BO_CACHE", str(tmp_path))
    out = tmp_path / "workers.json"
    monkeypatch.setattr(sys, "argv", ["workers", "--smoke", "--out", str(out)])
    workers.main()
    data = json.loads(out.read_text())["data"]
    assert {row["proposals"] for row in data["throughput"]} == {"batches", "asynchronous"}
    assert all(row["seconds"] > 0 for row in data["throughput"])
    assert data["milliseconds_per_task"] > 0
    assert all(bytes > 0 for one in data["memory"].values() for bytes in one["anonymous"])
