"""Kill test: a run killed with SIGKILL at random moments and resumed ends like one never killed.

python -m benchmarks.quality.kill [--smoke] [--out FILE.json]

Every trial starts the same run, kills its whole process at a random moment, resumes it, kills
that too at a random moment, and so on until ``--kills`` kills have struck in all; each trial is
then resumed to its end and compared with the run that nobody killed: the same evaluations, bit
for bit, and the same front.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import finish
from map_bo.loop.reading import load_state

OVERRIDES = ["problem=digits", "problem.experts=3", "surrogate=quadratic", "progress=false"]


def command(kind: str, directory: Path, budget: int) -> list[str]:
    start = [sys.executable, "-m", "map_bo.app.main"]
    if kind == "run":
        return [*start, "run", *OVERRIDES, f"loop.budget={budget}", f"hydra.run.dir={directory}"]
    return [*start, "resume", str(directory)]


def to_the_end(kind: str, directory: Path, budget: int) -> None:
    done = subprocess.run(command(kind, directory, budget), capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{kind} of {directory} failed:\n{done.stderr}")


def killed(kind: str, directory: Path, budget: int, after: float) -> bool:
    """Start and kill after so many seconds; return whether it was still running then."""
    with subprocess.Popen(
        command(kind, directory, budget),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            process.wait(timeout=after)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return True
    return False


def events(directory: Path) -> int:
    path = directory / "events.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def same(one: Path, two: Path) -> dict[str, bool]:
    (a, _), (b, _) = load_state(one), load_state(two)
    assert a.front is not None
    assert b.front is not None
    return {
        "same points": torch.equal(a.seen.X, b.seen.X),
        "same metrics": torch.equal(a.seen.Y, b.seen.Y),
        "same front": torch.equal(a.front.X, b.front.X) and torch.equal(a.front.mean, b.front.mean),
        "same verification": torch.equal(a.verification.Y, b.verification.Y),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="two kills")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--budget", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    kills = 2 if options.smoke else options.kills
    draw = random.Random(options.seed)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole"
        to_the_end("run", whole, options.budget)  # trains and caches the experts
        second = Path(scratch) / "second"
        start = time.perf_counter()
        to_the_end("run", second, options.budget)
        length = time.perf_counter() - start
        rows.append({"trial": "never killed, again", "kills": 0, **same(whole, second)})
        struck, trial = 0, 0
        while struck < kills:
            directory, moments = Path(scratch) / f"trial{trial}", []
            for _ in range(min(4, kills - struck)):
                kind = "resume" if events(directory) else "run"
                if killed(kind, directory, options.budget, draw.uniform(0.3, 1.0) * length):
                    moments.append(events(directory))
                    struck += 1
                else:
                    break
            to_the_end("resume" if events(directory) else "run", directory, options.budget)
            outcome = same(whole, directory)
            rows.append({"trial": trial, "kills": len(moments), "at events": moments, **outcome})
            print(json.dumps(rows[-1]), flush=True)
            trial += 1
    good = all(value for row in rows for key, value in row.items() if key.startswith("same"))
    total = sum(row["kills"] for row in rows)
    lines = [
        "| kills (SIGKILL) | trials | ended with the same evaluations | with the same front |",
        "|---|---|---|---|",
        f"| {total} | {trial} | {sum(r['same points'] and r['same metrics'] for r in rows[1:])} "
        f"| {sum(r['same front'] for r in rows[1:])} |",
    ]
    finish("kill", lines, {"rows": rows, "seconds of a whole run": length}, options.out)
    if not good:
        raise SystemExit("a killed run ended differently from one never killed")


if __name__ == "__main__":
    main()
