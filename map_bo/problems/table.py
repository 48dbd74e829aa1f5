"""Recorded evaluations as a problem: to replay a run, or to compare methods on a fixed pool."""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import DataError
from map_bo.evaluators.isolation.world import known_numerics
from map_bo.space import CoefficientSpace

__all__ = ["TableProblem"]

_COEFFICIENT, _VALUE, _VARIANCE, _COUNT, _OPTION = "c:", "y:", "var:", "n:", "option:"


@dataclass(frozen=True, eq=False)
class TableProblem:
    """A problem that looks its evaluations up in a table.

    Where a point was recorded several times, its first evaluation that succeeded counts.

    Attributes:
        observations: The table.
        space: The coefficients; every recorded point lies in it.
        tolerance: A point is the recorded one when their Euclidean distance is at most this.
        nearest: Take the nearest recorded point, however far it is. The observations that
            come back then hold that point's coefficients, where the values were measured.

    Raises:
        DataError: When the table is empty, does not fit the space, or the tolerance is negative.
        SpaceError: When a recorded point lies outside the space.
    """

    observations: Observations
    space: CoefficientSpace
    tolerance: float = 1e-6
    nearest: bool = False

    def __post_init__(self) -> None:
        if len(self.observations) == 0:
            raise DataError("the table holds no evaluations", hint="record some first")
        if self.observations.X.shape[-1] != self.space.d:
            raise DataError(
                f"the table has {self.observations.X.shape[-1]} coefficients and the space "
                f"{self.space.d}: {', '.join(self.space.names)}",
                hint="give the space that the table was recorded in",
            )
        if not 0 <= self.tolerance < math.inf:
            raise DataError(
                f"tolerance must be finite and not negative, got {self.tolerance}",
                hint="give a distance that is not negative",
            )
        self.space.check(self.observations.X)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics of the table."""
        return self.observations.metrics

    @property
    def candidates(self) -> Tensor:
        """The distinct recorded points (``n x d``) in the order of the table."""
        X = self.observations.X
        first: dict[tuple[float, ...], int] = {}
        for i, row in enumerate(X.tolist()):
            first.setdefault(tuple(row), i)
        return X[list(first.values())]

    @known_numerics()
    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        """Look every row of ``X`` (``n x d``) up.

        A row that was not recorded comes back as failed, with the distance of the nearest that
        was; one that was recorded as failed, with its recorded reason. ``generator`` is not
        used: the noise of a table is that of its recording.

        Raises:
            SpaceError: When a row lies outside the space.
        """
        X = self.space.check(X)
        if len(X) == 0:
            return Observations.empty(self.space.d, self.metrics)
        table = self.observations
        # Not by matrix product: that would lose the digits that the tolerance is about.
        distance = torch.cdist(X, table.X, compute_mode="donot_use_mm_for_euclid_dist")
        least = distance.amin(-1)
        limit = least if self.nearest else torch.full_like(least, self.tolerance)
        near = distance <= limit.unsqueeze(-1)
        rank = distance.masked_fill(~near, torch.inf)
        good = rank.masked_fill(~table.ok, torch.inf)
        rank = torch.where((near & table.ok).any(-1, keepdim=True), good, rank)
        # numpy's argmin takes the first of equals; torch's promises nothing.
        rows = rank.numpy().argmin(-1).tolist()
        found = table.select(rows)
        if self.nearest:
            return found
        known = near.any(-1)
        reasons = [
            reason
            if inside
            else f"this point is not in the table; the nearest is {float(gap):.3g} away"
            for reason, inside, gap in zip(found.failures, known.tolist(), least, strict=True)
        ]
        blank = torch.where(known, 0.0, torch.nan).unsqueeze(-1)
        return Observations(
            X,
            found.Y + blank,
            self.metrics,
            Yvar=found.Yvar + blank,
            counts=found.counts + blank,
            cost=torch.where(known, found.cost, 0.0),
            failures=tuple(reasons),
            gradients=found.gradients,
            gradient_variance=found.gradient_variance,
        )

    def describe(self) -> dict[str, Any]:
        """Return plain data by which the same problem is recognised."""
        table = self.observations
        content = hashlib.sha256()
        for part in (table.X, table.Y, table.Yvar, table.counts):
            content.update(part.contiguous().numpy().tobytes())
        if table.gradients is not None:
            for part in table.filled_gradients():
                content.update(part.contiguous().numpy().tobytes())
        return {
            "kind": "table",
            "evaluations": len(table),
            "digest": content.hexdigest(),
            "tolerance": self.tolerance,
            "nearest": self.nearest,
        }

    @classmethod
    def from_csv(
        cls,
        path: str | Path,
        *,
        metrics: Sequence[Metric] | None = None,
        space: CoefficientSpace | None = None,
        tolerance: float = 1e-6,
        nearest: bool = False,
    ) -> TableProblem:
        """Read an ``evaluations.csv``, as a run writes it.

        Columns: ``c:NAME`` for each coefficient; for each metric ``y:NAME`` and, if known,
        ``var:NAME`` (variance of the noise) and ``n:NAME`` (number of examples); ``cost``
        (seconds) and ``failure`` (the reason, empty where the evaluation succeeded). All but
        ``c:`` and ``y:`` may be missing; other columns are ignored. Of a choice ``c:NAME`` has the
        codes of options; what they mean, only the space says.

        Args:
            path: The file.
            metrics: The metrics to read, in the order wanted; the file does not say their
                direction, kind and bounds. By default every metric is to be maximised, as a
                proportion where all recorded values lie in [0, 1] and as unbounded otherwise.
            space: The coefficients; by default the smallest box that holds ``[0, 1]`` and
                every recorded point. Needed where there is a choice.
            tolerance: See the class.
            nearest: See the class.

        Raises:
            DataError: When the file cannot be read, or misses a column or a value.
            SpaceError: When a recorded point lies outside the space.
        """
        path = Path(path)
        table = _Csv(path)
        names = table.named(_COEFFICIENT)
        if space is not None:
            if set(names) != set(space.names):
                raise DataError(
                    f"{path} has the coefficients {', '.join(names)}; the space has "
                    f"{', '.join(space.names)}",
                    hint="give the space that the file was recorded in",
                )
            names = list(space.names)
        elif choices := table.named(_OPTION, needed=False):
            raise DataError(
                f"{path} has a choice, {choices[0]}, and no space says what its codes mean",
                hint="give the space of the run: space=map_bo.load_result(RUN).space",
            )
        measured = table.named(_VALUE)
        wanted = measured if metrics is None else [metric.name for metric in metrics]
        missing = [name for name in wanted if name not in measured]
        if missing:
            raise DataError(
                f"{path} has no column for the metrics {', '.join(missing)}",
                hint=f"it has {', '.join(measured)}",
            )
        for prefix in (_VARIANCE, _COUNT):
            unknown = [name for name in table.named(prefix, needed=False) if name not in measured]
            if unknown:
                raise DataError(
                    f"{path} has a column {prefix}{unknown[0]} but no {_VALUE}{unknown[0]}",
                    hint="rename it to one of its metrics",
                )
        failures = tuple(text or None for text in table.texts("failure"))
        failed = [reason is not None for reason in failures]
        never = [False] * len(failed)
        always = [True] * len(failed)
        X = table.numbers([_COEFFICIENT + name for name in names], blank=never)
        Y = table.numbers([_VALUE + name for name in wanted], blank=failed)
        Y[torch.tensor(failed)] = torch.nan
        return cls(
            Observations(
                X,
                Y,
                tuple(metrics) if metrics is not None else _guess(wanted, Y),
                Yvar=table.numbers([_VARIANCE + name for name in wanted], blank=always),
                counts=table.numbers([_COUNT + name for name in wanted], blank=always),
                cost=table.numbers(["cost"], blank=always)[:, 0].nan_to_num(0.0),
                failures=failures,
            ),
            space if space is not None else _covering(names, X),
            tolerance=tolerance,
            nearest=nearest,
        )


def _guess(names: Iterable[str], Y: Tensor) -> tuple[Metric, ...]:
    known = Y.nan_to_num(0.0)
    share = ((known >= 0) & (known <= 1)).all(0).tolist()
    return tuple(
        Metric(name, kind="proportion" if proportion else "unbounded")
        for name, proportion in zip(names, share, strict=True)
    )


def _covering(names: list[str], X: Tensor) -> CoefficientSpace:
    low, high = X.amin(0).clamp(max=0.0), X.amax(0).clamp(min=1.0)
    return CoefficientSpace(tuple(names), tuple(low.tolist()), tuple(high.tolist()))


class _Csv:
    """A file of comma-separated values that names the line and column of what is wrong."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open(newline="", encoding="utf-8") as file:
                lines = list(self._lines(csv.reader(file, strict=True)))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(
                f"{path} cannot be read: {error}", hint="give a file of comma-separated values"
            ) from error
        if not lines:
            raise DataError(f"{path} is empty", hint="its first line must name the columns")
        self._header = lines[0][1]
        twice = sorted({name for name in self._header if self._header.count(name) > 1})
        if twice:
            raise DataError(f"{path} has the columns {', '.join(twice)} twice", hint="rename one")
        self._rows = lines[1:]
        if not self._rows:
            raise DataError(f"{path} holds no evaluations", hint="record some first")
        for line, row in self._rows:
            if len(row) != len(self._header):
                raise DataError(
                    f"line {line} of {path} has {len(row)} values for {len(self._header)} columns",
                    hint="the file may have been cut off; remove the line, or complete it",
                )

    @staticmethod
    def _lines(reader: Any) -> Iterator[tuple[int, list[str]]]:
        for row in reader:
            if row:
                yield reader.line_num, [cell.strip() for cell in row]

    def named(self, prefix: str, *, needed: bool = True) -> list[str]:
        """Return what follows ``prefix`` in the names of the columns that begin with it."""
        names = [name[len(prefix) :] for name in self._header if name.startswith(prefix)]
        if needed and not names:
            raise DataError(
                f"{self._path} has no column {prefix}NAME; its columns are "
                f"{', '.join(self._header)}",
                hint="coefficients are in columns c:NAME and metrics in columns y:NAME",
            )
        return names

    def texts(self, name: str) -> list[str]:
        """Return a column as text; empty everywhere when there is none."""
        if name not in self._header:
            return [""] * len(self._rows)
        column = self._header.index(name)
        return [row[column] for _, row in self._rows]

    def numbers(self, names: Sequence[str], *, blank: Sequence[bool]) -> Tensor:
        """Return columns as ``n x len(names)``; NaN where a cell is empty or has no column.

        Args:
            names: The columns.
            blank: For each row whether it may have empty cells.
        """
        columns = [self._column(name, blank) for name in names]
        return torch.tensor(columns, dtype=torch.float64).T

    def _column(self, name: str, blank: Sequence[bool]) -> list[float]:
        values = []
        for (line, _), text, may in zip(self._rows, self.texts(name), blank, strict=True):
            try:
                value = float(text or "nan")
            except ValueError:
                value = math.inf
            if math.isinf(value) or (math.isnan(value) and not may):
                raise DataError(
                    f"line {line} of {self._path} has {text!r} in column {name}",
                    hint="write a finite number"
                    + (", or a reason in the column failure" if name.startswith(_VALUE) else ""),
                )
            values.append(value)
        return values
