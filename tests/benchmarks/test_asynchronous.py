"""The virtual clock: who is asked and told when, and what the sampler is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Generator, Tensor

from benchmarks import run as every_benchmark
from benchmarks.quality.analysis import Difference
from benchmarks.quality.asynchronous import (
    CASES,
    DURATIONS,
    GOAL,
    SETTLED,
    Ask,
    Durations,
    Schedule,
    Tell,
    at_equal_time,
    cells,
    duration,
    plan,
    play,
    table,
    within,
)
from benchmarks.quality.cases_core import Case
from benchmarks.record import RESULTS
from map_bo.data import Observations
from map_bo.problems.synthetic import ConcaveQuadratics
from map_bo.space import CoefficientSpace
from tests.benchmarks.test_analysis import row

EVERY = [Schedule(w, together) for w in (1, 4, 8) for together in (True, False)]


@pytest.mark.parametrize("kind", DURATIONS)
@pytest.mark.parametrize("schedule", EVERY, ids=lambda one: one.name)
def test_no_worker_has_two_evaluations_and_none_is_lost(
    schedule: Schedule, kind: Durations
) -> None:
    asked, told, now = 0, set[int](), 0.0
    for step in plan(schedule, kind, 3, 21):
        if isinstance(step, Ask):
            assert schedule.asynchronous or asked == len(told)  # a batch waits for the slowest
            asked += step.n
            assert asked - len(told) <= schedule.workers
            continue
        assert step.row < asked
        assert step.row not in told
        assert step.time >= now
        told, now = told | {step.row}, step.time
        if schedule.asynchronous and asked < 21:
            assert asked - len(told) == schedule.workers - 1  # and is given the next one now
    assert told == set(range(21))


def test_fixed_durations_take_as_long_as_there_are_rounds() -> None:
    for together in (True, False):
        assert at_equal_time(Schedule(8, together), "fixed", 0, 24) == (3.0, 3)
    assert at_equal_time(Schedule(1), "heavy-tailed", 0, 24)[1] == 24


def test_batches_wait_for_the_slowest() -> None:
    for seed in range(5):
        together, batches = (
            at_equal_time(Schedule(8, kind), "heavy-tailed", seed, 48)[0] for kind in (True, False)
        )
        assert together < batches
    drawn = torch.tensor([duration("heavy-tailed", 0, i) for i in range(2000)])
    assert float(drawn.mean()) == pytest.approx(1, abs=0.1)
    assert float((drawn > 3.1).double().mean()) == pytest.approx(0.05, abs=0.02)


class Noting:
    """Proposes points in a row, and writes down what it is shown."""

    def __init__(self) -> None:
        self.shown: list[tuple[list[float], list[float]]] = []
        self.count = 0

    def propose(
        self,
        seen: Observations,
        space: CoefficientSpace,
        n: int,
        *,
        pending: Tensor | None = None,
        generator: Generator,
    ) -> Tensor:
        waiting = [] if pending is None else pending[:, 0].tolist()
        self.shown.append((seen.X[:, 0].tolist(), waiting))
        X = torch.zeros(n, space.d, dtype=torch.float64)
        X[:, 0] = (torch.arange(n) + self.count) / 64
        self.count += n
        return X


def test_a_sampler_is_shown_what_is_in_flight() -> None:
    problem = ConcaveQuadratics(2, 2, 0)
    case = cast(Case, type("OnlyAProblem", (), {"problem": problem}))
    steps: list[Ask | Tell] = [Ask(3), Tell(1, 1.0), Ask(1), Tell(3, 2.0), Tell(0, 2.5)]
    steps += [Ask(1), Tell(2, 3.0)]
    sampler = Noting()
    played = list(play(case, sampler, 0, iter(steps)))
    rows = [i / 64 for i in range(5)]
    assert sampler.shown == [
        ([], []),
        (rows[1:2], [rows[0], rows[2]]),
        ([rows[0], rows[1], rows[3]], [rows[2]]),
    ]
    assert [time for time, _ in played] == [1.0, 2.0, 2.5, 3.0]
    assert played[-1][1].X[:, 0].tolist() == rows[:4]


def measured(label: str, seed: int, n: int, regret: float) -> dict[str, Any]:
    return row(CASES[0], label, seed, n, regret_solved=regret)


def test_the_table_compares_with_the_same_seed_in_sequence() -> None:
    rows = []
    for seed in range(6):
        for n, regret in ((6, 0.3), (12, 0.2), (24, 0.1)):
            rows.append(measured("default: sequential", seed, n, regret + seed))
            label = "default: 8 workers, asynchronous, fixed"
            rows.append(measured(label, seed, n, regret + seed + 0.002))
    text = "\n".join(table(rows))
    assert "+0.0020 [+0.0020, +0.0020] | yes | 6 |" in text
    assert "| 3.0 | 3.0 | 2.6020 | 2.8000 | 6 |" in text


def test_the_goal_is_kept_by_the_whole_interval() -> None:
    def of(low: float, high: float, seeds: int = 10) -> str:
        return within(Difference((low + high) / 2, low, high, 10, 1, seeds))

    assert of(-0.01, GOAL) == "yes"
    assert of(GOAL + 1e-4, 0.01) == "no"
    assert of(-0.001, 0.004).startswith("mean yes")
    assert of(0.002, 0.02).startswith("mean no")
    assert of(-0.01, GOAL, seeds=3) == "too few seeds"


def test_what_was_tried_out_on_is_not_reported() -> None:
    assert not set(CASES) & set(SETTLED)
    assert {case for case, *_ in cells(CASES, ["default"], 2)} == set(CASES)


def test_the_document_has_the_recorded_table() -> None:
    document = Path(every_benchmark.ASYNCHRONOUS)
    recorded = json.loads((RESULTS / "asynchronous.json").read_text())
    assert every_benchmark.filled(document.read_text()) == document.read_text()
    assert recorded["table"] == table(recorded["data"]["rows"])
