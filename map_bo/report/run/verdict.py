"""The verdict of a run and what was confirmed, as rows and sentences of a report.

Both come as plain data with the summary: ``verdict`` as
:meth:`map_bo.loop.verdict.verdict.Verdict.describe` writes it, and ``confirmed``, a list of what
:meth:`map_bo.loop.verdict.confirm.Confirmation.summary` writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from map_bo.report.view import RunView

__all__ = ["COLUMNS", "ConfirmedTable", "comparison_rows", "confirmed_tables", "verdict_lines"]

COLUMNS = ("merge", "against", "on", "gain", "95 % interval", "p, corrected", "ground", "verdict")
_WORDS = {"same": "not distinguishable"}
_UNKNOWN = "unknown"


@dataclass(frozen=True)
class ConfirmedTable:
    """What was measured for real after the run.

    Attributes:
        where: What it was measured on.
        head: Titles of the columns.
        rows: Cells.
        lines: The verdict in words, and the optimism of the search.
    """

    where: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    lines: tuple[str, ...]


def verdict_lines(view: RunView) -> list[str]:
    """Return the verdict of the run in words; nothing where there is none."""
    found = view.summary.get("verdict")
    return [str(line) for line in found["lines"]] if isinstance(found, Mapping) else []


def comparison_rows(view: RunView) -> list[tuple[str, ...]]:
    """Return the comparisons of the verdict as rows of :data:`COLUMNS`."""
    found = view.summary.get("verdict")
    return [_row(one) for one in found["comparisons"]] if isinstance(found, Mapping) else []


def _row(one: Mapping[str, Any]) -> tuple[str, ...]:
    ends = (_number(one["lower"]), _number(one["upper"]))
    between = _UNKNOWN if _UNKNOWN in ends else f"{ends[0]} to {ends[1]}"
    ground = str(one["test"]) if one["n"] is None else f"{one['test']}, {one['n']} examples"
    return (
        str(one["merge"]),
        str(one["competitor"]),
        str(one["metric"]),
        f"{float(one['gain']):+.4g}",
        between,
        "< 0.001" if float(one["p"]) < 1e-3 else f"{float(one['p']):.3f}",
        ground,
        _WORDS.get(str(one["judged"]), str(one["judged"])),
    )


def confirmed_tables(view: RunView) -> Iterator[ConfirmedTable]:
    """Yield what was measured after the run, in order."""
    for one in view.summary.get("confirmed") or ():
        head, *rows = one["table"]
        gaps = [f"{name} {gap:+.3g}" for name, gap in one["optimism"].items() if gap is not None]
        lines = [str(line) for line in one["verdict"]["lines"]]
        if gaps:
            lines.append(f"optimism of the search (promised less measured): {', '.join(gaps)}")
        yield ConfirmedTable(
            str(one["where"]),
            tuple(map(str, head)),
            tuple(tuple(map(str, row)) for row in rows),
            tuple(lines),
        )


def _number(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.4g}"
