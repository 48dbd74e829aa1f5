"""Tables as they are read: columns by name, and which rows of them a split is."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from map_bo.errors import EvaluationError, did_you_mean

__all__ = ["EncodedImage", "Split", "Table", "choose_split", "from_columns", "no_splits"]

_SPLIT = re.compile(r"(?P<name>[^\[\]]*)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")
_ALIASES = ({"val", "valid", "validation", "dev"}, {"train", "training"}, {"test", "t10k", "eval"})


@dataclass(frozen=True)
class EncodedImage:
    """An image as its file holds it, not decoded.

    Attributes:
        content: The bytes of the file.
    """

    content: bytes


@dataclass(frozen=True)
class Split:
    """Which part of a data set is read: ``test``, ``train[:80%]``, ``[100:]``.

    Attributes:
        name: The name of the split, or None where it was left out.
        start: The first row, such as ``"100"`` or ``"80%"``; None is the beginning.
        stop: The row after the last; None is the end.
    """

    name: str | None = None
    start: str | None = None
    stop: str | None = None

    @classmethod
    def of(cls, text: str | None) -> Split:
        """Read a split as the `datasets` library writes it.

        Raises:
            EvaluationError: When it is none.
        """
        found = _SPLIT.fullmatch(text or "")
        if found is None:
            raise EvaluationError(
                f"split must be a name or a part of one, got {text!r}",
                hint="such as 'test', 'train[:80%]', 'train[100:200]', or '[80%:]' of a file",
            )
        return cls(found["name"].strip() or None, found["start"], found["stop"])

    def rows(self, size: int) -> range:
        """Return the rows of the part, out of ``size``."""
        return range(size)[_bound(self.start, size) : _bound(self.stop, size)]


def _bound(text: str | None, size: int) -> int | None:
    if text is None:
        return None
    return round(size * int(text[:-1]) / 100) if text.endswith("%") else int(text)


@dataclass(frozen=True, eq=False)
class Table:
    """One split of a data set, before roles are given to its columns.

    Attributes:
        where: What was read, for errors.
        size: The number of rows.
        names: The columns.
        column: Returns the values of a column; called with one of the names.
        classes: Column -> names of the classes that its whole numbers stand for.
        of_lines: Whether rows are lines of text, whose columns are ``line``, and ``label`` and
            ``rest`` for what stands before and after the first space.
    """

    where: str
    size: int
    names: tuple[str, ...]
    column: Callable[[str], Sequence[object]]
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    of_lines: bool = False


def from_columns(where: str, columns: Mapping[str, Sequence[object]]) -> Table:
    """Return a table of columns in memory.

    Args:
        where: What was read, for errors.
        columns: Name -> values.

    Raises:
        EvaluationError: When columns have different numbers of rows.
    """
    sizes = {name: len(values) for name, values in columns.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{name!r} has {size}" for name, size in sizes.items())
        raise EvaluationError(
            f"the columns of {where} have different numbers of rows: {told}",
            hint="give every example a value in each column",
        )
    size = next(iter(sizes.values()), 0)
    return Table(where, size, tuple(columns), lambda name: columns[name])


def choose_split(where: str, name: str | None, known: Sequence[str]) -> str:
    """Return the split that is meant; ``val``, ``dev`` and ``validation`` are one.

    Args:
        where: What has the splits, for errors.
        name: What was asked for.
        known: The splits there are, at least one.

    Raises:
        EvaluationError: When it is not there, or several are and none was asked for.
    """
    if name is None:
        if len(known) == 1:
            return known[0]
        raise EvaluationError(
            f"{where} has the splits {', '.join(known)}, and none was chosen",
            hint=f"give split, such as split={known[-1]!r}",
        )
    if name in known:
        return name
    alike = next((group for group in _ALIASES if name in group), set())
    same = [one for one in known if one in alike]
    if len(same) == 1:
        return same[0]
    raise EvaluationError(
        f"{where} has no split {name!r}; it has {', '.join(known)}", hint=did_you_mean(name, known)
    )


def no_splits(path: Path, name: str | None) -> None:
    """Refuse the name of a split where there are none.

    Raises:
        EvaluationError: When one was given.
    """
    if name is not None:
        raise EvaluationError(
            f"{path} has no splits, got split {name!r}",
            hint="leave split out, take a part of the rows with split='[:80%]', or give a folder "
            "with one file per split",
        )
