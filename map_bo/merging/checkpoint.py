"""Checkpoints: the named tensors of a model, read lazily, whatever they are stored in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from map_bo.errors import CheckpointError
from map_bo.merging.formats import (
    Layout,
    MemoryReader,
    ShardedReader,
    TensorReader,
    open_file,
    raw_bytes,
)
from map_bo.merging.pickles import state_dict

__all__ = ["Checkpoint", "CheckpointSource", "adapter_file", "open_checkpoint"]

# In the order in which they are looked for: safetensors first, and a whole file before shards,
# as transformers does.
_KNOWN_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_CHUNK = 1 << 26


class Checkpoint:
    """The named tensors of a model. Make one with `open_checkpoint`.

    Ties: where several names are one tensor (an embedding shared with the output layer), all
    names are kept and ``ties`` maps each further name (alias) to the canonical one, which is the
    first in the order of the state dict. Ties are known for models and state dicts in memory,
    for ``.pt`` files (shared storage), and for safetensors files whose metadata record them.
    Hugging Face safetensors leave out the aliases without a record: such a checkpoint does not
    have those names at all.

    Tensors of a checkpoint in memory are referenced, not copied: do not write to what ``load``
    returns.

    Attributes:
        source: Readable origin: an absolute path, or what was given in memory.
        directory: The folder, when it is a Hugging Face directory (``config.json`` inside).
    """

    def __init__(self, reader: TensorReader, *, source: str, directory: Path | None) -> None:
        if not reader.layouts:
            raise CheckpointError(
                f"{source} holds no tensors", hint="give the weights of a trained model"
            )
        self._reader = reader
        self.source = source
        self.directory = directory
        self._names = tuple(sorted(reader.layouts))
        self._digest: tuple[object, str] | None = None

    def __repr__(self) -> str:
        return f"Checkpoint({self.source!r}, {len(self._names)} tensors)"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, aliases included, sorted."""
        return self._names

    @property
    def ties(self) -> Mapping[str, str]:
        """Alias -> canonical name; both are in ``names``."""
        return MappingProxyType(dict(self._reader.ties))

    def layout(self, name: str) -> Layout:
        """Return shape and dtype of a tensor without reading it.

        Raises:
            CheckpointError: When there is no tensor of this name.
        """
        try:
            return self._reader.layouts[name]
        except KeyError:
            raise CheckpointError(
                f"{self.source} has no tensor {name!r}", hint="see its .names"
            ) from None

    def shape(self, name: str) -> torch.Size:
        """Return the shape of a tensor without reading it."""
        return self.layout(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor without reading it."""
        return self.layout(name).dtype

    def load(self, name: str) -> Tensor:
        """Read one tensor to the CPU.

        Raises:
            CheckpointError: When there is no tensor of this name or its file cannot be read.
        """
        self.layout(name)
        return self._reader.load(name)

    def digest(self) -> str:
        """Return a SHA-256 over names, dtypes, shapes and bytes of the tensors, sorted by name.

        It does not depend on the file format, the shards or the order: the same weights have the
        same digest. Aliases of tied tensors are left out, since files leave them out too. One
        tensor at a time is read. The result is kept until the tensors or files change.
        """
        version = self._reader.version()
        if self._digest is not None and version is not None and self._digest[0] == version:
            return self._digest[1]
        total = hashlib.sha256()
        for name in self._names:
            if name in self._reader.ties:
                continue
            layout = self._reader.layouts[name]
            dtype = str(layout.dtype).removeprefix("torch.")
            total.update(json.dumps([name, dtype, list(layout.shape)]).encode() + b"\n")
            content = raw_bytes(self.load(name))
            for start in range(0, len(content), _CHUNK):
                total.update(content[start : start + _CHUNK])
        self._digest = (version, total.hexdigest())
        return self._digest[1]


CheckpointSource = nn.Module | Mapping[str, Tensor] | Checkpoint | str | Path
"""What `open_checkpoint` takes."""


def open_checkpoint(source: CheckpointSource) -> Checkpoint:
    """Open the weights of a model; nothing but names, shapes and dtypes is read yet.

    Args:
        source: One of

            - a module or a mapping from names to tensors (referenced, not copied);
            - a checkpoint, returned as it is;
            - a ``.safetensors`` file, or a ``.pt``, ``.pth`` or ``.bin`` file of ``torch.save``,
              read with ``weights_only=True``: a state dict, or a dict that holds one under
              ``state_dict``, ``model_state_dict`` or ``model``;
            - a ``*.index.json`` of a sharded checkpoint;
            - a folder: ``model.safetensors``, its sharded form, ``pytorch_model.bin``, its
              sharded form, or else the only safetensors file or index in it. With a
              ``config.json`` beside the weights it is a Hugging Face directory.

    Raises:
        CheckpointError: For anything that is missing, truncated, damaged, empty, unsafe or of an
            unknown kind; the message names the file and the cause.
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, nn.Module):
        origin = f"{type(source).__name__} in memory"
        tensors = state_dict(source.state_dict(), origin=origin)
        return Checkpoint(MemoryReader(tensors, origin=origin), source=origin, directory=None)
    if isinstance(source, Mapping):
        tensors = state_dict(source, origin="the state dict")
        origin = f"state dict in memory ({len(tensors)} tensors)"
        return Checkpoint(MemoryReader(tensors, origin=origin), source=origin, directory=None)
    if isinstance(source, (str, Path)):
        return _open_path(Path(source).expanduser().absolute())
    raise CheckpointError(
        f"a {type(source).__name__} is not a checkpoint",
        hint="give a path, a module, or a mapping from names to tensors",
    )


def _open_path(path: Path) -> Checkpoint:
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist",
            hint="give a file or folder on this machine; a model of the Hugging Face hub is "
            "downloaded first, for example with `hf download NAME --local-dir DIR`",
        )
    file = _weights_in(path) if path.is_dir() else path
    reader = ShardedReader(file) if file.name.endswith(".index.json") else open_file(file)
    directory = path if path.is_dir() and (path / "config.json").is_file() else None
    return Checkpoint(reader, source=str(path), directory=directory)


def adapter_file(path: Path) -> Path | None:
    """Return the weights of an adapter: the file of that name, or the one in a folder.

    None where there is no such file, and for a folder that holds a whole model too.
    """
    if path.name in _ADAPTER_FILES and path.is_file():
        return path
    if any((path / name).is_file() for name in _KNOWN_FILES):
        return None
    return next((path / name for name in _ADAPTER_FILES if (path / name).is_file()), None)


def _weights_in(folder: Path) -> Path:
    for name in _KNOWN_FILES:
        if (folder / name).is_file():
            return folder / name
    if adapter_file(folder) is not None:
        raise CheckpointError(
            f"{folder} holds an adapter, not the weights of a whole model",
            hint="give it as an expert beside its base, or merge it first (peft: "
            "merge_and_unload, then save_pretrained)",
        )
    for pattern in ("*.safetensors.index.json", "*.safetensors"):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(file.name for file in found[:5])
            raise CheckpointError(
                f"{folder} holds {len(found)} weight files and no model.safetensors: {names}",
                hint="name the one to read",
            )
        if found:
            return found[0]
    raise CheckpointError(
        f"{folder} holds no weights",
        hint=f"expected {', '.join(_KNOWN_FILES)} or one other safetensors file; "
        "name a .pt file directly",
    )
