"""The store of measurements: exact, shared by processes, and never a reason for a run to end."""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from map_bo.errors import ConfigError
from map_bo.evaluators.evaluator import Measurement
from map_bo.problems.evaluation_cache import (
    EVALUATIONS_VARIABLE,
    CachedMeasurements,
    EvaluationCache,
    read_cache,
)

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
ENTRY = CachedMeasurements("math", {"value": Measurement(0.1 + 0.2, 1e-300, 7)}, 2.5)


@pytest.fixture
def store(tmp_path: Path) -> EvaluationCache:
    return EvaluationCache(tmp_path / "folder" / "kept.sqlite", timeout=1.0)


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=5),
        st.builds(
            Measurement,
            NUMBERS,
            st.none() | NUMBERS.map(abs),
            st.none() | st.integers(1, 10**9),
        ),
        min_size=1,
        max_size=3,
    ),
    st.floats(0, 1e9),
)
def test_what_comes_back_is_what_was_put_bit_for_bit(
    metrics: dict[str, Measurement], seconds: float
) -> None:
    entry = CachedMeasurements("one", metrics, seconds)
    back = CachedMeasurements._of("one", entry._content())
    assert back == entry
    # Equality of floats does not tell the zeros apart.
    assert [m.value.hex() for m in back.metrics.values()] == [
        m.value.hex() for m in metrics.values()
    ]


def test_only_what_was_put_is_there(store: EvaluationCache) -> None:
    assert store.get(["a"]) == {}
    assert not store.path.exists()  # nothing is written by looking
    store.put({"a": ENTRY, "b": CachedMeasurements("code", {"x": Measurement(1.0)}, 0.5)})
    assert store.get(["a", "c"]) == {"a": ENTRY}
    again = EvaluationCache(store.path)
    assert again.get(["a"])["a"].metrics["value"] == Measurement(0.1 + 0.2, 1e-300, 7)
    told = again.describe()
    assert told["entries"] == {"code": 1, "math": 1}
    assert told["seconds"] == 3.0
    assert again.clear() == 2
    assert again.get(["a"]) == {}
    assert again.describe()["entries"] == {}


def test_more_keys_than_one_query_takes(store: EvaluationCache) -> None:
    store.put({f"key {i}": ENTRY for i in range(1203)})
    assert len(store.get(f"key {i}" for i in range(1300))) == 1203


def test_an_entry_that_was_changed_is_none(store: EvaluationCache) -> None:
    store.put({"a": ENTRY, "b": ENTRY})
    connection = sqlite3.connect(store.path)
    connection.execute("UPDATE evaluations SET content = replace(content, '7', '8') WHERE key='a'")
    connection.commit()
    connection.close()
    assert set(store.get(["a", "b"])) == {"b"}
    store.put({"a": ENTRY})
    assert set(store.get(["a", "b"])) == {"a", "b"}


@pytest.mark.parametrize("damage", ["text", "cut", "middle", "columns"])
def test_a_damaged_file_is_set_aside(
    store: EvaluationCache, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store.put({f"key {i}": ENTRY for i in range(300)})
    content = store.path.read_bytes()
    if damage == "text":
        store.path.write_bytes(b"not a database at all, but text " * 50)
    elif damage == "cut":
        store.path.write_bytes(content[: len(content) // 2 - 100])
    elif damage == "middle":
        store.path.write_bytes(content[:100] + b"\xff" * (len(content) - 100))
    else:
        store.path.unlink()
        connection = sqlite3.connect(store.path)
        connection.execute("CREATE TABLE evaluations (key TEXT, other TEXT)")
        connection.commit()
        connection.close()
    with caplog.at_level(logging.WARNING):
        assert store.get([f"key {i}" for i in range(300)]) == {}
        store.put({"a": ENTRY})
    assert store.get(["a"]) == {"a": ENTRY}
    assert "is damaged" in caplog.text
    assert len(list(store.path.parent.glob("kept.sqlite.damaged-*"))) == 1


def test_a_file_that_cannot_be_written_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    store = EvaluationCache(tmp_path / "file" / "kept.sqlite")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            store.put({"a": ENTRY})
            assert store.get(["a"]) == {}
    assert len(caplog.records) == 1
    assert "cannot be used" in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_file_that_can_only_be_read_is_read(store: EvaluationCache) -> None:
    store.put({"a": ENTRY})
    store.path.chmod(0o400)
    store.path.parent.chmod(0o500)
    try:
        assert store.get(["a"]) == {"a": ENTRY}
    finally:
        store.path.parent.chmod(0o700)


def test_a_file_that_stays_locked_is_left_alone(
    store: EvaluationCache, caplog: pytest.LogCaptureFixture
) -> None:
    store.put({"a": ENTRY})
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    quick = EvaluationCache(store.path, timeout=0.05)
    with caplog.at_level(logging.WARNING):
        begun = time.perf_counter()
        for _ in range(20):
            quick.put({"b": ENTRY})
            assert quick.get(["a"]) == {}
    assert time.perf_counter() - begun < 1.5
    assert len(caplog.records) == 1
    other.close()
    assert set(store.get(["a", "b"])) == {"a"}


WRITER = """
    import sys
    from map_bo.evaluators.evaluator import Measurement
    from map_bo.problems.evaluation_cache import CachedMeasurements, EvaluationCache

    store = EvaluationCache(sys.argv[1], timeout=60)
    print("ready", flush=True)
    sys.stdin.readline()
    for i in range(int(sys.argv[3])):
        entry = CachedMeasurements(sys.argv[2], {"value": Measurement(i / 7)}, 1.0)
        store.put({f"{sys.argv[2]} {i}": entry, f"both {i}": entry})
        if i == 3:
            print("under way", flush=True)
"""


def writer(store: EvaluationCache, name: str, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(store.path), name, str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def start(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_processes_that_write_at_once_lose_nothing(store: EvaluationCache) -> None:
    names = ["one", "two", "three"]
    processes = [writer(store, name, 40) for name in names]
    start(processes)
    for process in processes:
        process.communicate(timeout=100)
        assert process.returncode == 0
    keys = [f"{name} {i}" for name in [*names, "both"] for i in range(40)]
    found = store.get(keys)
    assert set(found) == set(keys)
    assert all(found[f"two {i}"].metrics["value"].value == i / 7 for i in range(40))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_writer_that_is_killed_leaves_whole_entries(store: EvaluationCache) -> None:
    process = writer(store, "one", 100_000)
    start([process])
    assert process.stdout is not None
    assert process.stdout.readline() == "under way\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    found = store.get([f"{name} {i}" for name in ("one", "both") for i in range(2000)])
    assert len(found) % 2 == 0  # both of a pair, or neither
    assert len(found) >= 8
    store.put({"after": ENTRY})
    assert store.get(["after"]) == {"after": ENTRY}


def test_what_a_user_may_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EVALUATIONS_VARIABLE, "off")
    assert read_cache(True) is None
    assert read_cache(False) is None
    given = EvaluationCache(tmp_path / "own")
    assert read_cache(given) is given
    named = read_cache(str(tmp_path / "named"))
    assert named is not None
    assert named.path == tmp_path / "named"
    monkeypatch.setenv(EVALUATIONS_VARIABLE, str(tmp_path / "of the environment"))
    usual = read_cache(None)
    assert usual is not None
    assert usual.path == tmp_path / "of the environment"
    monkeypatch.delenv(EVALUATIONS_VARIABLE)
    monkeypatch.setenv("MAP_BO_CACHE", str(tmp_path))
    usual = read_cache(True)
    assert usual is not None
    assert usual.path.parent == tmp_path
    with pytest.raises(ConfigError, match="cache must be true, false or the path"):
        read_cache(3)


@pytest.mark.parametrize(
    "outcomes",
    [
        torch.tensor([[1.0], [0.0], [1.0]] * 7, dtype=torch.float64),
        torch.tensor([[0.1, 1.0], [torch.nan, -2e300], [3.0, 0.0]], dtype=torch.float64),
        torch.zeros(1, 3, dtype=torch.float64),
        None,
    ],
    ids=["bits", "numbers", "one example", "none"],
)
def test_outcomes_of_examples_come_back_to_the_last_bit(
    outcomes: torch.Tensor | None, tmp_path: Path
) -> None:
    cache = EvaluationCache(tmp_path / "cache.sqlite")
    cache.put({"key": CachedMeasurements("a", {"m": Measurement(0.5)}, 1.0, outcomes)})
    found = cache.get(["key"])["key"]
    if outcomes is None:
        assert found.outcomes is None
    else:
        assert found.outcomes is not None
        assert found.outcomes.dtype == torch.float64
        assert torch.equal(found.outcomes.nan_to_num(7.0), outcomes.nan_to_num(7.0))
        assert torch.equal(found.outcomes.isnan(), outcomes.isnan())


def test_entries_from_before_outcomes_were_kept_are_read() -> None:
    old = CachedMeasurements._of("a", '[[["m", 0.5, null, null]], 2.0]')
    assert (old.metrics, old.seconds, old.outcomes) == ({"m": Measurement(0.5)}, 2.0, None)
