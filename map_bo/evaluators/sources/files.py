"""Data in one file: CSV, JSON, JSON lines, Parquet, lines of text, and arrays of numpy.

Any of the text formats may be gzipped. Nothing in a file is executed: pickles are refused, also
within an ``.npz``.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import struct
import threading
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from map_bo.errors import EvaluationError, did_you_mean, first_line, listed, require
from map_bo.evaluators.sources.table import (
    EncodedImage,
    Table,
    choose_split,
    from_columns,
    no_splits,
)

__all__ = ["FORMATS", "format_of", "read_file", "read_idx", "read_lines"]

FORMATS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".npz", ".txt")
"""How files of data end, before a ``.gz``; other files of text are read as lines."""

_REFUSED = {
    ".pkl": "a pickle, which can run code when it is read",
    ".pickle": "a pickle, which can run code when it is read",
    ".pt": "a file of torch, which can hold a pickle",
    ".pth": "a file of torch, which can hold a pickle",
    ".py": "a program, and nothing in a data set is executed",
    ".xlsx": "a spreadsheet",
    ".zip": "an archive",
    ".tar": "an archive",
    ".arrow": "an Arrow file",
}
_IDX_BYTES = 8  # the idx code for unsigned bytes
_LONGEST = 2**31 - 1
_PACKED, _FREE = 300, 2**26  # how much larger what is packed may be, from so many bytes on
_BROKEN = (  # what readers make of a damaged file
    *(OSError, EOFError, ValueError, TypeError, KeyError, OverflowError, MemoryError),
    *(RuntimeError, SyntaxError, struct.error, zlib.error, zipfile.BadZipFile, csv.Error),
)
_limit = threading.Lock()  # the csv module keeps its longest field for the whole process


def format_of(path: Path) -> str:
    """Return how a file's name ends, in small letters, without ``.gz``."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def read_file(path: Path, split: str | None, encoding: str) -> Table:
    """Read a file by the ending of its name.

    Args:
        path: The file.
        split: The split, where the format has any (JSON by its keys, ``.npz`` by its names).
        encoding: Of the text formats.

    Raises:
        EvaluationError: When it is missing, damaged, of another format, or has no such split.
        MissingDependencyError: For Parquet without pyarrow.
    """
    if not path.is_file():
        here = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
        raise EvaluationError(
            f"there is no file {path}",
            hint=did_you_mean(path.name, here)
            if here
            else f"there is no folder {path.parent} either",
        )
    kind = format_of(path)
    if kind in _REFUSED:
        raise EvaluationError(
            f"{path} is {_REFUSED[kind]}",
            hint="give CSV, JSON lines, JSON, Parquet, lines of text, an .npz or a folder",
        )
    try:
        if kind == ".npz":
            return _npz(path, split)
        if kind == ".json":
            return _json(path, split, encoding)
        no_splits(path, split)
        if kind in (".csv", ".tsv"):
            return _csv(path, encoding, "\t" if kind == ".tsv" else ",")
        if kind in (".jsonl", ".ndjson"):
            return _json_lines(path, encoding)
        if kind == ".parquet":
            return _parquet(path)
        return _text_lines(path, encoding)
    except _BROKEN as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: BaseException) -> EvaluationError:
    return EvaluationError(
        f"{path} cannot be read: {first_line(error)}",
        hint="it is damaged, or not what its name says",
    )


def _unpacked(path: Path) -> bytes:
    """Return the content of a file, unpacked where it is gzipped."""
    content = path.read_bytes()
    if content[:2] != b"\x1f\x8b":
        return content
    most = max(_FREE, _PACKED * len(content))
    with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
        found = file.read(most + 1)
    if len(found) > most:
        raise ValueError(f"it unpacks to more than {_PACKED} times its size")
    return found


def _text(path: Path, encoding: str) -> str:
    content = _unpacked(path)
    if b"\0" in content[:1_000_000] and "16" not in encoding and "32" not in encoding:
        raise EvaluationError(
            f"{path} is not a file of text",
            hint=f"the ending says the format: {', '.join(FORMATS)}, or these with .gz",
        )
    try:
        # "utf-8-sig" is UTF-8 with or without the mark that spreadsheets write first.
        return content.decode("utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding)
    except LookupError as error:
        raise EvaluationError(
            f"there is no encoding {encoding!r}", hint="such as 'utf-8' or 'latin-1'"
        ) from error
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise EvaluationError(
            f"{path} is not {encoding}: line {line} holds the byte 0x{content[error.start]:02x}",
            hint="say how it is written, such as encoding='latin-1'",
        ) from error


def read_lines(path: Path, encoding: str) -> list[str]:
    """Return the lines of a file of text, gzipped or not; the last may lack its end.

    Raises:
        EvaluationError: When it is not text of this encoding.
    """
    lines = _text(path, encoding).replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines and not lines[-1] else lines


def _text_lines(path: Path, encoding: str) -> Table:
    lines = [line for line in read_lines(path, encoding) if line.strip()]

    def column(name: str) -> Sequence[object]:
        if name == "line":
            return lines
        # The text is all that follows the first space, an empty one too.
        return [line.partition(" ")[0 if name == "label" else 2].strip() for line in lines]

    return Table(str(path), len(lines), ("line", "label", "rest"), column, of_lines=True)


def _csv(path: Path, encoding: str, delimiter: str) -> Table:
    text = _text(path, encoding)
    with _limit:
        before = csv.field_size_limit(_LONGEST)  # documents are longer than the default
        try:
            reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
            rows = [(reader.line_num, row) for row in reader if row]
        finally:
            csv.field_size_limit(before)
    if not rows:
        raise EvaluationError(f"{path} is empty", hint="its first line names the columns")
    names = [name.strip() for name in rows[0][1]]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise EvaluationError(
            f"{path} has two columns called {twice[0]!r}",
            hint="its first line names the columns, each once",
        )
    for line, row in rows[1:]:
        if len(row) != len(names):
            raise EvaluationError(
                f"line {line} of {path} has {len(row)} values; the first line names "
                f"{len(names)} columns",
                hint="put texts with a comma or a line break in double quotes"
                if delimiter == ","
                else "separate the columns with one tab",
            )
    values = list(zip(*(row for _, row in rows[1:]), strict=True)) or [()] * len(names)
    return from_columns(str(path), dict(zip(names, values, strict=True)))


def _json_lines(path: Path, encoding: str) -> Table:
    rows: list[object] = []
    for number, line in enumerate(read_lines(path, encoding), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise EvaluationError(
                f"line {number} of {path} is not JSON: {first_line(error)}",
                hint='every line is one object, such as {"text": "...", "label": 0}',
            ) from error
    return _of_records(str(path), rows)


def _json(path: Path, split: str | None, encoding: str) -> Table:
    try:
        content = json.loads(_text(path, encoding))
    except RecursionError as error:
        raise EvaluationError(f"{path} is nested too deeply", hint="give a list of rows") from error
    if isinstance(content, list):
        no_splits(path, split)
        return _of_records(str(path), content)
    if isinstance(content, dict) and all(isinstance(part, list) for part in content.values()):
        if content and any(isinstance(v, dict | list) for part in content.values() for v in part):
            chosen = choose_split(str(path), split, list(content))
            return _of_records(f"{path}, split {chosen!r}", content[chosen])
        no_splits(path, split)
        return from_columns(str(path), content)
    raise EvaluationError(
        f"{path} holds neither rows nor columns",
        hint="give a list of objects, an object of lists (columns), or an object of splits",
    )


def _of_records(where: str, rows: Sequence[object]) -> Table:
    """Return a table of objects, or of lists, whose columns are then called 0, 1, ..."""
    records: list[Mapping[str, object]] = []
    for number, row in enumerate(rows, start=1):
        if isinstance(row, list):
            row = {str(i): value for i, value in enumerate(row)}
        if not isinstance(row, dict):
            raise EvaluationError(
                f"row {number} of {where} is a {type(row).__name__}, not an object",
                hint='every row is one object, such as {"text": "...", "label": 0}',
            )
        records.append(row)
    names = list(dict.fromkeys(name for row in records for name in row))

    def column(name: str) -> Sequence[object]:
        for number, row in enumerate(records, start=1):
            if name not in row:
                raise EvaluationError(
                    f"row {number} of {where} has no {name!r}, which other rows have; it has "
                    f"{listed(row) or 'nothing'}",
                    hint="give every row the same columns",
                )
        return [row[name] for row in records]

    return Table(where, len(records), tuple(names), column)


def _parquet(path: Path) -> Table:
    require("pyarrow", by="reading Parquet", extra="data")
    from pyarrow import ArrowException, parquet

    try:
        file = parquet.ParquetFile(path)
        names, size = tuple(file.schema_arrow.names), int(file.metadata.num_rows)
    except ArrowException as error:
        raise ValueError(first_line(error)) from error

    def column(name: str) -> Sequence[object]:
        try:
            values: list[object] = parquet.ParquetFile(path).read(columns=[name])[name].to_pylist()
        except (ArrowException, *_BROKEN) as error:
            raise _damaged(path, error) from error
        return [_image_or_value(value) for value in values]

    return Table(str(path), size, names, column)


def _image_or_value(value: object) -> object:
    """Return the bytes of an image for the pair of bytes and path that Parquet files hold."""
    if isinstance(value, dict) and set(value) == {"bytes", "path"} and value["bytes"]:
        return EncodedImage(value["bytes"])
    return value


def _npz(path: Path, split: str | None) -> Table:
    """Read ``column`` arrays, or ``split_column`` arrays such as ``train_images``."""
    with zipfile.ZipFile(path) as archive:
        size = sum(one.file_size for one in archive.infolist())
    if size > max(_FREE, _PACKED * path.stat().st_size):
        raise ValueError(f"it unpacks to more than {_PACKED} times its size")
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
        names = list(file.files)
        parts = [name.partition("_") for name in names]
        whole = not names or any(not rest for _, _, rest in parts)
        if whole:
            no_splits(path, split)
            where, wanted = str(path), {name: name for name in names}
        else:
            chosen = choose_split(str(path), split, list(dict.fromkeys(p[0] for p in parts)))
            where = f"{path}, split {chosen!r}"
            wanted = {p[2]: name for name, p in zip(names, parts, strict=True) if p[0] == chosen}
        arrays = {column: file[name] for column, name in wanted.items()}
    flat = [name for name, array in arrays.items() if not array.ndim]
    if flat:
        raise EvaluationError(
            f"{flat[0]!r} of {where} is a single number", hint="each array has one row per example"
        )
    return from_columns(where, {name: _rows(array) for name, array in arrays.items()})


def _rows(array: NDArray[np.generic]) -> Sequence[object]:
    if array.ndim == 1:
        values: list[object] = array.tolist()
        return values
    return list(array)


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an idx file of bytes, gzipped or not: a magic number, the sizes, the values.

    Raises:
        EvaluationError: When it is damaged or holds anything else.
    """
    try:
        content = _unpacked(path)
        if len(content) < 8 or content[:3] != bytes((0, 0, _IDX_BYTES)):
            raise ValueError("it is not an idx file of bytes")
        start = 4 + 4 * content[3]
        shape = tuple(int(size) for size in np.frombuffer(content[4:start], dtype=">i4"))
        return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)
    except _BROKEN as error:
        raise _damaged(path, error) from error
