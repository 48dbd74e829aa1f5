"""How certain the results of a run are, as sentences and rows of text.

The interval of the hypervolume, the optimism of the predictions, the reason why the search ended,
and the calibration of the surrogate by its leave-one-out predictions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from map_bo.report.view import RunView

__all__ = [
    "calibration_rows",
    "calibration_words",
    "has_corrected",
    "has_feasible",
    "has_probability",
    "hypervolume_words",
    "optimism_rows",
    "optimism_words",
    "pit_rows",
    "stop_words",
]


def _uncertainty(view: RunView) -> Mapping[str, Any]:
    found = view.summary.get("uncertainty")
    return found if isinstance(found, Mapping) else {}


def has_corrected(view: RunView) -> bool:
    """Return whether the front has corrected predictions."""
    return len(view.front) > 0 and bool(view.front.corrected.isfinite().any())


def has_probability(view: RunView) -> bool:
    """Return whether the points have a probability of being non-dominated."""
    return len(view.front) > 0 and bool(view.front.probability.isfinite().any())


def has_feasible(view: RunView) -> bool:
    """Return whether the points have a probability of being feasible."""
    return len(view.front) > 0 and bool(view.front.feasible.isfinite().any())


def hypervolume_words(view: RunView) -> str:
    """Return the expected real hypervolume of the front in a sentence; empty where unknown."""
    found = _uncertainty(view).get("hypervolume")
    if not isinstance(found, Mapping) or found.get("median") is None:
        return ""
    return (
        f"Expected real hypervolume of the front: {found['median']:.4f}, 95 % interval "
        f"{found['lower']:.4f} to {found['upper']:.4f} ({found['draws']} posterior draws at "
        f"{found['points']} points, {found['kind']})."
    )


def optimism_rows(view: RunView) -> list[tuple[str, str, str, str]]:
    """Return for each metric: name, optimism as estimated and as measured, and the correction.

    Estimated: by leaving evaluations out, with its standard error. Measured: at the verified
    points, with its standard error where there are at least two. There are no rows where none of
    them is known.
    """
    optimism = _uncertainty(view).get("optimism")
    if not isinstance(optimism, Mapping):
        return []
    rows = []
    for metric in view.metrics:
        parts = [_with_error(_of(optimism, kind, metric.name)) for kind in ("left_out", "measured")]
        shift = _of(optimism, "corrected", metric.name)
        shown = _signed(shift) if isinstance(shift, int | float) else ""
        rows.append((metric.name, parts[0], parts[1], shown))
    return rows if any(any(cells) for _, *cells in rows) else []


def optimism_words(view: RunView) -> str:
    """Return the meaning of the columns of :func:`optimism_rows`; empty where it has no rows."""
    if not optimism_rows(view):
        return ""
    words = (
        "Optimism is predicted minus real; it is positive when the prediction was too good, "
        "whatever the direction of the metric. \u00b1 is a standard error. Estimated: by "
        "predicting each evaluation from the others, which is harder than predicting the front "
        "where there are few evaluations. "
    )
    if not bool(view.front.verified.any()):
        return words + "Nothing was verified, so optimism was neither measured nor corrected."
    return words + (
        "Measured: at the verified points. Corrected: by how much the predictions of the front "
        "fell, on average, when the verified points were added to the data."
    )


def stop_words(view: RunView) -> str:
    """Return why the search ended; empty where no stopping rule was set."""
    stop = view.summary.get("stop")
    if not isinstance(stop, Mapping):
        return ""
    if stop.get("reason"):
        unused = int(stop.get("unused") or 0)
        left = "1 evaluation" if unused == 1 else f"{unused} evaluations"
        return f"{stop['reason']}; {left} of the budget unused"
    least = stop.get("least_gain")
    if least is None:
        return "not before the budget was spent: the rule was never checked"
    return (
        f"not before the budget was spent: the expected {stop.get('criterion')} still to be gained "
        f"was at least {least:.2g}, the tolerance is {stop.get('tolerance'):g}"
    )


def _of(optimism: Mapping[str, Any], kind: str, name: str) -> Any:
    part = optimism.get(kind)
    return part.get(name) if isinstance(part, Mapping) else None


def _with_error(found: Any) -> str:
    if not isinstance(found, Mapping) or found.get("mean") is None:
        return ""
    error = found.get("se")
    return _signed(found["mean"]) + ("" if error is None else f" \u00b1 {abs(error):.2g}")


def _signed(value: float) -> str:
    return f"{value:+.3f}" if abs(value) < 10 else f"{value:+.4g}"


def _validation(view: RunView) -> Mapping[str, Any]:
    surrogate = view.summary.get("surrogate")
    found = surrogate.get("validation") if isinstance(surrogate, Mapping) else None
    return found if isinstance(found, Mapping) and found.get("metrics") else {}


def calibration_rows(view: RunView) -> list[tuple[str, str, str, str]]:
    """Return for each metric: name, coverage of 95 % intervals, log density, error.

    Everything is on the link scale. There are no rows where the run recorded no validation, as
    with a surrogate that cannot leave evaluations out.
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
    """Return for each metric its name and the number of evaluations in each PIT bin."""
    return [
        (str(name), *(str(count) for count in results["pit"]))
        for name, results in (_validation(view).get("metrics") or {}).items()
        if results.get("pit")
    ]


def calibration_words(view: RunView) -> str:
    """Return the meaning and precision of the numbers; empty where there are none."""
    found = _validation(view)
    n = int(found.get("n") or 0)
    if not n:
        return ""
    coarse = math.sqrt(0.95 * 0.05 / n)
    return (
        f"Each of the {n} evaluations was predicted from the other {n - 1}; an interval covers "
        "both the uncertainty of the surrogate and the noise of the measurement. Of the 95 % "
        f"intervals, 95 % should contain the measured value, give or take {100 * coarse:.0f} "
        f"percentage points for {n} evaluations. Hyperparameters were fitted to all evaluations, "
        "so the numbers are slightly too good. A flat PIT histogram means that the predictions are "
        "calibrated; high ends mean overconfidence, and a high middle means too wide intervals."
    )


def _shown(value: Any, form: str) -> str:
    return format(float(value), form) if isinstance(value, int | float) else "unknown"
