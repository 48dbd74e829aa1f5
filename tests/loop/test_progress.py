from __future__ import annotations

import pytest

from map_bo.loop.progress import RichProgress
from map_bo.loop.run import Run
from map_bo.tracking.jsonl import MemoryStore
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
