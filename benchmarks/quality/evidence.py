"""``docs/evidence.md``: its text is written by hand, its tables and verdicts by this module.

The tables stand between ``<!-- table:NAME -->`` and ``<!-- /table:NAME -->``; they come from
``benchmarks/results`` alone, so anyone can write them again without running anything.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.claims import claims, step_seconds, told
from benchmarks.quality.plots import draw
from benchmarks.quality.tables import (
    NOTHING,
    ablations,
    ablations_by_noise,
    against_default,
    calibration,
    costs,
    evaluations_needed,
    failures,
    matrix,
    overview,
    ranks,
)
from benchmarks.quality.tidy import Row, read
from benchmarks.record import RESULTS

__all__ = ["EVIDENCE", "PLOTS", "filled", "readme_table", "tables", "write"]

EVIDENCE = Path(__file__).parents[2] / "docs" / "evidence.md"
PLOTS = EVIDENCE.parent / "evidence"


def tables(rows: Sequence[Row], results: Path = RESULTS) -> dict[str, list[str]]:
    """Return all tables by name."""
    return {
        "claims": told(claims(rows, results / "step.json")),
        "overview": overview(rows),
        "needed-real": evaluations_needed(rows, real=True),
        "needed-synthetic": evaluations_needed(rows, real=False),
        "regret-12": matrix(rows, "regret", 12),
        "regret-48": matrix(rows, "regret", 48),
        "share-24": matrix(rows, "share", 24),
        "core": against_default(rows, ["core"]),
        "ranks": ranks(rows, 24),
        "ablations": ablations(rows),
        "ablations-by-noise": ablations_by_noise(rows),
        "samplers": against_default(rows, ["sampler", "surrogate"]),
        "calibration": calibration(rows),
        "costs": costs(rows),
        "steps": _steps(results / "step.json"),
        "failures": failures(rows),
    }


def _steps(path: Path) -> list[str]:
    return list(json.loads(path.read_text())["table"]) if step_seconds(path) else list(NOTHING)


def readme_table(rows: Sequence[Row]) -> list[str]:
    """Return what README.md shows of the study: the verdicts, and the evaluations needed."""
    verdicts = [line for line in told(claims(rows, RESULTS / "step.json")) if line[0] == "-"]
    return [*verdicts, "", *evaluations_needed(rows, real=True)]


def filled(text: str, results: Path = RESULTS) -> str:
    """Return the text of the document with the tables of the recorded results.

    Raises:
        ValueError: When a table has no place in the text.
    """
    for name, lines in tables(read(results / "quality.csv"), results).items():
        opening, closing = f"<!-- table:{name} -->\n", f"<!-- /table:{name} -->"
        before, rest = text.split(opening)
        after = rest.split(closing, maxsplit=1)[1]
        body = "\n".join(lines).strip()
        text = f"{before}{opening}\n{body}\n\n{closing}{after}"
    return text


def write(*, plots: bool = False) -> None:
    """Write the tables into the document and, when asked, draw the plots again."""
    EVIDENCE.write_text(filled(EVIDENCE.read_text()))
    if plots:
        draw(read(RESULTS / "quality.csv"), PLOTS)
