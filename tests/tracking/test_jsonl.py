from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from map_bo.errors import StoreError
from map_bo.tracking.jsonl import JsonlStore, MemoryStore
from map_bo.tracking.store import Event, RunStore
from tests.contracts.store_contract import StoreContract, strict


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def store(self) -> RunStore:
        return MemoryStore()


class TestJsonlStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> RunStore:
        return JsonlStore.create(tmp_path / "run")


def kinds(directory: Path) -> list[str]:
    return [event.kind for event in JsonlStore.open(directory).read()]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with the events a, b and c."""
    store = JsonlStore.create(tmp_path / "run")
    for kind in "abc":
        store.append(Event(kind, {"value": float("nan")}))
    return tmp_path / "run"


# Opening and creating


def test_create_makes_parents_and_open_finds_the_events(tmp_path: Path) -> None:
    JsonlStore.create(tmp_path / "a" / "b").append(Event("x", {}))
    assert kinds(tmp_path / "a" / "b") == ["x"]


def test_create_refuses_a_directory_with_events(run: Path) -> None:
    with pytest.raises(StoreError, match="already holds a run") as caught:
        JsonlStore.create(run)
    assert "map-bo resume" in str(caught.value.hint)
    assert kinds(run) == ["a", "b", "c"]


def test_create_takes_over_where_nothing_was_ever_acknowledged(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_bytes(b'{"v":1,"ki')
    JsonlStore.create(tmp_path).append(Event("x", {}))
    assert kinds(tmp_path) == ["x"]


def test_create_explains_a_directory_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be created: Not a directory"):
        JsonlStore.create(tmp_path / "file" / "run")


def test_open_explains_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"holds no run: there is no events\.jsonl"):
        JsonlStore.open(tmp_path / "nothing")


def test_reading_a_file_that_went_away_is_explained(run: Path) -> None:
    store = JsonlStore.open(run)
    (run / "events.jsonl").unlink()
    with pytest.raises(StoreError, match="cannot be read: No such file"):
        list(store.read())


# Torn and corrupt lines


@pytest.mark.parametrize(
    "tail", [b'{"v":1,"kind":"d"', b"{", b"\0" * 70_000, b"\0" * 70_000 + b"\n", b'{"v":1,\n']
)
def test_a_torn_last_line_is_passed_over_and_cut_by_the_next_writer(run: Path, tail: bytes) -> None:
    whole = (run / "events.jsonl").read_bytes()
    (run / "events.jsonl").write_bytes(whole + tail)
    assert kinds(run) == ["a", "b", "c"]
    # Reading must not change the file: its writer may still be at work.
    assert (run / "events.jsonl").read_bytes() == whole + tail
    JsonlStore.open(run).append(Event("d", {}))
    assert (run / "events.jsonl").read_bytes().startswith(whole + b'{"v":1,"kind":"d"')
    assert kinds(run) == ["a", "b", "c", "d"]


def test_a_file_with_nothing_but_a_torn_line(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_bytes(b"{" * 200_000)
    assert kinds(tmp_path) == []
    JsonlStore.open(tmp_path).append(Event("a", {}))
    assert kinds(tmp_path) == ["a"]


@pytest.mark.parametrize("bad", [b"not json\n", b"\n", b"[1]\n", b'{"v":2,"kind":"b"}\n'])
def test_a_corrupt_line_in_the_middle_is_named(run: Path, bad: bytes) -> None:
    lines = (run / "events.jsonl").read_bytes().splitlines(keepends=True)
    (run / "events.jsonl").write_bytes(lines[0] + bad + lines[2])
    reader = JsonlStore.open(run).read()
    assert next(reader).kind == "a"
    with pytest.raises(StoreError, match=r"line 2 of .*events.jsonl cannot be read") as caught:
        next(reader)
    assert caught.value.hint


def test_a_whole_last_line_that_is_no_event_is_an_error_and_is_kept(run: Path) -> None:
    with open(run / "events.jsonl", "ab") as file:
        file.write(b"[1]\n")
    with pytest.raises(StoreError, match="line 4"):
        kinds(run)
    JsonlStore.open(run).append(Event("d", {}))
    assert b"[1]\n" in (run / "events.jsonl").read_bytes()


def test_lines_are_strict_json(run: Path) -> None:
    lines = (run / "events.jsonl").read_bytes().splitlines()
    assert [strict(line)["data"] for line in lines] == [{"value": {"$float": "NaN"}}] * 3


# Failing writes


@pytest.mark.parametrize("written", [0, 1, 20])
def test_a_failing_write_leaves_the_file_as_it_was(
    run: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    before = (run / "events.jsonl").read_bytes()
    store, write = JsonlStore.open(run), os.write
    left = [written]

    def fill(descriptor: int, data: bytes) -> int:
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = write(descriptor, data[: left[0]])
        left[0] -= done
        return done

    with store.lock():
        monkeypatch.setattr(os, "write", fill)
        with pytest.raises(StoreError, match="No space left on device") as caught:
            store.append(Event("d", {}))
        assert caught.value.hint == (
            "free some disk space and resume; no earlier measurement is lost"
        )
        assert (run / "events.jsonl").read_bytes() == before
        monkeypatch.undo()
        store.append(Event("d", {}))
    assert kinds(run) == ["a", "b", "c", "d"]


def test_short_writes_are_finished(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    JsonlStore.open(run).append(Event("d", {"x": "y" * 50}))
    assert kinds(run) == ["a", "b", "c", "d"]


def test_a_failing_fsync_takes_the_event_back(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (run / "events.jsonl").read_bytes()
    fsync, calls = os.fsync, []

    def fail_once(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_once)
    with pytest.raises(StoreError, match="Input/output error"):
        JsonlStore.open(run).append(Event("d", {}))
    assert (run / "events.jsonl").read_bytes() == before


def test_an_interrupted_append_takes_the_event_back(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (run / "events.jsonl").read_bytes()
    calls: list[int] = []

    def interrupt(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        JsonlStore.open(run).append(Event("d", {}))
    assert (run / "events.jsonl").read_bytes() == before


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from map_bo.errors import StoreError
from map_bo.tracking.jsonl import JsonlStore
from map_bo.tracking.store import Event

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
store = JsonlStore.create(Path(sys.argv[1]))
acknowledged = 0
try:
    for i in range(1000):
        store.append(Event("e", {"i": i, "pad": "x" * 700}))
        acknowledged += 1
except StoreError as error:
    print(acknowledged, error.message, sep="|")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    store.append(Event("e", {"i": acknowledged}))
"""


def test_a_full_disk_loses_nothing_and_the_event_can_be_appended_later(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(run)], capture_output=True, text=True, check=True
    )
    count, message = done.stdout.strip().split("|")
    assert 0 < int(count) < 1000
    assert "File too large" in message
    events = list(JsonlStore.open(run).read())
    assert [event.data["i"] for event in events] == list(range(int(count) + 1))


# Kills

KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
from map_bo.tracking.jsonl import JsonlStore
from map_bo.tracking.store import Event

run, dice = Path(sys.argv[1]), random.Random(0)
JsonlStore.create(run)

def write_for_ever(acknowledge):
    store = JsonlStore.open(run)
    with store.lock():
        first = sum(1 for _ in store.read())
        os.write(acknowledge, b"ready\\n")
        for i in range(first, 10**9):
            store.append(Event("e", {"i": i, "pad": "x" * (i % 7) * 3000}))
            os.write(acknowledge, b"%d\\n" % i)

rounds = []
for _ in range(20):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        write_for_ever(write)
    os.close(write)
    with open(read) as out:
        assert out.readline() == "ready\\n"
        time.sleep(dice.uniform(0.0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        said = [int(line) for line in out.read().split("\\n")[:-1]]
    recorded = [event.data["i"] for event in JsonlStore.open(run).read()]
    rounds.append({"said": said, "recorded": recorded})
print(json.dumps(rounds))
"""


def test_a_killed_writer_loses_nothing_that_it_acknowledged(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    acknowledged = before = 0
    for kill in json.loads(done.stdout):
        acknowledged += len(kill["said"])
        assert kill["recorded"] == list(range(len(kill["recorded"])))
        assert kill["said"] == kill["recorded"][before : before + len(kill["said"])]
        # One event may be on the disk whose acknowledgement did not get out in time.
        assert len(kill["recorded"]) - before - len(kill["said"]) in (0, 1)
        before = len(kill["recorded"])
    assert acknowledged > 20


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_line_cut_anywhere_is_never_taken_for_an_event(run: Path, share: float) -> None:
    path = run / "events.jsonl"
    whole = path.read_bytes()
    JsonlStore.open(run).append(Event("d", {"x": [1.0, 2.0], "y": {"z": 12345}}))
    line = path.read_bytes()[len(whole) :]
    cut = int(share * (len(line) - 1))
    path.write_bytes(whole + line[:cut])
    assert kinds(run) == ["a", "b", "c"]
    JsonlStore.open(run).append(Event("e", {}))
    assert kinds(run) == ["a", "b", "c", "e"]


# The lock

HOLDER = """
import sys
from pathlib import Path
from map_bo.tracking.jsonl import JsonlStore

with JsonlStore.open(Path(sys.argv[1])).lock():
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time_works_on_a_run(run: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        store = JsonlStore.open(run)
        who = rf"another process \(pid {holder.pid}, host .+\) is working on this run"
        with pytest.raises(StoreError, match=who), store.lock():
            pass
        with pytest.raises(StoreError, match=who):
            store.append(Event("d", {}))
        assert kinds(run) == ["a", "b", "c"]  # reading goes on
    finally:
        holder.kill()
        holder.communicate()
    with store.lock():
        store.append(Event("d", {}))
    assert kinds(run) == ["a", "b", "c", "d"]


def test_the_lock_may_be_taken_again_by_its_holder_and_is_let_go_of(run: Path) -> None:
    store = JsonlStore.open(run)
    with store.lock(), store.lock():
        assert (run / "run.owner").read_text().startswith(f"pid {os.getpid()}, host ")
        with pytest.raises(StoreError, match="is working on this run"):
            JsonlStore.open(run).append(Event("d", {}))
    assert not (run / "run.owner").exists()
    with JsonlStore.open(run).lock():
        pass


def test_an_error_inside_lets_go_of_the_lock(run: Path) -> None:
    with pytest.raises(ValueError, match="inside"), JsonlStore.open(run).lock():
        raise ValueError("inside")
    JsonlStore.open(run).append(Event("d", {}))


def test_an_unknown_owner_is_said_to_be_unknown(run: Path) -> None:
    with JsonlStore.open(run).lock():
        (run / "run.owner").unlink()
        with pytest.raises(StoreError, match=r"another process \(unknown\)"):
            JsonlStore.open(run).append(Event("d", {}))


def test_a_lock_that_cannot_be_taken_is_explained(run: Path) -> None:
    (run / "run.lock").unlink(missing_ok=True)
    (run / "run.lock").mkdir()
    with pytest.raises(StoreError, match="cannot be locked: Is a directory") as caught:
        JsonlStore.open(run).append(Event("d", {}))
    assert "no measurement is lost" in str(caught.value.hint)
