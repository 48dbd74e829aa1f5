"""A table of evaluations as a CSV file: a run's own ``evaluations.csv``, or one written by hand."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from map_bo.errors import DataError, did_you_mean, listed
from map_bo.foreign import read_text
from map_bo.loop.transfer.study import Study

__all__ = ["read_table"]

_PARTS = {"c": "coefficient", "y": "metric", "var": "variance", "n": "count"}
_OWN = ("cost", "failure")
_NOTHING = ("", "nan", "null", "none", "na", "n/a")


@dataclass(frozen=True)
class _Column:
    place: int
    kind: str  # a word of _PARTS, or one of _OWN
    name: str


def read_table(path: Path, coefficients: Sequence[str], metrics: Sequence[str]) -> Study:
    """Return the evaluations in a CSV file with a header.

    Columns of a run's own table are ``c:NAME`` (a coefficient), ``y:NAME`` (a metric, own unit),
    ``var:NAME`` (its noise variance), ``n:NAME`` (examples it was measured on), ``cost`` (seconds)
    and ``failure`` (the reason). A table written by hand may leave out ``c:`` and ``y:`` where a
    name is that of a coefficient or expert, or of a metric, and not of both. What is empty was not
    measured. Columns without a name are passed over.

    Args:
        path: The file.
        coefficients: Names of coefficients and experts that a column without ``c:`` may have.
        metrics: Names of metrics that a column without ``y:`` may have.

    Raises:
        DataError: When it cannot be read, lacks columns, has one that is not understood, or holds
            text where numbers belong.
    """
    try:
        lines = list(csv.reader(io.StringIO(read_text(path).removeprefix("\ufeff")), strict=True))
    except (OSError, ValueError, csv.Error) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        raise DataError(
            f"{path} cannot be read as CSV: {reason}",
            hint="name a file of comma-separated values with a header, in UTF-8",
        ) from error
    filled = [(i, cells) for i, cells in enumerate(lines, 1) if any(map(str.strip, cells))]
    if len(filled) < 2:
        raise DataError(
            f"{path} holds no evaluation", hint="write a header, then one line per evaluation"
        )
    (_, header), *body = filled
    columns = _columns(path, [cell.strip() for cell in header], coefficients, metrics)
    for number, cells in body:
        if len(cells) != len(header):
            raise DataError(
                f"line {number} of {path} has {len(cells)} cells, and the header {len(header)}",
                hint="give each line one cell per column; empty is not measured",
            )
    names = {kind: [one.name for one in columns if one.kind == kind] for kind in _PARTS.values()}
    parts = {
        kind: _matrix(path, body, [one for one in columns if one.kind == kind], header)
        for kind in (*_PARTS.values(), "cost")
    }
    X = parts["coefficient"]
    if bool((lacking := X.isnan().any(-1)).any()):
        row = int(lacking.nonzero()[0])
        name = names["coefficient"][int(X[row].isnan().nonzero()[0])]
        raise DataError(
            f"line {body[row][0]} of {path} has no value of the coefficient {name!r}",
            hint="write 0 where an expert took no part",
        )
    order = names["metric"]
    Y = parts["metric"]
    told = [one.place for one in columns if one.kind == "failure"]
    failures = [(cells[told[0]].strip() if told else "") or None for _, cells in body]
    return Study(
        names=tuple(names["coefficient"]),
        X=X,
        metrics=tuple(order),
        Y=Y,
        Yvar=_like(Y, order, names["variance"], parts["variance"]),
        counts=_like(Y, order, names["count"], parts["count"]),
        cost=parts["cost"][:, 0].nan_to_num() if parts["cost"].numel() else torch.zeros(len(X)),
        failures=tuple(failures),
        rows=tuple(f"line {number}" for number, _ in body),
        source={"from": "csv", "path": str(path.absolute())},
        title=str(path),
    )


def _columns(
    path: Path, header: Sequence[str], coefficients: Sequence[str], metrics: Sequence[str]
) -> list[_Column]:
    found: list[_Column] = []
    for place, text in enumerate(header):
        part, colon, name = text.partition(":")
        if not text or (colon and part == "option"):  # the code of an option has its own column
            continue
        if text in _OWN:
            found.append(_Column(place, text, ""))
        elif colon and part in _PARTS:
            found.append(_Column(place, _PARTS[part], name.strip()))
        elif text in coefficients and text in metrics and f"c:{text}" not in header:
            raise DataError(
                f"column {text!r} of {path} may be a coefficient or a metric: both have this name",
                hint=f"name it c:{text} or y:{text}",
            )
        elif text in metrics:
            found.append(_Column(place, "metric", text))
        elif text in coefficients:
            found.append(_Column(place, "coefficient", text))
        else:
            raise DataError(
                f"column {text!r} of {path} is neither a coefficient nor a metric of the run",
                hint=f"{did_you_mean(text, [*coefficients, *metrics])}; or map its name with "
                "start_from.experts or start_from.metrics={OLD: NEW}, where null leaves it out",
            )
    keys = [(one.kind, one.name) for one in found]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise DataError(
            f"{path} has two columns of the {twice[0]} {twice[1]!r}", hint="keep one of them"
        )
    for kind in ("coefficient", "metric"):
        if not any(one.kind == kind for one in found):
            known = coefficients if kind == "coefficient" else metrics
            raise DataError(
                f"{path} has no column of a {kind}: its columns are {listed(header)}",
                hint=f"name columns like the {kind}s of the run: {listed(known)}",
            )
    return found


def _matrix(
    path: Path,
    body: Sequence[tuple[int, Sequence[str]]],
    columns: Sequence[_Column],
    header: Sequence[str],
) -> Tensor:
    rows = []
    for number, cells in body:
        row = []
        for one in columns:
            text = cells[one.place].strip()
            try:
                value = math.nan if text.lower() in _NOTHING else float(text)
            except ValueError:
                raise DataError(
                    f"line {number} of {path} has {text!r:.60} as {header[one.place]}, which is "
                    "not a number",
                    hint="leave a cell empty where nothing was measured",
                ) from None
            if math.isinf(value):
                raise DataError(
                    f"line {number} of {path} has an infinite {header[one.place]}",
                    hint="leave a cell empty where nothing was measured",
                )
            row.append(value)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64).reshape(len(body), len(columns))


def _like(Y: Tensor, order: Sequence[str], names: Sequence[str], values: Tensor) -> Tensor:
    """Return values (``n x len(names)``) in the order of the metrics, NaN where there are none."""
    found = torch.full_like(Y, torch.nan)
    places: Mapping[str, int] = {name: j for j, name in enumerate(order)}
    for k, name in enumerate(names):
        if name in places:
            found[:, places[name]] = values[:, k]
    return found
