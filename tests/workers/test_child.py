from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )


def test_nothing_heavy_is_imported_before_a_worker_has_its_device() -> None:
    done = run("import sys, map_bo.workers.child; print('torch' in sys.modules)")
    assert done.stdout == "False\n"


def test_what_is_printed_goes_to_standard_error_or_to_a_file(tmp_path: Path) -> None:
    code = """
        import os, sys
        from map_bo.workers.child import _redirect
        _redirect(sys.argv[1] if len(sys.argv) > 1 else None)
        print("from Python"); os.write(1, b"from below\\n")
    """
    done = run(code)
    assert done.stdout == ""
    assert sorted(done.stderr.split("\n"))[1:] == ["from Python", "from below"]
    log = tmp_path / "worker-1.log"
    log.write_text("before\n")
    done = run(code, str(log))
    assert done.stdout == done.stderr == ""
    assert sorted(log.read_text().split("\n"))[1:] == ["before", "from Python", "from below"]


def test_a_worker_whose_driver_has_gone_does_not_begin() -> None:
    done = run(
        "from map_bo.workers.child import end_with; end_with(1 << 22); print('begun')",
    )
    assert done.returncode == 1
    assert done.stdout == ""


def test_it_ends_with_its_driver_without_a_signal_too() -> None:
    code = """
        import subprocess, sys
        child = "import os, time; from map_bo.workers import child; " \\
            "child.ask_for_signal = lambda number: None; child.end_with(os.getppid(), 0.05); " \\
            "print('ready', flush=True); time.sleep(50)"
        started = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
        started.stdout.readline()
        print(started.pid)
    """
    pid = int(run(code).stdout)
    import time

    until = time.monotonic() + 10
    while time.monotonic() < until and Path(f"/proc/{pid}").exists():
        time.sleep(0.05)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return
    raise AssertionError(f"{pid} still runs")
