"""One safetensors file, read by position."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from map_bo.errors import CheckpointError
from map_bo.merging.formats import Layout, buffer_for, byte_view
from map_bo.merging.messages import first_line
from map_bo.merging.safetensors_header import read_header
from map_bo.merging.tensor_names import name_problem
from map_bo.merging.weight_file import WeightFile

__all__ = ["SafetensorsReader"]


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
