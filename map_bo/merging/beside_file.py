"""What is known of base and experts besides their rows, as a file beside the rows' file."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from map_bo.merging.adapted import Adapted
from map_bo.merging.formats import raw_bytes
from map_bo.merging.row_filling import Beside
from map_bo.merging.safetensors_file import SafetensorsReader
from map_bo.merging.safetensors_header import read_header
from map_bo.merging.weight_file import WeightFile

__all__ = ["read_beside", "write_beside"]

_ABOUT = "map_bo_rows"


def write_beside(path: Path, about: Mapping[str, Any], beside: Beside) -> None:
    """Write a safetensors file, to the disk itself.

    Args:
        path: The file to create.
        about: Plain data on the rows.
        beside: What there is.

    Raises:
        OSError: When it cannot be written.
    """
    tensors = {f"fixed.{name}": value for name, value in beside.fixed.items()}
    tensors |= {f"floor.{index}": floor for index, floor in beside.floors.items()}
    for index, part in beside.adapted.items():
        here = f"adapted.{index}"
        tensors |= {f"{here}.A": part.A, f"{here}.B": part.B, f"{here}.owner": part.owner}
        tensors |= {f"{here}.value.{i}": value for i, value in part.values.items()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    told = {
        **about,
        "likeness": {str(i): list(sums) for i, sums in beside.likeness.items()},
        "beside": _tensors_digest(tensors),
    }
    try:
        save_file(tensors, path, metadata={_ABOUT: json.dumps(told)})
    except SafetensorError as error:  # so it calls what the system says
        raise OSError(errno.EIO, str(error)) from error
    with path.open("rb") as file:
        os.fsync(file.fileno())


def read_beside(path: Path) -> tuple[dict[str, Any], Beside]:
    """Read what `write_beside` wrote.

    Raises:
        CheckpointError: When the file is missing, damaged, or no safetensors file.
        ValueError: When it holds something else than was written.
    """
    header = read_header(WeightFile(path))
    reader = SafetensorsReader(path)
    try:
        about: dict[str, Any] = json.loads(header.metadata[_ABOUT])
        tensors = {name: reader.load(name) for name in reader.layouts}
        if _tensors_digest(tensors) != about["beside"]:
            raise ValueError("what is beside its rows has changed")
        fixed: dict[str, Tensor] = {}
        floors: dict[int, Tensor] = {}
        parts: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "fixed":
                fixed[rest] = tensor
            elif kind == "floor":
                floors[int(rest)] = tensor
            else:
                index, _, label = rest.partition(".")
                parts.setdefault(int(index), {})[label] = tensor
        adapted = {index: _adapted(part) for index, part in sorted(parts.items())}
        likeness = {int(i): sums for i, sums in about["likeness"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name} is of something else") from error
    return about, Beside(fixed, floors, adapted, likeness)


def _adapted(part: Mapping[str, Tensor]) -> Adapted:
    values = {
        int(label.removeprefix("value.")): tensor
        for label, tensor in part.items()
        if label.startswith("value.")
    }
    return Adapted(part["B"], part["A"], part["owner"], dict(sorted(values.items())))


def _tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        total.update(raw_bytes(tensor))
    return total.hexdigest()
