"""Hand-made LoRA adapters over a small base, without peft."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from map_bo.merging.adapters.adapter import AdapterCheckpoint, adapter_checkpoint
from map_bo.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from map_bo.rng import make_generator

SHAPES = {
    "layers.0.fc.weight": (6, 5),
    "layers.0.fc.bias": (6,),
    "layers.0.norm.running_var": (6,),
    "layers.1.fc.weight": (40, 7),
    "layers.1.conv.weight": (4, 3, 2, 2),
    "head.weight": (7, 7),
}


def small_base(dtype: torch.dtype = torch.float32) -> Checkpoint:
    generator = make_generator(0)
    return open_checkpoint(
        {
            name: torch.randn(shape, generator=generator).abs().to(dtype)
            for name, shape in SHAPES.items()
        }
    )


def write_adapter(
    folder: Path,
    shapes: Mapping[str, Sequence[int]],
    *,
    seed: int,
    rank: int = 2,
    modules: Sequence[str] = (),
    values: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write an adapter with random factors of ``modules`` and random changes of ``values``."""
    generator = make_generator(seed)

    def normal(*shape: int) -> Tensor:
        return 0.1 * torch.randn(shape, generator=generator)

    tensors: dict[str, Tensor] = {}
    for module in modules:
        out, *further = shapes[f"{module}.weight"]
        ones = [1] * (len(further) - 1)
        tensors[f"base_model.model.{module}.lora_A.weight"] = normal(rank, *further)
        tensors[f"base_model.model.{module}.lora_B.weight"] = normal(out, rank, *ones)
    for name in values:
        tensors[f"base_model.model.{name}"] = normal(*shapes[name]).abs() + 0.05
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 3, **(settings or {})})
    )
    return folder


def small_adapters(folder: Path, base: Checkpoint) -> dict[str, AdapterCheckpoint]:
    """Return three adapters that overlap in part, with values beside their factors."""
    kinds: dict[str, dict[str, Any]] = {
        "math": {"modules": ["layers.0.fc", "layers.1.fc"], "values": ["layers.0.fc.bias"]},
        "code": {
            "modules": ["layers.1.fc", "head"],
            "values": ["layers.0.norm.running_var", "layers.0.fc.bias"],
            "rank": 3,
        },
        "chat": {"modules": ["layers.1.conv", "head"], "values": ["layers.1.fc.weight"]},
    }
    return {
        name: adapter_checkpoint(
            write_adapter(folder / name, SHAPES, seed=1 + seed, **settings), base
        )
        for seed, (name, settings) in enumerate(kinds.items())
    }


def as_dense(checkpoint: Checkpoint) -> Checkpoint:
    """Return the same model with every tensor multiplied out."""
    return open_checkpoint({name: checkpoint.load(name) for name in checkpoint.names})
