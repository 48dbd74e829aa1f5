"""Synthetic models to merge: task vectors in memory, and folders of checkpoints on disk.

Every number is drawn, none repeated: thresholds of magnitudes would else meet ties that no real
model has.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Generator, Tensor

from benchmarks.speed.merge_part import dtype_name
from benchmarks.speed.merge_shapes import LlamaShape
from map_bo.merging.align.layout import FlatLayout
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.vectors.parallel import parallel_for
from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.rng import make_generator

__all__ = ["Folders", "coefficients", "layout_of", "resident", "tensors", "write_folders"]

_BASE, _CHANGE = 0.02, 0.002  # standard deviations of weights and of what training changed
_PIECE = 1 << 20


def coefficients(experts: int, turn: int = 0) -> Tensor:
    """Return ``N`` coefficients that differ between experts and from turn to turn."""
    c = torch.linspace(0.1, 0.8, experts, dtype=torch.float64) if experts > 1 else torch.ones(1)
    return c.double() * (1 - 0.01 * turn)


def layout_of(shape: LlamaShape, dtype: torch.dtype) -> FlatLayout:
    """Return the layout that task vectors of such models have."""
    meta = {name: torch.empty(size, dtype=dtype) for name, size in shape.tensors().items()}
    return FlatLayout.of(open_checkpoint(meta), {})


def resident(shape: LlamaShape, experts: int, dtype: torch.dtype) -> TaskVectors:
    """Return a base and task vectors of random numbers, laid out as `TaskVectors.load` does.

    What was changed differs in size between tensors, by a factor of 4 at most.
    """
    layout = layout_of(shape, dtype)
    rows = torch.zeros(1 + experts, layout.size, dtype=dtype)

    def fill(index: int, _: None) -> None:
        generator = make_generator(index)
        for number, slot in enumerate(layout.slots):
            scale = _CHANGE * 2.0 ** (number % 5 / 2 - 1) if index else _BASE
            _fill(rows[index, slot.offset : slot.stop], scale, generator)

    parallel_for(fill, range(1 + experts), lambda: None)
    return TaskVectors(tuple(f"e{i}" for i in range(experts)), layout, rows)


def tensors(vectors: TaskVectors, flat: Tensor) -> dict[str, Tensor]:
    """Return name -> view of a flat tensor (``P``)."""
    return {slot.name: slot.of(flat) for slot in vectors.layout.slots}


def _fill(target: Tensor, scale: float, generator: Generator) -> None:
    for start in range(0, len(target), _PIECE):
        piece = target[start : start + _PIECE]
        drawn = torch.empty(len(piece)).normal_(0.0, scale, generator=generator)
        piece.copy_(drawn)


@dataclass(frozen=True)
class Folders:
    """Checkpoints on disk.

    Attributes:
        base: Folder of the base.
        experts: Name -> folder.
        nbytes: Bytes of the weights of one of them.
    """

    base: Path
    experts: dict[str, Path]
    nbytes: int

    @property
    def files(self) -> list[Path]:
        """All files of weights, those of the base first."""
        found: list[Path] = []
        for folder in (self.base, *self.experts.values()):
            found += sorted(folder.glob("*.safetensors"))
        return found


def write_folders(
    folder: Path, shape: LlamaShape, experts: int, dtype: torch.dtype, *, shards: int
) -> Folders:
    """Write a base and experts as Hugging Face folders, shard by shard.

    At most one shard of every model is in memory.
    """
    names = ["base", *(f"e{i}" for i in range(experts))]
    generators = [make_generator(100 + i) for i in range(len(names))]
    for name in names:
        (folder / name).mkdir()
        config = json.dumps(shape.config(dtype_name(dtype)), indent=1)
        (folder / name / "config.json").write_text(config)
    groups = _groups(shape, shards)
    index = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        index.update(dict.fromkeys(group, file))
        base = {name: torch.empty(size, dtype=dtype) for name, size in group.items()}
        for tensor in base.values():
            _fill(tensor.view(-1), _BASE, generators[0])
        save_file(base, folder / "base" / file, metadata={"format": "pt"})

        def write(
            model: int,
            _: None,
            base: dict[str, Tensor] = base,
            file: str = file,
        ) -> None:
            tuned = {}
            for name, tensor in base.items():
                change = torch.empty_like(tensor, dtype=torch.float32)
                _fill(change.view(-1), _CHANGE, generators[model])
                tuned[name] = change.add_(tensor).to(dtype)
            save_file(tuned, folder / names[model] / file, metadata={"format": "pt"})

        parallel_for(write, range(1, len(names)), lambda: None)
    nbytes = shape.parameters * dtype.itemsize
    text = json.dumps({"metadata": {"total_size": nbytes}, "weight_map": index})
    for name in names:
        (folder / name / "model.safetensors.index.json").write_text(text)
    return Folders(folder / "base", {name: folder / name for name in names[1:]}, nbytes)


def _groups(shape: LlamaShape, shards: int) -> list[dict[str, tuple[int, ...]]]:
    """Cut the tensors, in their order, into shards of about one size."""
    sizes = shape.tensors()
    each, groups, filled = shape.parameters / shards, [dict[str, tuple[int, ...]]()], 0
    for name, size in sizes.items():
        if filled >= each * len(groups):
            groups.append({})
        groups[-1][name] = size
        filled += torch.Size(size).numel()
    return groups
