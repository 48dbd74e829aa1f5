from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import pytest
import torch

from map_bo.data import Observations
from map_bo.errors import ConfigError, EvaluationError, SpaceError
from map_bo.evaluators.isolation import global_state
from map_bo.rng import make_generator
from map_bo.tracking.store import Event
from map_bo.workers.evaluation import TimeLimitExceededError, deaths_of, evaluate_row, time_limit
from tests.evaluators.surroundings import surroundings
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


class Leaving(Bowls):
    """A user's own problem that leaves the process otherwise than it found it."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__()
        self.act = act

    def evaluate(self, X: torch.Tensor, *, generator: torch.Generator) -> Observations:
        found = super().evaluate(X, generator=generator)
        self.act()
        return found


@pytest.mark.parametrize(
    "act",
    [
        lambda: torch.set_grad_enabled(False),
        lambda: torch.set_default_dtype(torch.float64),  # noqa: TID251
        lambda: torch.set_default_device("meta"),
        lambda: torch.inference_mode().__enter__(),
        lambda: torch.manual_seed(0),  # noqa: TID251
        lambda: os.chdir("/"),
        lambda: sys.argv.append("--odd"),
        lambda: signal.signal(signal.SIGALRM, signal.SIG_IGN),
        lambda: os.environ.update(MAP_BO_ODD="1"),
    ],
)
def test_what_a_problem_leaves_behind_is_undone(act: Callable[[], object]) -> None:
    before = surroundings()
    row = evaluate_row(Leaving(act), torch.zeros(2), timeout=30, generator=make_generator(0))
    assert surroundings() == before
    assert row.failures == (None,)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (SystemExit(2), "SystemExit: 2"),
        (SystemExit(), "SystemExit"),
        (GeneratorExit(), "GeneratorExit"),
        (asyncio.CancelledError("gone"), "CancelledError: gone"),
    ],
)
def test_a_problem_that_exits_is_a_failed_evaluation(error: BaseException, reason: str) -> None:
    def leave() -> None:
        raise error

    row = evaluate_row(Leaving(leave), torch.zeros(2), timeout=None, generator=make_generator(0))
    assert row.failures == (reason,)


def test_an_interrupt_and_the_end_of_the_process_pass_through() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    def end(signum: int, frame: object) -> None:
        raise SystemExit(143)

    with pytest.raises(KeyboardInterrupt):
        evaluate_row(Leaving(interrupt), torch.zeros(2), timeout=None, generator=make_generator(0))
    before = signal.signal(signal.SIGTERM, end)
    try:
        leaving = Leaving(lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit):
            evaluate_row(leaving, torch.zeros(2), timeout=None, generator=make_generator(0))
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_problem_in_inference_mode_gives_ordinary_tensors() -> None:
    with torch.inference_mode():
        row = evaluate_row(Bowls(), torch.zeros(2), timeout=None, generator=make_generator(0))
    assert not any(tensor.is_inference() for tensor in (row.X, row.Y, row.Yvar, row.cost))


def test_a_time_limit_gives_the_callers_alarm_back() -> None:
    test = signal.setitimer(signal.ITIMER_REAL, 50)
    try:
        with time_limit(5.0):
            signal.alarm(0)
        assert 40 < signal.getitimer(signal.ITIMER_REAL)[0] <= 50
    finally:
        signal.setitimer(signal.ITIMER_REAL, *test)


def test_a_time_limit_does_not_interrupt_what_puts_things_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[int] = []

    def slow(found: object) -> None:
        time.sleep(0.1)
        done.append(1)

    part = global_state._Part("it", lambda: 0, slow, always=True)
    monkeypatch.setattr(global_state, "_PARTS", (*global_state._PARTS, part))
    row = evaluate_row(
        Leaving(lambda: time.sleep(0.03)),
        torch.zeros(2),
        timeout=0.05,
        generator=make_generator(0),
    )
    assert done == [1]
    assert row.failures in [("it took longer than 0.05 s",), (None,)]


def test_what_workers_evaluated_when_the_driver_died_is_no_death() -> None:
    here = Event("started", {"probe": "3", "attempt": 0})
    there = Event("started", {"probe": "3", "attempt": 0, "worker": True})
    assert deaths_of([here, there, there, there], {"probe": "3"}) == 1
    assert deaths_of([here, here, Event("interrupted", {"probe": "3"})], {"probe": "3"}) == 1
    assert deaths_of([here], {"probe": "4"}) == 0
