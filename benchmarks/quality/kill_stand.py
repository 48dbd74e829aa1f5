"""What the kill test stands on: commands in processes of their own, and what their records hold."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.deadly import WAYS, calls
from map_bo.app.record_commands import verdict_of
from map_bo.loop.reading import load_state

PROBLEM = [
    *("problem=digits", "problem._target_=benchmarks.quality.deadly.deadly_digits"),
    *("problem.experts=4", "+problem.epochs=2", "surrogate=quadratic", "solver.points=30"),
    *("sampler=thompson", "loop.budget=16", "loop.verify=2", "progress=false"),
]
QUICK = ["sampler=sobol", "tracking=none"]
RUNS: dict[str, list[str]] = {
    "flat": [],
    "batch": ["loop.batch=3", *QUICK],
    "nested": ["nested=fronts", "loop.budget=18", *QUICK],
    "materialised": ["nested=fronts", "operator=ties", "loop.budget=18", *QUICK],
}
KINDS = {**dict.fromkeys(RUNS, 0.15), "resume": 0.16, "report": 0.12, "export": 0.12}
"""Kind -> its share of the kills."""

MORE = ("always", "sweep")
ALWAYS = (
    *(("flat", how, "invert") for how in WAYS),
    ("nested", "segfault", "invert"),
    ("materialised", "segfault", "base"),  # TIES trims experts, so none is measured as it is
)
"""Kind of run, how its process dies, and at which model."""
SHARDS = (("flat", "batch", "report", *MORE), ("nested", "materialised", "resume", "export"))
"""What each of two processes does with ``--jobs 2``."""

TRUST = ["--trust", "benchmarks"]
PREFER = ["--prefer", "rot90=2", "--prefer", "flip=1"]
MOST = 4  # kills of one trial
EVERY = 29  # a call of the evaluator in so many is the end of its process
PATIENCE = 30  # retries, so that no point is given up: its deaths and kills are fewer
HANGS = 900.0  # seconds after which a command counts as one that hangs, on a busy machine too
LIFE = 20.0  # seconds in which the workers of a killed sweep have to end
FREE = ("started", "interrupted")  # events that a death repeats
CHANCE = ("seconds", "time", "cost", "seq", "sum", "versions", "summary", "config")


@dataclass
class Stand:
    """Where trials take place.

    Attributes:
        root: A folder for everything.
        draw: Random moments.
        faults: What went wrong, in words.
        deaths: Way of an evaluator to die -> how often it did.
        until: When no further trial begins, by `time.monotonic`.
    """

    root: Path
    draw: random.Random
    faults: list[str] = field(default_factory=list)
    deaths: dict[str, int] = field(default_factory=dict)
    until: float = math.inf

    def blame(self, what: str, log: Path | None = None) -> None:
        """Note a fault."""
        said = log.read_text(errors="replace")[-1500:] if log is not None and log.exists() else ""
        self.faults.append(what)
        print(f"FAULT {what}\n{said}", flush=True)


# Processes


def marked_environment(calls_to: Path, more: Mapping[str, str]) -> dict[str, str]:
    return {"MAP_BO_DEADLY_CALLS": str(calls_to), "COLUMNS": "80", **more}


def start(argv: Sequence[str], log: Path, environment: Mapping[str, str], *, forked: bool) -> int:
    """Start a command of map-bo in a process group of its own, and return its number."""
    if not forked:
        with log.open("ab") as file:
            return subprocess.Popen(
                [sys.executable, "-m", "map_bo.app.main", *argv],
                stdout=file,
                stderr=file,
                env={**os.environ, **environment},
                start_new_session=True,
            ).pid
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        with suppress(OSError):
            os.setpgid(child, child)
        return child
    code = 70
    try:
        os.setpgid(0, 0)
        output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(environment)
        code = run_command(argv)
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def run_command(argv: Sequence[str]) -> int:
    """Run a command of map-bo in this process, and return its exit status."""
    import traceback

    from map_bo.app.main import main

    try:
        main(argv)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 71
    return 0


def wait(process: int, seconds: float) -> int | None:
    """Return how a process ended, or None when it still runs after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(0.002)


def kill(process: int) -> None:
    """Kill a process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(process, 0)


# What there is


def events(directory: Path) -> list[bytes]:
    """Return the complete lines of a record."""
    path = directory / "events.jsonl"
    text = path.read_bytes() if path.exists() else b""
    return text[: text.rfind(b"\n") + 1].splitlines(keepends=True)


def _plain(value: Any) -> Any:
    """Return recorded data without times and numbers of lines."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items() if key not in CHANCE}
    return [_plain(part) for part in value] if isinstance(value, list) else value


def story(directory: Path) -> list[Any]:
    """Return what happened in a run, without times, and without that evaluations began."""
    told = [json.loads(line) for line in events(directory)]
    kept = []
    for event in told:
        kind = event["data"].get("kind", "") if event["kind"] == "node" else event["kind"]
        if kind not in FREE:
            kept.append(_plain(event))
    return kept


def is_finished(directory: Path) -> bool:
    """Return whether a run has recorded its end."""
    lines = events(directory)
    return bool(lines) and any(json.loads(line)["kind"] == "finished" for line in lines[-3:])


def files(folder: Path) -> dict[str, str]:
    """Return the files of a folder, by what is in them."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def same(one: Path, two: Path) -> dict[str, bool]:
    """Compare the ends of two runs."""
    (a, _), (b, _) = load_state(one), load_state(two)
    assert a.front is not None
    assert b.front is not None
    return {
        "same evaluations": torch.equal(a.seen.X, b.seen.X)
        and torch.equal(a.seen.Y, b.seen.Y)
        and torch.equal(a.verification.Y, b.verification.Y)
        and a.seen.failures == b.seen.failures,
        "same front": torch.equal(a.front.X, b.front.X) and torch.equal(a.front.mean, b.front.mean),
        "same events": story(one) == story(two),
    }


# Trials of runs


@dataclass
class Whole:
    """A command that nobody killed.

    Attributes:
        directory: What it wrote.
        seconds: How long it took, forked and by the command line.
        calls: How often it called an evaluator.
    """

    directory: Path
    seconds: dict[bool, float]
    calls: int = 0


def run_words(kind: str, directory: Path, retries: int = PATIENCE) -> list[str]:
    """Return the command of a run."""
    more = [*PROBLEM, *RUNS[kind], f"loop.retries={retries}", f"hydra.run.dir={directory}"]
    return ["run", *more]


def next_words(kind: str, directory: Path) -> list[str]:
    """Return the command with which a user goes on."""
    if not events(directory):
        return run_words(kind, directory)
    return ["resume", str(directory), *TRUST]


def warm_up(stand: Stand) -> None:
    """Import here what commands import, learnt from a process that ran them."""
    told = stand.root / "modules"
    child = os.fork()
    if child == 0:
        code = 1
        try:
            directory = stand.root / "warm"
            os.environ.update(marked_environment(stand.root / "none.calls", {}))
            words = run_words("flat", directory)
            out = ["merge", str(directory), *PREFER, "--out", f"{directory}-out", *TRUST]
            log = os.open(stand.root / "warm.log", os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            code = run_command(words) or run_command(["report", str(directory)]) or run_command(out)
            told.write_text("\n".join(sorted(sys.modules)))
        finally:
            os._exit(code)
    if os.waitpid(child, 0)[1] != 0:
        raise SystemExit(f"a first run failed:\n{(stand.root / 'warm.log').read_text()}")
    for name in told.read_text().split("\n"):
        with suppress(Exception):
            importlib.import_module(name)


def _at_work(mark: str) -> list[int]:
    """Return the processes whose environment holds a mark."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z" and mark.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
    return found


def kill_sweep(stand: Stand) -> dict[str, Any]:
    """Kill a joblib sweep's own process, look for orphans, and go on with it."""
    sweep = stand.root / "sweep"
    words = [
        *("run", "-m", *PROBLEM, "seed=0,1,2,3", "loop.budget=12"),
        *("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", f"hydra.sweep.dir={sweep}"),
    ]
    log, counted = sweep.with_suffix(".log"), sweep.with_suffix(".calls")
    process = start(words, log, marked_environment(counted, {}), forked=False)
    end = time.monotonic() + HANGS
    while calls(counted) < 20 and time.monotonic() < end:  # both workers are at their jobs
        time.sleep(0.05)
    workers = len(_at_work(str(counted))) - 1
    os.kill(process, signal.SIGKILL)  # and not its group
    os.waitpid(process, 0)
    begun = time.monotonic()
    while (left := _at_work(str(counted))) and time.monotonic() - begun < LIFE:
        time.sleep(0.05)
    gone = time.monotonic() - begun
    kept = {path.parent.name: events(path.parent) for path in sweep.glob("*/events.jsonl")}
    for orphan in left:
        stand.blame(f"sweep: process {orphan} outlives it")
        with suppress(OSError):
            os.kill(orphan, signal.SIGKILL)
    code = wait(start(words, log, marked_environment(counted, {}), forked=False), HANGS)
    if code != 0:
        stand.blame(f"sweep: gone on with, it ended with {code}", log)
    lost = 0
    for path in sorted(sweep.glob("*/events.jsonl")):
        now, before = events(path.parent), kept.get(path.parent.name, [])
        lost += now[: len(before)] != before
        if not is_finished(path.parent) or verdict_of(path.parent).damage is not None:
            stand.blame(f"sweep: {path.parent.name} has not ended or is damaged")
    row = {
        "workers": workers,
        "orphans": len(left),
        "seconds until they had ended": round(gone, 2),
        "jobs": len(list(sweep.glob("*/events.jsonl"))),
        "records with lost lines": lost,
    }
    if lost or row["jobs"] != 4 or workers < 2:
        stand.blame(f"sweep: {row}", log)
    return row
