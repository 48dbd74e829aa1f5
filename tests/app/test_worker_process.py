from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

PARENT = """
import subprocess, sys
from map_bo.app import worker_process
if sys.argv[1] == "sweep":
    worker_process.announce_sweep()
child = subprocess.Popen([sys.executable, "-c", sys.argv[2], sys.argv[3]], stdout=subprocess.PIPE)
print(child.pid, child.stdout.readline().decode().strip(), flush=True)
child.wait()
"""
WORKER = """
import signal, sys, time
from map_bo.app import worker_process
if sys.argv[1] != "system":
    worker_process._ask_for_signal = lambda: None
if sys.argv[1] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    worker_process._GRACE = 0.1
print(worker_process.end_with_parent(poll=0.05), flush=True)
time.sleep(60)
"""


def is_alive(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")
@pytest.mark.parametrize("how", ["system", "watcher", "deaf"])
@pytest.mark.parametrize("kind", ["sweep", "shell"])
def test_a_worker_of_a_killed_sweep_ends_and_no_other_process_does(kind: str, how: str) -> None:
    command = [sys.executable, "-c", PARENT, kind, WORKER, how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        number, watches = parent.stdout.readline().split()
        parent.kill()
    worker = int(number)
    assert watches == str(kind == "sweep")
    until = time.monotonic() + (10.0 if kind == "sweep" else 0.3)
    while is_alive(worker) and time.monotonic() < until:
        time.sleep(0.02)
    alive = is_alive(worker)
    if alive:
        os.kill(worker, signal.SIGKILL)
    assert alive == (kind == "shell")
