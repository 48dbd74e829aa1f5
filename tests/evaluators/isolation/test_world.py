from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from map_bo.errors import EvaluationError
from map_bo.evaluators.isolation import global_state
from map_bo.evaluators.isolation.world import (
    TimeLimitExceededError,
    callers_dtype,
    callers_world,
    isolated,
    known_numerics,
    own_maths,
    stops_the_process,
)
from tests.evaluators.surroundings import surroundings


def numerics() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.zeros(1).device.type,
        np.geterr()["over"],
    )


KNOWN = (True, False, False, torch.float32, "cpu", "warn")


@pytest.fixture
def odd() -> Any:
    torch.set_default_dtype(torch.float64)  # noqa: TID251
    torch.set_default_device("meta")
    try:
        with torch.inference_mode(), torch.autocast("cpu"), np.errstate(all="raise"):
            yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)  # noqa: TID251


def test_own_computations_find_known_numerics_and_callers_their_own(odd: None) -> None:
    mine = numerics()
    assert mine == (False, True, True, torch.float64, "meta", "raise")
    for _ in range(2):
        with known_numerics(), own_maths():
            assert numerics() == KNOWN
            assert callers_dtype() == torch.float64
            with callers_world():
                assert numerics() == mine
                with known_numerics():  # as a run within an evaluator would
                    assert numerics() == KNOWN
                assert numerics() == mine
            assert numerics() == KNOWN
        assert numerics() == mine


def test_numerics_come_back_after_an_error_and_a_mode_left_entered(odd: None) -> None:
    mine, left = numerics(), torch.no_grad()

    @known_numerics()
    def compute() -> None:
        left.__enter__()
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        compute()
    assert numerics() == mine


def test_runs_take_turns_and_evaluators_do_not() -> None:
    order: list[str] = []
    inside = threading.Event()

    def other() -> None:
        with own_maths():
            order.append("other")
        inside.set()

    with own_maths():
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.05)
        order.append("first")
        with callers_world():
            assert inside.wait(5)  # while an evaluator is at work, the other has its turn
    thread.join()
    assert order == ["first", "other"]


@pytest.mark.slow
def test_a_forked_process_is_not_locked_out() -> None:
    code = (
        "import os, threading, time\n"
        "from map_bo.evaluators.isolation.world import own_maths\n"
        "def hold():\n"
        "    with own_maths(): time.sleep(1)\n"
        "threading.Thread(target=hold, daemon=True).start()\n"
        "time.sleep(.2)\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    with own_maths(): os._exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert out.stdout.strip() == "7", out.stderr


def draw() -> tuple[float, float]:
    return float(torch.rand(())), float(np.random.rand())  # noqa: NPY002


def test_what_is_drawn_depends_on_the_seed_alone() -> None:
    before = surroundings()
    drawn: list[tuple[float, float]] = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(drawn))  # noqa: TID251
        with isolated("it", seed):
            drawn.append(draw())
    assert drawn[0] == drawn[1]
    assert not set(drawn[0]) & set(drawn[2])
    torch.manual_seed(0)  # noqa: TID251
    first = draw()[0]
    torch.manual_seed(0)  # noqa: TID251
    with isolated("it", 5):
        draw()
    assert draw()[0] == first
    assert before.keys() == surroundings().keys()


def test_the_autocast_cache_does_not_outlive_a_candidate() -> None:
    weight = torch.nn.Linear(2, 1, bias=False)
    x = torch.ones(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        for value in (1.0, 2.0):
            weight.weight.data.fill_(value)  # as a candidate is written: in place
            with isolated("it", 0):
                assert float(weight(x).detach()) == 2 * value


def test_what_cannot_be_put_back_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(found: object) -> None:
        raise OSError("not today")

    state = [1]
    part = global_state._Part("the weather", lambda: list(state), refuse)
    monkeypatch.setattr(global_state, "_PARTS", (*global_state._PARTS, part))
    with isolated("evaluator 'a'", 0):
        pass
    with (
        pytest.raises(EvaluationError, match=r"evaluator 'a' left behind .*the weather \(OSError"),
        isolated("evaluator 'a'", 0),
    ):
        state.append(2)
    state.append(3)

    @isolated("evaluator 'a'", 0)
    def fail() -> None:
        state.append(4)
        raise ValueError("own")

    with pytest.raises(ValueError, match="own"):
        fail()


def test_threads_that_evaluate_leave_what_the_first_found() -> None:
    started, leave = threading.Event(), threading.Event()

    def work() -> None:
        with isolated("one", 1):
            os.environ["MAP_BO_ODD"] = "1"
            started.set()
            assert leave.wait(5)

    before = surroundings()
    thread = threading.Thread(target=work)
    thread.start()
    assert started.wait(5)
    with isolated("two", 2):
        leave.set()
        thread.join()
    assert surroundings() == before


def test_it_costs_little() -> None:
    with isolated("it", 0):
        pass
    best = min(_seconds(lambda: _empty()) for _ in range(20))
    assert best < 0.01  # a third of a millisecond on an idle machine


def _empty() -> None:
    with isolated("it", 0):
        pass


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def caught(call: Callable[[], object]) -> BaseException:
    try:
        call()
    except BaseException as error:
        return error
    raise AssertionError


def test_what_is_meant_for_the_process() -> None:
    def wait() -> None:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(1)

    def leave(signum: int, frame: object) -> None:
        sys.exit(143)

    assert stops_the_process(KeyboardInterrupt())
    assert stops_the_process(TimeLimitExceededError())
    assert not stops_the_process(ValueError())
    assert not stops_the_process(caught(sys.exit))
    before = signal.signal(signal.SIGTERM, leave)
    try:
        error = caught(wait)
        assert isinstance(error, SystemExit)
        assert stops_the_process(error)
        assert not stops_the_process(caught(sys.exit))
    finally:
        signal.signal(signal.SIGTERM, before)
