"""Data sets of the Hugging Face hub, of its cache, and of folders that `datasets` saved.

Only data are read: programs of a data set are never run (`datasets` has none from version 4).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from map_bo.errors import EvaluationError, did_you_mean, first_line, listed, require
from map_bo.evaluators.sources.table import EncodedImage, Table, choose_split, no_splits

__all__ = ["hub_name", "is_saved", "read_hub", "read_saved"]

_SCHEMES = ("hf://datasets/", "hf://")
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?P<name>(?:{_PART}/)?{_PART})(?:@(?P<revision>[A-Za-z0-9][\w./-]*))?")
_TIMEOUT = 10.0
_LOGGERS = ("datasets", "huggingface_hub", "fsspec", "httpx", "urllib3")


def hub_name(path: str) -> tuple[str, str | None] | None:
    """Return name and revision of the data set that a text can name, or None where it cannot.

    Such as ``stanfordnlp/sst2``, ``imdb``, ``organisation/name@revision`` or
    ``hf://datasets/organisation/name``.
    """
    for scheme in _SCHEMES:
        if path.startswith(scheme):
            path = path.removeprefix(scheme)
            break
    found = _NAME.fullmatch(path)
    return (found["name"], found["revision"]) if found else None


def is_saved(folder: Path) -> bool:
    """Return whether a folder is one that ``save_to_disk`` of `datasets` wrote."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def read_saved(folder: Path, split: str | None) -> Table:
    """Read a folder that ``save_to_disk`` wrote.

    Raises:
        EvaluationError: When it is damaged, or has no such split.
        MissingDependencyError: Without `datasets`.
    """
    require("datasets", by=f"reading {folder}, which `save_to_disk` wrote,", extra="data")
    import datasets

    with _quiet():
        try:
            found = datasets.load_from_disk(str(folder))
        except Exception as error:  # whatever pyarrow and datasets raise on a damaged folder
            raise EvaluationError(
                f"{folder} cannot be read: {first_line(error)}",
                hint="save it again with save_to_disk",
            ) from error
    return _table(str(folder), found, split)


def read_hub(
    name: str, revision: str | None, configuration: str | None, split: str | None
) -> Table:
    """Read a data set of the hub, or of its cache where the hub cannot be reached.

    Args:
        name: ``organisation/name``.
        revision: Branch, tag or commit.
        configuration: The configuration of a data set with several.
        split: The split.

    Raises:
        EvaluationError: When there is none, or no such configuration or split.
        MissingDependencyError: Without `datasets`.
    """
    require(
        "datasets",
        by=f"{name} is no file or folder here; reading it from the Hugging Face hub",
        extra="data",
    )
    import datasets

    where = name + (f" ({configuration})" if configuration else "")
    with _quiet(), _offline_where_needed(name):
        try:
            found = datasets.load_dataset(name, configuration, revision=revision)
        except Exception as error:  # of datasets, huggingface_hub, pyarrow and the network
            raise _refusal(name, configuration, error) from error
    return _table(where, found, split)


def _refusal(name: str, configuration: str | None, error: Exception) -> EvaluationError:
    text = str(error)
    if "config" in text.lower() and isinstance(error, ValueError):
        known = re.findall(r"'([^']+)'", text.partition("[")[2].partition("]")[0])
        if known:
            missing = (
                f"has no configuration {configuration!r}"
                if configuration
                else "has several configurations, and none was chosen"
            )
            return EvaluationError(
                f"the data set {name} {missing}; it has {listed(known, 20)}",
                hint=did_you_mean(configuration, known)
                if configuration
                else f"give name, such as name={known[0]!r}",
            )
    if "script" in text.lower():
        return EvaluationError(
            f"the data set {name} is a program, which is not run",
            hint="look for the branch of its Parquet files: path='NAME@refs/convert/parquet'",
        )
    if isinstance(error, ConnectionError):
        return EvaluationError(
            f"{name} is no file or folder here, and the data set of that name is not in the cache "
            f"of the Hugging Face hub, which cannot be reached",
            hint="check the path; for a data set of the hub, connect, or copy the cache "
            "(HF_HOME) from where there is a connection",
        )
    return EvaluationError(
        f"{name} is no file or folder here, and the Hugging Face hub gives no data set of that "
        f"name: {first_line(error)}",
        hint="check the path or the name; log in with `hf auth login` for one that is private or "
        "gated",
    )


def _table(where: str, found: Any, split: str | None) -> Table:
    import datasets

    if isinstance(found, datasets.DatasetDict):
        chosen = choose_split(where, split, list(found))
        where, found = f"{where}, split {chosen!r}", found[chosen]
    else:
        no_splits(Path(where), split)
    features = found.features
    classes = {
        name: tuple(feature.names)
        for name, feature in features.items()
        if isinstance(feature, datasets.ClassLabel)
    }

    def column(name: str) -> Sequence[object]:
        rows = found.with_format(None)
        if isinstance(features[name], datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
        with _quiet():
            values = list(rows[name])
        if not isinstance(features[name], datasets.Image):
            return values
        return [
            EncodedImage(one["bytes"]) if one["bytes"] is not None else Path(one["path"])
            for one in values
        ]

    return Table(where, found.num_rows, tuple(found.column_names), column, classes=classes)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress bars and warnings of libraries off the console, and put all back."""
    import datasets

    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    shown = datasets.are_progress_bars_disabled() is False
    try:
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _offline_where_needed(name: str) -> Iterator[None]:
    """Let `datasets` look in the cache at once where the hub cannot be reached.

    By itself it tries six times, half a minute in all.
    """
    import datasets
    import huggingface_hub

    before = datasets.config.HF_HUB_OFFLINE
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=_TIMEOUT)
    except huggingface_hub.errors.HfHubHTTPError:
        pass  # it answered; what it answers next is the reason
    except Exception:  # whatever a network can do
        datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
