"""The reader for one weight file, by its suffix."""

from __future__ import annotations

from pathlib import Path

from map_bo.errors import CheckpointError
from map_bo.merging.formats import TensorReader
from map_bo.merging.pickles import PickleReader
from map_bo.merging.safetensors_file import SafetensorsReader

__all__ = ["open_file"]

PICKLE_SUFFIXES = (".pt", ".pth", ".bin")


def open_file(path: Path) -> TensorReader:
    """Return the reader for one weight file, by its suffix.

    Raises:
        CheckpointError: For an unknown suffix, and whatever the reader refuses.
    """
    if path.suffix == ".safetensors":
        return SafetensorsReader(path)
    if path.suffix in PICKLE_SUFFIXES:
        return PickleReader(path)
    raise CheckpointError(
        f"{path} has the unknown suffix {path.suffix!r}",
        hint="known are .safetensors, .pt, .pth, .bin, a *.index.json, or a folder with them",
    )
