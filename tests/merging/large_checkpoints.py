"""Sharded bfloat16 checkpoints of any size, and merging them in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import map_bo
from map_bo.merging.checkpoints.safetensors_files import SafetensorsWriter, shard_layouts
from map_bo.merging.checkpoints.tensors import Layout
from map_bo.rng import child, make_generator

EXPERTS = ("math", "code", "chat")
_PIECE = 1 << 22

# Merges, and says how much memory the process had at its peak. ru_maxrss would be that of the
# parent too, whose memory a new process shares for a moment.
MERGE = """
import json, sys
from pathlib import Path
from map_bo.merging.export.model import merge_checkpoints
from map_bo.operators.recipes import operator_of

def kilobytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])

given = json.loads(sys.argv[1])
operator = operator_of(given["operator"])
if given.get("threads"):
    import torch
    torch.set_num_threads(given["threads"])
print("ready", flush=True)
before = kilobytes("VmRSS")
merge_checkpoints(
    given["base"],
    given["experts"],
    given["coefficients"],
    given["out"],
    operator=operator,
    max_memory=given["max_memory"],
    shard_size=given["shard_size"],
    progress=False,
)
print(json.dumps({"before": 1024 * before, "peak": 1024 * kilobytes("VmHWM")}))
"""


def layouts(megabytes: float) -> dict[str, Layout]:
    """Return the tensors of a model of so many megabytes: a quarter of it is one matrix."""
    width = 1024 if megabytes > 100 else 256
    rows = max(1, int(megabytes * 1e6 / 2 / width))
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (rows // 4, width)}
    left = rows - rows // 4
    while left > 0:
        high = min(4 * width, left)
        shapes[f"layers.{len(shapes) // 2}.fc.weight"] = (high, width)
        shapes[f"layers.{len(shapes) // 2}.fc.bias"] = (high,)
        left -= high
    return {name: Layout(torch.Size(shape), torch.bfloat16) for name, shape in shapes.items()}


def write_checkpoint(folder: Path, label: str, megabytes: float, *, shard_bytes: int) -> Path:
    """Write a base, or an expert a little away from it."""
    folder.mkdir(parents=True)
    known = layouts(megabytes)
    groups = list(shard_layouts(known, shard_bytes))
    noise = torch.randn(_PIECE, generator=make_generator(0))
    change = 0.02 * torch.randn(_PIECE, generator=child(make_generator(1), label))
    values = noise if label == "base" else noise + change
    stored = values.to(torch.bfloat16)
    home: dict[str, str] = {}
    for i, group in enumerate(groups, start=1):
        file = f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        writer = SafetensorsWriter(folder / file, group, {"format": "pt"})
        for name, layout in group.items():
            count = layout.shape.numel()
            for start in range(0, count, _PIECE):
                writer.write_piece(name, start, stored[: min(_PIECE, count - start)])
        home |= dict.fromkeys(group, file)
    index = {"metadata": {}, "weight_map": home}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_family(folder: Path, megabytes: float) -> dict[str, Any]:
    """Write a base and experts of so many megabytes each; return what `merging` takes."""
    shard_bytes = int(megabytes * 1e6 / 3)
    paths = {
        label: str(write_checkpoint(folder / label, label, megabytes, shard_bytes=shard_bytes))
        for label in ("base", *EXPERTS)
    }
    return {
        "base": paths.pop("base"),
        "experts": paths,
        "coefficients": {"math": 0.5, "code": 0.3, "chat": 0.4},
        "shard_size": shard_bytes,
    }


def merging(given: dict[str, Any]) -> subprocess.Popen[str]:
    """Start a process that merges; it says ``ready``, and at the end how much memory it had."""
    path = f"{Path(map_bo.__file__).parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return subprocess.Popen(
        [sys.executable, "-c", MERGE, json.dumps({"max_memory": None, **given})],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def memory_of(given: dict[str, Any]) -> dict[str, int]:
    """Merge in a process of its own; return resident bytes before, and at the peak."""
    process = merging(given)
    said, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    result: dict[str, int] = json.loads(said.splitlines()[-1])
    return result
