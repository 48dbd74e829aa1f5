"""Statistics of an expert on data: computed once, kept in a file, and tied to that expert.

A file is safetensors: a tensor for each tensor of the model that has one, and in the metadata what
was computed, from which weights (their digest), on what and on how many examples.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError, safe_open
from torch import Tensor

from map_bo.errors import CheckpointError, MergeError, first_line, listed
from map_bo.foreign import parse_json, understood
from map_bo.merging.checkpoints.checkpoint import Checkpoint, CheckpointSource, open_checkpoint
from map_bo.merging.checkpoints.safetensors_files import SafetensorsWriter
from map_bo.merging.checkpoints.tensors import all_finite

__all__ = [
    "Statistics",
    "StatisticsSource",
    "cached_statistics",
    "load_statistics",
    "save_statistics",
    "statistics_of",
]

KINDS = {
    "fisher": "diagonal Fisher information",
    "grams": "inner products of layer inputs",
    "merged_grams": "inner products of layer inputs in the merged model",
}
_KEY = "map_bo.statistics"
_VERSION = 1


@dataclass(frozen=True, eq=False)
class Statistics:
    """What was computed for one expert on data. Made by `fisher` and `grams`, or read from a file.

    Attributes:
        kind: ``"fisher"``, ``"grams"`` or ``"merged_grams"``.
        tensors: A tensor for each tensor of the model that has one, under its name; read lazily
            where they come from a file.
        model: Digest of the expert's weights (`Checkpoint.digest`); empty where it is not known.
        examples: Number of examples behind them.
        settings: How they were computed, as plain data.
        data: What the user calls the data.
        ties: Alias -> the name in ``tensors``, for tensors of several names.
    """

    kind: str
    tensors: Checkpoint
    model: str = ""
    examples: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    data: str = ""
    ties: Mapping[str, str] = field(default_factory=dict)
    _content: str = field(default="", repr=False)

    def find(self, name: str) -> str | None:
        """Return under which name the tensor ``name`` of the model has a statistic, or None."""
        if name in self.tensors.names:
            return name
        known = self.ties.get(name, name)
        group = {known} | {alias for alias, kept in self.ties.items() if kept == known}
        return next(iter(sorted(group & set(self.tensors.names))), None)

    def content(self) -> str:
        """Return a digest of the tensors; of a file, the one that was recorded when it was made."""
        return self._content or self.tensors.digest()

    def describe(self) -> dict[str, Any]:
        """Return plain data that tell these statistics from others."""
        return {
            "kind": self.kind,
            "model": self.model,
            "examples": self.examples,
            "settings": dict(self.settings),
            "data": self.data,
            "content": self.content(),
        }

    def check(
        self, *, kind: str | None = None, model: str | None = None, data: str | None = None
    ) -> Statistics:
        """Return these statistics, if they are what is wanted.

        Args:
            kind: The kind that is needed.
            model: Digest of the expert that they must belong to.
            data: What the data must be called.

        Raises:
            MergeError: On the first thing that differs.
        """
        source = self.tensors.source
        if kind is not None and kind != self.kind:
            raise MergeError(
                f"{source} holds {KINDS.get(self.kind, self.kind)}; {KINDS[kind]} are needed",
                hint="Fisher takes what `fisher` returns, RegMean what `grams` returns, and "
                "RegMean++ what `merged_grams` returns",
            )
        if model and self.model and model != self.model:
            raise MergeError(
                f"{source} was computed for another model: its weights have the digest "
                f"{self.model[:12]}..., those of this expert have {model[:12]}...",
                hint="compute the statistics again; where the weights are the same in another "
                "dtype or under other names, give `of=CHECKPOINT` when computing them",
            )
        if data is not None and data != self.data:
            raise MergeError(
                f"{source} was computed on {self.data!r}, not on {data!r}",
                hint="remove the file, or choose another one for these data",
            )
        return self


StatisticsSource = str | Path | Statistics | Mapping[str, Tensor]
"""Where statistics come from: a file, what `fisher` or `grams` returned, or bare tensors."""


def statistics_of(source: StatisticsSource, kind: str) -> Statistics:
    """Return the statistics of a source.

    Args:
        source: A path, statistics, or a mapping from tensor names to tensors.
        kind: The kind that is needed.

    Raises:
        CheckpointError: When a file cannot be read.
        MergeError: When it is of another kind.
    """
    if isinstance(source, Statistics):
        return source.check(kind=kind)
    if isinstance(source, (str, Path)):
        return load_statistics(source, kind=kind)
    if isinstance(source, Mapping) and source:
        return Statistics(kind, open_checkpoint(source))
    raise MergeError(
        f"a {type(source).__name__} is not the statistics of an expert",
        hint="give the path of a file that `save_statistics` wrote, or what `fisher` or `grams` "
        "returned",
    )


def finish_statistics(
    kind: str,
    tensors: Mapping[str, Tensor],
    *,
    model: str,
    examples: int,
    settings: Mapping[str, Any],
    data: str,
    ties: Mapping[str, str],
) -> Statistics:
    """Return statistics that were just computed, checked.

    Raises:
        MergeError: When there were no examples, or a tensor holds NaN or infinity.
    """
    if not examples:
        raise MergeError(
            "there were no batches to compute statistics on",
            hint="give at least one; an iterator that was used up before gives none",
        )
    bad = [name for name, tensor in tensors.items() if not all_finite(tensor)]
    if bad:
        raise MergeError(
            f"{KINDS[kind]} hold NaN or infinity in {listed(bad)}",
            hint="look for NaN in the data and the weights; a model in float16 may overflow: "
            "compute in float32",
        )
    return Statistics(
        kind,
        open_checkpoint({name: tensor.cpu() for name, tensor in tensors.items()}),
        model=model,
        examples=examples,
        settings=dict(settings),
        data=data,
        ties=dict(ties),
    )


def save_statistics(path: str | Path, statistics: Statistics) -> Path:
    """Write statistics to ``path`` in one step: the file is there complete, or not at all.

    Returns:
        The absolute path.

    Raises:
        CheckpointError: When it cannot be written, or its suffix is not ``.safetensors``.
    """
    target = Path(path).expanduser().absolute()
    if target.suffix != ".safetensors":
        raise CheckpointError(
            f"{target} does not end in .safetensors", hint="statistics are kept in safetensors"
        )
    tensors = statistics.tensors
    record = {"version": _VERSION, **statistics.describe(), "ties": dict(statistics.ties)}
    scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        writer = SafetensorsWriter(
            scratch,
            {name: tensors.layout(name) for name in tensors.names},
            {_KEY: json.dumps(record, sort_keys=True)},
        )
        for name in tensors.names:
            writer.write(name, tensors.load(name))
        _sync(scratch)
        scratch.replace(target)
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be written: {error.strerror or error}",
            hint="free some space, or choose a folder that can be written to",
        ) from error
    finally:
        with suppress(OSError):  # also where its folder is none
            scratch.unlink()
    return target


def load_statistics(
    path: str | Path,
    *,
    kind: str | None = None,
    model: CheckpointSource | None = None,
    data: str | None = None,
) -> Statistics:
    """Open the statistics in ``path``; tensors are read when they are needed.

    Args:
        path: A file that `save_statistics` wrote.
        kind: The kind that is needed: ``"fisher"``, ``"grams"`` or ``"merged_grams"``.
        model: The expert that they must belong to; its weights are read once, for their digest.
        data: What the data must be called.

    Raises:
        CheckpointError: When the file is missing, damaged, or holds no statistics.
        MergeError: When they are of another kind, expert or data; the message says which.
    """
    tensors = open_checkpoint(path)
    record = _record(Path(tensors.source))
    if record is None:
        raise CheckpointError(
            f"{path} holds no statistics of an expert",
            hint="make such files with `save_statistics`, from what `fisher` or `grams` returns",
        )
    with understood(CheckpointError, str(path), hint="compute the statistics again"):
        found = Statistics(
            record["kind"],
            tensors,
            model=record["model"],
            examples=record["examples"],
            settings=record["settings"],
            data=record["data"],
            ties=record["ties"],
            _content=record["content"],
        )
    return found.check(
        kind=kind, model=None if model is None else open_checkpoint(model).digest(), data=data
    )


def cached_statistics(
    path: str | Path,
    make: Callable[[], Statistics],
    *,
    kind: str | None = None,
    model: CheckpointSource | None = None,
    data: str | None = None,
) -> Statistics:
    """Return the statistics in ``path``; make and keep them there when there are none.

    Two processes may ask at once: one makes them, the other waits for it. A damaged file is made
    again. One of another kind, expert or data is left alone and refused.

    Args:
        path: The file, ending in ``.safetensors``.
        make: Computes them, such as ``lambda: fisher(model, loader)``.
        kind: As for `load_statistics`, for what is found and what is made.
        model: As for `load_statistics`.
        data: As for `load_statistics`.

    Raises:
        CheckpointError: When the file cannot be written.
        MergeError: When what is found or made is of another kind, expert or data.
    """
    target = Path(path).expanduser().absolute()
    if not _usable(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(target.with_name(f".{target.name}.lock")):
                if not _usable(target):  # another process may have made it meanwhile
                    digest = None if model is None else open_checkpoint(model).digest()
                    made = make().check(kind=kind, model=digest, data=data)
                    save_statistics(target, made)
        except OSError as error:
            raise CheckpointError(
                f"{target} cannot be written: {error.strerror or error}",
                hint="choose a folder that can be written to",
            ) from error
    return load_statistics(target, kind=kind, model=model, data=data)


def _usable(path: Path) -> bool:
    """Return whether the file is there and whole; one that holds no statistics is the user's."""
    if not path.is_file():
        return False
    try:
        open_checkpoint(path)
    except CheckpointError:
        return False
    return True


def _record(path: Path) -> dict[str, Any] | None:
    try:
        with safe_open(str(path), framework="pt") as file:
            record = parse_json((file.metadata() or {}).get(_KEY, "null"))
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error
    version = record.get("version") if isinstance(record, dict) else None
    if record is not None and version != _VERSION:
        raise CheckpointError(
            f"{path} has statistics of version {version}; this is {_VERSION}",
            hint="compute them again",
        )
    return record  # type: ignore[no-any-return]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
