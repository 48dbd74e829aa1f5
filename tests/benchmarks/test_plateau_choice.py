"""The page on the verdict shows what was measured of the default choice."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.quality.plateau_choice import CASES, SETTLED
from benchmarks.record import RESULTS

PAGE = Path(__file__).parents[2] / "docs" / "verdict.md"


def test_the_page_shows_the_table_that_was_measured() -> None:
    record = json.loads((RESULTS / "plateau_choice.json").read_text())
    assert "\n".join(record["table"]) in PAGE.read_text()
    assert tuple(record["data"]["cases"]) == CASES


def test_the_rule_was_settled_on_other_cases() -> None:
    assert not set(CASES) & set(SETTLED)
