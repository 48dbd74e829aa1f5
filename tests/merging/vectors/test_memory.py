from __future__ import annotations

import pytest

from map_bo.errors import MergeError
from map_bo.merging.export.model import ExportSettings
from map_bo.merging.vectors.storage import parse_bytes, resident_bytes


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
    with pytest.raises(MergeError, match="max_memory is") as caught:
        parse_bytes(size, "max_memory")
    assert repr(size) in caught.value.message
    assert "2GB" in str(caught.value.hint)


def test_settings_are_checked_when_they_are_made() -> None:
    settings = ExportSettings("1GB", "2 MiB")
    assert (settings.memory, settings.shard_bytes) == (10**9, 2 << 20)
    assert ExportSettings().memory is None
    with pytest.raises(MergeError, match="max_memory is 'much'"):
        ExportSettings("much")
    with pytest.raises(MergeError, match="shard_size is 0"):
        ExportSettings(shard_size=0)


def test_resident_memory_grows_with_what_is_held() -> None:
    before = resident_bytes()
    held = bytearray(b"x") * 50_000_000
    assert 30_000_000 < resident_bytes() - before < 200_000_000
    del held
