"""Kill test: what is killed with SIGKILL at random moments and gone on with ends like the rest.

python -m benchmarks.quality.kill [--smoke] [--kills N] [--only KIND ...] [--out FILE.json]

Every trial starts a command, kills its whole process group at a random moment, goes on with it as
a user would, kills that too, and so on; in the end it is left alone and compared with the same
command that nobody killed. Meanwhile the evaluator itself dies in every 29th call, in turn by a
segmentation fault, an abort and an `os._exit(0)`, and whatever died is resumed.

    flat, batch             a run of points one by one, or three at a time
    nested, materialised    a nested run: merges of fronts, or of models that have to be written
    resume                  a run that was cut off anywhere, and whose every resume is killed
    report, export          `map-bo report RUN`, `map-bo merge RUN --out FOLDER`

Checked after every kill: the record is whole, all lines that were complete before are its first
lines, byte by byte, and a report or an export that is there is whole. Checked at the end: `map-bo
check`, every event (but that evaluations began, and seconds), evaluations, front, every file of a
report, every file of an export, and that nothing else is left beside them. Apart from kills, one
point at which the process always dies has to become a failed evaluation, and a killed joblib sweep
has to end its workers.

Most commands run in a process that is forked from one that has imported everything, so that a
kill costs a second; every fifth trial starts the real command line.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.deadly import WAYS, calls
from benchmarks.quality.kill_stand import (
    ALWAYS,
    EVERY,
    HANGS,
    KINDS,
    MORE,
    MOST,
    PREFER,
    RUNS,
    SHARDS,
    TRUST,
    Stand,
    Whole,
    events,
    files,
    is_finished,
    kill,
    kill_sweep,
    marked_environment,
    next_words,
    run_words,
    same,
    start,
    wait,
    warm_up,
)
from benchmarks.record import finish
from map_bo.app.record_commands import verdict_of
from map_bo.errors import MapBoError


class Trial:
    """One run that is killed again and again.

    Args:
        stand: Where.
        kind: Of the run.
        directory: Of the run.
        whole: The same run that nobody killed.
        forked: Whether its processes are forked.
    """

    def __init__(
        self, stand: Stand, kind: str, directory: Path, whole: Whole, *, forked: bool
    ) -> None:
        self.stand, self.kind, self.directory, self.whole = stand, kind, directory, whole
        self.forked = forked
        self.log = directory.with_suffix(".log")
        self.calls = directory.with_suffix(".calls")
        self.kept = events(directory)
        self.lost = self.killed = self.died = 0
        self.moments: list[int] = []
        self.environment = marked_environment(self.calls, {"MAP_BO_DEADLY_EVERY": str(EVERY)})

    def look(self) -> None:
        """Compare the record with what it held before."""
        now = events(self.directory)
        for before, after in zip(self.kept, [*now, *[b""] * len(self.kept)], strict=False):
            self.lost += before != after
        if now:
            try:
                damage = verdict_of(self.directory).damage
            except MapBoError as error:
                damage = error.message
            if damage is not None:
                self.stand.blame(f"{self.name}: the record is damaged: {damage}")
        self.kept = now

    @property
    def name(self) -> str:
        return f"{self.kind} in {self.directory.name}"

    def strike(self) -> bool:
        """Go on, and kill at a random moment; return whether it still ran then.

        One moment in three is one of the time that the run takes; the others follow shortly after
        a random line of the record, because on a busy machine most time is spent on starting.
        """
        words = next_words(self.kind, self.directory)
        draw, length = self.stand.draw, self.whole.seconds[self.forked]
        process = start(words, self.log, self.environment, forked=self.forked)
        if draw.random() < 1 / 3:
            code = wait(process, draw.uniform(0.02, 1.0) * length)
        else:
            # A killed run records its interruptions as well, so it may be the longer one.
            written = len(self.kept)
            lines = draw.randint(written, max(written, len(events(self.whole.directory))))
            code = None
            end = time.monotonic() + HANGS
            while len(events(self.directory)) < lines and code is None:
                code = wait(process, 0.002)
                if time.monotonic() > end:
                    self.stand.blame(f"{self.name}: hangs", self.log)
                    break
            if code is None:
                code = wait(process, draw.uniform(0.0, 0.03))
        if code is None:
            kill(process)
            self.killed += 1
            self.look()
            self.moments.append(len(self.kept))
            return True
        self.ended(code)
        return False

    def ended(self, code: int) -> None:
        """Take note of how a process ended that was not killed."""
        ways = {-signal.SIGSEGV: "segfault", -signal.SIGABRT: "abort", 0: "exit"}
        self.look()
        if code == 0 and is_finished(self.directory):
            return
        if code in ways:
            self.died += 1
            self.stand.deaths[ways[code]] = self.stand.deaths.get(ways[code], 0) + 1
        else:
            self.stand.blame(f"{self.name}: ended with {code}", self.log)

    def to_the_end(self) -> bool:
        """Go on until it has ended; return whether it has."""
        for _ in range(40):
            words = next_words(self.kind, self.directory)
            process = start(words, self.log, self.environment, forked=self.forked)
            code = wait(process, HANGS)
            if code is None:
                kill(process)
                self.stand.blame(f"{self.name}: hangs", self.log)
                return False
            before = len(self.stand.faults)
            self.ended(code)
            if len(self.stand.faults) > before:
                return False
            if code == 0 and is_finished(self.directory):
                return True
        self.stand.blame(f"{self.name}: does not end", self.log)
        return False

    def row(self) -> dict[str, Any]:
        """End it and compare."""
        row: dict[str, Any] = {
            "kind": self.kind,
            "by": "fork" if self.forked else "command line",
            "kills": self.killed,
        }
        if not self.to_the_end():
            return {**row, "ended": False}
        process = start(["check", str(self.directory)], self.log, {}, forked=self.forked)
        if wait(process, HANGS) != 0:
            self.stand.blame(f"{self.name}: map-bo check", self.log)
        if b"Traceback" in self.log.read_bytes():
            self.stand.blame(f"{self.name}: a traceback", self.log)
        found = same(self.whole.directory, self.directory)
        names = [set(os.listdir(each)) for each in (self.whole.directory, self.directory)]
        found["same files"] = names[0] == names[1]
        for what, good in found.items():
            if not good:
                self.stand.blame(f"{self.name}: not the {what} {names[0] ^ names[1] or ''}")
        if self.lost:
            self.stand.blame(f"{self.name}: {self.lost} lines were lost or changed")
        return {
            **row,
            "ended": True,
            "at events": self.moments,
            "deaths": self.died,
            "lines lost": self.lost,
            "measurements kept": sum(
                any(f'"{kind}"'.encode() in line for kind in ("observed", "verified", "measured"))
                for line in self.kept
            ),
            "calls repeated": calls(self.calls) - self.whole.calls,
            **found,
        }


def whole_run(stand: Stand, kind: str, *, shell: bool) -> Whole:
    """Make a run that nobody kills, forked, and again by the command line where trials are."""
    seconds: dict[bool, float] = {}
    for name, forked in (("whole", True), *([("shell", False)] * shell)):
        directory = stand.root / f"{kind}-{name}"
        log, counted = directory.with_suffix(".log"), directory.with_suffix(".calls")
        begun = time.perf_counter()
        words = run_words(kind, directory)
        code = wait(start(words, log, marked_environment(counted, {}), forked=forked), HANGS)
        seconds[forked] = time.perf_counter() - begun
        if code != 0:
            stand.blame(f"{kind}: a run that nobody killed ended with {code}", log)
            raise SystemExit(1)
    whole = stand.root / f"{kind}-whole"
    for what, good in same(whole, stand.root / f"{kind}-shell").items() if shell else ():
        if not good:
            stand.blame(f"{kind}: the same run again has not the {what}")
    return Whole(whole, seconds, calls(whole.with_suffix(".calls")))


def cut(whole: Path, directory: Path, draw: random.Random) -> None:
    """Leave a run as one that was cut off in the middle of a line, or after one."""
    lines = events(whole)
    count = draw.randrange(1, len(lines))
    rest = lines[count][: draw.randrange(len(lines[count]))] if draw.random() < 0.5 else b""
    directory.mkdir()
    shutil.copytree(whole / ".hydra", directory / ".hydra")
    shutil.copy(whole / "run.log", directory / "run.log")
    (directory / "events.jsonl").write_bytes(b"".join(lines[:count]) + rest)


def kill_runs(stand: Stand, kind: str, wanted: int, wholes: dict[str, Whole]) -> list[Any]:
    """Kill runs of one kind until so many kills have struck."""
    rows: list[Any] = []
    struck = 0
    while struck < wanted and time.monotonic() < stand.until:
        number = len(rows)
        of = stand.draw.choice([name for name in RUNS if name in wholes])
        of = of if kind == "resume" else kind
        whole = wholes[of]
        forked = number % 5 != 1 or False not in whole.seconds
        directory = stand.root / f"{kind}-{number}"
        if kind == "resume":
            cut(whole.directory, directory, stand.draw)
        trial = Trial(stand, of, directory, whole, forked=forked)
        for _ in range(3 * MOST):
            if trial.killed >= min(MOST, wanted - struck) or is_finished(directory):
                break
            trial.strike()
        row = {**trial.row(), "kind": kind, "of": of}
        if kind == "resume":
            row.pop("calls repeated", None)  # it began with measurements of another
        struck += row["kills"]
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


# Trials of what is written from a run


def _strike(
    stand: Stand, words: list[str], log: Path, seconds: float, place: Path, *, forked: bool
) -> int | None:
    """Kill a command at a random moment, or shortly after it began to write in a folder."""
    before = set(os.listdir(place))
    process = start(words, log, marked_environment(stand.root / "none.calls", {}), forked=forked)
    if stand.draw.random() < 0.4:
        code = wait(process, stand.draw.uniform(0.02, 1.0) * seconds)
    else:
        end = time.monotonic() + 3 * seconds + 5.0
        while set(os.listdir(place)) == before and time.monotonic() < end:
            time.sleep(0.0005)
            code = wait(process, 0.0)
            if code is not None:
                return code
        code = wait(process, stand.draw.uniform(0.0, 0.05))
    if code is None:
        kill(process)
    return code


def _seconds(words: Callable[[Path], list[str]], stand: Stand, name: str) -> dict[bool, float]:
    found = {}
    for forked in (True, False):
        out = stand.root / f"{name}-{'forked' if forked else 'shell'}"
        begun = time.perf_counter()
        log = out.with_suffix(".log")
        environment = marked_environment(stand.root / "none.calls", {})
        code = wait(start(words(out), log, environment, forked=forked), HANGS)
        found[forked] = time.perf_counter() - begun
        if code != 0:
            stand.blame(f"{name}: ended with {code} although nobody killed it", log)
            raise SystemExit(1)
    return found


def kill_writers(
    stand: Stand, kind: str, wanted: int, of: str, whole: Whole, *, shell: bool
) -> list[Any]:
    """Kill reports or exports of a finished run until so many kills have struck."""
    record = (whole.directory / "events.jsonl").read_bytes()

    def words(out: Path) -> list[str]:
        if kind == "report":
            return ["report", str(whole.directory), "--out", str(out)]
        return ["merge", str(whole.directory), *PREFER, "--out", str(out), *TRUST]

    seconds = _seconds(words, stand, f"{kind}-{of}")
    expected = files(stand.root / f"{kind}-{of}-forked")
    if expected != files(stand.root / f"{kind}-{of}-shell"):
        stand.blame(f"{kind}: made twice, it has other files")
    rows: list[Any] = []
    struck = tries = 0
    while struck < wanted and tries < 5 * wanted and time.monotonic() < stand.until:
        number = len(rows)
        forked = not shell or number % 5 != 1
        place = stand.root / f"{kind}-{of}-{number}"
        place.mkdir()
        out, log, killed, seen = place / "out", place.with_suffix(".log"), 0, []
        if kind == "report":
            out.mkdir()
        watched = out if kind == "report" else place
        for _ in range(min(MOST, wanted - struck)):
            tries += 1
            code = _strike(stand, words(out), log, seconds[forked], watched, forked=forked)
            killed += code is None
            there = out.exists()
            seen.append(sorted(set(os.listdir(watched))))
            if kind == "report":
                half = {n for n, h in files(out).items() if n in expected and expected[n] != h}
            else:
                half = {"out"} if there and files(out) != expected else set()
            if half:
                stand.blame(f"{kind}: {half} of {place.name} is there and not whole")
            if code is not None and code != 0:
                stand.blame(f"{kind} in {place.name}: ended with {code}", log)
            if kind == "export" and there:
                break  # it was finished before the kill
        if kind == "report" or not out.exists():
            code = wait(
                start(
                    words(out),
                    log,
                    marked_environment(stand.root / "none.calls", {}),
                    forked=forked,
                ),
                HANGS,
            )
            if code != 0:
                stand.blame(f"{kind} in {place.name}: afterwards it ended with {code}", log)
        found = {
            "same files": files(out) == expected,
            "nothing beside": os.listdir(place) == ["out"],
            "same record": (whole.directory / "events.jsonl").read_bytes() == record,
        }
        for what, good in found.items():
            if not good:
                stand.blame(f"{kind} in {place.name}: not {what}: {os.listdir(place)}", log)
        if log.exists() and b"Traceback" in log.read_bytes():
            stand.blame(f"{kind} in {place.name}: a traceback", log)
        by = "fork" if forked else "command line"
        row = {"kind": kind, "of": of, "by": by, "kills": killed, "left": seen, **found}
        rows.append(row)
        print(json.dumps(row), flush=True)
        struck += killed
    return rows


# A point at which the process always dies, and a killed sweep


def given_up(stand: Stand, kind: str, how: str, model: str) -> dict[str, Any]:
    """Resume a run whose evaluator dies at one point for ever, until the run has ended."""
    directory = stand.root / f"always-{kind}-{how}"
    log, counted = directory.with_suffix(".log"), directory.with_suffix(".calls")
    more = {"MAP_BO_DEADLY_EXPERT": model, "MAP_BO_DEADLY_HOW": how}
    processes = 0
    while not is_finished(directory) and processes < 12:
        words = next_words(kind, directory)
        if words[0] == "run":
            words = run_words(kind, directory, retries=1)
        processes += 1
        code = wait(start(words, log, marked_environment(counted, more), forked=True), HANGS)
        if code is None or code not in (0, -signal.SIGSEGV, -signal.SIGABRT):
            stand.blame(f"a point that always ends in {how} ({kind}): exit status {code}", log)
            break
    text = b"".join(events(directory)).decode()
    row = {
        "kind": kind,
        "how": how,
        "processes": processes,
        "ended": is_finished(directory),
        "failed evaluation": "the process ended during this evaluation 2 times" in text,
    }
    if not row["ended"] or not row["failed evaluation"]:
        stand.blame(f"a point that always ends in {how} ({kind}): {row}", log)
    return row


# All of it


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the table of what was killed."""
    lines = [
        "| killed | kills (by the command line) | deaths in the evaluator | trials "
        "| measurements lost | same evaluations or files | same front |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in (*KINDS, "all"):
        of = [row for row in rows if kind in (row["kind"], "all")]
        if not of:
            continue
        kills = sum(row["kills"] for row in of)
        shell = sum(row["kills"] for row in of if row["by"] != "fork")
        runs = [row for row in of if "same files" in row and "left" not in row]
        equal = sum(
            all(row.get(key, True) for key in ("same evaluations", "same events", "same files"))
            and row.get("ended", True)
            for row in of
        )
        front = f"{sum(row['same front'] for row in runs)}" if runs else "-"
        died = f"{sum(row.get('deaths', 0) for row in of)}" if runs else "-"
        lost = sum(row.get("lines lost", 0) for row in of)
        name = {"materialised": "nested, materialised"}.get(kind, kind)
        lines.append(
            f"| {name} | {kills} ({shell}) | {died} | {len(of)} | {lost} | {equal} | {front} |"
        )
    return lines


def trials(
    kinds: Sequence[str], kills: int, seed: int, *, smoke: bool, shell: bool, until: float
) -> dict[str, Any]:
    """Do the trials of some kinds and return what came of them.

    Args:
        kinds: Kinds of ``KINDS`` and ``MORE``.
        kills: Kills of all kinds together.
        seed: Of the random moments.
        smoke: Whether to kill each kind once.
        shell: Whether every fifth trial starts the real command line.
        until: When no further trial begins, by `time.monotonic`.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        stand = Stand(Path(scratch), random.Random(seed), until=until)
        warm_up(stand)
        runs = [kind for kind in RUNS if kind in kinds or "resume" in kinds]
        if not runs and not set(kinds) <= set(MORE):
            runs = ["flat"]
        wholes = {kind: whole_run(stand, kind, shell=shell) for kind in runs}
        rows: list[Any] = []
        for kind in kinds:
            wanted = 1 if smoke else round(KINDS.get(kind, 0) * kills)
            if kind == "report":
                of = next(iter(wholes))
                rows += kill_writers(stand, kind, wanted, of, wholes[of], shell=shell)
            elif kind == "export":  # of the first and the last
                ends = list(wholes)[:: max(1, len(wholes) - 1)]
                for of in ends:
                    part = wanted // len(ends)
                    rows += kill_writers(stand, kind, part, of, wholes[of], shell=shell)
            elif kind in KINDS:
                rows += kill_runs(stand, kind, wanted, wholes)
        always: list[Any] = []
        if "always" in kinds:
            always = [given_up(stand, *each) for each in ALWAYS]
        sweep = [kill_sweep(stand)] if "sweep" in kinds else []
        for row in (*always, *sweep):
            print(json.dumps(row), flush=True)
        return {
            "rows": rows,
            "deaths": stand.deaths,
            "always": always,
            "sweep": sweep,
            "faults": stand.faults,
            "seconds of whole runs": {
                kind: {"fork" if forked else "command line": s for forked, s in one.seconds.items()}
                for kind, one in wholes.items()
            },
        }


def in_shards(kills: int, seed: int) -> dict[str, Any]:
    """Do the trials of all kinds in two processes at a time; return what came of them."""
    with tempfile.TemporaryDirectory() as scratch:
        outs = [Path(scratch) / f"{number}.json" for number in range(len(SHARDS))]
        base = [sys.executable, "-m", "benchmarks.quality.kill", "--kills", str(kills)]
        processes = [
            subprocess.Popen([*base, "--seed", str(seed + i), "--only", *kinds, "--out", str(out)])
            for i, (kinds, out) in enumerate(zip(SHARDS, outs, strict=True))
        ]
        for process in processes:
            process.wait()
        return joined(outs)


def joined(parts: Sequence[Path]) -> dict[str, Any]:
    """Return what came of the trials that several files record."""
    data: dict[str, Any] = {}
    for part in parts:
        for key, value in json.loads(part.read_text())["data"].items():
            if isinstance(value, list):
                data[key] = data.get(key, []) + value
            elif key == "deaths":
                before = data.get(key, {})
                data[key] = {how: before.get(how, 0) + value.get(how, 0) for how in WAYS}
            elif isinstance(value, dict):
                data[key] = {**data.get(key, {}), **value}
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one kill of three kinds each")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--only", nargs="+", choices=[*KINDS, *MORE], default=[*KINDS, *MORE])
    parser.add_argument("--jobs", type=int, default=1, choices=(1, 2), help="processes at a time")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--forked", action="store_true", help="no trial by the command line")
    parser.add_argument("--minutes", type=float, default=math.inf, help="then begin no trial")
    parser.add_argument("--join", nargs="+", type=Path, help="only join what these files record")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)  # before any fork: a pool of threads would not survive it
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    begun, until = time.perf_counter(), time.monotonic() + 60 * options.minutes
    if options.join:
        data = joined(options.join)
    elif options.jobs > 1:
        data = in_shards(options.kills, options.seed)
    else:
        kinds = ["flat", "report", "export"] if options.smoke else options.only
        data = trials(
            kinds,
            options.kills,
            options.seed,
            smoke=options.smoke,
            shell=not (options.smoke or options.forked),
            until=until,
        )
    data.setdefault("seconds", []).append(time.perf_counter() - begun)
    finish("kill", table(data["rows"]), data, options.out)
    if data["faults"]:
        raise SystemExit(f"{len(data['faults'])} faults, the first: {data['faults'][0]}")


if __name__ == "__main__":
    main()
