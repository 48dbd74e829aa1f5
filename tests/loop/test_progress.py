from __future__ import annotations

import io
import logging
import sys

import pytest
import torch
from rich.console import Console
from torch import Generator, Tensor, nn

from map_bo.data import Metric, Observations
from map_bo.evaluators.evaluator import measure
from map_bo.evaluators.examples import ExampleEvaluator, mean_of
from map_bo.loop import progress
from map_bo.loop.progress import RichProgress, follow, silent
from map_bo.loop.run import Run
from map_bo.tracking.jsonl import MemoryStore
from map_bo.workers.workers import Task
from tests.loop.bowls import Bowls, quick


class Listener:
    def __init__(self) -> None:
        self.heard: list[str] = []

    def over(self, total: int) -> Listener:
        self.heard.append(f"total {total}")
        return self

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *args: object) -> None:
        self.heard.append("closed")

    def done(self, count: int) -> None:
        self.heard.append(f"done {count}")

    def evaluating(self, what: str) -> None:
        self.heard.append(what)

    def measured(self, outcome: object) -> None:
        self.heard.append("measured")


def test_progress_hears_of_every_evaluation() -> None:
    listener = Listener()
    Run(Bowls(), quick(6), MemoryStore()).drive(listener)
    assert listener.heard[:2] == ["total 6", "done 0"]
    assert listener.heard.count("measured") == 6
    assert "evaluation 1" in listener.heard
    assert any(text.startswith("verifying front point") for text in listener.heard)
    assert listener.heard[-1] == "closed"


def test_the_bar_writes_nothing_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    problem = Bowls(fails=lambda number, x: "[odd] markup" if number == 2 else None)
    Run(problem, quick(6), MemoryStore()).drive(RichProgress())
    assert capsys.readouterr().out == ""


class Counted(ExampleEvaluator):
    """Five examples, of which two at a time are scored."""

    metrics = (Metric("right"),)
    size = 5
    digest = "five"

    def __init__(self) -> None:
        super().__init__(batch_size=2)

    def prepare(self, model: nn.Module) -> None:
        """Nothing is read."""

    def outcomes(self, model: nn.Module, items: Tensor) -> Tensor:
        return (items % 2).double()


class Scored(Bowls):
    """Bowls that score examples on the way."""

    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        evaluator = Counted()

        def called(model: nn.Module) -> object:
            return mean_of(evaluator.score(model, torch.arange(5)), evaluator.metrics[0])

        measure("sst2", called, nn.Identity())  # type: ignore[arg-type]
        return super().evaluate(X, generator=generator)


class Counting(Listener):
    def scored(self, evaluator: str | None, done: int, total: int) -> None:
        self.heard.append(f"{evaluator} {done}/{total}")


def test_a_reporter_that_counts_hears_of_examples() -> None:
    listener = Counting()
    Run(Scored(), quick(6), MemoryStore()).drive(listener)
    first = listener.heard.index("evaluation 1")
    counts = ["sst2 2/5", "sst2 4/5", "sst2 5/5"]
    assert listener.heard[first + 1 : first + 5] == [*counts, "measured"]
    plain = Listener()
    Run(Scored(), quick(6), MemoryStore()).drive(plain)
    assert not any("sst2" in text for text in plain.heard)
    with follow(silent, 3) as report:
        assert report is silent


def test_without_a_terminal_the_log_says_now_and_then_how_far_it_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "map_bo"):
        Run(Scored(), quick(6), MemoryStore()).drive(RichProgress())
        assert not caplog.messages
        Run(Scored(), quick(6), MemoryStore()).drive(RichProgress(interval=0.0))
    assert "evaluation 1, sst2: 4 of 5 examples; 0 of 6 evaluations done" in caplog.messages
    said = [text for text in caplog.messages if text.startswith("evaluation 3, sst2: 5 of 5")]
    assert len(said) == 1
    assert "2 of 6 evaluations done, about 0 s left" in said[0]


def test_on_a_terminal_the_bar_shows_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()

    def console(file: object) -> Console:
        assert file is sys.stderr
        return Console(file=shown, force_terminal=True, width=200)

    monkeypatch.setattr(progress, "Console", console)
    with follow(RichProgress(), 4) as report:
        report.done(0)
        report.evaluating("evaluation 1")
        assert isinstance(report, progress.CountsExamples)
        report.scored("sst2", 128, 500)
        report.scored(None, 500, 500)
    assert "evaluation 1" in shown.getvalue()
    assert "examples 500/500" in shown.getvalue()


def test_a_narrow_terminal_shows_counts_and_times_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(
        progress, "Console", lambda file: Console(file=shown, force_terminal=True, width=80)
    )
    metrics = tuple(Metric(f"a_metric_with_a_long_name_{i}") for i in range(4))
    seen = Observations(X=torch.zeros(1, 1), Y=torch.full((1, 4), 0.5), metrics=metrics)
    with follow(RichProgress(), 24) as report:
        report.measured(seen)
        report.evaluating("evaluation 12")
        assert isinstance(report, progress.CountsExamples)
        report.scored("sst2", 128, 500)
    for whole in ("evaluation 12 ", " 1/24", "0:00:0", " left ", "sst2 128/500"):
        assert whole in shown.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (89, "89 s"), (600, "10 min"), (9000, "2.5 h")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert progress._duration(seconds) == text


@pytest.mark.parametrize(
    ("marks", "text"),
    [
        ([False, False], ""),
        ([True, True], " (from the cache)"),
        ([False, True], " (1 of 2 from the cache)"),
    ],
)
def test_what_comes_from_the_cache_is_told(marks: list[bool], text: str) -> None:
    row = torch.tensor([[0.5, 0.25]])
    seen = Observations(row, row, (Metric("a"), Metric("b")), recalled=torch.tensor([marks]))
    assert progress._from_the_cache(seen) == text


def test_the_log_counts_what_comes_from_the_cache(caplog: pytest.LogCaptureFixture) -> None:
    row = torch.tensor([[0.5]])
    kept = Observations(row, row, (Metric("a"),), recalled=torch.tensor([[True]]))
    with caplog.at_level(logging.INFO):
        report = progress._LogReporter(4, 0.0)
        for outcome in (kept, Observations(row, row, (Metric("a"),)), kept):
            report.measured(outcome)
        report.evaluating("evaluation 4 of 4")
    assert "3 of 4 evaluations done (2 from the cache)" in caplog.text


def test_the_log_estimates_by_what_was_paid_since_it_began(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("map_bo.loop.progress.time.monotonic", lambda: now[0])
    row = torch.tensor([[0.5]])
    with caplog.at_level(logging.INFO):
        report = progress._LogReporter(10, 1.0)
        report.paid(4.0)  # recorded earlier
        for _ in range(5):
            report.measured(Observations(row, row, (Metric("a"),)))
        report.paid(5.0)
        now[0] = 10.0
        report.evaluating("evaluation 30")
    assert "evaluation 30; 5.0 of 10 full evaluations done, about 50 s left" in caplog.text


RUNNING = [
    ("host/1", Task("index", 4, 0, (0.5,), 1), 12.0),
    ("host/2", Task("verify", 2, 0, (0.5,), 1), 200.0),
]


def test_the_log_shows_what_each_worker_does(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        report = progress._LogReporter(4, 0.0)
        report.working([], 0)
        assert caplog.text == ""
        report.working(RUNNING, 3)
    assert (
        "2 workers at work: verifying front point 2 on host/2 for 3 min, "
        "evaluation 5 on host/1 for 12 s, 3 waiting; 0 of 4 evaluations done" in caplog.text
    )


def test_the_bar_shows_what_each_worker_does(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(
        progress, "Console", lambda file: Console(file=shown, force_terminal=True, width=200)
    )
    with follow(RichProgress(), 4) as report:
        assert isinstance(report, progress.ShowsWorkers)
        report.working(RUNNING[:1], 0)
    assert "1 worker at work" in shown.getvalue()
    assert "evaluation 5 on host/1 for 12 s" in shown.getvalue()
