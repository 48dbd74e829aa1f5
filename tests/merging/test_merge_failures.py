"""Merges that fail for want of a target, disk space or memory, or in the middle of the work."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.checkpoints.safetensors_files import SafetensorsWriter
from map_bo.merging.vectors import kernel as chunked
from map_bo.merging.vectors.kernel import KernelMerge
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.on_disk import OnDiskVectors
from map_bo.operators.sparse import Ties
from tests.merging.hard_checkpoints import everything, threads
from tests.merging.refusing import Family, Refused, merge


class TestTarget:
    @pytest.fixture(autouse=True)
    def nothing_is_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """No pass over the checkpoints is made for a target that cannot be written."""

        def run(*arguments: Any) -> None:
            raise AssertionError("merged")

        monkeypatch.setattr(KernelMerge, "run", run)
        monkeypatch.setattr(Ties, "prepare", run)

    def test_a_folder_in_use(self, refused: Refused, tmp_path: Path) -> None:
        out = tmp_path / "m"
        out.mkdir()
        (out / "precious").write_text("x")
        refused("m exists and is not empty", out=out, operator=Ties())
        assert (out / "precious").read_text() == "x"
        refused("exists and is not a folder", out=out / "precious")

    def test_a_parent_that_is_a_file(self, refused: Refused, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        refused("cannot be written: Not a directory", out=tmp_path / "file" / "a" / "m")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_parent_that_may_not_be_written(self, refused: Refused, tmp_path: Path) -> None:
        (tmp_path / "locked").mkdir(mode=0o500)
        refused("cannot be written: Permission denied", out=tmp_path / "locked" / "m")

    def test_a_parent_where_nothing_can_be_made(self, refused: Refused) -> None:
        if not Path("/proc/self").is_dir():
            pytest.skip("there is no /proc")
        refused("cannot be written|has 0.000 GB free", out=Path("/proc/nothing/m"))

    def test_a_full_disk(self, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 5, 100_000))
        refused("needs 0.001 GB, and .* has 0.000 GB free", operator=Ties())


class TestDisk:
    def test_files_that_may_not_grow(self, refused: Refused, family: Family) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        try:
            refused("cannot be written: File too large")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    @pytest.fixture
    def small_disk(self, tmp_path: Path) -> Iterator[Path]:
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, check=False).returncode == 0
        except OSError:
            done = False
        if not done:
            pytest.skip("no file system can be mounted here")
        yield folder
        subprocess.run(["umount", str(folder)], check=True)

    def test_a_disk_that_becomes_full(
        self, refused: Refused, small_disk: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 10**12))
        tensors = {f"w{i}": torch.ones(10_000) for i in range(4)}
        error = refused(
            "m cannot be written: No space left|cannot be written: " + os.strerror(errno.ENOSPC),
            family=(tensors, {"e": {name: 1.5 * value for name, value in tensors.items()}}),
            coefficients={},
            out=small_disk / "new" / "m",
        )
        assert "free some space" in str(error.hint)


class TestMemory:
    def test_too_little_names_what_is_needed(self, refused: Refused) -> None:
        error = refused(r"max_memory is 50 MB, and this merge needs (\d+) MB", max_memory="50MB")
        assert re.fullmatch(r"allow \d+MB or more", str(error.hint))
        tensors = {"w": torch.ones(30, 20, dtype=torch.float64)}
        refused(
            "max_memory is 50 MB",
            family=(tensors, {"e": {name: 1.5 * value for name, value in tensors.items()}}),
            coefficients={},
            max_memory="50MB",
        )

    @pytest.mark.parametrize("operator", [TaskArithmetic(), Ties()])
    def test_what_the_hint_says_suffices(
        self,
        refused: Refused,
        family: Family,
        tmp_path: Path,
        operator: Any,
    ) -> None:
        error = refused("max_memory", max_memory="1MB", operator=operator)
        merge(
            family,
            tmp_path / "m",
            operator=operator,
            max_memory=str(error.hint).split()[1],
        )


class TestThreads:
    @pytest.mark.parametrize(
        "error", [MergeError("a thread failed", hint="-"), KeyboardInterrupt()]
    )
    @pytest.mark.parametrize("count", [1, 4])
    def test_an_exception_in_one_of_them(
        self,
        family: Family,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        error: BaseException,
        count: int,
    ) -> None:
        real, calls = OnDiskVectors.read, iter(range(1000))

        def read(self: Any, *arguments: Any) -> Tensor:
            if next(calls) == 5:
                raise error
            return real(self, *arguments)

        monkeypatch.setattr(OnDiskVectors, "read", read)
        before = everything(tmp_path)
        with threads(count), pytest.raises(type(error)):
            merge(family, tmp_path / "new" / "m")
        assert everything(tmp_path) == before

    def test_an_interrupt_while_they_work(
        self,
        family: Family,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        real, calls = SafetensorsWriter.write_piece, iter(range(1000))
        late: list[str] = []
        monkeypatch.setitem(chunked._CHUNK, "cpu", 20)

        def write_piece(self: Any, *arguments: Any) -> None:
            if next(calls) == 5:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            time.sleep(0.01)
            late.append(str(self.path.exists()))
            real(self, *arguments)

        monkeypatch.setattr(SafetensorsWriter, "write_piece", write_piece)
        before = everything(tmp_path)
        with threads(3), pytest.raises(KeyboardInterrupt):
            merge(family, tmp_path / "new" / "m")
        assert everything(tmp_path) == before
        count = len(late)
        time.sleep(0.05)
        assert len(late) == count < 60
        assert set(late) == {"True"}
