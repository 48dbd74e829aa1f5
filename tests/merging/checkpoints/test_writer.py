from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from map_bo.merging.checkpoints.safetensors_files import SafetensorsWriter, shard_layouts
from map_bo.merging.checkpoints.tensors import Layout

TENSORS = {
    "a": torch.arange(7, dtype=torch.int8),
    "b": torch.randn(4, 5, generator=torch.Generator().manual_seed(0)),
    "c": torch.ones(3, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 2),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
}


def layouts(tensors: dict[str, Tensor] = TENSORS) -> dict[str, Layout]:
    return {name: Layout(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def test_pieces_in_any_order_are_the_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    writer = SafetensorsWriter(path, layouts(), {"format": "pt"})
    for name in reversed(list(TENSORS)):
        flat = TENSORS[name].flatten()
        for start in reversed(range(0, len(flat), 3)):
            writer.write_piece(name, start, flat[start : start + 3])
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert torch.equal(found[name], value)


def test_short_writes_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, content, at: real(fd, bytes(content[:3]), at))
    writer = SafetensorsWriter(tmp_path / "x.safetensors", layouts(), {})
    for name, value in TENSORS.items():
        writer.write(name, value)
    assert torch.equal(load_file(tmp_path / "x.safetensors")["b"], TENSORS["b"])


@pytest.fixture
def few_handles() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(used + 20, before[0]), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("few_handles")
def test_more_files_than_handles(tmp_path: Path) -> None:
    writers = [SafetensorsWriter(tmp_path / f"{i}.safetensors", layouts(), {}) for i in range(100)]
    for writer in writers:
        for name, value in TENSORS.items():
            writer.write(name, value)
    assert torch.equal(load_file(tmp_path / "99.safetensors")["b"], TENSORS["b"])


@given(
    sizes=st.lists(st.integers(0, 50), min_size=1, max_size=20),
    limit=st.integers(1, 200),
)
def test_shards_hold_every_tensor_once_within_the_limit(sizes: list[int], limit: int) -> None:
    known = {f"{i:02d}": Layout(torch.Size([n]), torch.float32) for i, n in enumerate(sizes)}
    groups = list(shard_layouts(known, limit))
    assert [name for group in groups for name in group] == sorted(known)
    for group in groups:
        assert len(group) == 1 or sum(layout.nbytes for layout in group.values()) <= limit
