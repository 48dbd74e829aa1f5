"""Data in a folder: images by class, idx files, one file per split, or one file per column."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from map_bo.errors import EvaluationError, listed
from map_bo.evaluators.sources.files import FORMATS, format_of, read_file, read_idx, read_lines
from map_bo.evaluators.sources.table import Table, choose_split, from_columns, no_splits

__all__ = ["IMAGE_ENDINGS", "read_folder"]

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".webp", ".tif", ".tiff")
"""How files of images end."""

_IDX = re.compile(r"(?P<split>[\w.]+?)-images-idx\d-ubyte(?:\.gz)?")
_PARTS = re.compile(r"[-_.]?\d+(-of-\d+)?$")
_PREFIXES = ("train", "training", "test", "validation", "valid", "val", "dev", "eval")


def read_folder(folder: Path, split: str | None, encoding: str, wanted: Sequence[str]) -> Table:
    """Read a folder by what it holds.

    Args:
        folder: The folder.
        split: The split.
        encoding: Of files of text.
        wanted: Columns that are asked for; where they are files of the folder, each line of one is
            a row.

    Raises:
        EvaluationError: When it holds nothing that can be read, or has no such split.
        MissingDependencyError: For Parquet without pyarrow.
    """
    entries = sorted(one for one in folder.iterdir() if not one.name.startswith("."))
    files = [one for one in entries if one.is_file()]
    columns = _column_files(files, wanted)
    if columns:
        no_splits(folder, split)
        lines = {name: read_lines(path, encoding) for name, path in columns.items()}
        return from_columns(str(folder), lines)
    idx = {found["split"]: path for path in files if (found := _IDX.fullmatch(path.name))}
    if idx:
        return _idx_pair(folder, split, idx)
    data = _data_files(entries)
    if data:
        return _split_files(folder, split, encoding, data)
    if any(one.is_dir() for one in entries):
        return _images(folder, split, [one for one in entries if one.is_dir()])
    raise EvaluationError(
        f"the folder {folder} holds no data"
        + (f", but {listed(one.name for one in entries)}" if entries else "; it is empty"),
        hint=f"give a file ({', '.join(FORMATS)}), a folder with such files, or one of images with "
        "a sub-folder per class; columns may name files of lines",
    )


def _column_files(files: Sequence[Path], wanted: Sequence[str]) -> dict[str, Path]:
    """Return column -> file, where each column that is wanted is a file of lines."""
    found: dict[str, Path] = {}
    for name in wanted:
        for path in files:
            if path.name in (name, f"{name}.gz") and format_of(path) not in FORMATS[:-1]:
                found[name] = path
    return found if len(found) == len(set(wanted)) else {}


def _idx_pair(folder: Path, split: str | None, known: Mapping[str, Path]) -> Table:
    chosen = choose_split(str(folder), split, list(known))
    images = known[chosen]
    labels = next(folder.glob(f"{chosen}-labels-idx1-ubyte*"), None)
    columns: dict[str, Sequence[object]] = {"image": list(read_idx(images))}
    if labels is not None:
        columns["label"] = read_idx(labels).astype(np.int64).tolist()
    return from_columns(f"{folder}, split {chosen!r}", columns)


def _data_files(entries: Sequence[Path]) -> list[Path]:
    """Return the files of data of a folder and of its folder ``data``, as the hub has them."""
    inner = next((one for one in entries if one.is_dir() and one.name == "data"), None)
    everything = [*entries, *(sorted(inner.iterdir()) if inner else ())]
    files = [one for one in everything if one.is_file() and format_of(one) in FORMATS]
    apart = {"dataset_infos.json", "dataset_info.json", "metadata.csv", "metadata.jsonl"}
    files = [one for one in files if one.name not in apart]
    for kind in (".parquet", ".jsonl", ".ndjson", ".csv", ".tsv", ".json", ".npz", ".txt"):
        alike = [one for one in files if format_of(one) == kind]
        if alike:
            return alike
    return []


def _split_files(folder: Path, split: str | None, encoding: str, files: Sequence[Path]) -> Table:
    if len(files) == 1 and (format_of(files[0]) in (".npz", ".json") or split is None):
        return read_file(files[0], split, encoding)
    groups: dict[str, list[Path]] = {}
    for path in files:
        groups.setdefault(_split_name(path), []).append(path)
    chosen = choose_split(str(folder), split, list(groups))
    tables = [read_file(path, None, encoding) for path in groups[chosen]]
    where = f"{folder}, split {chosen!r}"
    if len(tables) == 1:
        (table,) = tables
        return Table(
            str(groups[chosen][0]), table.size, table.names, table.column, of_lines=table.of_lines
        )
    names = tables[0].names
    for path, table in zip(groups[chosen], tables, strict=True):
        if set(table.names) != set(names):
            raise EvaluationError(
                f"{path} has the columns {', '.join(table.names)}; {groups[chosen][0].name} has "
                f"{', '.join(names)}",
                hint="give the files of a split the same columns",
            )
    return Table(
        where,
        sum(table.size for table in tables),
        names,
        lambda name: [value for table in tables for value in table.column(name)],
        of_lines=all(table.of_lines for table in tables),
    )


def _split_name(path: Path) -> str:
    """Return the split that a file belongs to by its name: ``train-00000-of-00002.parquet``."""
    stem = path.name.removesuffix(".gz")
    stem = _PARTS.sub("", stem.removesuffix(Path(stem).suffix))
    words = re.split(r"[-_.]", stem.lower())
    return next((word for word in words if word in _PREFIXES), stem)


def _images(folder: Path, split: str | None, inner: Sequence[Path]) -> Table:
    """Read ``folder/class/file`` or ``folder/split/class/file``; an image is the path of a file."""
    split_folders = {one.name: one for one in inner if not _image_files(one)}
    if split_folders and len(split_folders) == len(inner):
        chosen = choose_split(str(folder), split, list(split_folders))
        where = f"{folder}, split {chosen!r}"
        inner = sorted(
            one
            for one in split_folders[chosen].iterdir()
            if one.is_dir() and not one.name.startswith(".")
        )
    else:
        no_splits(folder, split)
        where = str(folder)
    names = [one.name for one in inner]
    found = [(path, label) for label, one in enumerate(inner) for path in _image_files(one)]
    if not found:
        raise EvaluationError(
            f"{where} holds no images: its sub-folders are {listed(names) or 'none'}",
            hint=f"put the images of each class into a sub-folder; images end in "
            f"{', '.join(IMAGE_ENDINGS)}",
        )
    columns: dict[str, Sequence[object]] = {
        "image": [path for path, _ in found],
        "label": [label for _, label in found],
    }
    return Table(
        where,
        len(found),
        ("image", "label"),
        lambda name: columns[name],
        classes={"label": tuple(names)},
    )


def _image_files(folder: Path) -> list[Path]:
    return sorted(
        one
        for one in folder.iterdir()
        if one.suffix.lower() in IMAGE_ENDINGS and not one.name.startswith(".")
    )
