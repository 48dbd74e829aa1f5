"""Time and memory of merging: seven ways of one merge, all operators, adapters, disk, GPU.

python -m benchmarks.speed.merge [--smoke] [--only PART ...] [--out FILE.json] [--peers]

Parts, each described in a module of its own:

- ``linear``: task arithmetic beside a copy of as many bytes, a loop and other libraries;
- ``operators``: preparing the others, and their candidates;
- ``adapters``: LoRA adapters that stay factors;
- ``streaming``: checkpoints merged from disk to disk in bounded memory;
- ``cuda``: merges on a GPU, where there is one.

All ways of a part take turns in one run. The seconds are medians, and "over copy" is the median of
the quotients within a turn, so that what else runs on the machine disturbs both alike. The models
are synthetic, in the shapes of a Llama. Other libraries are measured where they are installed
(mergekit: ``pip install "map-bo[benchmark]"``; FusionBench, which is no extra because of what it
brings along: ``pip install fusion-bench``).
"""

from __future__ import annotations

import argparse
import gc
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.record import finish
from benchmarks.speed import (
    merge_adapters,
    merge_cuda,
    merge_linear,
    merge_operators,
    merge_streaming,
)
from benchmarks.speed.merge_disk import require_space
from benchmarks.speed.merge_part import Options, Outcome
from benchmarks.speed.merge_shapes import SIZES, Size

PARTS: dict[str, Callable[[Options], Outcome]] = {
    "linear": merge_linear.measure,
    "operators": merge_operators.measure,
    "adapters": merge_adapters.measure,
    "streaming": merge_streaming.measure,
    "cuda": merge_cuda.measure,
}
SPACE: dict[str, Callable[[Size], int]] = {
    "linear": merge_linear.scratch_bytes,
    "streaming": merge_streaming.scratch_bytes,
}


def record_of(out: Path, part: str) -> Path:
    """Return where a part is recorded: ``linear`` in ``out``, the others beside it."""
    return out if part == "linear" else out.with_name(f"{out.stem}_{part}{out.suffix}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--smoke", action="store_true", help="tiny models: does it run?")
    size.add_argument("--size", choices=list(SIZES), default="full", help="default: full")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--peers", action="store_true", help="also what takes mergekit minutes")
    parser.add_argument(
        "--scratch",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="folder for checkpoints, 16 GB at full size; they are removed (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="write the numbers as JSON: of linear to OUT.json, of a further part to OUT_PART.json",
    )
    arguments = parser.parse_args()
    options = Options(
        SIZES["smoke" if arguments.smoke else arguments.size], arguments.scratch, arguments.peers
    )
    for part in arguments.only:
        if part in SPACE:
            require_space(options.scratch, SPACE[part](options.size))
    # An end from outside must not leave gigabytes behind either.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for part in arguments.only:
        print(f"== {part}", flush=True)
        outcome = PARTS[part](options)
        out = None if arguments.out is None else record_of(arguments.out, part)
        finish(outcome.title, outcome.table, outcome.data, out)
        gc.collect()


if __name__ == "__main__":
    main()
