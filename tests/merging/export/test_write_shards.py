"""The progress bar of a merge: on stderr, on terminals alone, up to the last element."""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file

from map_bo.errors import MergeError
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.export.model import merge_checkpoints
from map_bo.merging.export.write_shards import (
    Pieces,
    Put,
    merging_bar,
    write_weights,
    writing,
)
from tests.merging import checkpoint_files as files
from tests.merging.hard_checkpoints import hard_family

TENSORS = {
    "a": torch.arange(10.0),
    "b": torch.ones(3, 2),
    "none": torch.zeros(0),
    "z": torch.tensor(4),
}
BASE = open_checkpoint(TENSORS)
LAYOUTS = {name: BASE.layout(name) for name in BASE.names}


def all_pieces(put: Put) -> None:
    for name, value in TENSORS.items():
        flat = value.flatten()
        for start in range(0, len(flat), 4):
            put(name, start, flat[start : start + 4])


def without(name: str) -> Pieces:
    def pieces(put: Put) -> None:
        all_pieces(lambda n, start, piece: None if n == name else put(n, start, piece))

    return pieces


@pytest.mark.parametrize("limit", [1, 30, 10_000])
def test_pieces_and_tensors_give_the_same_files(tmp_path: Path, limit: int) -> None:
    contents = []
    for kind, tensors in (("pieces", all_pieces), ("tensors", TENSORS.items())):
        folder = tmp_path / kind
        folder.mkdir()
        counts: list[int] = []
        write_weights(folder, tensors, LAYOUTS, BASE, limit, advance=counts.append)
        assert sum(counts) == sum(value.numel() for value in TENSORS.values())
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
        assert open_checkpoint(folder).digest() == BASE.digest()
    assert contents[0] == contents[1]


def test_what_takes_the_place_of_a_tensor(tmp_path: Path) -> None:
    for kind, tensors in (("pieces", all_pieces), ("tensors", TENSORS.items())):
        (tmp_path / kind).mkdir()
        write_weights(
            tmp_path / kind,
            tensors,
            LAYOUTS,
            BASE,
            10_000,
            instead={"a": torch.full((10,), 7.0, dtype=torch.float64)},
        )
        found = load_file(tmp_path / kind / "model.safetensors")
        assert found["a"].tolist() == [7.0] * 10
        assert torch.equal(found["b"], TENSORS["b"])


@pytest.mark.parametrize("name", ["a", "z"])
def test_a_tensor_that_was_not_put_is_missed(tmp_path: Path, name: str) -> None:
    with pytest.raises(MergeError, match=f"lacks 1 of the base's tensors: {name}\n"):
        write_weights(tmp_path, without(name), LAYOUTS, BASE, 10_000)


def test_a_piece_that_was_not_put_is_missed(tmp_path: Path) -> None:
    def pieces(put: Put) -> None:
        all_pieces(lambda n, start, piece: None if start == 8 else put(n, start, piece))

    with pytest.raises(MergeError, match="lacks 1 of the base's tensors: a"):
        write_weights(tmp_path, pieces, LAYOUTS, BASE, 10_000)


def test_the_index_names_every_tensor(tmp_path: Path) -> None:
    write_weights(tmp_path, all_pieces, LAYOUTS, BASE, 1)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(TENSORS)
    assert index["metadata"]["total_size"] == sum(layout.nbytes for layout in LAYOUTS.values())


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EFBIG, "free some space"),
        (errno.EROFS, "can be written to"),
    ],
)
def test_what_the_system_says_becomes_an_error_with_a_way_out(code: int, says: str) -> None:
    with pytest.raises(MergeError, match="m cannot be written: ") as caught, writing(Path("/m")):
        raise OSError(code, os.strerror(code))
    assert os.strerror(code) in caught.value.message
    assert says in str(caught.value.hint)


C = {"math": 0.5, "code": 0.25}


@contextmanager
def terminal() -> Iterator[Callable[[], str]]:
    """Make stderr a terminal, within a test since pytest puts its own there before it."""
    reader, writer = pty.openpty()
    os.set_blocking(reader, False)

    def said() -> str:
        text = b""
        with suppress(BlockingIOError):
            while part := os.read(reader, 1 << 16):
                text += part
        return text.decode()

    with pytest.MonkeyPatch.context() as patch, os.fdopen(writer, "w", buffering=1) as stream:
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            patch.delenv(name, raising=False)
        patch.setenv("TERM", "xterm")
        patch.setattr(sys, "stderr", stream)
        yield said
    os.close(reader)


def test_the_bar_goes_to_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, experts = hard_family(tmp_path)
    with terminal() as said:
        merge_checkpoints(base, experts, C, tmp_path / "m")
        text = said()
    assert re.search(r"merging .* M numbers|hashing", text)
    assert "100%" in text
    assert capsys.readouterr().out == ""


def test_the_bar_is_silent_where_it_was_not_asked_for(tmp_path: Path) -> None:
    base, experts = hard_family(tmp_path)
    with terminal() as said:
        merge_checkpoints(base, experts, C, tmp_path / "m", progress=False)
        assert said() == ""


def test_the_bar_is_silent_where_there_is_no_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base, experts = hard_family(tmp_path)
    merge_checkpoints(base, experts, C, tmp_path / "m")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["pieces", "tensors", "ties"])
def test_every_element_is_counted(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    totals: list[float | None] = []
    advance, add_task = Progress.advance, Progress.add_task

    def counting(self: Progress, task: object, count: float = 1) -> None:
        counted.append(int(count))
        advance(self, task, count)  # type: ignore[arg-type]

    def adding(self: Progress, description: str, total: float | None = 100.0) -> int:
        totals.append(total)
        return add_task(self, description, total=total)

    monkeypatch.setattr(Progress, "advance", counting)
    monkeypatch.setattr(Progress, "add_task", adding)
    with terminal():
        if kind == "tensors":  # of float64 and complex numbers
            merge_checkpoints(
                files.BASE, files.EXPERTS, files.COEFFICIENTS, tmp_path / "m", check_base=False
            )
        elif kind == "pieces":
            base, experts = hard_family(tmp_path)
            merge_checkpoints(base, experts, C, tmp_path / "m")
        else:  # stored apart: both are written
            tensors = {"a": torch.ones(7), "b": torch.ones(7), "n": torch.arange(3)}
            tuned = tensors | dict.fromkeys("ab", torch.full((7,), 2.0))
            merge_checkpoints(tensors, {"e": tuned}, {}, tmp_path / "m", ties={"b": "a"})
    assert [sum(counted)] == totals


def test_an_error_ends_the_bar() -> None:
    def fail() -> None:
        with merging_bar(open_checkpoint({"a": torch.ones(4)}), shown=True) as advance:
            assert advance is not None
            advance(2)
            raise ValueError("boom")

    with terminal() as said:
        with pytest.raises(ValueError, match="boom"):
            fail()
        assert "50%" in said()


class TestReadBack:
    @pytest.mark.parametrize("limit", [1, 10_000])
    def test_what_was_written_is_what_was_meant(self, tmp_path: Path, limit: int) -> None:
        tensors = [(name, BASE.load(name)) for name in BASE.names]
        meant = write_weights(tmp_path, tensors, LAYOUTS, BASE, limit)
        meant.compare(open_checkpoint(tmp_path))

    def test_a_bit_that_flipped_on_the_way_is_told(self, tmp_path: Path) -> None:
        tensors = [(name, BASE.load(name)) for name in BASE.names]
        meant = write_weights(tmp_path, tensors, LAYOUTS, BASE, 10_000)
        file = tmp_path / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        with pytest.raises(MergeError, match="what is read back is not what was merged"):
            meant.compare(open_checkpoint(tmp_path))


def test_shards_of_a_variant_have_the_index_that_diffusers_looks_for(tmp_path: Path) -> None:
    stem = "diffusion_pytorch_model.fp16"
    for seed, name in enumerate(("base", "e")):
        (tmp_path / name).mkdir()
        tensors = {n: torch.full((1000,), 1.0 + seed / 10) for n in ("a", "b")}
        save_file(tensors, tmp_path / name / f"{stem}.safetensors")
        (tmp_path / name / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    out = tmp_path / "out"
    merge_checkpoints(
        tmp_path / "base", {"e": tmp_path / "e"}, {"e": 1.0}, out, shard_size="5kB", progress=False
    )
    assert (out / "diffusion_pytorch_model.safetensors.index.fp16.json").is_file()
    assert (out / f"{stem}-00001-of-00002.safetensors").is_file()
    torch.testing.assert_close(open_checkpoint(out).load("b"), torch.full((1000,), 1.1))
