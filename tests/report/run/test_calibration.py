from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from map_bo.report.run.certainty import calibration_rows, calibration_words, pit_rows
from map_bo.report.run.page import write_html
from map_bo.report.view import RunView
from tests.report.fake_views import make_view

PIT = [1, 2, 3, 4, 0, 0, 4, 3, 2, 1]


def validated(**changes: Any) -> RunView:
    view = make_view(2)
    results = {"coverage": 0.95, "log_density": -0.1234, "rmse": 0.0456, "pit": PIT, **changes}
    found = {"n": 20, "metrics": {"rot90": results, "in<vert": {**results, "coverage": 0.5}}}
    surrogate = {**view.summary["surrogate"], "validation": found}
    return dataclasses.replace(view, summary={**view.summary, "surrogate": surrogate})


def test_rows_are_coverage_density_and_error_by_metric() -> None:
    assert calibration_rows(validated()) == [
        ("rot90", "95.0 %", "-0.123", "0.0456"),
        ("in<vert", "50.0 %", "-0.123", "0.0456"),
    ]
    assert pit_rows(validated())[0] == ("rot90", *map(str, PIT))


def test_what_is_not_finite_is_unknown() -> None:
    assert calibration_rows(validated(log_density=None))[0][2] == "unknown"


def test_words_tell_how_coarse_the_shares_are() -> None:
    words = calibration_words(validated())
    assert "Each of the 20 evaluations was predicted from the other 19" in words
    assert "give or take 5 percentage points for 20 evaluations" in words


def test_a_run_without_validation_has_no_calibration(tmp_path: Path) -> None:
    view = make_view(2)
    assert calibration_rows(view) == pit_rows(view) == []
    assert calibration_words(view) == ""
    write_html(view, tmp_path / "report.html", [])
    assert "Calibration" not in (tmp_path / "report.html").read_text()


def test_the_page_shows_tables_that_can_be_read_aloud(tmp_path: Path) -> None:
    write_html(validated(), tmp_path / "report.html", [])
    page = (tmp_path / "report.html").read_text()
    assert '<h2 id="calibration">Calibration of the surrogate</h2>' in page
    assert '<a href="#calibration">' in page
    assert (
        "<caption>Every evaluation predicted from all others, on the link scale.</caption>" in page
    )
    assert "in&lt;vert" in page
    assert "in<vert" not in page
    start = page.index("<summary>PIT histogram")
    histogram = page[start : page.index("</table>", start)]
    assert histogram.count('scope="col"') == 11
    assert histogram.count("<td>4</td>") == 4
