"""A merged-model problem in a worker: on the worker's device, with rows that processes share."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from map_bo.merging.checkpoints.checkpoint import Checkpoint
from map_bo.merging.checkpoints.tensors import Layout
from map_bo.merging.vectors.storage import Storage
from map_bo.problems.cache import cache_root
from map_bo.problems.rebuilding import Rebuilt

__all__ = ["Placeable"]


class Placeable(Rebuilt):
    """What of a merged-model problem depends on where it is: its device, and where rows are kept.

    Nothing that was loaded moves along: the copies that these methods return load for themselves.
    """

    _without_weights: ClassVar[tuple[str, ...]] = ("model",)
    _base: Checkpoint
    _experts: dict[str, Checkpoint]
    _device: torch.device
    _storage: Storage
    _cache_dir: str | Path | None
    _source: Any
    _model: nn.Module | None = None
    _loaded: Any = None
    _recall: Any = None

    @property
    def device(self) -> torch.device:
        """Where the task vectors and the model live."""
        return self._device

    def on(self, device: torch.device | str) -> Self:
        """Return the same problem on another device.

        A model that was given as a module moves there with the copy's first evaluation, so this
        problem should not be evaluated any more.

        Args:
            device: Such as ``"cuda:0"``.
        """
        made = self._unloaded()
        made._device = torch.device(device)
        if made._device.type != "cpu" and made._storage.cache is not None:
            made._storage = Storage(made._storage.dtype)  # only rows on the CPU can be mapped
        if isinstance(made._source, nn.Module):
            made._source = made._source.to(made._device)
        return made

    def with_mapped_rows(self) -> Self:
        """Return the same problem with rows mapped from one file in the cache.

        Processes that do so have one copy of the task vectors between them; the numbers are those
        of rows in memory. On other devices than the CPU rows cannot be mapped, and the problem
        stays as it is.
        """
        if self._device.type != "cpu" or self._storage.cache is not None:
            return self
        made = self._unloaded()
        folder = cache_root(self._cache_dir) / "rows"
        made._storage = Storage(self._storage.dtype, folder, spare_memory=False)
        return made

    def release(self) -> None:
        """Give back what was loaded; the next evaluation loads it again."""
        self._loaded = self._recall = None
        if not isinstance(self._source, nn.Module):
            self._model = None

    def memory(self) -> int:
        """Return about how many bytes rows and the model take where they live.

        Activations and what operators prepare come on top.
        """
        width = torch.empty((), dtype=self._storage.dtype).element_size()
        layouts = [self._base.layout(name) for name in self._base.names]
        numbers = sum(map(_numbers, layouts))
        rows = 0 if self._storage.cache is not None else len(self._experts) * numbers * width
        return rows + 2 * sum(_numbers(one) * one.dtype.itemsize for one in layouts)

    def _unloaded(self) -> Self:
        made = copy.copy(self)
        made._loaded, made._model, made._recall = None, None, None
        return made


def _numbers(layout: Layout) -> int:
    return torch.Size(layout.shape).numel()
