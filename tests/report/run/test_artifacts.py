from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from map_bo.errors import DataError
from map_bo.report.run import artifacts
from map_bo.report.run.artifacts import write_report, write_summary
from tests.report.fake_views import make_view


def strict(text: str) -> Any:
    def refuse(constant: str) -> Any:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def test_a_report_is_all_of_its_files_and_nothing_more(tmp_path: Path) -> None:
    view = make_view(2, failures=(7,))
    for _ in range(2):  # writing it again replaces it
        write_report(view, tmp_path / "run")
    files = {p.relative_to(tmp_path / "run").as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {
        "evaluations.csv",
        "front.csv",
        "summary.json",
        "plots/front.png",
        "plots/progress.png",
        "report.html",
    }
    assert strict((tmp_path / "run" / "summary.json").read_text()) == view.summary
    assert (tmp_path / "run" / "report.html").read_text().count("data:image/png;base64,iVBOR") == 2


def test_a_plot_that_cannot_be_drawn_costs_no_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr(artifacts, "write_plots", fail)
    with pytest.raises(DataError, match="RuntimeError: no font"):
        write_report(make_view(2), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "evaluations.csv", "front.csv", "summary.json",
    }  # fmt: skip


def test_the_summary_is_strict_json(tmp_path: Path) -> None:
    write_summary({"a": float("nan"), "b": [float("inf"), 0.1], "c": {"d": None}}, tmp_path / "s")
    assert strict((tmp_path / "s").read_text()) == {"a": None, "b": [None, 0.1], "c": {"d": None}}
