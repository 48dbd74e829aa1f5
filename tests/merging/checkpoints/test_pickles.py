from __future__ import annotations

import functools
import os
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from map_bo.errors import CheckpointError
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from tests.merging.checkpoint_files import tensors_of
from tests.merging.damaged import little_room, refused


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


class Shell(Evil):
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self.marker}",)


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


def gadget(function: Callable[..., Any], *arguments: Any) -> object:
    """Return an object whose pickle calls a function when it is read."""

    class Gadget:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return function, arguments

    return Gadget()


@pytest.mark.parametrize(
    "call",
    [
        lambda marker: gadget(eval, f"open({str(marker)!r}, 'w')"),
        lambda marker: gadget(exec, f"open({str(marker)!r}, 'w')"),
        lambda marker: gadget(getattr, Path, "touch"),
        lambda marker: gadget(open, str(marker), "w"),
        lambda marker: gadget(__import__, "antigravity"),
        lambda marker: gadget(subprocess.Popen, ["touch", str(marker)]),
        lambda marker: gadget(pickle.loads, pickle.dumps(Evil(marker))),
        lambda marker: gadget(torch.load, str(marker)),
        lambda marker: gadget(torch.hub.load, str(marker), "model"),
        lambda marker: gadget(functools.partial, os.system),
    ],
)
@pytest.mark.parametrize("place", ["state_dict", "beside", "extra state"])
@pytest.mark.parametrize("zipped", [True, False])
def test_ways_to_run_code(
    tmp_path: Path, call: Callable[[Path], object], place: str, zipped: bool
) -> None:
    marker = tmp_path / "ran"
    evil = call(marker)
    weights: dict[str, object] = dict(tensors_of(0))
    content: object
    match place:
        case "state_dict":
            content = {"state_dict": {**weights, "x": evil}}
        case "beside":
            content = {"state_dict": weights, "optimizer": [evil]}
        case _:
            content = {**weights, "layer._extra_state": evil}
    path = tmp_path / "evil.pt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    refused(path, str(path), "was refused", "would run code")
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02" + b"]" * 100_000,
        b"\x80\x02" + b"(" * 200_000 + b".",
        b"\x80\x02X\xff\xff\xff\xffabc",
        b"\x80\x02\x8b\xff\xff\xff\x7f1",
        b"\x80\x02}q\x00(h\x00h\x00u.",
        # Thirty lists, each twice in the next: a thousand million items when they are counted.
        b"\x80\x02]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(30)) + b".",
    ],
)
@pytest.mark.parametrize("suffix", ["pt", "bin"])
def test_pickles_made_to_exhaust_a_reader(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(content)
    with little_room():
        refused(path, str(path))
