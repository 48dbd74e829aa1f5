"""How task vectors are kept under a cap, and what they take."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from map_bo.errors import MergeError
from map_bo.merging.align.layout import FlatLayout, join_ties
from map_bo.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from map_bo.merging.vectors import storage
from map_bo.merging.vectors.row_filling import STORAGE
from map_bo.merging.vectors.storage import (
    Storage,
    StorageDtype,
    available_bytes,
    estimate_memory,
    format_bytes,
    parse_bytes,
    resident_bytes,
)
from map_bo.merging.vectors.task_vectors import TaskVectors
from tests.merging.adapter_files import as_dense, small_adapters, small_base
from tests.merging.small_models import MODELS, family

ROWS = 4 * 4 * 160  # of the MLP and its three experts in float32


def models(kind: str = "mlp") -> tuple[Checkpoint, dict[str, Checkpoint]]:
    base, experts = family(kind)
    return open_checkpoint(base), {name: open_checkpoint(model) for name, model in experts.items()}


def need(
    base: Checkpoint, experts: Mapping[str, Checkpoint], dtype: torch.dtype
) -> storage.MemoryNeed:
    return estimate_memory(base, experts, FlatLayout.of(base, join_ties(base, {})), dtype)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("kind", sorted(MODELS))
def test_what_is_needed_is_what_is_taken(kind: str, dtype: torch.dtype) -> None:
    base, experts = models(kind)
    found = need(base, experts, dtype)
    vectors = TaskVectors.load(base, experts, dtype=dtype)
    others = [*vectors.fixed.values(), *(floor for _, floor in vectors.floors)]
    assert found.rows == vectors.nbytes
    assert found.extras == sum(tensor.nbytes for tensor in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_take_their_factors(dtype: torch.dtype, tmp_path: Path) -> None:
    base = small_base()
    adapters = small_adapters(tmp_path, base)
    experts = {**adapters, "whole": as_dense(adapters["math"])}
    vectors = TaskVectors.load(base, experts, dtype=dtype)
    floors = sum(floor.nbytes for _, floor in vectors.floors)
    assert need(base, experts, dtype).total == vectors.nbytes + floors
    assert need(base, experts, dtype).rows == 2 * vectors.layout.size * dtype.itemsize


@pytest.mark.parametrize(
    ("dtype", "most", "kept", "mapped", "spare_memory"),
    [
        (None, None, torch.float32, False, True),
        ("auto", None, torch.float32, False, True),
        (torch.float16, None, torch.float16, False, True),
        (None, 3 * ROWS, torch.float32, False, True),
        (None, ROWS, torch.float32, False, False),
        (None, ROWS - 1, torch.float32, True, False),
        (torch.bfloat16, ROWS // 2, torch.bfloat16, False, False),
        (torch.bfloat16, ROWS // 2 - 1, torch.bfloat16, True, False),
        ("auto", ROWS, torch.float32, False, False),
        ("auto", ROWS - 1, torch.bfloat16, False, False),
        ("auto", ROWS // 2, torch.bfloat16, False, False),
        ("auto", ROWS // 2 - 1, torch.float32, True, False),
        ("auto", "2 kB", torch.bfloat16, False, False),
    ],
)
def test_the_cap_decides(
    dtype: StorageDtype | None,
    most: int | str | None,
    kept: torch.dtype,
    mapped: bool,
    spare_memory: bool,
    tmp_path: Path,
) -> None:
    base, experts = models()
    cache = None if most is None else tmp_path
    found = Storage.of(base, experts, dtype=dtype, max_memory=most, cache=cache)
    assert found == Storage(kept, tmp_path if mapped else None, spare_memory)
    assert not list(tmp_path.iterdir())  # nothing is written, and nothing read


def test_without_a_cap_a_cache_maps(tmp_path: Path) -> None:
    base, experts = models()
    assert Storage.of(base, experts, cache=tmp_path) == Storage(torch.float32, tmp_path, False)


def test_what_fits_nowhere_is_told_with_what_would_be_needed(tmp_path: Path) -> None:
    base, experts = models()
    with pytest.raises(MergeError, match=r"is 100 bytes, .* take 2\.56 kB in float32\n") as caught:
        Storage.of(base, experts, max_memory=100)
    assert "allow 2.56 kB, or give a folder" in str(caught.value.hint)
    assert "'auto' may take half" in str(caught.value.hint)
    with pytest.raises(MergeError, match=r"2\.56 kB in float32, 1\.28 kB in bfloat16") as caught:
        Storage.of(base, experts, dtype="auto", device="meta", max_memory=100, cache=tmp_path)
    assert "allow 1.28 kB, or use the CPU" in str(caught.value.hint)
    base = small_base()
    adapters = small_adapters(tmp_path, base)
    with pytest.raises(MergeError, match=r"of which 2\.76 kB are always in memory") as caught:
        Storage.of(base, adapters, max_memory=1000, cache=tmp_path)
    assert "allow 2.76 kB, or give fewer adapters or lower ranks" in str(caught.value.hint)
    assert Storage.of(base, adapters, max_memory=3000, cache=tmp_path).cache == tmp_path


@pytest.mark.parametrize(
    ("most", "message"),
    [("lots", "max_memory must .* got 'lots'"), (0, "max_memory must .* got 0")],
)
def test_sizes_that_are_none_are_refused(most: int | str, message: str) -> None:
    base, experts = models()
    with pytest.raises(MergeError, match=message):
        Storage.of(base, experts, max_memory=most)


def test_memory_that_is_not_there_is_told_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = models()
    monkeypatch.setattr(storage, "available_bytes", lambda: 1000)
    monkeypatch.setattr(Checkpoint, "read", None)
    with pytest.raises(MergeError, match=r"take 2\.56 kB of memory, and 1 kB are ava") as caught:
        TaskVectors.load(base, experts)
    assert "max_memory" in str(caught.value.hint)
    monkeypatch.undo()
    monkeypatch.setattr(storage, "available_bytes", lambda: 2000)
    assert TaskVectors.load(base, experts, dtype=torch.bfloat16).nbytes == ROWS // 2
    assert TaskVectors.load(base, experts, cache=tmp_path).nbytes == ROWS
    monkeypatch.setattr(storage, "available_bytes", lambda: None)
    assert TaskVectors.load(base, experts).nbytes == ROWS


def write(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_available_memory_is_what_system_and_control_groups_leave(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) is None
    write(tmp_path, {"proc/meminfo": "MemTotal: 99 kB\nMemFree: 1 kB\nMemAvailable:   50 kB\n"})
    assert available_bytes(tmp_path) == 50 * 1024
    group = "sys/fs/cgroup/job/step"
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/job/step\n",
            f"{group}/memory.max": "max\n",
            f"{group}/memory.current": "7000\n",
            f"{group}/memory.stat": "anon 1\ninactive_file 2000\n",
        },
    )
    assert available_bytes(tmp_path) == 50 * 1024
    write(tmp_path, {f"{group}/memory.max": "20000\n"})
    assert available_bytes(tmp_path) == 15000
    write(
        tmp_path,
        {
            "sys/fs/cgroup/job/memory.max": "9000\n",
            "sys/fs/cgroup/job/memory.current": "9500\n",
            "sys/fs/cgroup/job/memory.stat": "inactive_file 100\n",
        },
    )
    assert available_bytes(tmp_path) == 0
    (tmp_path / "proc/meminfo").write_text("nothing\n")
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/old\n")
    assert available_bytes(tmp_path) is None


def test_this_machine_says_what_it_has() -> None:
    available = available_bytes()
    if not Path("/proc/meminfo").exists():
        assert available is None
    else:
        assert available is not None
        assert available > 10_000_000


def test_sizes_are_told_in_their_unit() -> None:
    assert [format_bytes(x) for x in (12, 1540, 2.5e6, 40.12e9)] == [
        "12 bytes",
        "1.54 kB",
        "2.5 MB",
        "40.1 GB",
    ]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, 1),
        (2.5e9, 2_500_000_000),
        (10**18, 10**18),
        ("700MB", 700_000_000),
        ("2 GB", 2_000_000_000),
        (" 2gb ", 2_000_000_000),
        ("2G", 2_000_000_000),
        ("1.5GiB", 3 << 29),
        ("512 MiB", 512 << 20),
        ("64k", 64_000),
        ("1TB", 10**12),
        ("1_000", 1000),
        ("12b", 12),
    ],
)
def test_sizes(size: int | float | str, expected: int) -> None:
    assert parse_bytes(size, "size") == expected


@pytest.mark.parametrize(
    "size",
    [0, -1, 0.5, float("nan"), float("inf"), True, "abc", "-1", "0", "0GB", "", "GB", "1.2.3MB",
     "1e9", "5 apples", "1 0", "._", "2GBit"],
)  # fmt: skip
def test_what_is_no_size(size: int | float | str) -> None:
    with pytest.raises(MergeError, match="max_memory must") as caught:
        parse_bytes(size, "max_memory")
    assert repr(size) in caught.value.message
    assert "2GB" in str(caught.value.hint)


def test_resident_memory_grows_with_what_is_held() -> None:
    before = resident_bytes()
    # Mapped: what an allocator has kept is resident already.
    with mmap.mmap(-1, 50_000_000) as held:
        held[::4096] = b"x" * len(range(0, 50_000_000, 4096))
        assert 30_000_000 < resident_bytes() - before < 200_000_000
