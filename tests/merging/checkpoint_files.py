"""Small checkpoints that the tests of merging share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.export.bounded import merge_linearly
from map_bo.merging.export.model import write_model


def tensors_of(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "first.weight": normal(4, 3),
        "first.bias": normal(4).double(),
        "second.weight": normal(6).to(torch.bfloat16),
        "third.phase": torch.complex(normal(2), normal(2)),
        "third.counter": torch.tensor(seed),
        "third.mask": torch.tensor([True, False, True]),
        "third.none": torch.zeros(0, 2),
        "third.scalar": normal(1)[0],
    }


BASE = open_checkpoint(tensors_of(0))
EXPERTS = {"math": open_checkpoint(tensors_of(1)), "c: #d\n": open_checkpoint(tensors_of(2))}
NAMES = tuple(EXPERTS)
COEFFICIENTS = {NAMES[0]: 0.25, NAMES[1]: -0.5}


def merged(weights: Mapping[str, float] = COEFFICIENTS) -> Iterator[tuple[str, Tensor]]:
    return merge_linearly(BASE, EXPERTS, lambda name: weights)


def export(out: Path, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "tensors": merged(),
        "base": BASE,
        "experts": EXPERTS,
        "operator": {"name": "task_arithmetic", "blocks": None},
        "coefficients": COEFFICIENTS,
    }
    return write_model(out, **{**settings, **changes})


class Tied(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Parameter(torch.randn(5, 3, generator=generator))
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed
