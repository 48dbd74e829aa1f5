"""Reading weights from disk: one file, by its suffix, or several that an index joins."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from torch import Tensor

from map_bo.errors import CheckpointError, first_line, listed
from map_bo.merging.checkpoints.pickles import PickleReader
from map_bo.merging.checkpoints.positioned_reads import (
    GGUF_HINT,
    HEAD_BYTES,
    WeightFile,
    appearance,
)
from map_bo.merging.checkpoints.safetensors_files import (
    HEADER_LIMIT,
    SafetensorsReader,
    strict_json,
)
from map_bo.merging.checkpoints.tensors import Layout, TensorReader, name_problem

__all__ = ["ShardedReader", "open_file", "require_inside"]

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")

_HINT = "an index is JSON with a 'weight_map' from tensor names to files beside it"


def open_file(path: Path) -> TensorReader:
    """Return the reader for one weight file, by its suffix.

    Raises:
        CheckpointError: For an unknown suffix, and whatever the reader refuses.
    """
    if path.suffix == ".safetensors":
        return SafetensorsReader(path)
    if path.suffix in PICKLE_SUFFIXES:
        return PickleReader(path)
    if path.suffix.lower() == ".gguf":
        raise CheckpointError(
            f"{path} is a GGUF file, whose weights cannot be merged", hint=GGUF_HINT
        )
    raise CheckpointError(
        f"{path} has the unknown suffix {path.suffix!r}",
        hint="known are .safetensors, .pt, .pth, .bin, .ckpt, a *.index.json, or a folder with "
        "them",
    )


class ShardedReader:
    """Several files joined by an index; a shard's tensors are read only when they are asked for.

    Each shard is a file in the index's own folder. A link may not lead out of it, except in the
    cache of the Hugging Face hub, where a snapshot links to the blobs of the same cache.

    Raises:
        CheckpointError: When the index is malformed, or names a missing tensor or a file that is
            missing, leads elsewhere or is none; when a shard holds tensors that the index lacks.
    """

    def __init__(self, index: Path) -> None:
        self.index = index
        weight_map = _weight_map(index)
        shards: dict[str, TensorReader] = {}
        for shard in sorted(set(weight_map.values())):
            path = index.parent / shard
            if not os.path.lexists(path):
                raise CheckpointError(
                    f"{index} names the shard {shard!r}, which is missing from {index.parent}",
                    hint="the download or copy is incomplete; fetch the missing file",
                )
            require_inside(path)
            shards[shard] = open_file(path)
        home: dict[str, TensorReader] = {}
        ties: dict[str, str] = {}
        for name, shard in weight_map.items():
            if name not in shards[shard].layouts:
                raise CheckpointError(
                    f"{index} says that tensor {name!r} is in {shard!r}, which does not hold it",
                    hint="index and shards are of different checkpoints; fetch both again",
                )
            home[name] = shards[shard]
        for shard, reader in shards.items():
            unnamed = [n for n in reader.layouts if n not in home and n not in reader.ties]
            if unnamed:
                raise CheckpointError(
                    f"{index.parent / shard} holds tensors that {index.name} does not name: "
                    f"{listed(sorted(unnamed))}",
                    hint="index and shards are of different checkpoints; fetch both again",
                )
            for alias, kept in reader.ties.items():
                if kept in home and home.setdefault(alias, reader) is reader:
                    ties[alias] = kept
        self._home = home
        self._shards = tuple(shards.values())
        self.layouts: Mapping[str, Layout] = {n: r.layouts[n] for n, r in home.items()}
        self.ties: Mapping[str, str] = ties

    def load(self, name: str) -> Tensor:
        """Read one tensor from its shard."""
        return self._home[name].load(name)

    def read(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Read the elements from ``start`` to ``stop`` of a tensor from its shard."""
        return self._home[name].read(name, start, stop, out)

    def version(self) -> object | None:
        """Return the versions of all shards; None when that of one cannot be told."""
        versions = tuple(shard.version() for shard in self._shards)
        return None if None in versions else versions


def _weight_map(index: Path) -> dict[str, str]:
    file = WeightFile(index)
    if file.size > HEADER_LIMIT:
        raise CheckpointError(
            f"{index} must have at most {HEADER_LIMIT} bytes, got {file.size}", hint=_HINT
        )
    text = file.read(0, file.size)
    try:
        content = strict_json(text)
    except ValueError as error:
        seen = appearance(text[:HEAD_BYTES])
        if seen is not None and seen.kind != "json":
            raise CheckpointError(
                f"{index} cannot be read: by its beginning it is {seen.what}, not an index",
                hint=seen.hint,
            ) from error
        raise CheckpointError(f"{index} cannot be read: {first_line(error)}", hint=_HINT) from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} holds no usable weight_map", hint=_HINT)
    for name, shard in weight_map.items():
        problem = _shard_problem(shard)
        if problem is not None:
            raise CheckpointError(
                f"{index} holds no usable weight_map: the file of tensor {name[:200]!r} {problem}",
                hint=_HINT,
            )
    return weight_map


def _shard_problem(shard: object) -> str | None:
    """Return why a shard is not a plain name: an index must not lead out of its own folder."""
    if not isinstance(shard, str):
        return f"is a {type(shard).__name__}, not a name"
    shown = ascii(shard[:200])
    if "/" in shard or "\\" in shard or shard in {".", ".."}:
        return f"is {shown}, which leads out of the folder"
    return (
        None
        if name_problem(shard) is None and len(shard) <= 255
        else f"is {shown}, not a file name"
    )


def require_inside(path: Path, root: Path | None = None) -> None:
    """Refuse a file that links lead out of its model's folder, and of the hub cache around it.

    Links of links are followed, and so are those of the folders between.

    Args:
        path: The file; it need not exist.
        root: The folder that it must be in, which may be a link itself; by default the file's own.

    Raises:
        CheckpointError: When it is elsewhere, or cannot be followed.
    """
    if root is None and not path.is_symlink():
        return
    try:
        folder, real = (root or path.parent).resolve(strict=True), path.resolve()
    except (OSError, RuntimeError) as error:
        _refuse_link(path, first_line(error), error)
    if not any(real.is_relative_to(root) for root in (folder, *_blobs_around(folder))):
        _refuse_link(path, f"it is a link out of the model's folder, to {real}")


def _refuse_link(path: Path, why: str, cause: Exception | None = None) -> NoReturn:
    raise CheckpointError(
        f"{path} was refused: {why}",
        hint="copy the file to where the link is, or give the folder that really holds the weights",
    ) from cause


def _blobs_around(folder: Path) -> list[Path]:
    """Return where the links of a hub snapshot may lead.

    The cache is ``CACHE/models--ORG--NAME/snapshots/COMMIT`` with links to
    ``CACHE/models--ORG--NAME/blobs``, whose entries may be links to ``CACHE/blobs``.
    """
    for parent in (folder, *folder.parents):
        repository = parent.parent.parent
        if parent.parent.name == "snapshots" and repository.name.startswith("models--"):
            return [(repository / "blobs").resolve(), (repository.parent / "blobs").resolve()]
    return []
