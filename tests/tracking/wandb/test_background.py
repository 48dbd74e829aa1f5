from __future__ import annotations

import threading
import time

import pytest

from map_bo.tracking.store import Event
from map_bo.tracking.wandb.mirror import Background


class Slow:
    """Takes an event when it is let, and keeps what it took and in which thread."""

    def __init__(self, *, free: bool = False, fails: BaseException | None = None) -> None:
        self.free, self.fails = threading.Event(), fails
        self.told: list[str | bool] = []
        self.threads: set[int] = set()
        if free:
            self.free.set()

    def observe(self, event: Event) -> None:
        self.free.wait(20)
        self.threads.add(threading.get_ident())
        self.told.append(event.kind)
        if self.fails is not None:
            raise self.fails

    def finish(self, *, whole: bool) -> None:
        self.free.wait(20)
        self.told.append(whole)


def test_events_arrive_in_order_from_one_other_thread() -> None:
    inner = Slow(free=True)
    background = Background(inner, name="it")
    for number in range(300):
        background.observe(Event(str(number), {}))
    background.finish(whole=True)
    assert inner.told == [*map(str, range(300)), True]
    assert len(inner.threads) == 1
    assert threading.get_ident() not in inner.threads


def test_a_slow_tracker_does_not_slow_the_run() -> None:
    inner = Slow()
    background = Background(inner, name="it")
    start = time.perf_counter()
    for _ in range(1000):
        background.observe(Event("observed", {}))
    assert time.perf_counter() - start < 0.5
    inner.free.set()
    background.finish(whole=False)
    assert inner.told == ["observed"] * 1000 + [False]


def test_one_that_hangs_is_waited_for_as_long_as_the_patience(
    caplog: pytest.LogCaptureFixture,
) -> None:
    inner = Slow()
    background = Background(inner, name="it", patience=0.2)
    background.observe(Event("created", {}))
    start = time.perf_counter()
    background.finish(whole=True)
    assert 0.15 < time.perf_counter() - start < 2
    (record,) = caplog.records
    assert record.getMessage() == (
        "it is given up for this session; the run and its record go on: it did not finish in time"
    )
    inner.free.set()


def test_one_that_lags_behind_by_the_whole_queue_is_given_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    inner = Slow()
    background = Background(inner, name="it", room=5)
    for _ in range(20):
        background.observe(Event("observed", {}))
    start = time.perf_counter()
    background.finish(whole=True)
    assert time.perf_counter() - start < 0.5
    (record,) = caplog.records
    assert "it lags behind by 5 events" in record.getMessage()
    inner.free.set()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SystemExit(1), KeyboardInterrupt()]
)
def test_whatever_is_raised_is_told_once(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    inner = Slow(free=True, fails=error)
    background = Background(inner, name="it")
    for _ in range(3):
        background.observe(Event("observed", {}))
        time.sleep(0.02)
    background.finish(whole=True)
    assert inner.told == ["observed"]
    (record,) = caplog.records
    assert f"{type(error).__name__}: {error}" in record.getMessage()


def test_nothing_is_started_for_a_run_that_never_began() -> None:
    inner = Slow()
    Background(inner, name="it").finish(whole=True)
    assert inner.told == []
