"""How far the surrogate can be believed, as rows of text: its leave-one-out record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from map_bo.report.view import RunView

__all__ = ["calibration_rows", "calibration_words", "pit_rows"]


def _validation(view: RunView) -> Mapping[str, Any]:
    surrogate = view.summary.get("surrogate")
    found = surrogate.get("validation") if isinstance(surrogate, Mapping) else None
    return found if isinstance(found, Mapping) and found.get("metrics") else {}


def calibration_rows(view: RunView) -> list[tuple[str, str, str, str]]:
    """Return for each metric: name, coverage of 95 % intervals, log density, error.

    Everything is on the link scale. No rows where the run recorded no validation, as with a
    surrogate that cannot leave evaluations out.
    """
    return [
        (
            str(name),
            _shown(results.get("coverage"), ".1%").replace("%", " %"),
            _shown(results.get("log_density"), ".3f"),
            _shown(results.get("rmse"), ".3g"),
        )
        for name, results in (_validation(view).get("metrics") or {}).items()
    ]


def pit_rows(view: RunView) -> list[tuple[str, ...]]:
    """Return for each metric its name and how many evaluations fell into each PIT bin."""
    return [
        (str(name), *(str(count) for count in results["pit"]))
        for name, results in (_validation(view).get("metrics") or {}).items()
        if results.get("pit")
    ]


def calibration_words(view: RunView) -> str:
    """Return what the numbers mean and how coarse they are; empty where there are none."""
    found = _validation(view)
    n = int(found.get("n") or 0)
    if not n:
        return ""
    coarse = math.sqrt(0.95 * 0.05 / n)
    return (
        f"Each of the {n} evaluations was predicted from the other {n - 1}; an interval holds "
        "what the surrogate does not know and the noise of the measurement. Of 95 % intervals, "
        f"95 % should hold the measured value, give or take {100 * coarse:.0f} points for so many "
        "evaluations. Hyperparameters were fitted to all of them, which flatters a little. A "
        "level PIT histogram is calibrated; high ends are overconfidence, a high middle is caution."
    )


def _shown(value: Any, form: str) -> str:
    return format(float(value), form) if isinstance(value, int | float) else "unknown"
