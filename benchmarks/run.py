"""Run every benchmark and put its table into README.md.

python -m benchmarks.run            all of them, then README.md and docs/evidence.md
python -m benchmarks.run --smoke    tiny sizes, nothing written: do they run?
python -m benchmarks.run --only merge kill
python -m benchmarks.run --readme   only put the recorded tables into the documents
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.quality import evidence
from benchmarks.record import RESULTS

README = Path(__file__).parents[1] / "README.md"
NESTED = README.parent / "docs" / "nested.md"
RELIABILITY = README.parent / "docs" / "reliability.md"
CLUSTERS = README.parent / "docs" / "clusters.md"
ASYNCHRONOUS = README.parent / "docs" / "asynchronous.md"
GROW = README.parent / "docs" / "grow.md"
WORKERS = README.parent / "docs" / "workers.md"
ITEMS = README.parent / "docs" / "items.md"
ESTIMATES = README.parent / "docs" / "estimates.md"
MODULES = {
    "merge": "benchmarks.speed.merge",
    "front": "benchmarks.speed.front",
    "step": "benchmarks.speed.step",
    "evaluation_memory": "benchmarks.speed.evaluation_memory",
    "kill": "benchmarks.quality.kill",
}
# Tables that a module records beside its own.
FURTHER = {
    "merge": ("merge_operators", "merge_adapters", "merge_streaming", "merge_cuda"),
}
# What a module is asked for when its numbers are to be kept.
ARGUMENTS = {"merge": ("--peers",)}
# Longer than all others together; they have documents of their own, docs/evidence.md and nested.md.
STUDY = {"quality": "benchmarks.quality", "nested": "benchmarks.quality.nested"}
# What docs/reliability.md promises, measured; run by themselves.
PROMISES = {
    "constraints": "benchmarks.quality.constraints",
    "outliers": "benchmarks.quality.outliers",
    "confidence": "benchmarks.quality.confidence",
    "invariance": "benchmarks.quality.invariance",
    "record_damage": "benchmarks.reliability.record_damage",
}
# What docs/clusters.md promises, measured where there are Ray and Dask; run by themselves.
CLUSTER_TRIALS = {
    "two_hosts": "benchmarks.reliability.two_hosts",
    "workers_faults": "benchmarks.reliability.workers_faults",
}

# Tables of other documents, each beside what it is about; run by themselves.
PAGES = {
    "asynchronous": "benchmarks.quality.asynchronous",
    "items": "benchmarks.quality.items",
    "estimation": "benchmarks.quality.estimation",
    "transfer": "benchmarks.quality.transfer",
    "workers": "benchmarks.speed.workers",
}


def filled(text: str, *, full: bool = False) -> str:
    """Return text with the recorded tables between their markers.

    Args:
        text: That of README.md or of a document beside it.
        full: Whether to take the long form of a table, where there is one.
    """
    recorded = [
        *MODULES,
        *STUDY,
        *PROMISES,
        *CLUSTER_TRIALS,
        *PAGES,
        *(name for names in FURTHER.values() for name in names),
    ]
    for name in recorded:
        path = RESULTS / f"{name}.json"
        if not path.exists() or f"<!-- table:{name} -->" not in text:
            continue
        record = json.loads(path.read_text())
        lines = record["data"]["full"] if full else record["table"]
        table = "\n".join(lines).strip()
        opening, closing = f"<!-- table:{name} -->\n", f"<!-- /table:{name} -->"
        before, rest = text.split(opening)
        after = rest.split(closing, maxsplit=1)[1]
        text = f"{before}{opening}\n{table}\n\n{closing}{after}"
    return text


def main() -> None:
    modules = {**MODULES, **STUDY, **CLUSTER_TRIALS, **PROMISES, **PAGES}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--only", nargs="+", choices=sorted(modules), default=[*MODULES, *STUDY])
    parser.add_argument("--readme", action="store_true", help="only rewrite the documents")
    options = parser.parse_args()
    if not options.readme:
        with tempfile.TemporaryDirectory() as scratch:
            for name in options.only:
                out = (Path(scratch) if options.smoke else RESULTS) / f"{name}.json"
                command = [sys.executable, "-m", modules[name], "--out", str(out)]
                command += ["--smoke"] if options.smoke else ARGUMENTS.get(name, ())
                print(f"== {name}", flush=True)
                subprocess.run(command, check=True)
    if not options.smoke:
        README.write_text(filled(README.read_text()))
        NESTED.write_text(filled(NESTED.read_text(), full=True))
        RELIABILITY.write_text(filled(RELIABILITY.read_text()))
        CLUSTERS.write_text(filled(CLUSTERS.read_text()))
        ASYNCHRONOUS.write_text(filled(ASYNCHRONOUS.read_text()))
        GROW.write_text(filled(GROW.read_text()))
        WORKERS.write_text(filled(WORKERS.read_text()))
        ITEMS.write_text(filled(ITEMS.read_text()))
        ESTIMATES.write_text(filled(ESTIMATES.read_text()))
        evidence.write()


if __name__ == "__main__":
    main()
