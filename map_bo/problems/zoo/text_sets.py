"""Real text sets from a local folder: questions, opinions, emotions, intents.

The folder holds one folder per set, as they are published: lines of label and text, parallel lines,
a table or a JSON file, gzipped or not. Nothing is downloaded.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from map_bo.errors import DataError
from map_bo.problems.zoo.image_sets import DATA_VARIABLE
from map_bo.rng import make_generator, numpy_generator

__all__ = [
    "TEXT_SETS",
    "TextSelection",
    "TextSet",
    "check_sets",
    "load_text_set",
    "select_texts",
    "text_folder",
]

_TEST_EVERY = 5  # of sets in one part the last row of every five is for testing

Rows = list[tuple[str, str]]  # label, text


@dataclass(frozen=True, eq=False)
class TextSet:
    """One set, split.

    Attributes:
        name: One of ``TEXT_SETS``.
        train: ``n`` texts for training.
        train_labels: ``n`` classes, from 0.
        test: ``t`` held-out texts, none of which is a training text.
        test_labels: ``t`` classes.
        classes: Name of each class, as the files have it.
        repeats: How many held-out texts were left out because they are training texts too.
        blank: How many rows of both parts were left out because they have no text.
    """

    name: str
    train: tuple[str, ...]
    train_labels: tuple[int, ...]
    test: tuple[str, ...]
    test_labels: tuple[int, ...]
    classes: tuple[str, ...]
    repeats: int
    blank: int


@dataclass(frozen=True, eq=False)
class TextSelection:
    """The part of one text set that a zoo uses.

    Attributes:
        name: The set.
        train: ``n`` training texts.
        train_labels: ``n`` classes.
        test: ``t`` held-out texts, in an order drawn at random once for all: the first ``k`` are a
            fair sample.
        test_labels: ``t`` classes.
        classes: Name of each class.
        digest: Of all these texts and labels.
        facts: What a datasheet says of the set.
    """

    name: str
    train: tuple[str, ...]
    train_labels: tuple[int, ...]
    test: tuple[str, ...]
    test_labels: tuple[int, ...]
    classes: tuple[str, ...]
    digest: str
    facts: dict[str, int]


def select_texts(name: str, root: str | Path | None = None, *, examples: int) -> TextSelection:
    """Return some training texts of a set, one of each class at least, and its shuffled test texts.

    Args:
        name: One of ``TEXT_SETS``.
        root: See :func:`text_folder`.
        examples: How many training texts; all, where the set has fewer.

    Raises:
        DataError: See :func:`load_text_set`; also for fewer examples than the set has classes.
    """
    return _select(name, str(text_folder(root).resolve()), examples)


@lru_cache(maxsize=32)
def _select(name: str, folder: str, examples: int) -> TextSelection:
    data = load_text_set(name, folder)
    if examples < len(data.classes):
        raise DataError(
            f"{name} has {len(data.classes)} classes, and {examples} training texts were asked for",
            hint="train on at least one text per class",
        )
    generator = numpy_generator(make_generator(0), "texts", name)
    order = generator.permutation(len(data.train)).tolist()
    first: dict[int, int] = {}
    for row in order:
        first.setdefault(data.train_labels[row], row)
    firsts = set(first.values())
    others = [row for row in order if row not in firsts]
    chosen = [*first.values(), *others][:examples]
    tests = generator.permutation(len(data.test)).tolist()
    parts = (
        tuple(data.train[row] for row in chosen),
        tuple(data.train_labels[row] for row in chosen),
        tuple(data.test[row] for row in tests),
        tuple(data.test_labels[row] for row in tests),
    )
    return TextSelection(
        name,
        *parts,
        data.classes,
        hashlib.sha256(json.dumps(parts).encode()).hexdigest(),
        {
            "classes": len(data.classes),
            "train": len(chosen),
            "train_available": len(data.train),
            "test_available": len(data.test),
            "test_repeats_dropped": data.repeats,
            "blank_dropped": data.blank,
        },
    )


def check_sets(sets: object) -> tuple[str, ...]:
    """Return the names of the sets of a zoo, one expert each.

    Raises:
        DataError: When there are fewer than two, one is named twice, or there is no such set.
    """
    names = list(sets) if isinstance(sets, Sequence) and not isinstance(sets, str) else [sets]
    if len(names) < 2 or len({str(name) for name in names}) != len(names):
        raise DataError(
            f"sets must be two or more different ones, got {', '.join(map(str, names)) or 'none'}",
            hint="name the text sets to train experts on",
        )
    for name in names:
        if not isinstance(name, str) or name not in _READERS:
            raise DataError(
                f"there is no text set {name!r}", hint=f"text sets are {', '.join(TEXT_SETS)}"
            )
    return tuple(str(name) for name in names)


def text_folder(root: str | Path | None = None) -> Path:
    """Return the folder of the text sets.

    Args:
        root: The folder itself, or one that has it as ``text``; otherwise the environment variable
            ``MAP_BO_DATA`` names one of the two.

    Raises:
        DataError: When none is given, or there is no such folder.
    """
    given = root or os.environ.get(DATA_VARIABLE)
    hint = (
        f"give the folder that holds {', '.join(TEXT_SETS)}: problem.root=FOLDER, or the "
        f"environment variable {DATA_VARIABLE}; problem=digits needs no data"
    )
    if not given:
        raise DataError("no folder of text sets is given", hint=hint)
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder} of text sets", hint=hint)
    inner = folder / "text"
    if not any((folder / name).is_dir() for name in TEXT_SETS) and inner.is_dir():
        return inner
    return folder


def load_text_set(name: str, root: str | Path | None = None) -> TextSet:
    """Read one set.

    The split is the published one; cr, mpqa and subj have none and give every fifth row to testing.
    Published validation parts are not used.

    Args:
        name: One of ``TEXT_SETS``.
        root: See :func:`text_folder`.

    Raises:
        DataError: When there is no such set, its files are not there, or they are damaged.
    """
    if name not in _READERS:
        raise DataError(
            f"there is no text set {name!r}", hint=f"text sets are {', '.join(TEXT_SETS)}"
        )
    folder = text_folder(root) / name
    try:
        train, test = _READERS[name](folder)
    except (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error) as error:
        raise DataError(
            f"{folder} cannot be read: {error or type(error).__name__}",
            hint="it is damaged or of another format; fetch it again",
        ) from error
    rows = len(train) + len(test)
    train, test = ([(label, text) for label, text in part if text] for part in (train, test))
    blank = rows - len(train) - len(test)
    known = {text for _, text in train}
    new = [(label, text) for label, text in test if text not in known]
    classes = sorted({label for label, _ in train}, key=_order)
    number = {label: i for i, label in enumerate(classes)}
    unknown = sorted({label for label, _ in new} - number.keys())
    if not train or not new or unknown:
        what = (
            f"test labels that no training text has: {', '.join(unknown)}"
            if unknown
            else (f"{len(train)} training and {len(new)} test texts")
        )
        raise DataError(
            f"{folder} holds {what}",
            hint="it is damaged or of another format; fetch it again",
        )
    return TextSet(
        name,
        tuple(text for _, text in train),
        tuple(number[label] for label, _ in train),
        tuple(text for _, text in new),
        tuple(number[label] for label, _ in new),
        tuple(classes),
        len(test) - len(new),
        blank,
    )


def _order(label: str) -> tuple[int, str]:
    return (int(label), "") if label.isdecimal() else (0, label)


def _content(path: Path) -> str:
    """Return the text of a file, or of the gzipped one beside it: UTF-8 where it is that."""
    packed = path.with_name(path.name + ".gz")
    if packed.is_file():
        with gzip.open(packed) as file:
            content = file.read()
    elif path.is_file():
        content = path.read_bytes()
    else:
        raise DataError(
            f"the text set has no file {path}",
            hint=f"problem.root (or {DATA_VARIABLE}) is the folder that holds "
            f"{', '.join(TEXT_SETS)}; leave a set out with problem.sets=[...]",
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def _lines(path: Path) -> list[str]:
    # Not splitlines: it also ends lines at characters that stand inside texts.
    lines = [line.rstrip("\r") for line in _content(path).split("\n")]
    return lines[:-1] if lines and not lines[-1] else lines


def _labelled(path: Path) -> Rows:
    """Read lines of a label, a space and a text."""
    rows = []
    for line in _lines(path):
        label, _, text = line.partition(" ")
        if not label.isdecimal():
            raise ValueError(f"{path.name} has a line without a label: {line[:40]!r}")
        rows.append((label, text.strip()))
    return rows


def _parallel(texts: Path, labels: Path) -> Rows:
    """Read a file of texts and one of their labels."""
    pairs = zip(_lines(labels), _lines(texts), strict=True)
    return [(label.strip(), text.strip()) for label, text in pairs]


def _two_files(train: str, test: str) -> Callable[[Path], Sequence[Rows]]:
    return lambda folder: [_labelled(folder / name) for name in (train, test)]


def _one_file(name: str) -> Callable[[Path], Sequence[Rows]]:
    def read(folder: Path) -> Sequence[Rows]:
        rows = _labelled(folder / name)
        held = [i % _TEST_EVERY == _TEST_EVERY - 1 for i in range(len(rows))]
        return [
            [row for row, out in zip(rows, held, strict=True) if out == wanted]
            for wanted in (False, True)
        ]

    return read


def _emotion(folder: Path) -> Sequence[Rows]:
    parts = [
        _parallel(folder / f"{part}_text.txt", folder / f"{part}_labels.txt")
        for part in ("train", "test")
    ]
    named = dict(line.split("\t") for line in _lines(folder / "mapping.txt"))
    return [[(named[label], text) for label, text in rows] for rows in parts]


def _snips(folder: Path) -> Sequence[Rows]:
    return [
        _parallel(folder / part / "seq.in", folder / part / "label") for part in ("train", "test")
    ]


def _banking(folder: Path) -> Sequence[Rows]:
    def read(name: str) -> Rows:
        rows = csv.DictReader(io.StringIO(_content(folder / name), newline=""))
        return [(row["category"], row["text"].strip()) for row in rows]

    return [read("train.csv"), read("test.csv")]


def _clinc(folder: Path) -> Sequence[Rows]:
    parts = json.loads(_content(folder / "data_full.json"))
    return [[(label, text.strip()) for text, label in parts[part]] for part in ("train", "test")]


_READERS: dict[str, Callable[[Path], Sequence[Rows]]] = {
    "trec": _two_files("TREC.train.all", "TREC.test.all"),
    "sst2": _two_files("stsa.binary.train", "stsa.binary.test"),
    "tweeteval_emotion": _emotion,
    "subj": _one_file("subj.all"),
    "cr": _one_file("custrev.all"),
    "snips": _snips,
    "banking77": _banking,
    "mpqa": _one_file("mpqa.all"),
    "clinc150": _clinc,
}

TEXT_SETS = tuple(_READERS)
"""Names of the sets, in the order in which a zoo takes them."""
