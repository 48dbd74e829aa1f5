from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from map_bo.data import Metric, Observations
from map_bo.errors import StoreError
from map_bo.tracking import side_file
from map_bo.tracking.codec import decode_event, decode_observations, encode_observations
from map_bo.tracking.jsonl import JsonlStore
from map_bo.tracking.outcomes import with_examples_as_recorded
from map_bo.tracking.side_file import Lost, SideFile, without_lost
from map_bo.tracking.store import Event
from tests.tracking.scored import outcomes

METRICS = (Metric("e", kind="unbounded"),)


def observation(seed: int = 0, n: int = 6000, rows: int = 1) -> Observations:
    """Return rows of which each has large outcomes of `e` and small ones of `f`."""
    examples = tuple(
        {"e": outcomes(n, seed=seed + i), "f": outcomes(9, seed=seed)} for i in range(rows)
    )
    X = torch.full((rows, 2), float(seed))
    return Observations(X, X.mean(-1, keepdim=True) / 3, METRICS, examples=examples)


def event(seed: int = 0, n: int = 6000, rows: int = 1) -> Event:
    part = "observation" if rows == 1 else "observations"
    return Event("observed", {"i": seed, part: encode_observations(observation(seed, n, rows))}, 1)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with three events that have large outcomes."""
    store = JsonlStore.create(tmp_path / "run")
    for i in range(3):
        store.append(event(i))
    return tmp_path / "run"


def read(directory: Path) -> list[Event]:
    return list(JsonlStore.open(directory).read())


def test_large_outcomes_stand_beside_the_record_and_small_ones_in_it(run: Path) -> None:
    lines = (run / "events.jsonl").read_bytes().splitlines()
    assert all(len(line) < 2000 for line in lines)
    content = (run / "outcomes.bin").read_bytes()
    places = [
        json.loads(line)["data"]["observation"]["examples"][0]["e"]["packed"] for line in lines
    ]
    assert [place["offset"] for place in places] == [
        0, places[0]["length"], places[0]["length"] + places[1]["length"],
    ]  # fmt: skip
    assert sum(place["length"] for place in places) == len(content)
    assert read(run) == [event(i) for i in range(3)]


def test_what_is_read_is_what_was_measured(run: Path) -> None:
    found = decode_observations(read(run)[1].data["observation"], METRICS).examples[0]["e"]
    wanted = with_examples_as_recorded(observation(1)).examples[0]["e"]
    assert torch.equal(found.values, wanted.values)
    assert torch.equal(found.items, wanted.items)


def test_a_run_without_large_outcomes_has_no_file(tmp_path: Path) -> None:
    store = JsonlStore.create(tmp_path)
    store.append(Event("a", {}))
    store.append(event(n=20))
    assert not (tmp_path / "outcomes.bin").exists()
    assert read(tmp_path)[1] == event(n=20)


def test_a_run_that_was_moved_is_whole(run: Path) -> None:
    shutil.move(run, run.with_name("elsewhere"))
    assert read(run.with_name("elsewhere")) == [event(i) for i in range(3)]


def test_other_handles_read_what_was_written_since(run: Path) -> None:
    one, other = JsonlStore.open(run), JsonlStore.open(run)
    with other.turn():
        assert other.after(3) == []
    one.append(event(3))
    with other.turn():
        assert other.after(3) == [event(3)]
        assert other.after(2) == [event(2), event(3)]
    other.append(event(4))
    assert read(run) == [event(i) for i in range(5)]


# Damage


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def from_another_run(path: Path) -> None:
    store = JsonlStore.create(path.parent / "another")
    for i in range(7, 11):
        store.append(event(i))
    (path.parent / "another" / "outcomes.bin").replace(path)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "line", "said"),
    [
        (flip, 2, "holds other bytes there than were written"),
        (cut, 3, "bytes and ends before them"),
        (Path.unlink, 1, r"there is no outcomes\.bin"),
        (from_another_run, 1, "holds other bytes there"),
        (pipe, 1, "is not a regular file"),
    ],
)
def test_outcomes_that_are_not_there_are_refused_and_said_to_be_lost(
    run: Path, damage: Callable[[Path], None], line: int, said: str
) -> None:
    damage(run / "outcomes.bin")
    reader = JsonlStore.open(run).read()
    assert [next(reader) for _ in range(line - 1)] == [event(i) for i in range(line - 1)]
    with pytest.raises(StoreError, match=f"'e' in line {line} of the record .*{said}") as caught:
        next(reader)
    assert f"map-bo repair {run}" in str(caught.value.hint)
    stored = [decode_event(one) for one in (run / "events.jsonl").read_bytes().splitlines()]
    found, lost, _ = SideFile(run / "outcomes.bin").examine(stored)
    assert (lost[0].line, lost[0].place, lost[0].evaluator) == (line, 0, "e")
    left = found[line - 1].data["observation"]["examples"]
    assert list(left[0]) == ["f"], "the others stay"


def test_bytes_that_belong_to_no_event_are_passed_over_and_counted(run: Path) -> None:
    with open(run / "outcomes.bin", "ab") as file:
        file.write(b"half of some outcomes")
    assert read(run) == [event(i) for i in range(3)]
    JsonlStore.open(run).append(event(3))
    assert read(run) == [event(i) for i in range(4)]
    stored = [decode_event(one) for one in (run / "events.jsonl").read_bytes().splitlines()]
    _, lost, loose = SideFile(run / "outcomes.bin").examine(stored)
    assert (lost, loose) == ([], 21)


def test_events_that_name_the_same_bytes_again_are_refused(run: Path) -> None:
    """A few bytes could otherwise name gigabytes."""
    stored = [decode_event(one) for one in (run / "events.jsonl").read_bytes().splitlines()]
    side = SideFile(run / "outcomes.bin")
    assert list(side.restore(stored)) == [event(i) for i in range(3)]
    with pytest.raises(StoreError, match="they stand where others do"):
        list(side.restore([stored[1], stored[1]]))


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ({}, "where they stand is not told"),
        ({"offset": -1, "length": 5}, "where they stand is not told"),
        ({"offset": 0, "length": True}, "where they stand is not told"),
        ({"offset": "0", "length": []}, "where they stand is not told"),
        ({"offset": 2**70, "length": 2**70}, "ends before them"),
        ({"offset": 0, "length": 2**40}, "ends before them"),
        ({"offset": 0, "length": 3, "sha256": None}, "holds other bytes"),
    ],
)
def test_places_that_cannot_be_are_refused(run: Path, place: object, said: str) -> None:
    stored = Event("observed", {"observation": {"examples": [{"e": {"packed": place}}]}})
    with pytest.raises(StoreError, match=said):
        list(SideFile(run / "outcomes.bin").restore([stored]))


def test_lost_outcomes_are_left_out_and_all_else_is_kept(run: Path) -> None:
    JsonlStore.open(run).append(event(3, rows=3))
    lines = (run / "events.jsonl").read_bytes().splitlines(keepends=True)
    assert without_lost(lines, []) == lines
    kept = without_lost(lines, [Lost(2, 0, "e", "gone"), Lost(4, 2, "e", "gone")])
    assert kept[0] == lines[0]
    (run / "events.jsonl").write_bytes(b"".join(kept))
    found = read(run)
    assert [one.kind for one in found] == ["observed"] * 4
    assert found[2] == event(2)
    assert list(found[1].data["observation"]["examples"][0]) == ["f"]
    assert found[1].data["observation"]["Y"] == event(1).data["observation"]["Y"]
    rows = found[3].data["observations"]["examples"]
    assert [list(row) for row in rows] == [["e", "f"], ["f"], ["e", "f"]], "row by row"


# Failing writes


class PowerCut(BaseException):
    """Ends everything at once: nothing is cleaned up after it."""


def write_and_sync(run: Path, monkeypatch: pytest.MonkeyPatch, fail: Callable[[int], None]) -> None:
    """Append an event; `fail` is called with the number of each write and each wait for the disk.

    Half of what is written at a failing write is there.
    """
    steps, write, fsync = itertools.count(), os.write, os.fsync

    def written(descriptor: int, data: bytes) -> int:
        try:
            fail(next(steps))
        except BaseException:
            write(descriptor, bytes(data)[: len(data) // 2])
            raise
        return write(descriptor, data)

    def synced(descriptor: int) -> None:
        fail(next(steps))
        fsync(descriptor)

    store = JsonlStore.open(run)
    store.patience = 0.0
    with store.lock(), monkeypatch.context() as patched:
        patched.setattr(os, "write", written)
        patched.setattr(os, "fsync", synced)
        store.append(event(3))


STEPS = 4  # outcomes, their disk, the line, its disk


def test_the_steps_of_an_event_are_these(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    write_and_sync(run, monkeypatch, seen.append)
    assert seen == list(range(STEPS))


@pytest.mark.parametrize("step", range(STEPS))
def test_an_event_whose_writing_fails_is_not_there_and_can_be_written_again(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], step: int
) -> None:
    before = {path.name: path.read_bytes() for path in run.glob("*s.*")}

    def fail(number: int) -> None:
        if number == step:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StoreError, match="No space left"):
        write_and_sync(run, monkeypatch, fail)
    assert {path.name: path.read_bytes() for path in run.glob("*s.*")} == before
    printed = capsys.readouterr().err.splitlines()[-1]
    assert decode_event(printed.encode()) == event(3), "it is printed with its outcomes"
    JsonlStore.open(run).append(event(3))
    assert read(run) == [event(i) for i in range(4)]


def test_a_disk_that_is_full_for_a_while_keeps_one_copy_of_the_outcomes(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, failures = JsonlStore.open(run), [2, 5]
    steps, write = itertools.count(), os.write

    def written(descriptor: int, data: bytes) -> int:
        if next(steps) in failures:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    size = (run / "outcomes.bin").stat().st_size
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with store.lock():
        monkeypatch.setattr(os, "write", written)
        store.append(event(3))
        store.append(event(4))
    assert (run / "outcomes.bin").stat().st_size < size * 5 / 3 + 100
    assert read(run) == [event(i) for i in range(5)]


def test_outcomes_that_two_write_at_once_where_locks_lie_are_noticed(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, others = os.write, [b"another's"]

    def interrupted(descriptor: int, data: bytes) -> int:
        if others:
            with open(run / "outcomes.bin", "ab") as file:
                file.write(others.pop())
        return write(descriptor, data)

    store = JsonlStore.open(run)
    with store.lock():
        monkeypatch.setattr(os, "write", interrupted)
        with pytest.raises(StoreError, match="another process wrote at the same moment"):
            store.append(event(3))
    assert read(run) == [event(i) for i in range(3)]


def link(path: Path) -> None:
    (path.parent / "elsewhere").write_bytes(b"a file of the user's")
    path.symlink_to(path.parent / "elsewhere")


@pytest.mark.parametrize("put", [link, os.mkfifo, Path.mkdir])
def test_nothing_is_written_through_what_somebody_has_put_there(
    tmp_path: Path, put: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    store = JsonlStore.create(tmp_path)
    store.patience = 0.0
    store.append(Event("created", {}))
    put(tmp_path / "outcomes.bin")
    with pytest.raises(StoreError, match=r"not a regular file|Is a directory"):
        store.append(event(0))
    assert decode_event(capsys.readouterr().err.splitlines()[-1].encode()) == event(0)
    if put is link:
        assert (tmp_path / "elsewhere").read_bytes() == b"a file of the user's"
    assert [one.kind for one in read(tmp_path)] == ["created"]


def test_a_name_that_cannot_be_made_durable_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    store = JsonlStore.create(tmp_path)
    store.patience = 0.0
    with monkeypatch.context() as patched:
        patched.setattr(side_file, "sync_directory", fail)
        with pytest.raises(StoreError, match="Input/output error"):
            store.append(event(0))
    assert (tmp_path / "outcomes.bin").stat().st_size == 0
    store.append(event(0))
    assert read(tmp_path) == [event(0)]


def append_and_die(directory: Path, one: Event, step: int, half: float) -> None:
    """Append an event in a process that kills itself at a step, after a part of what it writes."""
    steps, write, fsync = itertools.count(), os.write, os.fsync

    def written(descriptor: int, data: bytes) -> int:
        if next(steps) == step:
            write(descriptor, bytes(data)[: int(half * len(data))])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(descriptor, data)

    def synced(descriptor: int) -> None:
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    try:
        store = JsonlStore.open(directory)
        with store.lock():
            os.write, os.fsync = written, synced  # type: ignore[assignment]
            store.append(one)
    finally:
        os._exit(1)


@pytest.mark.parametrize(
    ("step", "half", "there"),
    [
        (0, 0.0, False),
        (0, 0.5, False),
        (0, 1.0, False),
        (1, 0.0, False),
        (2, 0.0, False),
        (2, 0.5, False),
        (2, 1.0, True),
        (3, 0.0, True),
    ],
)
def test_a_kill_between_any_two_steps_loses_nothing_and_is_gone_on_from(
    run: Path, step: int, half: float, there: bool
) -> None:
    events = [event(i) for i in range(6)]  # torch is not to be used in the other process
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other threads of this process do not matter there
        child = os.fork()
    if child == 0:
        append_and_die(run, events[3], step, half)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert read(run) == events[: 3 + there]
    store = JsonlStore.open(run)
    for one in events[3 + there :]:
        store.append(one)
    assert read(run) == events


def test_an_interruption_leaves_nothing_behind(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (run / "outcomes.bin").stat().st_size

    def fail(number: int) -> None:
        if number == 2:
            raise PowerCut

    with pytest.raises(PowerCut):
        write_and_sync(run, monkeypatch, fail)
    assert (run / "outcomes.bin").stat().st_size == size


def test_the_new_name_is_durable_before_the_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bool] = []

    def sync(path: Path) -> None:
        synced.append((tmp_path / "events.jsonl").stat().st_size == 0)

    store = JsonlStore.create(tmp_path)
    monkeypatch.setattr(side_file, "sync_directory", sync)
    store.append(event(0))
    store.append(event(1))
    assert synced == [True]


def test_many_that_are_not_small_together_go_beside_the_record(tmp_path: Path) -> None:
    def several(count: int) -> Event:
        names = {f"task {i}": outcomes(5000, seed=i, kind="bits") for i in range(count)}
        seen = Observations(torch.zeros(1, 2), torch.zeros(1, 1), METRICS, examples=(names,))
        return Event("observed", {"observation": encode_observations(seen)}, 1)

    store = JsonlStore.create(tmp_path)
    store.append(several(8))
    assert not (tmp_path / "outcomes.bin").exists()
    store.append(several(20))
    assert (tmp_path / "outcomes.bin").stat().st_size > 20 * 600
    lines = (tmp_path / "events.jsonl").read_bytes().splitlines()
    assert len(lines[1]) < len(lines[0])
    assert read(tmp_path) == [several(8), several(20)]
