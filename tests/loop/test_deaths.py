"""Evaluations in which the process dies, by what an operating system and an evaluator can do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # some forty processes; test_ask_and_tell.py counts without them

FORKS = """
import json, os, signal, sys, time
from pathlib import Path
import torch
from map_bo.loop.run import Run
from map_bo.nested.run import NestedRun
from map_bo.nested.settings import Nested
from map_bo.tracking.jsonl import JsonlStore
from tests.loop.bowls import Bowls, quick
from tests.nested.hills import Hills, VARIANTS, quick as nested_quick

torch.set_num_threads(1)
HOW = {
    "exit": lambda: os._exit(0),
    "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "abort": lambda: os.kill(os.getpid(), signal.SIGABRT),
    "out of memory": lambda: os.kill(os.getpid(), signal.SIGKILL),
}

def process(work):
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(3)  # done, unlike the exit of an evaluator
        except SystemExit as error:
            os._exit(error.code)
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(4)
    return child

def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def store_of(directory):
    there = (directory / "events.jsonl").exists()
    return JsonlStore.open(directory) if there else JsonlStore.create(directory)

def flat(directory, fails, **changes):
    Run(Bowls(fails=fails), quick(8, **changes), store_of(directory)).drive()

def nested(directory, fails):
    how = Nested(**VARIANTS["points"])
    NestedRun(Hills(fails=fails), nested_quick(24), how, store_of(directory)).drive()


root, said = Path(sys.argv[1]), {}
for name, die in HOW.items():
    def fails(number, x):
        if x.tolist() == [1.0, 0.0]:
            die()
    said[name] = [ended(process(lambda: flat(root / name, fails))) for _ in range(4)]

def one(x):
    if x.tolist() == [1.0, 0.0, 0.0, 0.0]:
        os._exit(0)
said["nested"] = [ended(process(lambda: nested(root / "nested", one))) for _ in range(4)]

def late(number, x):
    if number > 6 or (root / "late" / "verifying").exists():
        (root / "late" / "verifying").touch()
        os._exit(0)
said["late"] = [ended(process(lambda: flat(root / "late", late))) for _ in range(6)]

def slow(number, x):
    if x.tolist() == [1.0, 0.0]:
        (root / "asked" / "begun").touch()
        time.sleep(30)
said["asked"] = []
for _ in range(3):
    (root / "asked" / "begun").unlink(missing_ok=True)
    child = process(lambda: flat(root / "asked", slow))
    while not (root / "asked" / "begun").exists():
        time.sleep(0.02)
    os.kill(child, signal.SIGTERM)
    said["asked"].append(ended(child))
said["asked"].append(ended(process(lambda: flat(root / "asked", lambda number, x: None))))
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[int]]]:
    root = tmp_path_factory.mktemp("deaths")
    done = subprocess.run(
        [sys.executable, "-c", FORKS, str(root)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return root, json.loads(done.stdout)


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def failures(run: Path, kind: str) -> list[str]:
    told = (e["data"]["observation"]["failures"][0] for e in events(run) if e["kind"] == kind)
    return [reason for reason in told if reason is not None]


@pytest.mark.parametrize(
    ("how", "status"), [("exit", 0), ("segfault", -11), ("abort", -6), ("out of memory", -9)]
)
def test_a_point_at_which_the_process_dies_is_given_up_and_the_run_goes_on(
    ends: tuple[Path, dict[str, list[int]]], how: str, status: int
) -> None:
    root, codes = ends
    assert codes[how] == [status, status, 3, 3]
    assert failures(root / how, "observed") == ["the process ended during this evaluation 2 times"]
    assert events(root / how)[-1]["kind"] == "finished"


def test_so_is_a_point_of_a_nested_run(ends: tuple[Path, dict[str, list[int]]]) -> None:
    root, codes = ends
    assert codes["nested"] == [0, 0, 3, 3]
    assert "ended during this evaluation 2 times" in (root / "nested/events.jsonl").read_text()


def test_so_is_a_verification(ends: tuple[Path, dict[str, list[int]]]) -> None:
    root, codes = ends
    assert codes["late"] == [0, 0, 0, 0, 3, 3], "two deaths at each of two front points"
    assert len(failures(root / "late", "verified")) == 2
    assert failures(root / "late", "observed") == []


def test_a_process_that_is_asked_to_end_costs_a_point_nothing(
    ends: tuple[Path, dict[str, list[int]]],
) -> None:
    root, codes = ends
    assert codes["asked"] == [143, 143, 143, 3]
    kinds = [event["kind"] for event in events(root / "asked")]
    assert kinds.count("interrupted") == 3
    assert failures(root / "asked", "observed") == []
