"""Adapters seen as checkpoints: the base with the adapter merged in, one tensor at a time.

So everything that takes a checkpoint takes an adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from map_bo.merging.adapters.adapter import Adapter, open_adapter, wide
from map_bo.merging.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointSource,
    absolute_path,
    adapter_file,
    open_checkpoint,
)
from map_bo.merging.checkpoints.hub import fetch, hub_model
from map_bo.merging.checkpoints.tensors import Layout, buffer_for

__all__ = [
    "AdapterCheckpoint",
    "AdapterReader",
    "adapter_checkpoint",
    "adapter_over",
    "open_expert",
]


class AdapterReader:
    """The tensors of a base with an adapter merged in, one at a time.

    Changed tensors are in float32 (float64 for a base of float64), so that a base in bfloat16
    does not round the change away; the others are the base's as they are.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        base = adapter.base
        changed = set(adapter.names)
        self.ties: Mapping[str, str] = base.ties
        self.layouts: Mapping[str, Layout] = {
            name: Layout(base.shape(name), wide(base.dtype(name)))
            if self.ties.get(name, name) in changed
            else base.layout(name)
            for name in base.names
        }

    def load(self, name: str) -> Tensor:
        """Return one merged tensor."""
        value = self.adapter.base.load(name)
        delta = self.adapter.delta(self.ties.get(name, name))
        if delta is None:
            return value
        dtype = self.layouts[name].dtype
        return (value.to(delta.dtype) + delta).to(dtype)

    def read(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return the elements ``start`` to ``stop`` of one merged tensor, row-major."""
        base = self.adapter.base
        delta = self.adapter.piece(self.ties.get(name, name), start, stop)
        if delta is None:
            return base.read(name, start, stop, out=out)
        merged = base.read(name, start, stop).to(delta.dtype) + delta
        dtype = self.layouts[name].dtype
        return (
            merged.to(dtype) if out is None else buffer_for(stop - start, dtype, out).copy_(merged)
        )

    def version(self) -> object | None:
        """Return the version of the adapter's file: a digest is over its tensors alone."""
        return self.adapter.reader.version()


class AdapterCheckpoint(Checkpoint):
    """An adapter seen as the checkpoint of the model that it makes of its base.

    Its digest is that of the adapter alone; the base has its own. It has no ``directory``, since
    its folder is no model.

    Attributes:
        adapter: The adapter.
    """

    def __init__(self, adapter: Adapter) -> None:
        super().__init__(AdapterReader(adapter), source=adapter.source, directory=None)
        self.adapter = adapter

    def digest(self) -> str:
        """Return the digest of the adapter's own tensors; see `Adapter.digest`."""
        version = self._reader.version()
        if self._digest is None or version is None or self._digest[0] != version:
            self._digest = (version, self.adapter.digest())
        return self._digest[1]


def adapter_checkpoint(source: str | Path, base: Checkpoint) -> AdapterCheckpoint:
    """Open a PEFT LoRA adapter as the checkpoint of its base with it merged in.

    Raises:
        CheckpointError: When files are missing or damaged, or the adapter is not plain LoRA.
        MergeError: When it does not fit the base.
    """
    return AdapterCheckpoint(open_adapter(source, base))


def adapter_over(base: Checkpoint, expert: Checkpoint) -> Adapter | None:
    """Return the adapter over this very base that an expert is, or None where it is none."""
    if isinstance(expert, AdapterCheckpoint) and expert.adapter.base is base:
        return expert.adapter
    return None


def open_expert(source: CheckpointSource, base: Checkpoint) -> Checkpoint:
    """Open an expert: whatever `open_checkpoint` takes, or a LoRA adapter's folder or hub name.

    Args:
        source: Where the expert is.
        base: The base, which an adapter is added to.

    Raises:
        CheckpointError: When it cannot be read.
        MergeError: When an adapter does not fit the base.
    """
    if isinstance(source, str) and (model := hub_model(source)) is not None:
        snapshot = fetch(model)
        if adapter_file(snapshot.folder) is not None:
            return AdapterCheckpoint(open_adapter(snapshot.folder, base, label=snapshot.source))
    elif isinstance(source, (str, Path)):
        path = absolute_path(source)
        if adapter_file(path) is not None:
            return adapter_checkpoint(path, base)
    return open_checkpoint(source)
