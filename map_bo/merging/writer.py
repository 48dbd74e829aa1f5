"""Writing safetensors files tensor by tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from map_bo.merging.formats import DTYPES, Layout, raw_bytes

__all__ = ["SafetensorsWriter", "shard_layouts"]


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
