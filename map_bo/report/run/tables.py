"""The tables of a run as CSV, with all digits, for spreadsheets and scripts."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from map_bo.data import Front, Observations
from map_bo.report.files import write_whole
from map_bo.report.normalised import OwnScores
from map_bo.report.view import RunView
from map_bo.space import CoefficientSpace

__all__ = ["write_evaluations_csv", "write_front_csv"]


def write_evaluations_csv(
    view_or_seen: RunView | Observations, space: CoefficientSpace, path: Path
) -> None:
    """Write one row per evaluation, in order, failures included.

    Columns: ``c:NAME`` for each coefficient, of a choice the code of its option and in
    ``option:NAME`` the option's name; for each metric ``y:NAME`` (measured, own unit),
    ``var:NAME`` (noise variance) and ``n:NAME`` (examples it was measured on); ``cost`` (seconds)
    and ``failure`` (the reason). What is unknown is empty, as is what was not measured; what a
    failed evaluation measured all the same is there.

    Raises:
        OSError: When the file cannot be written; it is then as it was before.
    """
    seen = view_or_seen.seen if isinstance(view_or_seen, RunView) else view_or_seen
    header = [f"c:{name}" for name in space.names]
    options = _options(seen.X, space)
    header += [f"option:{space.choice.name}"] if space.choice is not None else []
    for metric in seen.metrics:
        header += [f"y:{metric.name}", f"var:{metric.name}", f"n:{metric.name}"]
    rows = (
        [
            *map(_number, x),
            *option,
            *(_number(value) for triple in zip(y, var, n, strict=True) for value in triple),
            _number(cost),
            failure or "",
        ]
        for x, option, y, var, n, cost, failure in zip(
            seen.X.tolist(),
            options,
            seen.Y.tolist(),
            seen.Yvar.tolist(),
            seen.counts.tolist(),
            seen.cost.tolist(),
            seen.failures,
            strict=True,
        )
    )
    _write([*header, "cost", "failure"], rows, path)


def write_front_csv(
    front: Front, space: CoefficientSpace, path: Path, own: OwnScores | None = None
) -> None:
    """Write one row per front point.

    Columns: ``point`` (the number to choose it by); ``c:NAME`` for each coefficient, of a
    choice the code of its option and in ``option:NAME`` the option's name; for each
    metric ``predicted:NAME``, ``std:NAME``, ``lower:NAME``, ``upper:NAME`` (95 % interval),
    ``corrected:NAME`` (predicted with the verified points among the data; empty where nothing was
    verified) and ``real:NAME`` (empty where the point was not verified); ``probability`` (of
    being non-dominated; empty where it is not known); and, only where something failed or the run
    has constraints, ``feasible`` (the probability that the point works and keeps them). With
    ``own``, for each metric ``normalised:NAME`` and ``normalised_real:NAME``: the predicted and the
    real value as shares of the score of the task's own expert.

    Raises:
        OSError: When the file cannot be written; it is then as it was before.
    """
    header = ["point", *(f"c:{name}" for name in space.names)]
    header += [f"option:{space.choice.name}"] if space.choice is not None else []
    for metric in front.metrics:
        parts = ("predicted", "std", "lower", "upper", "corrected", "real")
        header += [f"{part}:{metric.name}" for part in parts]
    columns = (front.mean, front.std, front.lower, front.upper, front.corrected, front.real)
    values = [
        [_number(v) for group in zip(*parts, strict=True) for v in group]
        for parts in zip(*(column.tolist() for column in columns), strict=True)
    ]
    ends = {"probability": front.probability.tolist()}
    if bool(front.feasible.isfinite().any()):
        ends["feasible"] = front.feasible.tolist()
    if own is not None:
        for part, shares in (("", front.mean), ("_real", front.real)):
            parted = own.normalise(shares).unbind(-1)
            for metric, column in zip(front.metrics, parted, strict=True):
                ends[f"normalised{part}:{metric.name}"] = column.tolist()
    rows = (
        [str(point), *map(_number, x), *option, *row, *map(_number, last)]
        for point, (x, option, row, last) in enumerate(
            zip(
                front.X.tolist(),
                _options(front.X, space),
                values,
                zip(*ends.values(), strict=True),
                strict=True,
            )
        )
    )
    _write([*header, *ends], rows, path)


def _options(X: Tensor, space: CoefficientSpace) -> list[list[str]]:
    """Return the option of each row (``n x d``) by name; nothing where there is no choice."""
    placed = space.placed_choice
    if placed is None:
        return [[] for _ in X]
    return [[placed.axis.options[code]] for code in placed.codes(X).tolist()]


def _number(value: float) -> str:
    return "" if math.isnan(value) else repr(value)


def _write(header: Sequence[str], rows: Iterable[Sequence[str]], path: Path) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_whole(path, text.getvalue())
