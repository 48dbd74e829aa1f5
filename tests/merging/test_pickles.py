from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from map_bo.errors import CheckpointError
from map_bo.merging.checkpoint import open_checkpoint
from tests.merging.checkpoints import tensors_of


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


class Shell(Evil):
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self.marker}",)


def refused(source: Any, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source)
    for part in parts:
        assert part in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("evil", [Evil, Shell])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_a_pickle_that_would_run_code(
    tmp_path: Path, zipped: bool, nested: bool, evil: type[Evil]
) -> None:
    marker = tmp_path / "ran"
    content = {**tensors_of(0), "x": evil(marker)} if nested else evil(marker)
    path = tmp_path / "evil.pt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    refused(path, str(path), "was refused", "would run code")
    assert not marker.exists()


def test_a_plain_pickle_that_would_run_code(tmp_path: Path) -> None:
    path = tmp_path / "evil.bin"
    path.write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    refused(path, str(path), "was refused", "plain pickle", "could run code")
    assert not (tmp_path / "ran").exists()


def test_a_whole_pickled_model(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "would run code", "torch.nn.modules.linear.Linear")


def test_something_else_in_a_pt_file(tmp_path: Path) -> None:
    torch.save([torch.ones(2)], tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "holds a list, not a state dict")


def test_a_damaged_pickle_brings_no_advice_to_load_it_unsafely(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(tensors_of(0), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert "weights_only" not in str(caught.value)
