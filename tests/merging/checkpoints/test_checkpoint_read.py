from __future__ import annotations

import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from map_bo.errors import CheckpointError
from map_bo.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from tests.merging.checkpoint_files import tensors_of
from tests.merging.checkpoints.test_checkpoint import FORMS, saved, some_tensors


@pytest.mark.parametrize("form", FORMS)
def test_every_piece_of_every_form(tmp_path: Path, form: str) -> None:
    checkpoint = open_checkpoint(saved(tmp_path, form))
    for name, tensor in some_tensors().items():
        flat = tensor.reshape(-1)
        for start in range(flat.numel() + 1):
            for stop in range(start, flat.numel() + 1):
                piece = checkpoint.read(name, start, stop)
                assert piece.dtype == tensor.dtype
                assert piece.shape == (stop - start,)
                assert torch.equal(piece, flat[start:stop])
        for out in (torch.empty_like(flat), torch.empty(flat.nbytes + 3, dtype=torch.uint8)):
            piece = checkpoint.read(name, flat.numel() // 2, flat.numel(), out=out)
            assert torch.equal(piece, flat[flat.numel() // 2 :])
            assert piece.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()


@given(
    shape=st.lists(st.integers(1, 4), max_size=4),
    data=st.data(),
    lazy=st.sampled_from(["plain", "conj", "neg"]),
)
def test_pieces_of_tensors_in_any_memory_layout(
    shape: list[int], data: st.DataObject, lazy: str
) -> None:
    count = torch.Size(shape).numel()
    tensor = torch.arange(count * 2).reshape(*shape, 2)[..., 0].to(torch.complex64) * (1 + 2j)
    tensor = tensor.permute(data.draw(st.permutations(range(len(shape)))))
    if lazy == "conj":
        tensor = tensor.conj()
    elif lazy == "neg":
        tensor = torch._neg_view(tensor)
    stop = data.draw(st.integers(0, count))
    start = data.draw(st.integers(0, stop))
    checkpoint = open_checkpoint({"w": tensor})
    expected = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)[start:stop]
    assert torch.equal(checkpoint.read("w", start, stop), expected)
    out = torch.empty(count, dtype=torch.complex64)
    assert torch.equal(checkpoint.read("w", start, stop, out=out), expected)
    assert torch.equal(out[: stop - start], expected)


def test_a_piece_in_memory_is_a_view() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    piece = open_checkpoint({"w": weight}).read("w", 2, 5)
    weight[1, 0] = -1
    assert piece.tolist() == [2, -1, 4]


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 16), (15, 16)])
def test_a_piece_outside_the_tensor(start: int, stop: int) -> None:
    with pytest.raises(CheckpointError, match=r"has no elements .* of tensor 'layer.weight'"):
        open_checkpoint(some_tensors()).read("layer.weight", start, stop)


@pytest.mark.parametrize("form", ["mapping", "safetensors"])
@pytest.mark.parametrize(
    "out",
    [
        torch.empty(14),
        torch.empty(59, dtype=torch.uint8),
        torch.empty(15, dtype=torch.float64),
        torch.empty(30)[::2],
        torch.empty(15, device="meta"),
        torch.empty(64, dtype=torch.uint8)[1:],
    ],
)
def test_memory_that_does_not_fit(tmp_path: Path, form: str, out: Tensor) -> None:
    checkpoint = open_checkpoint(saved(tmp_path, form))
    with pytest.raises(CheckpointError, match=r"^out ") as caught:
        checkpoint.read("layer.weight", 0, 15, out=out)
    assert caught.value.hint


def test_what_is_read_may_be_written_to_without_touching_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path, "safetensors")
    checkpoint = open_checkpoint(path)
    before = path.read_bytes()
    checkpoint.load("layer.weight").zero_()
    checkpoint.read("layer.weight", 0, 15).zero_()
    assert path.read_bytes() == before
    assert torch.equal(checkpoint.load("layer.weight"), some_tensors()["layer.weight"])


def test_a_large_tensor_is_an_ordinary_one(tmp_path: Path) -> None:
    large = torch.arange(3 << 19).reshape(-1, 2)
    save_file({"w": large}, tmp_path / "x.safetensors")
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    loaded = checkpoint.load("w")
    del checkpoint
    assert torch.equal(loaded, large)
    assert torch.equal(pickle.loads(pickle.dumps(loaded)), large)
    assert torch.equal(loaded.add_(1), large + 1)


def test_threads_read_at_once(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((3000,), float(i)) for i in range(8)}
    save_file(tensors, tmp_path / "x.safetensors")
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    ready = threading.Barrier(8)

    def read(i: int) -> bool:
        ready.wait()
        out = torch.empty(1000)
        return all(
            bool((checkpoint.read(f"t{i}", k % 2000, k % 2000 + 1000, out=out) == i).all())
            for k in range(0, 4000, 37)
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))


def test_no_file_stays_open(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved(tmp_path, "sharded"))
    before = len(os.listdir("/proc/self/fd"))
    for name in checkpoint.names:
        checkpoint.load(name)
    assert len(os.listdir("/proc/self/fd")) == before
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_resident_memory_is_bounded_by_the_piece(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.full((64 << 20,), 7, dtype=torch.uint8)}, path)
    checkpoint = open_checkpoint(path)
    step = 1 << 20
    out = torch.empty(step, dtype=torch.uint8)
    checkpoint.read("w", 0, step, out=out)
    before = most = resident()
    for start in range(step, 64 << 20, step):
        out.zero_()
        assert checkpoint.read("w", start, start + step, out=out)[-1] == 7
        most = max(most, resident())
    assert most - before < 8 << 20


class TestChanges:
    """A file that is no longer the one that was opened gives an error, never other numbers."""

    def each_refuses(self, checkpoint: Checkpoint, part: str) -> None:
        asks: list[Any] = [
            lambda: checkpoint.load("first.weight"),
            lambda: checkpoint.read("first.weight", 1, 3),
            lambda: checkpoint.load("third.none"),
            lambda: checkpoint.digest(),
        ]
        for ask in asks:
            with pytest.raises(CheckpointError, match="cannot be read") as caught:
                ask()
            assert part in caught.value.message
            assert caught.value.hint

    @pytest.fixture(params=["safetensors", "pt"])
    def opened(self, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Checkpoint]:
        path = tmp_path / f"x.{request.param}"
        save = save_file if request.param == "safetensors" else torch.save
        save(tensors_of(0), path)
        checkpoint = open_checkpoint(path)
        checkpoint.digest()
        return path, checkpoint

    def test_it_disappears(self, opened: tuple[Path, Checkpoint]) -> None:
        path, checkpoint = opened
        path.unlink()
        self.each_refuses(checkpoint, "No such file")

    def test_it_shrinks(self, opened: tuple[Path, Checkpoint]) -> None:
        path, checkpoint = opened
        os.truncate(path, 8)
        self.each_refuses(checkpoint, "")

    def test_it_is_replaced(self, opened: tuple[Path, Checkpoint]) -> None:
        path, checkpoint = opened
        times = path.stat()
        content = path.read_bytes()
        path.rename(path.with_name("old"))
        path.write_bytes(content)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        self.each_refuses(checkpoint, "has changed since it was opened")

    def test_it_is_written_to(self, opened: tuple[Path, Checkpoint]) -> None:
        path, checkpoint = opened
        with path.open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\1\1\1\1")
        os.utime(path, (1, 1))
        self.each_refuses(checkpoint, "has changed since it was opened")

    def test_it_becomes_a_folder(self, opened: tuple[Path, Checkpoint]) -> None:
        path, checkpoint = opened
        path.unlink()
        path.mkdir()
        self.each_refuses(checkpoint, "")


class TestOtherProcesses:
    """Pickling stands for sending to another process, perhaps on another machine."""

    def test_a_copy_of_the_file_will_do(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        save_file(tensors_of(0), path)
        sent = pickle.dumps(open_checkpoint(path))
        digest = open_checkpoint(path).digest()
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
        os.utime(path, (1, 1))
        assert len(sent) < 4000
        assert pickle.loads(sent).digest() == digest

    @pytest.mark.parametrize("change", ["longer", "header"])
    def test_another_file_will_not(self, tmp_path: Path, change: str) -> None:
        path = tmp_path / "x.safetensors"
        save_file({"a": torch.zeros(4), "b": torch.ones(4)}, path)
        received = pickle.loads(pickle.dumps(open_checkpoint(path)))
        if change == "longer":
            save_file({"a": torch.zeros(4), "b": torch.ones(5)}, path)
        else:
            save_file({"c": torch.zeros(4), "b": torch.ones(4)}, path)
        with pytest.raises(CheckpointError, match="has changed since it was opened"):
            received.load("b")
        with pytest.raises(CheckpointError, match="has changed since it was opened"):
            received.read("a", 0, 1)
