"""The outcomes of single examples as a table, for spreadsheets, data frames and scripts.

One line per outcome: ``row`` (of the evaluation, as in ``evaluations.csv``, from 0), ``evaluator``,
``metric``, ``example`` (as its evaluator numbers them) and ``outcome`` (in the metric's own unit;
not a number where the example failed).
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from map_bo.errors import ConfigError, require
from map_bo.examples.sets import ExampleOutcomes

__all__ = ["COLUMNS", "check_name", "outcome_columns", "write_outcomes"]

COLUMNS = ("row", "evaluator", "metric", "example", "outcome")

Rows = Sequence[Mapping[str, ExampleOutcomes]]


@dataclass(frozen=True)
class _Block:
    """All outcomes of one row in one metric."""

    row: int
    evaluator: str
    metric: str
    examples: NDArray[np.int64]
    outcomes: NDArray[np.float64]


def _blocks(rows: Rows) -> Iterator[_Block]:
    for row, evaluators in enumerate(rows):
        for name, one in evaluators.items():
            width = len(one.means)
            metrics = one.metrics or ((name,) if width == 1 else tuple(map(str, range(width))))
            for metric, column in zip(metrics, one.values.unbind(-1), strict=True):
                yield _Block(row, name, metric, one.items.numpy(), column.numpy())


def outcome_columns(rows: Rows) -> dict[str, NDArray[Any]]:
    """Return the table as its columns, which data frames are made of.

    Args:
        rows: For each evaluation, evaluator -> its outcomes.

    Returns:
        The five columns by name: integers (``row``, ``example``), text (``evaluator``, ``metric``)
        and float64 (``outcome``), of equal length.
    """
    blocks = list(_blocks(rows))

    def text(part: str) -> NDArray[Any]:
        parts = [np.full(len(one.examples), getattr(one, part), dtype=object) for one in blocks]
        return np.concatenate([np.empty(0, dtype=object), *parts])

    lengths = [len(one.examples) for one in blocks]
    return {
        "row": np.repeat(np.array([one.row for one in blocks], dtype=np.int64), lengths),
        "evaluator": text("evaluator"),
        "metric": text("metric"),
        "example": np.concatenate([np.empty(0, np.int64), *(one.examples for one in blocks)]),
        "outcome": np.concatenate([np.empty(0, np.float64), *(one.outcomes for one in blocks)]),
    }


def check_name(path: Path) -> None:
    """Refuse a file that the table cannot be written to, before anything is read.

    Raises:
        ConfigError: When its name says no format that is known.
        MissingDependencyError: For Parquet without pyarrow.
    """
    if path.name.endswith(".parquet"):
        require("pyarrow", by="writing Parquet", extra="data")
    elif not path.name.endswith((".csv", ".csv.gz")):
        raise ConfigError(
            f"a table of outcomes cannot be written to {path.name!r}",
            hint="name a file that ends in .csv, .csv.gz or .parquet",
        )


def write_outcomes(rows: Rows, path: Path) -> int:
    """Write the table, as CSV (``.csv``, ``.csv.gz``) or Parquet (``.parquet``).

    In CSV, numbers have all their digits, and the outcome of a failed example is empty.

    Args:
        rows: For each evaluation, evaluator -> its outcomes.
        path: The file; one that is there is replaced.

    Returns:
        How many outcomes there are.

    Raises:
        ConfigError: When its name says no format that is known.
        MissingDependencyError: For Parquet without pyarrow.
        OSError: When it cannot be written; it is then as it was before.
    """
    check_name(path)
    write: Callable[[Rows, io.BufferedIOBase], int] = _write_csv
    if path.name.endswith(".parquet"):
        write = _write_parquet
    elif path.name.endswith(".gz"):
        write = _write_packed_csv
    with _replacing(path) as file:
        return write(rows, file)


@contextmanager
def _replacing(path: Path) -> Iterator[io.BufferedIOBase]:
    """Open a file that takes the place of ``path`` when it is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _write_packed_csv(rows: Rows, file: io.BufferedIOBase) -> int:
    # Without a name and a time: the same table makes the same file.
    with gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0) as packed:
        return _write_csv(rows, packed)


def _write_csv(rows: Rows, file: io.BufferedIOBase) -> int:
    count = 0
    file.write((",".join(COLUMNS) + "\n").encode())
    for block in _blocks(rows):
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows(
            (block.row, block.evaluator, block.metric, example, _number(outcome))
            for example, outcome in zip(
                block.examples.tolist(), block.outcomes.tolist(), strict=True
            )
        )
        file.write(text.getvalue().encode("utf-8", "backslashreplace"))
        count += len(block.examples)
    return count


def _number(value: float) -> str:
    return "" if math.isnan(value) else repr(value)


def _write_parquet(rows: Rows, file: io.BufferedIOBase) -> int:
    import pyarrow as pa
    from pyarrow import parquet

    names = pa.dictionary(pa.int32(), pa.string())
    types = (pa.int64(), names, names, pa.int64(), pa.float64())
    schema = pa.schema(list(zip(COLUMNS, types, strict=True)))
    count = 0
    with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        for row, evaluators in enumerate(rows):
            columns = outcome_columns([evaluators])
            columns["row"] = columns["row"] + row
            for part in ("evaluator", "metric"):
                columns[part] = np.array([_text(one) for one in columns[part]], dtype=object)
            arrays = [
                pa.array(columns[name], kind) for name, kind in zip(COLUMNS, types, strict=True)
            ]
            writer.write_table(pa.table(arrays, schema=schema))
            count += len(columns["row"])
    return count


def _text(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
