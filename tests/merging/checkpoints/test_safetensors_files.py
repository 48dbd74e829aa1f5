from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.checkpoints.safetensors_files import SafetensorsWriter, shard_layouts
from map_bo.merging.checkpoints.tensors import Layout
from tests.merging.damaged import DATA, GOOD, refused, safetensors_bytes, written


def changed(**entry: Any) -> dict[str, Any]:
    return {**GOOD, "b": {**GOOD["b"], **entry}}


def test_a_file_made_by_hand_is_read(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt", "odd\nnote": "a", "c": "a", "d": "?"}, **GOOD}
    checkpoint = open_checkpoint(written(tmp_path / "x.safetensors", safetensors_bytes(header)))
    # Only an entry whose value is a tensor's name, and whose key could be one, is an alias.
    assert checkpoint.names == ("a", "b", "c")
    assert checkpoint.ties == {"c": "a"}
    assert checkpoint.load("b").view(torch.uint8).flatten().tolist() == list(DATA[8:])
    assert torch.equal(checkpoint.load("c"), checkpoint.load("a"))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "an empty file"),
        (b"\x10\0\0", "ends after 3 bytes"),
        (safetensors_bytes(GOOD, length=0), "said to have 0 bytes"),
        (safetensors_bytes(GOOD, length=10_000), "said to have 10000 bytes, and the file has"),
        (safetensors_bytes(GOOD, length=1 << 63), "said to have 9223372036854775808 bytes"),
        (safetensors_bytes(b"[1, 2]"), "does not begin with an opening brace"),
        (safetensors_bytes(b" {}"), "does not begin with an opening brace"),
        (safetensors_bytes(b'{"a": }'), "its header is not JSON"),
        (safetensors_bytes(b'{"a": \xff}'), "its header is not JSON"),
        (safetensors_bytes(b'{"a": NaN}'), "NaN is not JSON"),
        (safetensors_bytes(b'{"a":' + b"[" * 100_000), "nested too deeply"),
        (safetensors_bytes(b'{"a":' + b"9" * 10_000 + b"}"), "its header is not JSON"),
        (
            safetensors_bytes(b'{"a":' + json.dumps(GOOD["a"]).encode() + b',"a":{}}', DATA[:8]),
            "it has the key 'a' twice",
        ),
        (
            safetensors_bytes(b'{"a":{"dtype":"F32","dtype":"F64","shape":[2]}}', DATA[:8]),
            "it has the key 'dtype' twice",
        ),
        (safetensors_bytes({"__metadata__": [], **GOOD}), "metadata are not a map"),
        (safetensors_bytes({"__metadata__": {"a": {"b": "c"}}, **GOOD}), "metadata are not a map"),
        (safetensors_bytes({"a": 3}), "tensor 'a' is not described by"),
        (safetensors_bytes(changed(more=1)), "tensor 'b' is not described by"),
        (safetensors_bytes(changed(dtype=3)), "the dtype of tensor 'b' is not text"),
        (safetensors_bytes(changed(shape="22")), "the shape of tensor 'b'"),
        (safetensors_bytes(changed(shape=[2, -2])), "the shape of tensor 'b'"),
        (safetensors_bytes(changed(shape=[2, 2.0])), "the shape of tensor 'b'"),
        (safetensors_bytes(changed(shape=[2, True])), "the shape of tensor 'b'"),
        (safetensors_bytes(changed(shape=[1 << 32, 1 << 32])), "larger than any tensor"),
        # (2^62 + 1) * 4 elements of 2 bytes are 8 bytes in 64-bit arithmetic.
        (safetensors_bytes(changed(shape=[(1 << 62) + 1, 4])), "larger than any tensor"),
        (
            safetensors_bytes(changed(shape=[0, 1 << 63], data_offsets=[8, 8]), DATA[:8]),
            "larger than any tensor",
        ),
        (safetensors_bytes(changed(shape=[2, 3])), "needs 12 bytes for its shape and dtype"),
        (safetensors_bytes(changed(dtype="F64")), "needs 32 bytes for its shape and dtype"),
        (safetensors_bytes(changed(data_offsets=[8])), "the offsets of tensor 'b'"),
        (safetensors_bytes(changed(data_offsets=[16, 8])), "the offsets of tensor 'b'"),
        (safetensors_bytes(changed(data_offsets=[-8, 0])), "the offsets of tensor 'b'"),
        (safetensors_bytes(changed(data_offsets=[4, 12])), "begins before the one before it ends"),
        (safetensors_bytes(changed(data_offsets=[0, 8])), "begins before the one before it ends"),
        (safetensors_bytes(changed(data_offsets=[10, 18]), DATA + b"--"), "leaves a hole"),
        (safetensors_bytes(changed(data_offsets=[1 << 40, (1 << 40) + 8])), "leaves a hole"),
        (safetensors_bytes(GOOD, DATA[:-1]), "need 16 bytes, and 15 follow the header"),
        (safetensors_bytes(GOOD, DATA + b"-"), "1 bytes follow its last tensor"),
    ],
)
def test_a_wrong_header_is_told(tmp_path: Path, content: bytes, part: str) -> None:
    path = written(tmp_path / "x.safetensors", content)
    refused(path, str(path), "cannot be read: ", part)


@pytest.mark.parametrize(("dtype", "hint"), [("F4", "quantised"), ("Q7", "one of F64")])
def test_a_dtype_without_a_meaning_here(tmp_path: Path, dtype: str, hint: str) -> None:
    path = written(tmp_path / "x.safetensors", safetensors_bytes(changed(dtype=dtype)))
    assert hint in str(refused(path, f"has the dtype {dtype}").hint)


def test_a_header_above_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little") + b"{")
        file.truncate(300_000_000)
    refused(path, "100000000 are the most allowed")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", "is empty"),
        ("a\0b", r"holds the character '\x00'"),
        ("a\nb", r"holds the character '\n'"),
        ("a\x9bb", r"holds the character '\x9b'"),
        ("a\u2028b", r"holds the character '\u2028'"),
        ("\ud800", r"holds the character '\ud800'"),
        ("../a", "reads as a path"),
        ("a/../b", "reads as a path"),
        ("/etc/passwd", "reads as a path"),
        ("a\\b", "reads as a path"),
        ("a" * 2000, "has 2000 characters"),
    ],
)
@pytest.mark.parametrize("form", ["safetensors", "pt", "memory"])
def test_a_name_that_no_model_has(tmp_path: Path, name: str, problem: str, form: str) -> None:
    tensor = torch.ones(2)
    if form == "memory":
        refused({name: tensor}, problem)
    elif form == "pt":
        if name == "\ud800":
            pytest.skip("torch does not write it")
        torch.save({name: tensor}, tmp_path / "x.pt")
        refused(tmp_path / "x.pt", problem)
    else:
        content = safetensors_bytes({name: GOOD["a"]}, DATA[:8])
        path = written(tmp_path / "x.safetensors", content)
        # The library knows no lone surrogates, and says so first.
        refused(path, *([] if name == "\ud800" else [problem]))


@pytest.mark.parametrize("name", ["a/b", "größe.权重", "a b", "c: #d", "..."])
def test_unusual_names_that_are_kept(tmp_path: Path, name: str) -> None:
    content = safetensors_bytes({name: GOOD["a"]}, DATA[:8])
    assert open_checkpoint(written(tmp_path / "x.safetensors", content)).names == (name,)


def test_truth_values_are_true_or_false(tmp_path: Path) -> None:
    header = {"m": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}
    path = written(tmp_path / "x.safetensors", safetensors_bytes(header, b"\1\2"))
    checkpoint = open_checkpoint(path)
    assert checkpoint.read("m", 0, 1).tolist() == [True]
    with pytest.raises(Exception, match="holds bytes other than 0 and 1"):
        checkpoint.load("m")


@pytest.mark.parametrize("length", [640, 35_615])
def test_a_length_that_begins_like_another_format(tmp_path: Path, length: int) -> None:
    """640 is 80 02, as in a pickle of protocol 2, and 35615 is 1f 8b, as in gzip."""
    header = json.dumps(GOOD).encode().ljust(length)
    path = written(tmp_path / "x.safetensors", safetensors_bytes(header))
    assert open_checkpoint(path).names == ("a", "b")
    error = refused(written(tmp_path / "x.pt", path.read_bytes()), "it is a safetensors file")
    assert error.hint == "rename it to .safetensors"


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
