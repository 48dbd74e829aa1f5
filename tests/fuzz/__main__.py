"""``python -m tests.fuzz --inputs 200000``: fuzz the readers of files, and say what escaped."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from tests.fuzz.campaign import run
from tests.fuzz.readers import READERS


def main() -> None:
    """Exit with 1 when an exception left the family of errors."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=main.__doc__)
    parser.add_argument("--inputs", type=int, default=2000, help="in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", action="append", default=[], choices=list(READERS))
    parser.add_argument("--keep", type=Path, help="folder for the files that made one escape")
    options = parser.parse_args()
    torch.set_num_threads(1)
    escaped = 0
    for name, found in run(
        options.inputs, seed=options.seed, names=options.reader, keep=options.keep
    ):
        escaped += sum(found.values())
        sys.stdout.write(f"{name}: {sum(found.values())} escaped\n")
        for said, count in found.most_common():
            sys.stdout.write(f"  {count} x {said}\n")
        sys.stdout.flush()
    raise SystemExit(int(escaped > 0))


if __name__ == "__main__":
    main()
