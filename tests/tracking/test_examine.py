from __future__ import annotations

from pathlib import Path

import pytest

from map_bo.tracking.examine import examine
from map_bo.tracking.jsonl import JsonlStore
from map_bo.tracking.store import Event


@pytest.fixture
def path(tmp_path: Path) -> Path:
    store = JsonlStore.create(tmp_path)
    for kind in "abc":
        store.append(Event(kind, {}))
    return tmp_path / "events.jsonl"


def test_a_whole_record(path: Path) -> None:
    found = examine(path)
    assert [event.kind for event in found.events] == ["a", "b", "c"]
    assert (found.link.lines, found.link.sealed) == (3, 3)
    assert (found.end, found.unfinished, found.damage) == (path.stat().st_size, 0, None)


def test_an_unfinished_line_is_no_damage(path: Path) -> None:
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b'{"v":2,"seq":4,')
    found = examine(path)
    assert (found.end, found.unfinished, found.damage) == (size, 15, None)


@pytest.mark.parametrize(("row", "last"), [(1, False), (2, True)])
def test_a_damaged_line_ends_what_is_whole(path: Path, row: int, last: bool) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    lines[row] = lines[row].replace(b'"data":{}', b'"data":[]')
    path.write_bytes(b"".join(lines))
    found = examine(path)
    assert len(found.events) == found.link.lines == row
    assert found.damage is not None
    assert (found.damage.number, found.damage.start) == (row + 1, found.end)
    assert found.damage.last == last
    assert found.unfinished == 0


@pytest.mark.parametrize("tail", [b'{"v":1,"kind":"d","time":0,"data":{}}K', b"{}", b"[" * 100_000])
def test_the_end_of_an_old_record(path: Path, tail: bytes) -> None:
    path.write_bytes(path.read_bytes() + tail)
    assert (examine(path).damage is None) == (tail[-1:] != b"K")
