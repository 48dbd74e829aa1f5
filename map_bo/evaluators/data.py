"""The data of an evaluator: one block of settings for every kind of file and data set.

``Data(path="reviews.csv", columns={"text": "body"}, labels=["bad", "good"], limit=500)`` says which
columns play which roles, which rows are used, and what the labels are called. Nothing is read when
it is made; `Data.read` reads, and refuses what is not there.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from map_bo.errors import ConfigError, EvaluationError, did_you_mean, listed
from map_bo.evaluators.sources.files import read_file
from map_bo.evaluators.sources.folders import read_folder
from map_bo.evaluators.sources.hub import hub_name, is_saved, read_hub, read_saved
from map_bo.evaluators.sources.table import EncodedImage, Split, Table
from map_bo.values import whole_number

__all__ = ["Data", "Examples"]

ROLES = (
    "text",
    "label",
    "first",
    "second",
    "score",
    "query",
    "document",
    "image",
    "prompt",
    "target",
)
"""Roles of ready evaluators; a data block may name those that an evaluator does not need."""

_LONGEST = 10  # digits of a class index
_WHOLE = re.compile(r"-?\d+\.0+")  # as tables write whole numbers where some are missing

_read: WeakValueDictionary[str, Examples] = WeakValueDictionary()
_lock = threading.Lock()


@dataclass(frozen=True, eq=False)
class Examples:
    """What was read.

    Attributes:
        columns: Role -> one value per example. Those of ``label`` are class indices. An image is
            the path of a file, the bytes of one (`EncodedImage`), or an array of numbers.
        size: The number of examples.
        digest: SHA-256 over roles, values (images by their bytes) and the names of the classes.
        label_names: Names of the classes by index, where the data or the label map say them.
        rows: Where each example stands in the split, from 0.
        where: What was read, for errors.
        sources: Role -> column.
        numbered: Whether nothing but the order of their names says which class has which index.
    """

    columns: Mapping[str, tuple[object, ...]]
    size: int
    digest: str
    label_names: tuple[str, ...] | None
    rows: tuple[int, ...]
    where: str
    sources: Mapping[str, str]
    numbered: bool = False

    def texts(self, role: str) -> list[str]:
        """Return the texts of a role.

        Raises:
            EvaluationError: Where a value is not text.
        """
        found = []
        for row, value in zip(self.rows, self.columns[role], strict=True):
            if not isinstance(value, str):
                raise EvaluationError(
                    f"row {row + 1} of column {self.sources[role]!r} of {self.where} is a "
                    f"{type(value).__name__}, not text",
                    hint=f"choose a column of texts: columns={{{role!r}: ...}}",
                )
            if not value.isascii() and any("\ud800" <= one <= "\udfff" for one in value):
                raise EvaluationError(
                    f"row {row + 1} of column {self.sources[role]!r} of {self.where} holds half of "
                    "a character",
                    hint="write the file anew in UTF-8",
                )
            found.append(value)
        return found

    def numbers(self, role: str) -> list[float]:
        """Return the numbers of a role; text that is one counts.

        Raises:
            EvaluationError: Where a value is not a finite number.
        """
        found = []
        for row, value in zip(self.rows, self.columns[role], strict=True):
            try:
                number = float(value) if isinstance(value, str | int | float) else math.nan
            except (ValueError, OverflowError):
                number = math.nan
            if not math.isfinite(number):
                raise EvaluationError(
                    f"row {row + 1} of column {self.sources[role]!r} of {self.where} is {value!r}, "
                    "not a finite number",
                    hint=f"choose a column of numbers: columns={{{role!r}: ...}}",
                )
            found.append(number)
        return found

    def classes(self) -> list[int]:
        """Return the class index of every example."""
        return [value for value in self.columns["label"] if isinstance(value, int)]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where an evaluator's examples are, and what they are.

    Attributes:
        path: A file (``.csv``, ``.tsv``, ``.jsonl``, ``.json``, ``.parquet``, ``.npz``, or lines of
            text, each also with ``.gz``), a folder (images in a sub-folder per class, files called
            by their split, idx files, one file of lines per column, or what ``save_to_disk``
            wrote), or the name of a data set of the Hugging Face hub.
        name: The configuration of a data set of the hub.
        split: The split, or a part of one: ``test``, ``train[:80%]``; of a file without splits
            ``[:500]``.
        columns: Role -> column. What is not named is the column called like its role, or like it
            with an ``s``. Of lines of text the columns are ``line``, and ``label`` and ``rest`` for
            what stands before and after the first space.
        labels: Label map. A mapping from values in the data to class indices, or the names of the
            classes in the order of their indices. By default whole numbers are indices, and other
            values are numbered in the order of the alphabet.
        limit: At most so many examples. They are the first of a permutation by ``seed``, so that a
            smaller limit is a subset of a larger one.
        seed: Seed of that permutation.
        encoding: How files of text are written.

    Raises:
        ConfigError: For a setting of a wrong kind.
    """

    path: str
    name: str | None = None
    split: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, int] | Sequence[str] | None = None
    limit: int | None = None
    seed: int = 0
    encoding: str = "utf-8"

    def __post_init__(self) -> None:
        put = object.__setattr__
        if isinstance(self.path, Path):
            put(self, "path", str(self.path))
        for key in ("path", "name", "split", "encoding"):
            value = getattr(self, key)
            optional = key in ("name", "split")
            if not (isinstance(value, str) and value.strip()) and not (optional and value is None):
                raise ConfigError(
                    f"{key} of a data block must be text, got {value!r}",
                    hint="such as path='reviews.csv'",
                )
        if not isinstance(self.columns, Mapping) or not all(
            isinstance(one, str) for pair in self.columns.items() for one in pair
        ):
            raise ConfigError(
                f"columns of a data block must map roles to columns, got {self.columns!r}",
                hint="such as columns={'text': 'sentence', 'label': 'label'}",
            )
        put(self, "columns", dict(self.columns))
        put(self, "labels", _label_map(self.labels))
        if self.limit is not None:
            put(self, "limit", whole_number("limit of a data block", self.limit, least=1))
        put(self, "seed", whole_number("seed of a data block", self.seed, least=0))

    @classmethod
    def of(cls, given: Data | Mapping[str, Any] | str | Path) -> Data:
        """Return a data block: as it is, of its settings by name, or of a path alone.

        Raises:
            ConfigError: For a setting that does not exist or is of a wrong kind.
        """
        if isinstance(given, Data):
            return given
        if isinstance(given, str | Path):
            return cls(path=str(given))
        if not isinstance(given, Mapping):
            raise ConfigError(
                f"data must be a data block, got a {type(given).__name__}",
                hint="such as {'path': 'reviews.csv', 'split': 'test'}",
            )
        known = [one.name for one in fields(cls)]
        for key in given:
            if key not in known:
                raise ConfigError(
                    f"a data block has no setting {key!r}", hint=did_you_mean(key, known)
                )
        if "path" not in given:
            raise ConfigError("a data block has no path", hint="path='reviews.csv'")
        return cls(**given)

    def read(self, roles: Sequence[str]) -> Examples:
        """Read the examples; at once where they were read before and are still in use.

        Args:
            roles: Roles to read.

        Raises:
            EvaluationError: For a file, split or column that is not there, an empty split, rows
                that disagree, and labels that the label map lacks; it says what there is.
            MissingDependencyError: For a format whose package is not installed.
        """
        for role in self.columns:
            if role not in roles and role not in ROLES:
                raise EvaluationError(
                    f"columns name the role {role!r}, which does not exist",
                    hint=did_you_mean(role, roles),
                )
        key = json.dumps(
            [repr(self), list(roles), _state(Path(self.path).expanduser())], default=str
        )
        with _lock:
            found = _read.get(key)
        if found is None:
            found = self._examples(self._table(roles), tuple(roles))
            with _lock:
                found = _read.setdefault(key, found)
        return found

    def _table(self, roles: Sequence[str]) -> Table:
        part = Split.of(self.split)
        path = Path(self.path).expanduser()
        if path.is_dir():
            if is_saved(path):
                return read_saved(path, part.name)
            wanted = [self.columns.get(role, role) for role in roles]
            return read_folder(path, part.name, self.encoding, wanted)
        named = hub_name(self.path)
        on_hub = named is not None and not _looks_like_a_file(self.path)
        if path.exists() or not on_hub or named is None:
            return read_file(path, part.name, self.encoding)
        return read_hub(*named, self.name, part.name)

    def _examples(self, table: Table, roles: tuple[str, ...]) -> Examples:
        rows: Sequence[int] = Split.of(self.split).rows(table.size)
        if not rows:
            raise EvaluationError(
                f"{table.where} is empty"
                if not table.size
                else f"split {self.split!r} of {table.where} takes none of its {table.size} rows",
                hint="choose another split, or another file",
            )
        sources = {role: self._column(role, roles, table) for role in roles}
        columns: dict[str, list[object]] = {}
        for role, source in sources.items():
            values = table.column(source)
            columns[role] = [values[row] for row in rows]
            # A cell of CSV without a label is empty text, which is no class of its own.
            blank = role == "label"
            empty = [
                one is None or (blank and isinstance(one, str) and not one.strip())
                for one in columns[role]
            ]
            if any(empty):
                row = rows[empty.index(True)]
                raise EvaluationError(
                    f"row {row + 1} of {table.where} has no value in column {source!r}",
                    hint="fill it, or leave the row out",
                )
        names: tuple[str, ...] | None = None
        if "label" in roles:
            source = sources["label"]
            said = f"column {source!r} of {table.where}"
            indices, names = _class_indices(
                columns["label"], self.labels, table.classes.get(source), said
            )
            columns["label"] = list(indices)
        order = list(range(len(rows)))
        if self.limit is not None:
            order = np.random.default_rng(self.seed).permutation(len(rows)).tolist()[: self.limit]
        chosen = {role: tuple(values[i] for i in order) for role, values in columns.items()}
        return Examples(
            columns=chosen,
            size=len(order),
            digest=_digest(chosen, names),
            label_names=names,
            rows=tuple(rows[i] for i in order),
            where=table.where,
            sources=sources,
            numbered=names is not None
            and self.labels is None
            and sources["label"] not in table.classes,
        )

    def _column(self, role: str, roles: Sequence[str], table: Table) -> str:
        """Return the column of a role."""
        given = self.columns.get(role)
        if given is None and table.of_lines and role == "text":
            return "rest" if "label" in roles else "line"
        for name in (given,) if given is not None else (role, f"{role}s"):
            if name in table.names:
                return name
        wanted = given if given is not None else role
        hint = did_you_mean(wanted, table.names)
        if given is None:
            others = {self.columns.get(one, one) for one in roles}
            free = [name for name in table.names if name not in others] or [*table.names, "COLUMN"]
            hint = f"say which column is the {role}: columns={{{role!r}: {free[0]!r}}}"
        raise EvaluationError(
            f"{table.where} has no column {wanted!r}; it has {listed(table.names, 20) or 'none'}",
            hint=hint,
        )


def _label_map(given: object) -> dict[str, int] | tuple[str, ...] | None:
    if given is None:
        return None
    if isinstance(given, Mapping):
        found = {}
        for value, index in given.items():
            found[_word(value)] = whole_number(f"class index of label {value!r}", index, least=0)
        if found:
            return found
    elif isinstance(given, Sequence) and not isinstance(given, str):
        names = tuple(_word(name) for name in given)
        if names and len(set(names)) == len(names):
            return names
    raise ConfigError(
        f"labels of a data block must be a mapping or different names, got {given!r}",
        hint="such as labels={'bad': 0, 'good': 1} or labels=['bad', 'good']",
    )


def _word(value: object) -> str:
    """Return a label as text; 1, 1.0, "1" and "1.0" are one."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    word = str(value).strip()
    return word.partition(".")[0] if _WHOLE.fullmatch(word) else word


def _index(value: object) -> int | None:
    """Return the class index that a value of the data is, if it is one."""
    if isinstance(value, bool | np.bool_):
        return int(value)
    word = _word(value)
    return int(word) if word.isdecimal() and len(word) < _LONGEST else None


def _class_indices(
    values: Sequence[object],
    labels: Mapping[str, int] | Sequence[str] | None,
    known: tuple[str, ...] | None,
    where: str,
) -> tuple[list[int], tuple[str, ...] | None]:
    """Return the class index of each value, and the names of the classes where there are any.

    Args:
        values: What the data hold.
        labels: The label map.
        known: Names that the data have for their whole numbers.
        where: What is read, for errors.
    """
    words = [_word(value) for value in values]
    numbers = [_index(value) for value in values]
    if any(word.startswith("-") and word[1:].isdecimal() for word in words) and labels is None:
        raise EvaluationError(
            f"{where} holds negative labels, which stand for labels that were kept back",
            hint="choose a split with labels, such as 'validation'",
        )
    fraction = next(
        (one for one in values if isinstance(one, float) and not one.is_integer()), None
    )
    if fraction is not None:
        raise EvaluationError(
            f"{where} holds {fraction}, which is not a class",
            hint="choose the column of the classes; numbers are scored by an evaluator of "
            "regression",
        )
    plain = None not in numbers
    if isinstance(labels, Mapping):
        if known is not None and not set(words) <= set(labels):
            # The map may speak of the names that the data have for their numbers.
            words = [known[i] if i is not None and i < len(known) else "" for i in numbers]
        return [_looked_up(word, labels, where) for word in words], _names_of(labels)
    if labels is not None:
        names = tuple(labels)
        if known is not None and plain and set(known) == set(names):
            place = {name: i for i, name in enumerate(names)}
            return [place[known[i]] for i in numbers if i is not None], names
        if plain and not set(words) <= set(names):
            if all(name.lstrip("-").isdecimal() for name in names):  # then they are no names
                lacking = next(word for word in words if word not in names)
                raise EvaluationError(
                    f"{where} holds the label {lacking}, and labels name {listed(names, 20)}",
                    hint="name every value of the data, in the order of the classes",
                )
            over = next((i for i in numbers if i is not None and i >= len(names)), None)
            if over is not None:
                raise EvaluationError(
                    f"{where} holds the class {over}, and labels name {len(names)} classes",
                    hint="name every class, in the order of the indices from 0",
                )
            return [i for i in numbers if i is not None], names
        order = {name: i for i, name in enumerate(names)}
        return [_looked_up(word, order, where) for word in words], names
    if plain:
        return [i for i in numbers if i is not None], known
    names = tuple(sorted(set(words)))
    order = {name: i for i, name in enumerate(names)}
    return [order[word] for word in words], names


def _looked_up(word: str, labels: Mapping[str, int], where: str) -> int:
    if word not in labels:
        raise EvaluationError(
            f"{where} holds the label {word!r}, which the label map lacks; it has "
            f"{listed(labels, 20)}",
            hint=f"add it: labels={{..., {word!r}: ...}}",
        )
    return labels[word]


def _names_of(labels: Mapping[str, int]) -> tuple[str, ...] | None:
    """Return the names by index, where each index from 0 has exactly one that is not a number."""
    names = {index: name for name, index in labels.items()}
    whole = len(names) == len(labels) and sorted(names) == list(range(len(names)))
    if not whole or all(name.lstrip("-").isdecimal() for name in names.values()):
        return None
    return tuple(names[i] for i in range(len(names)))


def _looks_like_a_file(text: str) -> bool:
    """Return whether a path that does not exist was meant to be one."""
    if text.startswith(("/", ".", "~")) or "\\" in text or text.count("/") > 1:
        return not text.startswith("hf://")
    if "/" in text and Path(text.partition("/")[0]).is_dir():
        return True
    ending = Path(text.removesuffix(".gz")).suffix.lower()
    return ending in (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".npz", ".txt")


def _state(path: Path) -> list[tuple[str, int, int]]:
    """Return what changes when a file, or one of a folder, is written."""
    if path.is_file():
        seen = path.stat()
        return [(str(path.resolve()), seen.st_size, seen.st_mtime_ns)]
    found = []
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                seen = (Path(folder) / name).stat()
            except OSError:  # a link to nothing, which is refused only where it is data
                continue
            found.append((f"{folder}/{name}", seen.st_size, seen.st_mtime_ns))
    return sorted(found)


def _digest(columns: Mapping[str, Sequence[object]], names: tuple[str, ...] | None) -> str:
    total = hashlib.sha256(json.dumps([list(columns), names]).encode())
    for role, values in columns.items():
        total.update(f"\n{role} {len(values)}\n".encode())
        for value in values:
            content = _content(value)
            total.update(f"{type(value).__name__} {len(content)} ".encode())
            total.update(content)
    return total.hexdigest()


def _content(value: object) -> bytes:
    """Return the bytes that tell a value from others."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    if isinstance(value, EncodedImage):
        return value.content
    if isinstance(value, Path):
        try:
            return value.read_bytes()
        except OSError as error:
            raise EvaluationError(
                f"{value} cannot be read: {error.strerror or error}", hint="it is part of the data"
            ) from error
    if isinstance(value, np.ndarray):
        return f"{value.dtype.str} {value.shape} ".encode() + np.ascontiguousarray(value).tobytes()
    return json.dumps(value, sort_keys=True, default=repr).encode()
