from __future__ import annotations

import functools
import os
import pickle
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from map_bo.errors import CheckpointError
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from tests.merging.checkpoint_files import tensors_of
from tests.merging.damaged import little_room, refused, written

STATE = {"w": torch.arange(6.0)}


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


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.save(tensors_of(0), tmp_path / "x.pt")
    return tmp_path / "x.pt"


def rezipped(
    path: Path, compression: int, change: Callable[[str, bytes], bytes] = lambda name, data: data
) -> None:
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, change(name, data))


def test_an_archive_packed_again_without_compression_is_read(path: Path) -> None:
    digest = open_checkpoint(path).digest()
    rezipped(path, zipfile.ZIP_STORED)
    assert open_checkpoint(path).digest() == digest


def test_an_archive_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensors_of(0), tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert open_checkpoint(tmp_path / "x.pt").digest() == open_checkpoint(tensors_of(0)).digest()


def test_a_zip_bomb(path: Path) -> None:
    rezipped(
        path,
        zipfile.ZIP_DEFLATED,
        lambda name, data: bytes(50_000_000) if name.endswith("data/0") else data,
    )
    assert path.stat().st_size < 1_000_000
    refused(path, "cannot be read: the record", "is compressed, which torch.save never does")


def test_a_record_of_another_size_than_its_tensor(path: Path) -> None:
    rezipped(
        path,
        zipfile.ZIP_STORED,
        lambda name, data: data[:-8] if name.endswith("data/0") else data,
    )
    refused(path, "tensors and the records of the archive differ in size")


@pytest.mark.parametrize("name", ["data.pkl", "byteorder", "version"])
def test_a_small_record_that_is_damaged(path: Path, name: str) -> None:
    with zipfile.ZipFile(path) as archive:
        record = archive.getinfo(f"x/{name}")
        data = archive.read(record)
    content = bytearray(path.read_bytes())
    content[content.index(data, record.header_offset)] ^= 1
    refused(written(path, bytes(content)), f"the record 'x/{name}' does not have its checksum")


@pytest.mark.parametrize("bit", [1, 2, 4, 8, 16, 32, 64, 128])
def test_a_record_that_is_moved(path: Path, bit: int) -> None:
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("x/data/0").header_offset
    content = bytearray(path.read_bytes())
    content[start + 28] ^= bit  # how long a field is that stands before the data
    refused(written(path, bytes(content)), "cannot be read")


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9, 0.99])
def test_an_archive_that_is_cut_off(path: Path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    refused(path, "it is a zip archive, as torch.save writes, that is cut off")


def test_bytes_before_an_archive_move_its_records_and_bytes_behind_do_not(path: Path) -> None:
    content, digest = path.read_bytes(), open_checkpoint(path).digest()
    assert open_checkpoint(written(path, content + b"more")).digest() == digest
    refused(written(path, b"PK\3\4" + content), "its first record is not where")


def test_a_record_twice(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("x/data/0", b"1234")
    refused(path, "holds the record 'x/data/0' twice")


def test_an_archive_of_something_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("model.safetensors", b"1234")
    refused(tmp_path / "x.pt", "cannot be read")
    with zipfile.ZipFile(tmp_path / "x.pt", "w"):
        pass
    refused(tmp_path / "x.pt", "cannot be read")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_tensor_that_claims_more_than_the_file_holds(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "x.pt"
    small = {"w": torch.ones(1, 3).expand(1000, 3), "v": torch.ones(2)}
    torch.save(small, path, _use_new_zipfile_serialization=zipped)
    assert open_checkpoint(path).read("w", 2999, 3000).tolist() == [1]
    huge = {"w": torch.ones(1).expand(1 << 45), "v": torch.ones(2)}
    torch.save(huge, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"tensor 'w' has 140737488355328 bytes") as caught:
        open_checkpoint(path)
    assert "contiguous" in str(caught.value.hint)


@pytest.mark.parametrize(
    "content",
    [
        {"module": STATE, "ds_config": {}, "global_steps": 5},
        {"state_dict": STATE, "epoch": 3, "optimizer_states": []},
        {"model": {"state_dict": STATE}, "args": {"lr": 0.1}},
        {"model": {"name": "vit"}, "net": STATE},  # settings of that name
        {"ema": STATE, "step": 7},
        {"model": STATE, "ema": {"w": torch.zeros(2)}},  # weights before their averages
        {"my_weights": STATE, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".ckpt"])
def test_training_checkpoints_hold_their_state_dict_somewhere(
    content: dict[str, object], suffix: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / f"a{suffix}")
    opened = open_checkpoint(tmp_path / f"a{suffix}")
    assert opened.names == ("w",)
    assert torch.equal(opened.load("w"), STATE["w"])


def test_two_state_dicts_under_keys_of_their_own_are_refused(tmp_path: Path) -> None:
    torch.save({"generator": STATE, "discriminator": STATE}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="not a state dict of names and tensors"):
        open_checkpoint(tmp_path / "a.pt")
