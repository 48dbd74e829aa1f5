"""``map-bo ask`` and ``map-bo tell``: a run whose evaluations are made elsewhere.

Neither reads a checkpoint: space, metrics and settings come from the record, so they answer on the
machine that hands out the work, whatever that has installed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from map_bo.errors import ConfigError, DataError, first_line

if TYPE_CHECKING:
    from map_bo.loop.run import Run

__all__ = ["ask", "tell"]


def ask(options: argparse.Namespace) -> None:
    """Propose rows and record them, or list those that wait; print them."""
    from map_bo.loop.optimize import open_run
    from map_bo.values import whole_number

    count = whole_number("-n", options.count, least=1, hint="give how many rows to propose")
    if options.trust:
        sys.path.append(os.getcwd())
    run = open_run(options.run, trust=options.trust)
    rows = run.state.pending if options.waiting else run.ask(count)
    told = [_row(run, options.run, row) for row in rows]
    if options.json:
        found = {
            "run": options.run,
            "metrics": {metric.name: metric.direction for metric in run.problem.metrics},
            "rows": told,
            **_counts(run),
        }
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return
    for one in told:
        named = "  ".join(f"{name}={_said(value)}" for name, value in one["coefficients"].items())
        sys.stdout.write(f"row {one['row']}: {named}\n")
        sys.stdout.writelines(f"  {one[name]}\n" for name in ("merge", "tell") if name in one)
    sys.stdout.write(_progress(run, options.run) + "\n")


def _said(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"


def _row(run: Run, place: str, row: int) -> dict[str, Any]:
    x = run.state.X[row].tolist()
    found: dict[str, Any] = {"row": row, "coefficients": run.problem.space.named(x), "x": x}
    quoted, metrics = shlex.quote(place), [metric.name for metric in run.problem.metrics]
    if _can_be_merged(run.state.created):
        found["merge"] = f"map-bo merge {quoted} --row {row} --out row-{row}"
    example = "{" + ", ".join(f"{json.dumps(name)}: VALUE" for name in metrics) + "}"
    found["tell"] = f"map-bo tell {quoted} {row} --json {shlex.quote(example)}"
    return found


def _can_be_merged(created: Mapping[str, Any]) -> bool:
    """Return whether `map-bo merge` can write a model of the run: it knows its checkpoints."""
    problem, config = created.get("problem"), created.get("config")
    known = isinstance(problem, Mapping) and {"base", "experts"} <= set(problem)
    return known and isinstance(config, Mapping) and bool(config.get("tree"))


def _counts(run: Run) -> dict[str, int]:
    state, search = run.state, run.settings.search
    return {
        "told": len(state.outcomes),
        "waiting": len(state.pending),
        "left": max(0, search - len(state.X)) if state.front is None else 0,
    }


def _progress(run: Run, place: str) -> str:
    counts, quoted = _counts(run), shlex.quote(place)
    said = f"{counts['told']} told, {counts['waiting']} waiting, {counts['left']} left to ask for"
    if counts["waiting"] or counts["left"] or run.state.summary is not None:
        return said
    return f"{said}; the search is complete: `map-bo resume {quoted}` solves it for the front"


def tell(options: argparse.Namespace) -> None:
    """Record the outcome of a row that waits."""
    from map_bo.loop.optimize import open_run

    outcome = _outcome(options.json)
    if options.trust:
        sys.path.append(os.getcwd())
    run = open_run(options.run, trust=options.trust)
    run.tell(options.row, outcome)
    sys.stdout.write(f"row {options.row} told: {_progress(run, options.run)}\n")


def _outcome(given: str) -> Mapping[str, Any]:
    """Return the outcome in a text, in a file, or on standard input (``-``)."""
    text = given
    if given == "-":
        text = sys.stdin.read()
    elif not given.lstrip().startswith(("{", "[")):
        try:
            text = Path(given).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"--json {given[:80]!r} is neither JSON nor a file that can be read: "
                f"{first_line(error)}",
                hint="""write --json '{"math": 0.41}', name a file, or give - for standard input""",
            ) from error
    try:
        found = json.loads(text)
    except ValueError as error:
        raise DataError(
            f"the outcome is not JSON: {first_line(error)}",
            hint="""write it as in '{"math": 0.41, "code": {"value": 0.3, "n": 200}}'""",
        ) from error
    if not isinstance(found, Mapping):
        raise DataError(
            f"the outcome must map metrics to values, got a {type(found).__name__}",
            hint="""write it as in '{"math": 0.41, "code": {"value": 0.3, "n": 200}}'""",
        )
    return found
