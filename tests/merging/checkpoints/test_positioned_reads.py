from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from tests.merging.checkpoint_files import tensors_of
from tests.merging.damaged import refused, written

SAFETENSORS = save(tensors_of(0))


def pickled(zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors_of(0), buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry = tarfile.TarInfo("model.safetensors")
        entry.size = len(SAFETENSORS)
        archive.addfile(entry, io.BytesIO(SAFETENSORS))
    return buffer.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Not found</title></head></html>"
EVERYWHERE = [
    (b"", "an empty file", "again"),
    (LFS, "a git-lfs pointer", "git lfs pull"),
    (PAGE, "an HTML or XML page", "open its address in a browser"),
    (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "an HTML or XML page", "again"),
    (b'{"error": "Repository not found"}', "JSON text", "again"),
    (b"Entry not found", "text that begins with 'Entry not found'", "again"),
    ("Zugriff verweigert: größe".encode() * 40, "text that begins with 'Zugriff", "again"),
    (b"GGUF\3\0\0\0" + bytes(600), "a GGUF file", "converted from"),
    (b"\x89HDF\r\n\x1a\n" + bytes(600), "an HDF5 file", "convert"),
    (gzip.compress(SAFETENSORS), "a gzip archive", "unpack"),
    (bytes(4096), "zeros", "again"),
]


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "bin"])
@pytest.mark.parametrize(("content", "what", "hint"), EVERYWHERE)
def test_a_file_of_another_kind(
    tmp_path: Path, content: bytes, what: str, hint: str, suffix: str
) -> None:
    path = written(tmp_path / f"model.{suffix}", content)
    error = refused(path, str(path), "cannot be read: by its beginning it is ", what)
    assert hint in str(error.hint)


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin"])
def test_safetensors_with_the_name_of_a_pickle(tmp_path: Path, suffix: str) -> None:
    error = refused(written(tmp_path / f"x.{suffix}", SAFETENSORS), "it is a safetensors file")
    assert error.hint == "rename it to .safetensors"


@pytest.mark.parametrize(("zipped", "what"), [(True, "a zip archive"), (False, "a pickle")])
def test_a_pickle_with_the_name_of_safetensors(tmp_path: Path, zipped: bool, what: str) -> None:
    error = refused(written(tmp_path / "x.safetensors", pickled(zipped)), f"it is {what}")
    assert error.hint == "rename it to .pt"


@pytest.mark.parametrize("length", [640, 896, 1152, 1408, 2**16 + 640, 0x4B50, 0x8B20 - 1])
def test_safetensors_whose_length_begins_like_another_format(tmp_path: Path, length: int) -> None:
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(length)
    content = length.to_bytes(8, "little") + header + bytes(4)
    path = written(tmp_path / "x.safetensors", content)
    assert open_checkpoint(path).shape("w") == (1,)


def test_a_tar(tmp_path: Path) -> None:
    refused(written(tmp_path / "x.safetensors", tarred()), "it is a tar archive")
    refused(written(tmp_path / "x.pt", tarred()), "cannot be read")


def test_bytes_of_no_kind(tmp_path: Path) -> None:
    content = bytes([200, 13, 255]) * 300
    refused(written(tmp_path / "x.safetensors", content), "its header is said to have")
    refused(written(tmp_path / "x.pt", content), "cannot be read")
