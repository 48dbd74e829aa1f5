"""Checkpoints in files with all that makes merging by pieces hard, and how to merge them whole."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from map_bo.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from map_bo.merging.vectors.operator import Deltas, MergeOperator
from map_bo.rng import child, make_generator

EXPERTS = ("math", "code", "chat")
BLOCKS = {"layers": r"^block\.", "rest": "*"}
SHAPES: Mapping[str, tuple[int, ...]] = {
    "block.0.conv.weight": (5, 4, 3, 3),
    "block.0.norm.running_mean": (5,),
    "block.0.norm.running_var": (5,),
    "block.1.fc.bias": (30,),
    "block.1.fc.weight": (30, 33),
    "embed.weight": (41, 12),
    "empty": (0,),
    "hollow": (3, 0),
    "one": (1, 1),
    "scalar": (),
}


def hard_tensors(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return the tensors of ``"base"`` or of an expert, with a counter, a table and a mask."""
    root = make_generator(0)
    pre = {key: torch.randn(shape, generator=root) for key, shape in SHAPES.items()}
    generator = child(root, name)
    change = {key: 0.3 * torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}
    tensors: dict[str, Tensor] = {}
    for key, value in pre.items():
        value = value if name == "base" else value + change[key]
        if key.endswith("running_var"):
            value = value.abs() + 0.2
        tensors[key] = value.to(dtype)
    return {
        **tensors,
        "block.0.norm.num_batches_tracked": torch.tensor(10 + len(name)),
        "mask": torch.tensor([True, False, True]),
        "table": torch.arange(6),
    }


def saved(folder: Path, tensors: Mapping[str, Tensor], *, shards: int = 1) -> Path:
    """Write tensors to a new folder: one file, or so many with their index."""
    folder.mkdir(parents=True)
    parts = {name: value.contiguous() for name, value in tensors.items()}
    if shards == 1:
        save_file(parts, folder / "model.safetensors")
        return folder
    home: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        mine = {name: parts[name] for name in sorted(parts)[i::shards]}
        save_file(mine, folder / file)
        home |= dict.fromkeys(mine, file)
    index = {"metadata": {}, "weight_map": home}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def hard_family(
    folder: Path,
    base: torch.dtype = torch.float32,
    experts: torch.dtype | tuple[torch.dtype, ...] = torch.float32,
    *,
    shards: int = 1,
) -> tuple[Path, dict[str, Path]]:
    """Write a base and its experts into folders and return those."""
    kinds = experts if isinstance(experts, tuple) else (experts,) * len(EXPERTS)
    return saved(folder / "base", hard_tensors("base", base), shards=shards), {
        name: saved(folder / name, hard_tensors(name, kind), shards=shards)
        for name, kind in zip(EXPERTS, kinds, strict=True)
    }


def whole(operator: MergeOperator, deltas: Deltas, c: Tensor) -> dict[str, Tensor]:
    """Return the merge of floating tensors in float32."""
    flat = torch.full((deltas.layout.size,), torch.nan)
    operator.prepare(deltas).write(c, flat)
    return {slot.name: slot.of(flat) for slot in deltas.layout.slots}


def opened(base: Path, experts: Mapping[str, Path]) -> tuple[Checkpoint, dict[str, Checkpoint]]:
    """Open a base and its experts."""
    return open_checkpoint(base), {name: open_checkpoint(path) for name, path in experts.items()}


def loaded(checkpoint: Checkpoint | Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint."""
    known = open_checkpoint(checkpoint)
    return {name: known.load(name) for name in known.names}


def everything(folder: Path) -> list[str]:
    """Return the names of all that is in a folder, hidden things and folders included."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch, and so merging, use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
