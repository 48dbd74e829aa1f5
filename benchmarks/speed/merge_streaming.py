"""Merging checkpoints on disk that need not fit into memory, beside a plain copy of files.

The yardstick reads as many bytes and writes as many: ``shutil.copyfileobj`` copies the base to a
new file, which is forced to the disk as a merged model is, and reads every expert to nowhere.
"""

from __future__ import annotations

from statistics import median
from typing import Any

import torch

from benchmarks.speed.merge_disk import DiskMerges, bytes_needed, models_on_disk
from benchmarks.speed.merge_part import (
    ABSENT,
    Options,
    Outcome,
    Seconds,
    Way,
    dtype_name,
    in_turns,
    medians,
    over,
    row,
    table_of,
)
from benchmarks.speed.merge_peers import MERGEKIT, installed
from benchmarks.speed.merge_shapes import Size
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.storage import parse_bytes
from map_bo.operators.sparse import Ties
from map_bo.plain import to_plain

__all__ = ["measure", "scratch_bytes"]

EXPERTS, SHARDS, DTYPE = 3, 5, torch.bfloat16
CAP = "2GB"
OPERATORS = {"task arithmetic": to_plain(TaskArithmetic()), "Ties": to_plain(Ties())}


def scratch_bytes(size: Size) -> int:
    """Return the space on disk that this part needs."""
    return bytes_needed(size.streamed, EXPERTS, DTYPE)


def measure(options: Options) -> Outcome:
    """Write the models, merge them in turns, and remove them."""
    shape = options.size.streamed
    with models_on_disk(options.scratch, shape, EXPERTS, DTYPE, shards=SHARDS) as merges:
        seconds = in_turns(
            _ways(merges, peers=options.peers), options.size.disk_repeats, warm_up=False
        )
    for operator in OPERATORS:  # what a merge takes without its digests
        both = zip(seconds[operator], seconds["digests"], strict=True)
        seconds[f"{operator}, rest"] = [max(whole - part, 0.0) for whole, part in both]
    million = shape.parameters / 1e6
    cached = "unknown" if merges.cached is None else f"{100 * merges.cached:.0f} %"
    note = (
        f"{EXPERTS} experts of {million:.4g} M parameters in {dtype_name(DTYPE)}, {SHARDS} shards "
        f"each, {merges.moved / 1e9:.3g} GB to read and write; medians of "
        f"{options.size.disk_repeats} turns in new processes, warm page cache (share of the "
        f"inputs in it before each merge, at least: {cached})."
    )
    heads = ("merge", "way", "seconds", "s per GB", "over copy", "peak resident GB", "cap GB")
    data = {
        "experts": EXPERTS,
        "parameters": shape.parameters,
        "repeats": options.size.disk_repeats,
        "bytes": merges.moved,
        "cached": merges.cached,
        "cap": parse_bytes(CAP, "the cap"),
        "mergekit": installed(MERGEKIT),
        "seconds": medians(seconds),
        "over copy": over(seconds),
        "all seconds": seconds,
        "peak bytes": merges.peaks,
    }
    title = f"Merge of checkpoints of {million:.4g} M parameters, disk to disk"
    return Outcome(title, table_of(note, heads, _lines(data, seconds, options.peers)), data)


def _ways(merges: DiskMerges, *, peers: bool) -> dict[str, Way]:
    ways = {"copy": merges.way("copy", "copy")}
    if peers and installed(MERGEKIT):
        ways["mergekit"] = merges.way("mergekit", "mergekit")
    for name, operator in OPERATORS.items():
        ways[name] = merges.way(name, "merge", operator=operator, max_memory=CAP)
    ways["digests"] = merges.way("digests", "digests")  # of what was merged last, too
    return ways


def _lines(data: dict[str, Any], seconds: Seconds, peers: bool) -> list[str]:
    def line(merge: str, way: str, key: str, cap: bool = False) -> str:
        took, peak = median(seconds[key]), data["peak bytes"].get(key)
        return row(
            merge,
            way,
            took,
            f"{took / data['bytes'] * 1e9:.2f}",
            f"{data['over copy'][key]:.2f}",
            None if peak is None else f"{peak / 1e9:.2f}",
            f"{data['cap'] / 1e9:g}" if cap else None,
        )

    lines = [line("", "copy: all inputs read, one written", "copy")]
    for operator in OPERATORS:
        lines.append(line(operator, "map_bo.merge_checkpoints", operator, cap=True))
        lines.append(line(operator, "the same, less the digests", f"{operator}, rest"))
    lines.append(line("", "digests of inputs and output alone", "digests"))
    if "mergekit" in seconds:
        lines.append(line("task arithmetic", "mergekit.run_merge", "mergekit"))
    elif peers:
        cells = (None,) * 4
        lines.append(row("task arithmetic", "mergekit.run_merge", ABSENT, *cells))
    return lines
