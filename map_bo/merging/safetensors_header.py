"""The header of a safetensors file, checked to the letter of the format.

A file is eight bytes with the length of the header (little endian), the header in JSON, and the
elements of all tensors. The header gives of each tensor dtype, shape and where its bytes begin
and end, counted from the end of the header. The library safetensors checks files too; here every
mistake gets words of its own, and the places of the tensors become known, so that parts of them
can be read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from map_bo.errors import CheckpointError
from map_bo.merging.appearance import HEAD_BYTES, appearance
from map_bo.merging.formats import DTYPES, Layout
from map_bo.merging.messages import first_line
from map_bo.merging.strict_json import strict_json
from map_bo.merging.weight_file import WeightFile

__all__ = ["Header", "read_header"]

HEADER_LIMIT = 100_000_000
"""Longest header in bytes; the library has the same limit."""

_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_SCALED = {"F8_E8M0", "F4", "F6_E2M3", "F6_E3M2"}


@dataclass(frozen=True)
class Header:
    """What the header of a safetensors file says.

    Attributes:
        layouts: Layout of every tensor in the file.
        offsets: Position in the file, in bytes, of the first element of every tensor.
        metadata: The file's text metadata.
    """

    layouts: Mapping[str, Layout]
    offsets: Mapping[str, int]
    metadata: Mapping[str, str]


class _Wrong(Exception):
    """What is wrong with a header."""


def read_header(file: WeightFile) -> Header:
    """Read and check the header, and seal the file with it.

    Raises:
        CheckpointError: For a file that is truncated or damaged, is of another format, or has a
            dtype that cannot be merged. Tensors must lie in the file one behind the other, without
            holes or overlaps, and fill it.
    """
    head = file.read(0, HEAD_BYTES)
    seen = appearance(head)
    if seen is not None and seen.kind != "safetensors":
        raise CheckpointError(
            f"{file.path} cannot be read: by its beginning it is {seen.what}, "
            "not a safetensors file",
            hint=seen.hint,
        )
    try:
        return _parsed(file, head)
    except _Wrong as wrong:
        raise CheckpointError(
            f"{file.path} cannot be read: {wrong}",
            hint="the file is truncated or damaged, or no safetensors file; copy or download it "
            "again",
        ) from wrong.__cause__


def _parsed(file: WeightFile, head: bytes) -> Header:
    if len(head) < 8:
        raise _Wrong(f"it ends after {len(head)} bytes, within the length of its header")
    length = int.from_bytes(head[:8], "little")
    if length < 2:
        raise _Wrong(f"its header is said to have {length} bytes")
    if 8 + length > file.size:
        raise _Wrong(f"its header is said to have {length} bytes, and the file has {file.size}")
    if length > HEADER_LIMIT:
        raise _Wrong(f"its header has {length} bytes, and {HEADER_LIMIT} are the most allowed")
    content = file.read(0, 8 + length)
    if content[8:9] != b"{":
        raise _Wrong("its header does not begin with an opening brace")
    try:
        header = strict_json(content[8:])
    except ValueError as error:
        raise _Wrong(f"its header is no JSON: {first_line(error)}") from error
    file.seal(len(content), content)
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _Wrong("its metadata are not a map from text to text")
    layouts: dict[str, Layout] = {}
    places: dict[str, tuple[int, int]] = {}
    for name, entry in header.items():
        layouts[name], places[name] = _entry(file, name, entry)
    _require_filled(places, file.size - len(content))
    offsets = {name: len(content) + begin for name, (begin, _) in places.items()}
    return Header(MappingProxyType(layouts), MappingProxyType(offsets), MappingProxyType(metadata))


def _entry(file: WeightFile, name: str, entry: Any) -> tuple[Layout, tuple[int, int]]:
    label = f"tensor {name[:200]!r}"
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        raise _Wrong(f"{label} is not described by dtype, shape and data_offsets alone")
    shape, place, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
    if not isinstance(dtype, str):
        raise _Wrong(f"the dtype of {label} is no text")
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{file.path}: {label} has the dtype {dtype[:40]}, which cannot be merged",
            hint="its numbers need scales stored elsewhere; expand quantised weights first"
            if dtype in _SCALED
            else f"convert it to one of {', '.join(DTYPES)}",
        )
    if not _whole_numbers(shape):
        raise _Wrong(f"the shape of {label} is no list of whole numbers from 0")
    if not _whole_numbers(place) or len(place) != 2 or place[0] > place[1]:
        raise _Wrong(f"the offsets of {label} are no begin and end")
    kind = DTYPES[dtype]
    # A dimension of zero hides the others from the count of bytes, and torch has 63 bits for them.
    if math.prod(size or 1 for size in shape) * kind.itemsize >= 1 << 63:
        raise _Wrong(f"{label} is larger than any tensor can be")
    needed = math.prod(shape) * kind.itemsize
    if place[1] - place[0] != needed:
        raise _Wrong(
            f"{label} needs {needed} bytes for its shape and dtype and has {place[1] - place[0]}"
        )
    return Layout(torch.Size(shape), kind), (place[0], place[1])


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _require_filled(places: Mapping[str, tuple[int, int]], size: int) -> None:
    """Refuse tensors that overlap, leave holes, or do not end where the file does."""
    end = 0
    for name, (begin, stop) in sorted(places.items(), key=lambda item: item[1]):
        if begin != end:
            problem = "begins before the one before it ends" if begin < end else "leaves a hole"
            raise _Wrong(f"tensor {name[:200]!r} {problem} (at byte {begin} of the data)")
        end = stop
    if end > size:
        raise _Wrong(f"its tensors need {end} bytes, and {size} follow the header; it is cut off")
    if end < size:
        raise _Wrong(f"{size - end} bytes follow its last tensor")
