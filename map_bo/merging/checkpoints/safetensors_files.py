"""Safetensors files: read by position, checked to the letter of the format, written by tensor.

A file is eight bytes with the length of the header (little endian), the header in JSON, and the
elements of all tensors. The header gives of each tensor dtype, shape and where its bytes begin
and end, counted from the end of the header. The library safetensors checks files too; here every
mistake gets words of its own, and the places of the tensors become known, so that parts of them
can be read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from map_bo.errors import CheckpointError, first_line
from map_bo.merging.checkpoints.positioned_reads import HEAD_BYTES, WeightFile, appearance
from map_bo.merging.checkpoints.tensors import (
    DTYPES,
    Layout,
    buffer_for,
    byte_view,
    name_problem,
    raw_bytes,
)

__all__ = [
    "Header",
    "SafetensorsReader",
    "SafetensorsWriter",
    "read_header",
    "shard_layouts",
    "strict_json",
]

HEADER_LIMIT = 100_000_000
"""Longest header in bytes; the library has the same limit."""

_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_SCALED = {"F8_E8M0", "F4", "F6_E2M3", "F6_E3M2"}


class SafetensorsReader:
    """One ``.safetensors`` file; only the header is read on opening.

    Tensors and pieces of them are read into memory of their own, by position: nothing is mapped,
    so resident memory is what was asked for, and several threads may read at once.

    Files leave out the further names of tied tensors. Where the metadata record them as
    ``alias: canonical`` (as ``safetensors.torch.save_model`` and this package do), the aliases
    are read back as ties; Hugging Face records nothing, so there they are simply absent.

    Raises:
        CheckpointError: For a file that is truncated, damaged, or of an unknown dtype.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = WeightFile(path)
        header = read_header(self._file)
        _require_accepted(path)
        layouts = dict(header.layouts)
        ties = {
            alias: kept
            for alias, kept in header.metadata.items()
            # "format" is the file's own entry, and a strange name is a remark, not an alias.
            if alias not in layouts
            and kept in layouts
            and alias != "format"
            and not name_problem(alias)
        }
        layouts.update({alias: layouts[kept] for alias, kept in ties.items()})
        self._offsets = dict(header.offsets)
        self.layouts: Mapping[str, Layout] = layouts
        self.ties: Mapping[str, str] = ties

    def load(self, name: str) -> Tensor:
        """Read one tensor."""
        layout = self.layouts[name]
        return self.read(name, 0, layout.shape.numel()).reshape(layout.shape)

    def read(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Read the elements from ``start`` to ``stop`` of a tensor."""
        dtype = self.layouts[name].dtype
        piece = buffer_for(stop - start, dtype, out)
        if not piece.numel():
            self._file.require_unchanged()
            return piece
        offset = self._offsets[self.ties.get(name, name)] + start * dtype.itemsize
        content = byte_view(piece)
        self._file.read_into(content, offset)
        if dtype == torch.bool and int(piece.view(torch.uint8).max()) > 1:
            raise CheckpointError(
                f"{self.path} cannot be read: tensor {name!r} is of truth values and holds bytes "
                "other than 0 and 1",
                hint="the file is damaged; copy or download it again",
            )
        return piece

    def version(self) -> object | None:
        """Return the file's size, time of change and inode."""
        return self._file.version()


def _require_accepted(path: Path) -> None:
    """Refuse what the library refuses: a file must mean the same to every program."""
    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            handle.keys()
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {first_line(error)}",
            hint="the file is truncated, damaged or not readable; copy or download it again",
        ) from error


@dataclass
class SafetensorsWriter:
    """Writes one ``.safetensors`` file tensor by tensor, in any order.

    The header is written first, from the layouts; every tensor then goes to its own place in
    the file, so that no more than one tensor is in memory. Every write opens the file, so that
    thousands of shards hold no handles.

    Args:
        path: The file to create.
        layouts: Layout of every tensor that will be written.
        metadata: The file's text metadata.

    Raises:
        OSError: When the file cannot be written; so do the methods.
    """

    path: Path
    layouts: Mapping[str, Layout]
    metadata: Mapping[str, str]
    _offsets: dict[str, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        labels = {dtype: label for label, dtype in DTYPES.items()}
        header: dict[str, object] = {"__metadata__": dict(self.metadata)}
        end = 0
        # The widest elements first keep every tensor aligned to its own element size.
        for name, layout in sorted(
            self.layouts.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])
        ):
            self._offsets[name] = end
            begin, end = end, end + layout.nbytes
            header[name] = {
                "dtype": labels[layout.dtype],
                "shape": list(layout.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        with self.path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            # A tensor without elements writes nothing, so the length is set beforehand.
            file.truncate(self._start + end)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one CPU tensor of the announced layout."""
        assert Layout(tensor.shape, tensor.dtype) == self.layouts[name]
        self._put(raw_bytes(tensor), self._start + self._offsets[name])

    def write_piece(self, name: str, start: int, piece: Tensor) -> None:
        """Write elements of a tensor from ``start`` on; several threads may at once.

        Args:
            name: The tensor.
            start: Its first element to write, in row-major order.
            piece: 1-D CPU tensor of the announced dtype.
        """
        layout = self.layouts[name]
        assert piece.dtype == layout.dtype
        assert start + len(piece) <= layout.shape.numel()
        offset = self._offsets[name] + start * layout.dtype.itemsize
        self._put(raw_bytes(piece), self._start + offset)

    def _put(self, content: memoryview, offset: int) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            while len(content):
                written = os.pwrite(descriptor, content, offset)
                content, offset = content[written:], offset + written
        finally:
            os.close(descriptor)


def shard_layouts(layouts: Mapping[str, Layout], shard_bytes: int) -> Iterator[dict[str, Layout]]:
    """Cut tensors, in the order of their names, into groups of at most ``shard_bytes``.

    A single tensor above the limit gets a group of its own.
    """
    group: dict[str, Layout] = {}
    size = 0
    for name in sorted(layouts):
        if group and size + layouts[name].nbytes > shard_bytes:
            yield group
            group, size = {}, 0
        group[name] = layouts[name]
        size += layouts[name].nbytes
    if group:
        yield group


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
        return _parse(file, head)
    except _Wrong as wrong:
        raise CheckpointError(
            f"{file.path} cannot be read: {wrong}",
            hint="the file is truncated or damaged, or not a safetensors file; copy or download it "
            "again",
        ) from wrong.__cause__


def _parse(file: WeightFile, head: bytes) -> Header:
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
        raise _Wrong(f"its header is not JSON: {first_line(error)}") from error
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
        raise _Wrong(f"the dtype of {label} is not text")
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{file.path}: {label} has the dtype {dtype[:40]}, which cannot be merged",
            hint="its numbers need scales stored elsewhere; expand quantised weights first"
            if dtype in _SCALED
            else f"convert it to one of {', '.join(DTYPES)}",
        )
    if not _whole_numbers(shape):
        raise _Wrong(f"the shape of {label} is not a list of whole numbers from 0")
    if not _whole_numbers(place) or len(place) != 2 or place[0] > place[1]:
        raise _Wrong(f"the offsets of {label} are not a begin and an end")
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


def strict_json(content: bytes) -> Any:
    """Return what UTF-8 JSON says.

    Raises:
        ValueError: For anything else, for an object with one key twice (of which Python would
            keep the last and another reader the first), for ``NaN`` and ``Infinity``, and for
            nesting or numbers too large to read.
    """
    try:
        return json.loads(
            content.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"it has the key {twice[:200]!r} twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
