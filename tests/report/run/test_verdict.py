"""Verdicts in reports: rows, words, page and terminal."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from map_bo.data import Metric, Observations
from map_bo.loop.verdict.confirm import CHOSEN, Confirmation
from map_bo.loop.verdict.verdict import BLEND, OVERALL, Comparison, Verdict
from map_bo.report.run.cards import print_summary
from map_bo.report.run.page import write_html
from map_bo.report.run.verdict import COLUMNS, comparison_rows, confirmed_tables, verdict_lines
from map_bo.report.view import RunView
from tests.report.fake_views import make_view

UP = Comparison(CHOSEN, BLEND, "acc", 0.05, 0.01, 0.09, 1e-5, "examples", "McNemar, exact", 80)
FLAT = replace(UP, metric=OVERALL, gain=0.01, lower=-float("inf"), p=1.0, ground="values", n=None)
VERDICT = Verdict((UP, FLAT), 12)
CONFIRMED = Confirmation(
    "held-out examples",
    True,
    (CHOSEN,),
    torch.tensor([[0.8]]).double(),
    Observations(torch.tensor([[0.2]]), torch.tensor([[0.75]]), (Metric("acc"),)),
    VERDICT,
    {},
)


def judged(view: RunView) -> RunView:
    told = {"verdict": VERDICT.describe(), "confirmed": [CONFIRMED.summary()]}
    return replace(view, summary={**view.summary, **told})


def test_comparisons_become_rows() -> None:
    first, second = comparison_rows(judged(make_view()))
    assert len(first) == len(COLUMNS)
    assert first[3:6] == ("+0.05", "0.01 to 0.09", "< 0.001")
    assert first[6:] == ("McNemar, exact, 80 examples", "better")
    assert second[4] == "unknown"
    assert second[7] == "not distinguishable"
    assert comparison_rows(make_view()) == []
    assert verdict_lines(make_view()) == []


def test_page_and_terminal_show_the_verdict_and_what_was_confirmed(tmp_path: Path) -> None:
    view = judged(make_view())
    write_html(view, tmp_path / "report.html", [])
    page = (tmp_path / "report.html").read_text()
    screen = io.StringIO()
    print_summary(view, Console(file=screen, width=200))
    for text in (page, screen.getvalue()):
        assert "Verdict" in text
        assert VERDICT.lines()[0] in text
        assert "acc: measured" in text
        assert "acc +0.05" in text
    assert "Verdict</h2>" not in _page(make_view(), tmp_path)
    [one] = confirmed_tables(view)
    assert one.where == "held-out examples"


def _page(view: RunView, folder: Path) -> str:
    write_html(view, folder / "plain.html", [])
    return (folder / "plain.html").read_text()
