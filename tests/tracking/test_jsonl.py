from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from filelock import FileLock

from map_bo.errors import StoreError
from map_bo.tracking.codec import decode_event
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


@pytest.mark.parametrize("tail", [b'{"v":2,"seq":4,"kind":"d"', b"{", b"\0" * 70_000])
def test_a_torn_last_line_is_passed_over_and_cut_by_the_next_writer(run: Path, tail: bytes) -> None:
    whole = (run / "events.jsonl").read_bytes()
    (run / "events.jsonl").write_bytes(whole + tail)
    assert kinds(run) == ["a", "b", "c"]
    # Reading must not change the file: its writer may still be at work.
    assert (run / "events.jsonl").read_bytes() == whole + tail
    JsonlStore.open(run).append(Event("d", {}))
    assert (run / "events.jsonl").read_bytes().startswith(whole + b'{"v":2,"seq":4,"kind":"d"')
    assert kinds(run) == ["a", "b", "c", "d"]
    assert not list(run.glob("*.damaged"))


@pytest.mark.parametrize(
    "bad",
    [b"\0" * 70_000 + b"\n", b'{"v":1,\n', b"[1]\n", b'{"v":1,"kind":"d","time":0,"data":{}}\n'],
)
def test_a_damaged_last_line_is_refused_by_readers_and_set_aside_by_the_next_writer(
    run: Path, bad: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    whole = (run / "events.jsonl").read_bytes()
    (run / "events.jsonl").write_bytes(whole + bad)
    with pytest.raises(StoreError, match="line 4 of") as caught:
        kinds(run)
    assert "lines 1 to 3 are whole" in str(caught.value.hint)
    JsonlStore.open(run).append(Event("d", {}))
    assert kinds(run) == ["a", "b", "c", "d"]
    assert (run / "events.line-4.damaged").read_bytes() == bad
    assert "it was moved to" in caplog.text


def test_a_newline_that_was_changed_is_not_the_mark_of_an_unfinished_line(run: Path) -> None:
    path = run / "events.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"K")
    with pytest.raises(StoreError, match=r"line 3 of .* its newline was changed"):
        kinds(run)
    path.write_bytes(whole[:-1])
    assert kinds(run) == ["a", "b"], "a line without its newline was never acknowledged"


def test_a_last_line_of_a_newer_version_is_left_where_it_is(run: Path) -> None:
    path = run / "events.jsonl"
    path.write_bytes(path.read_bytes() + b'{"v":99,"kind":"d","time":0,"data":{}}\n')
    with pytest.raises(StoreError, match="format is 99"):
        JsonlStore.open(run).append(Event("e", {}))
    assert b'"v":99' in path.read_bytes()


def test_a_file_with_nothing_but_a_torn_line(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_bytes(b"{" * 200_000)
    assert kinds(tmp_path) == []
    JsonlStore.open(tmp_path).append(Event("a", {}))
    assert kinds(tmp_path) == ["a"]


@pytest.mark.parametrize("bad", [b"not json\n", b"\n", b"[1]\n", b'{"v":9,"kind":"b"}\n'])
def test_a_corrupt_line_in_the_middle_is_named(run: Path, bad: bytes) -> None:
    lines = (run / "events.jsonl").read_bytes().splitlines(keepends=True)
    (run / "events.jsonl").write_bytes(lines[0] + bad + lines[2])
    reader = JsonlStore.open(run).read()
    assert next(reader).kind == "a"
    with pytest.raises(StoreError, match=r"line 2 of .*events.jsonl cannot be read") as caught:
        next(reader)
    assert caught.value.hint


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

    monkeypatch.setattr(JsonlStore, "patience", 0.0)
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


@pytest.mark.parametrize("patience", [0.0, 5.0])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_what_finds_no_room_is_kept_and_written_later_or_printed(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    number: int,
    patience: float,
) -> None:
    before = (run / "events.jsonl").read_bytes()
    fsync, calls = os.fsync, []

    def fail_once(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(JsonlStore, "patience", patience)
    monkeypatch.setattr(os, "fsync", fail_once)
    measured = Event("node", {"node": "0", "kind": "observed", "data": {"index": 3}})
    if patience:
        JsonlStore.open(run).append(measured)
        assert kinds(run) == ["a", "b", "c", "node"]
        assert "the event in hand (observed) is kept" in caplog.text
        return
    with pytest.raises(StoreError, match=os.strerror(number)):
        JsonlStore.open(run).append(measured)
    assert (run / "events.jsonl").read_bytes() == before
    line = capsys.readouterr().err.splitlines()[-1]
    assert decode_event(line.encode()) == measured
    (run / "events.jsonl").write_bytes(before + line.encode() + b"\n")
    assert kinds(run) == ["a", "b", "c", "node"], "what was printed is the line itself"


def test_a_half_line_that_could_not_be_cut_off_is_cut_off_later(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = JsonlStore.open(run)

    def full(descriptor: int, size: int = 0) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with store.lock():
        monkeypatch.setattr(JsonlStore, "patience", 0.0)
        monkeypatch.setattr(os, "fsync", full)
        monkeypatch.setattr(os, "ftruncate", full)
        with pytest.raises(StoreError):
            store.append(Event("d", {}))
        monkeypatch.undo()
        store.append(Event("e", {}))
    assert kinds(run) == ["a", "b", "c", "e"]


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


def test_a_lock_whose_descriptor_was_closed_is_let_go_of(run: Path) -> None:
    store = JsonlStore.open(run)
    with store.lock():
        descriptor = store._file_lock._context.lock_file_fd
        assert descriptor is not None
        os.close(descriptor)  # as os.closerange(3, 99) does
        store.append(Event("d", {}))
    with store.lock():  # the handle can take it again
        store.append(Event("e", {}))
    assert kinds(run) == ["a", "b", "c", "d", "e"]


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


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.ENOLCK, "its file system has no locks"),
        (errno.EOPNOTSUPP, "its file system has no locks"),
        (errno.ENOSPC, "free some disk space"),
        (errno.EROFS, "make the run directory and its files writable"),
    ],
)
def test_the_hint_fits_the_reason_why_there_is_no_lock(
    run: Path, monkeypatch: pytest.MonkeyPatch, number: int, hint: str
) -> None:
    def refuse(self: FileLock, blocking: bool = True) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with pytest.raises(StoreError, match="cannot be locked") as caught:
        JsonlStore.open(run).append(Event("d", {}))
    assert str(caught.value.hint).startswith(hint)


# Several writers


def test_a_handle_notices_that_another_has_written_and_overwrites_nothing(run: Path) -> None:
    one, other = JsonlStore.open(run), JsonlStore.open(run)
    one.append(Event("d", {}))
    other.append(Event("e", {}))
    whole = (run / "events.jsonl").read_bytes()
    with pytest.raises(StoreError, match="is not as this process left it: it has") as caught:
        one.append(Event("f", {}))
    assert "another process is writing" in str(caught.value.hint)
    assert (run / "events.jsonl").read_bytes() == whole
    assert [event.kind for event in one.after(4)] == ["e"]
    one.append(Event("f", {}))
    assert kinds(run) == ["a", "b", "c", "d", "e", "f"]


def replaced(path: Path) -> None:
    path.with_name("new").write_bytes(path.read_bytes())
    path.with_name("new").replace(path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def rewritten(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"00")


@pytest.mark.parametrize("change", [replaced, cut, rewritten, Path.unlink])
def test_a_file_that_is_not_as_it_was_left_is_not_written_to(
    run: Path, change: Callable[[Path], None]
) -> None:
    store = JsonlStore.open(run)
    with store.lock():
        store.append(Event("d", {}))
        change(run / "events.jsonl")
        before = {path.name: path.read_bytes() for path in run.glob("events*")}
        with pytest.raises(StoreError, match=r"not as this process left it|cannot be written"):
            store.append(Event("e", {}))
        assert {path.name: path.read_bytes() for path in run.glob("events*")} == before


def test_two_that_write_at_once_where_locks_lie_do_not_both_go_on(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = JsonlStore.open(run), JsonlStore.open(run)
    write, others = os.write, [Event("other", {})]

    def interrupted(descriptor: int, data: bytes) -> int:
        if others:
            event = others.pop()
            monkeypatch.setattr(other, "_locked", lambda step: nullcontext())
            other.append(event)
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", interrupted)
    with pytest.raises(StoreError, match="another process wrote at the same moment"):
        one.append(Event("one", {}))
    assert kinds(run) == ["a", "b", "c", "other"]


STEPS = """
import sys
from pathlib import Path
from map_bo.tracking.jsonl import JsonlStore
from map_bo.tracking.store import Event

store, count = JsonlStore.open(Path(sys.argv[1])), 0
for i in range(20):
    with store.turn():
        count += len(store.after(count))
        store.append(Event("step", {"count": count}))
        count += 1
"""


@pytest.mark.slow
def test_processes_that_take_turns_see_what_the_others_have_written(run: Path) -> None:
    command = [sys.executable, "-c", STEPS, str(run)]
    workers = [subprocess.Popen(command) for _ in range(2)]
    assert [worker.wait(timeout=60) for worker in workers] == [0, 0]
    steps = [event for event in JsonlStore.open(run).read() if event.kind == "step"]
    assert [event.data["count"] for event in steps] == list(range(3, 43))


def test_keeping_a_part_of_a_record_leaves_a_copy_of_all_of_it(run: Path) -> None:
    whole = (run / "events.jsonl").read_bytes()
    for number, copy in enumerate(["before-repair", "before-repair-2"], start=1):
        beside = JsonlStore.open(run).keep(3 - number)
        assert beside.name == f"events.{copy}.jsonl"
    assert (run / "events.before-repair.jsonl").read_bytes() == whole
    assert kinds(run) == ["a"]
    with pytest.raises(StoreError, match=r"the first 2 lines of .* are not whole"):
        JsonlStore.open(run).keep(2)
    assert len(list(run.glob("*repair*"))) == 2
    JsonlStore.open(run).append(Event("b", {}))
    assert kinds(run) == ["a", "b"]
