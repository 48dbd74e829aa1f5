"""Workers that are killed: nothing is lost, nothing is told twice, and the run ends.

python -m benchmarks.reliability.workers_faults [--smoke] [--kills N] [--only KIND ...] [--out FILE]

Runs on workers of a kind (processes, a Ray cluster, a Dask cluster) are struck at random moments,
until so many strikes have hit. Who is struck: a worker, the driver, or both at once. How:

    SIGKILL, SIGSTOP    by a signal, as an operator or a machine does it. A worker that is stopped
                        stays so until its time limit; a driver goes on, or is killed then
    segfault            in native code: in the evaluator, or by the same signal to the driver
    out of memory       a limit on the address space, at which native code aborts; of the driver
                        Python raises MemoryError, if it asks for more

A driver that has ended is started again, as a user resumes a run. Checked at the end of each run:
it has ended, its record is whole and still begins with every line that it had at a strike, no
result is missing, failed or told twice, and all rows are, bit by bit, those of a run that nobody
disturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.record import finish
from benchmarks.reliability.worker_stand import (
    KINDS,
    driver_words,
    faults_of,
    lines,
    observed,
    traces,
)

VICTIMS = ("worker", "driver", "both")
WAYS = ("SIGKILL", "SIGSTOP", "segfault", "out of memory")
PACKAGE = {"ray": "ray", "dask": "distributed", "processes": "pebble"}
BUDGET = 24
SECONDS = 0.4
LIMIT = 6.0  # seconds that an evaluation may take
HANGS = 400.0  # seconds without a new line of the record after which a run counts as one that hangs
STORE = str(80 * 2**20)
MOST = 6  # strikes of one run


@contextmanager
def cluster(kind: str, folder: Path) -> Iterator[str | None]:
    """Start what the workers of a kind need: nothing, or a cluster of two nodes or workers."""
    if kind == "processes":
        yield None
        return
    python, started = sys.executable, []

    def start(name: str, *words: str) -> None:
        with (folder / f"{name}.log").open("ab") as file:
            process = subprocess.Popen(
                [python, "-m", *words], stdout=file, stderr=file, start_new_session=True
            )
        started.append(process)

    port = str(free_port())
    try:
        if kind == "dask":
            address = f"tcp://127.0.0.1:{port}"
            start(
                "head",
                *["dask", "scheduler", "--no-dashboard", "--host", "127.0.0.1", "--port"],
                port,
            )
            common = ["--no-dashboard", *("--nthreads", "1"), *("--memory-limit", "0")]
            for number in range(2):
                start(f"node-{number}", "dask", "worker", address, *common)
        else:
            here = import_module("ray").util.get_node_ip_address()
            address = f"{here}:{port}"
            common = f"--block --disable-usage-stats --object-store-memory {STORE}".split()
            ray = ("ray.scripts.scripts", "start", *common)
            head = f"--head --port {port} --num-cpus 0 --include-dashboard false".split()
            start("head", *ray, *head, "--node-ip-address", here)
            time.sleep(15)
            for number in range(2):
                start(f"node-{number}", *ray, "--address", address, "--num-cpus", "1")
        time.sleep(15)
        yield address
    finally:
        for process in reversed(started):
            for sign in (signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, sign)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                    if sign == signal.SIGTERM:
                        time.sleep(1)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


class Trial:
    """One run that is struck again and again.

    Args:
        kind: Of its workers.
        folder: Where it takes place.
        address: Of the cluster.
        draw: Random moments.
    """

    def __init__(self, kind: str, folder: Path, address: str | None, draw: random.Random) -> None:
        self.kind, self.folder, self.draw = kind, folder, draw
        self.words = driver_words(
            kind, folder, address=address, budget=BUDGET, seconds=SECONDS, timeout=LIMIT
        )
        self.log = folder / "driver.log"
        self.faults: list[str] = []
        self.strikes: list[str] = []
        self.resumes = -1
        self.kept: list[bytes] = []
        self.driver = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        self.resumes += 1
        with self.log.open("ab") as file:
            return subprocess.Popen(self.words, stdout=file, stderr=file, start_new_session=True)

    def look(self) -> None:
        """Compare the record with what it held before."""
        now = lines(self.folder)
        if now[: len(self.kept)] != self.kept:
            self.faults.append("lines of the record were lost or changed")
        self.kept = now

    def until(self, begun: int) -> bool:
        """Wait for so many evaluations to have begun; return whether the run goes on then.

        Whatever has ended is started again.
        """
        quiet = time.monotonic()
        while len(traces(self.folder)) < begun:
            if not self.revive():
                return False
            time.sleep(0.05)
            if time.monotonic() - quiet > HANGS:
                self.faults.append(f"nothing has happened for {HANGS:g} s")
                return False
        return self.driver.poll() is None

    def revive(self) -> bool:
        """Start the driver again where it has ended before the run; return whether it runs."""
        code = self.driver.poll()
        if code == 0:
            return False
        if code is not None:
            self.look()
            if self.resumes > 60:
                self.faults.append("the run does not end")
                return False
            self.driver = self.start()
        return True

    def worker(self) -> int | None:
        """Return a process that evaluates, the latest that began."""
        for process, _, _ in reversed(traces(self.folder)[-4:]):
            with suppress(OSError):
                state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
                if state not in "ZT" and process != self.driver.pid:
                    return int(process)
        return None

    def strike(self, victim: str, way: str) -> bool:
        """Strike once something is being evaluated; return whether it hit."""
        if not self.until(len(traces(self.folder)) + self.draw.randint(1, 4)):
            return False
        time.sleep(self.draw.uniform(0.0, SECONDS))
        self.look()
        hit = victim == "driver" or self.strike_worker(way)
        if hit and victim != "worker":
            self.strike_driver(way)
        self.look()
        if hit:
            self.strikes.append(f"{victim}: {way}")
        return hit

    def strike_worker(self, way: str) -> bool:
        if way in ("segfault", "out of memory"):
            (self.folder / "doom.new").write_text(way)
            os.rename(self.folder / "doom.new", self.folder / "doom")
            end = time.monotonic() + 30
            while (self.folder / "doom").exists() and time.monotonic() < end:
                if self.driver.poll() is not None:
                    break
                time.sleep(0.02)
            missed = (self.folder / "doom").exists()
            (self.folder / "doom").unlink(missing_ok=True)
            return not missed
        process = self.worker()
        if process is None:
            return False
        try:
            os.kill(process, signal.SIGKILL if way == "SIGKILL" else signal.SIGSTOP)
        except ProcessLookupError:
            return False
        return True

    def strike_driver(self, way: str) -> None:
        process = self.driver
        with suppress(ProcessLookupError):
            if way == "SIGSTOP":
                os.kill(process.pid, signal.SIGSTOP)
                time.sleep(self.draw.uniform(0.5, 4.0))
                goes_on = self.draw.random() < 0.5
                os.kill(process.pid, signal.SIGCONT if goes_on else signal.SIGKILL)
                if goes_on:
                    return
            elif way == "out of memory":
                # Of what it has, nothing more: whatever asks for memory gets an error.
                used = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0])
                room = used * os.sysconf("SC_PAGE_SIZE") + 2**20
                resource.prlimit(process.pid, resource.RLIMIT_AS, (room, room))
                return
            else:
                os.kill(process.pid, signal.SIGKILL if way == "SIGKILL" else signal.SIGSEGV)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)

    def end(self) -> None:
        """Go on until the run has ended."""
        count, quiet = len(lines(self.folder)), time.monotonic()
        while self.revive():
            if len(lines(self.folder)) != count:
                count, quiet = len(lines(self.folder)), time.monotonic()
            if time.monotonic() - quiet > HANGS:
                self.faults.append(f"nothing was recorded for {HANGS:g} s: the run hangs")
                break
            time.sleep(0.1)
        self.look()

    def clear(self) -> None:
        if self.driver.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.driver.pid, signal.SIGKILL)
            self.driver.wait()
        for process in {int(process) for process, _, _ in traces(self.folder)}:
            with suppress(OSError):  # one that was stopped, and that nobody has ended since
                if "Traced" in Path(f"/proc/{process}/environ").read_text(errors="replace"):
                    os.kill(process, signal.SIGCONT)


def run(
    kind: str, folder: Path, whole: Path, address: str | None, draw: random.Random, wanted: int
) -> dict[str, Any]:
    """Strike one run a few times, let it end, and compare."""
    folder.mkdir()
    trial = Trial(kind, folder, address, draw)
    begun = time.monotonic()
    try:
        for _ in range(3 * wanted):
            if len(trial.strikes) >= wanted or sum(observed(folder).values()) >= BUDGET - 3:
                break
            victim = draw.choices(VICTIMS, (4, 2, 2))[0]
            if not trial.strike(victim, draw.choice(WAYS)) and trial.driver.poll() == 0:
                break
        trial.end()
    finally:
        trial.clear()
    counts, faults = faults_of(folder, whole, BUDGET)
    row = {
        "workers": kind,
        "strikes": trial.strikes,
        "resumes": trial.resumes,
        "seconds": round(time.monotonic() - begun, 1),
        **counts,
        "faults": [*trial.faults, *faults],
    }
    if row["faults"]:
        print(f"FAULT {folder.name}: {row['faults']}\n{trial.log.read_text()[-3000:]}", flush=True)
    return row


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    names = ("results lost", "results doubled", "attempts lost", "resumes")
    found = [
        "| workers | runs | strikes | of a worker | of the driver | of both | "
        + " | ".join(names)
        + " | runs that ended |",
        "|---" * (7 + len(names)) + "|",
    ]
    for kind in dict.fromkeys(row["workers"] for row in rows):
        mine = [row for row in rows if row["workers"] == kind]
        struck = Counter(one.partition(":")[0] for row in mine for one in row["strikes"])
        cells = [kind, len(mine), struck.total(), *(struck[victim] for victim in VICTIMS)]
        cells += [sum(row[name] for row in mine) for name in names]
        cells.append(sum("the run has not ended" not in row["faults"] for row in mine))
        found.append("| " + " | ".join(map(str, cells)) + " |")
    ways = Counter(one.partition(": ")[2] for row in rows for one in row["strikes"])
    found += ["", "Strikes: " + ", ".join(f"{ways[way]} by {way}" for way in WAYS) + "."]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="two strikes on processes")
    parser.add_argument("--kills", type=int, default=200, help="over all kinds of workers")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--minutes", type=float, default=1e9, help="then begin no run")
    parser.add_argument("--join", nargs="+", type=Path, help="only join what these files record")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.join:
        rows = [
            row for part in options.join for row in json.loads(part.read_text())["data"]["rows"]
        ]
        finish("Faults of workers", table(rows), {"rows": rows}, options.out)
        return
    kinds = ["processes"] if options.smoke else options.only
    lacking = [PACKAGE[kind] for kind in kinds if find_spec(PACKAGE[kind]) is None]
    if lacking:
        raise SystemExit(f"not installed: {', '.join(lacking)}; pip install 'map-bo[ray,dask]'")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # The clusters that are started here have a token of their own.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    until = time.monotonic() + 60 * options.minutes
    each = 2 if options.smoke else -(-options.kills // len(kinds))
    draw, rows = random.Random(options.seed), []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        root = Path(scratch)
        whole = root / "whole"
        whole.mkdir()
        words = driver_words("inline", whole, budget=BUDGET, seconds=0.0)
        subprocess.run(words, check=True, capture_output=True)
        for kind in kinds:
            with cluster(kind, root) as address:
                left = each
                while left > 0 and time.monotonic() < until:
                    folder = root / f"{kind}-{len(rows)}"
                    row = run(kind, folder, whole, address, draw, min(MOST, left))
                    rows.append(row)
                    left -= len(row["strikes"])
                    print(f"{kind}: {row}", flush=True)
                    if options.out is not None:  # what has been measured stays
                        finish("Faults of workers", table(rows), {"rows": rows}, options.out)
    finish("Faults of workers", table(rows), {"rows": rows}, options.out)
    faults = [fault for row in rows for fault in row["faults"]]
    if faults:
        raise SystemExit(f"{len(faults)} faults, the first: {faults[0]}")


if __name__ == "__main__":
    main()
