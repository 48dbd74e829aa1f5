"""Compare methods on cases over paired seeds, on all cores, going on after any interruption.

python -m benchmarks.quality                       every core method on every case, 10 seeds
python -m benchmarks.quality --methods all         samplers, surrogates and ablations as well
python -m benchmarks.quality --suite real --methods core ablation --seeds 5 --budget 48
python -m benchmarks.quality --smoke               tiny, nothing recorded: does it run?
python -m benchmarks.quality --scratch FOLDER ...  try something, documents stay as they are
python -m benchmarks.quality --tables              only write tables and plots again

Each finished cell (case, method, seed) is a file under .bench_cache/quality and rows of
benchmarks/results/quality.csv; neither is ever run again with the same settings.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.quality import evidence, kept
from benchmarks.quality.methods import CORE, METHODS, TIERS, matching, unavailable
from benchmarks.quality.study import CACHE, CASES, Study
from benchmarks.quality.tidy import read
from benchmarks.record import RESULTS, finish
from map_bo.errors import MapBoError

SMOKE = ("direct", "default", "reference", "random", "uniform-blend", "best-expert")


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    suites = ("real", "synthetic", "all", "smoke")
    parser.add_argument("--suite", choices=suites, default="all", help="cases to run")
    parser.add_argument("--cases", nargs="+", default=[], help="cases by name, instead of a suite")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["direct", "core"],
        help=f"names, tiers ({', '.join(TIERS)}) or all",
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--budget", type=int, default=120, help="evaluations of a run")
    parser.add_argument("--direct", type=int, default=10_000, help="of the direct search")
    parser.add_argument("--jobs", type=int, default=2, help="processes; 0 runs in this one")
    parser.add_argument("--deadline", type=float, help="seconds after which to stop and record")
    parser.add_argument("--retry-failed", action="store_true", help="run failed cells again")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, nothing recorded")
    parser.add_argument("--tables", action="store_true", help="run nothing, write tables again")
    parser.add_argument(
        "--scratch", type=Path, help="folder for cells and table; documents are left as they are"
    )
    parser.add_argument("--list", action="store_true", help="show methods and cases, then stop")
    parser.add_argument("--case-module", default=CASES, help="module that knows the cases")
    parser.add_argument("--out", type=Path, help="record the summary as JSON")
    return parser.parse_args(arguments)


def apart(options: argparse.Namespace) -> bool:
    """Return whether the committed results and documents are to stay as they are."""
    return bool(options.smoke or options.scratch)


def study(options: argparse.Namespace, scratch: Path) -> Study:
    source = importlib.import_module(options.case_module)
    methods, suite = options.methods, "smoke" if options.smoke else options.suite
    if options.smoke and methods == ["direct", "core"]:
        methods = list(SMOKE)
    return Study(
        cases=tuple(options.cases or source.names(suite)),
        methods=tuple(entry.name for entry in matching(methods)),
        seeds=1 if options.smoke else options.seeds,
        budget=min(options.budget, 8) if options.smoke else options.budget,
        direct=min(options.direct, 300) if options.smoke else options.direct,
        jobs=0 if options.smoke else options.jobs,
        deadline=options.deadline,
        source=options.case_module,
        cache=scratch / "cells" if apart(options) else CACHE,
        results=scratch if apart(options) else RESULTS,
        retry=options.retry_failed,
    )


def listing(source: str) -> None:
    for name, entry in METHODS.items():
        reason = unavailable(entry)
        print(f"{entry.tier:10} {name}" + (f"   (unavailable: {reason})" if reason else ""))
    print("cases:", ", ".join(importlib.import_module(source).names("all")))


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    start = time.perf_counter()
    try:
        if options.list:
            listing(options.case_module)
            return
        with tempfile.TemporaryDirectory() as passing:
            scratch = options.scratch or Path(passing)
            if options.tables:
                rows = read((scratch if apart(options) else RESULTS) / "quality.csv")
            else:
                if not options.smoke:
                    kept.restore()
                rows = study(options, scratch).run(lambda line: print(line, flush=True))
        data = {"rows": len(rows), "seconds": time.perf_counter() - start, "core": CORE}
        finish("quality", evidence.readme_table(rows), data, options.out)
        if not apart(options):
            evidence.write(plots=True)
    except MapBoError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
