"""Two hosts: the network between a run and its workers is cut for a minute, and restored.

python -m benchmarks.reliability.two_hosts [--smoke] [--only ray dask] [--cut SECONDS] [--out FILE]

Two network namespaces of this machine stand for two hosts, with a cable (a veth pair) between them:
one has the driver and the cluster's head or scheduler, the other all workers. In the middle of the
run the cable is unplugged for a minute, then it is plugged in again. On the host of the workers
something starts them again when they end, as a service manager or a batch system does.

Checked at the end: the run has ended; no result is lost or told twice; all rows are, bit by bit,
those of a run without workers. It needs root, `ip`, Ray and distributed.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.record import finish
from benchmarks.reliability.worker_stand import driver_words, faults_of, lines, traces

HOSTS = ("mapbo-a", "mapbo-b")
CABLES = ("mapbo-va", "mapbo-vb")
ADDRESSES = ("10.77.7.1", "10.77.7.2")
STORE = str(80 * 2**20)
PACKAGE = {"ray": "ray", "dask": "distributed"}
PATIENCE = 420.0  # seconds that a trial may take beside the cut, on a busy machine


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def two_hosts() -> Iterator[None]:
    """Make the hosts and the cable between them, and take them away."""

    def remove() -> None:
        for host in HOSTS:
            with suppress(subprocess.CalledProcessError):
                ip("netns", "delete", host)

    remove()
    try:
        for host in HOSTS:
            ip("netns", "add", host)
            ip("-n", host, "link", "set", "lo", "up")
        one, two = CABLES
        ip("link", "add", one, "netns", HOSTS[0], "type", "veth", "peer", two, "netns", HOSTS[1])
        for host, cable, address in zip(HOSTS, CABLES, ADDRESSES, strict=True):
            ip("-n", host, "address", "add", f"{address}/24", "dev", cable)
            ip("-n", host, "link", "set", cable, "up")
        yield
    finally:
        remove()


def on(host: int, *words: str) -> list[str]:
    """Return a command as it is on a host."""
    return ["ip", "netns", "exec", HOSTS[host], *words]


class Service:
    """A command on a host that is started again whenever it ends."""

    def __init__(self, host: int, words: Sequence[str], log: Path) -> None:
        self._words, self._log = on(host, *words), log
        self._over = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self.starts = 0
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def _keep(self) -> None:
        while not self._over.is_set():
            with self._log.open("ab") as file:
                self._process = subprocess.Popen(
                    self._words, stdout=file, stderr=file, start_new_session=True
                )
            self.starts += 1
            while self._process.poll() is None and not self._over.is_set():
                time.sleep(0.2)
            if not self._over.wait(1.0):
                self._end()

    def _end(self) -> None:
        process = self._process
        if process is not None:
            for sign, seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, sign)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(seconds)
                    if sign == signal.SIGTERM:
                        time.sleep(1.0)

    def stop(self) -> None:
        self._over.set()
        self._thread.join(5.0)
        self._end()


def services(kind: str, folder: Path) -> tuple[list[Service], str]:
    """Start a cluster, its head on the driver's host and two workers on the other."""
    python = sys.executable
    here, there = ADDRESSES
    if kind == "dask":
        address = f"tcp://{here}:8786"
        head = [python, "-m", "dask", "scheduler", "--host", here, "--port", "8786"]
        worker = [python, "-m", "dask", "worker", address, "--host", there, "--nthreads", "1"]
        started = [Service(0, [*head, "--no-dashboard"], folder / "head.log")]
        for number in range(2):
            words = [*worker, "--no-dashboard", "--memory-limit", "0"]
            started.append(Service(1, words, folder / f"worker-{number}.log"))
        return started, address
    ray = [python, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    common = ["--object-store-memory", STORE]
    head = [*ray, "--head", "--node-ip-address", here, "--port", "6379", "--num-cpus", "0"]
    worker = [*ray, "--address", f"{here}:6379", "--node-ip-address", there, "--num-cpus", "2"]
    started = [Service(0, [*head, *common, "--include-dashboard", "false"], folder / "head.log")]
    time.sleep(15)  # a node that finds no head gives up
    started.append(Service(1, [*worker, *common], folder / "worker.log"))
    return started, f"{here}:6379"


def trial(kind: str, root: Path, whole: Path, *, cut: float, budget: int, seconds: float) -> Any:
    """Run, cut the network in the middle of it, restore it, and compare."""
    folder = root / kind
    folder.mkdir()
    faults: list[str] = []
    started, address = services(kind, folder)
    driver: subprocess.Popen[bytes] | None = None
    row: dict[str, Any] = {"engine": kind, "seconds cut": cut}
    try:
        words = driver_words(
            kind, folder, address=address, budget=budget, seconds=seconds, timeout=120
        )
        with (folder / "driver.log").open("ab") as file:
            driver = subprocess.Popen(on(0, *words), stdout=file, stderr=file)
        end = time.monotonic() + PATIENCE
        while sum(b'"observed"' in line for line in lines(folder)) < budget // 3:
            if driver.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"{kind}: the run did not begin\n{tail(folder)}")
            time.sleep(0.1)
        begun = time.monotonic()
        ip("-n", HOSTS[0], "link", "set", CABLES[0], "down")
        before = len(lines(folder))
        time.sleep(cut)
        row["events while cut"] = len(lines(folder)) - before
        alive = driver.poll() is None
        ip("-n", HOSTS[0], "link", "set", CABLES[0], "up")
        print(
            f"{kind}: cut for {time.monotonic() - begun:.0f} s, driver alive: {alive}", flush=True
        )
        resumes = 0
        end = time.monotonic() + PATIENCE
        while driver.poll() != 0 and time.monotonic() < end:
            if driver.poll() is not None:  # as a user would go on
                resumes += 1
                with (folder / "driver.log").open("ab") as file:
                    driver = subprocess.Popen(on(0, *words), stdout=file, stderr=file)
            time.sleep(0.2)
        row["seconds from cut to end"] = round(time.monotonic() - begun, 1)
        if driver.poll() != 0:
            faults.append("the run has not ended")
        counts, found = faults_of(folder, whole, budget)
        row |= {"resumes": resumes, **counts}
        row["starts of workers"] = sum(service.starts for service in started[1:])
        row["worker processes"] = len({process for process, _, _ in traces(folder)})
        faults += found
    finally:
        if driver is not None and driver.poll() is None:
            driver.kill()
            driver.wait()
        for service in reversed(started):
            service.stop()
    row["faults"] = faults
    if faults:
        print(tail(folder), flush=True)
    return row


def tail(folder: Path) -> str:
    return "\n".join(
        f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in folder.glob("*.log")
    )


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    names = [
        *("engine", "seconds cut", "seconds from cut to end", "results lost", "results doubled"),
        *("attempts lost", "evaluations begun", "resumes"),
    ]
    found = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    found += ["| " + " | ".join(str(row.get(name, "")) for name in names) + " |" for row in rows]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a cut of a few seconds")
    parser.add_argument("--only", nargs="+", choices=sorted(PACKAGE), default=sorted(PACKAGE))
    parser.add_argument("--cut", type=float, default=60.0, help="seconds without a network")
    parser.add_argument("--join", nargs="+", type=Path, help="only join what these files record")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.join:
        rows = [
            row for part in options.join for row in json.loads(part.read_text())["data"]["rows"]
        ]
        finish("Two hosts", table(rows), {"rows": rows}, options.out)
        return
    if os.geteuid() != 0 or shutil.which("ip") is None:
        raise SystemExit("two hosts need root and `ip` (of iproute2), to make network namespaces")
    lacking = [PACKAGE[kind] for kind in options.only if find_spec(PACKAGE[kind]) is None]
    if lacking:
        raise SystemExit(f"not installed: {', '.join(lacking)}; pip install 'map-bo[ray,dask]'")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # The clusters that are started here have a token of their own.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    cut = 5.0 if options.smoke else options.cut
    budget, seconds = (9, 0.5) if options.smoke else (24, 2.0)
    with tempfile.TemporaryDirectory() as scratch, two_hosts():
        root = Path(scratch)
        whole = root / "whole"
        whole.mkdir()
        words = driver_words("inline", whole, budget=budget, seconds=0.0)
        subprocess.run(words, check=True, capture_output=True)
        rows = [
            trial(kind, root, whole, cut=cut, budget=budget, seconds=seconds)
            for kind in options.only
        ]
    finish("Two hosts", table(rows), {"rows": rows}, options.out)
    if any(row["faults"] for row in rows):
        raise SystemExit(f"faults: {[row['faults'] for row in rows]}")


if __name__ == "__main__":
    main()
