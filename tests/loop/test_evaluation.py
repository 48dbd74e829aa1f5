from __future__ import annotations

import contextlib
import threading
import time

import pytest
import torch

from map_bo.data import Observations
from map_bo.errors import ConfigError, EvaluationError, SpaceError
from map_bo.loop.evaluation import TimeLimitExceededError, evaluate_row, time_limit
from map_bo.rng import make_generator
from tests.loop.bowls import Bowls


def test_a_time_limit_interrupts_and_leaves_no_timer() -> None:
    with pytest.raises(TimeLimitExceededError, match=r"longer than 0.05 s"), time_limit(0.05):
        time.sleep(5)
    time.sleep(0.06)  # a timer left behind would strike here


def test_a_time_limit_outside_the_main_thread_is_refused() -> None:
    caught: list[ConfigError] = []

    def work() -> None:
        try:
            with time_limit(1.0):
                pass
        except ConfigError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "main thread" in caught[0].message


class Slow(Bowls):
    def evaluate(self, X: torch.Tensor, *, generator: torch.Generator) -> Observations:
        time.sleep(5)
        return super().evaluate(X, generator=generator)


def test_an_evaluation_over_its_limit_is_a_failed_one() -> None:
    row = evaluate_row(Slow(), torch.zeros(2), timeout=0.05, generator=make_generator(0))
    assert row.failures == ("it took longer than 0.05 s",)
    assert 0.04 < float(row.cost[0]) < 2


class CatchesEverything(Bowls):
    def evaluate(self, X: torch.Tensor, *, generator: torch.Generator) -> Observations:
        with contextlib.suppress(Exception):
            time.sleep(5)
        return super().evaluate(X, generator=generator)


def test_an_evaluator_that_catches_everything_cannot_swallow_the_limit() -> None:
    start = time.perf_counter()
    row = evaluate_row(
        CatchesEverything(), torch.zeros(2), timeout=0.05, generator=make_generator(0)
    )
    assert row.failures == ("it took longer than 0.05 s",)
    assert time.perf_counter() - start < 2


def test_errors_of_the_set_up_pass_through() -> None:
    with pytest.raises(SpaceError):
        evaluate_row(Bowls(), torch.full((2,), 7.0), timeout=None, generator=make_generator(0))


def test_the_cost_is_measured_where_the_problem_does_not_say() -> None:
    row = evaluate_row(Bowls(), torch.zeros(2), timeout=None, generator=make_generator(0))
    assert float(row.cost[0]) > 0


class Hinting(Bowls):
    def evaluate(self, X: torch.Tensor, *, generator: torch.Generator) -> Observations:
        raise EvaluationError("no GPU is free", hint="set device=cpu")


def test_a_failure_is_recorded_with_its_hint() -> None:
    row = evaluate_row(Hinting(), torch.zeros(2), timeout=None, generator=make_generator(0))
    assert row.failures == ("no GPU is free (hint: set device=cpu)",)
