"""A folder of rows on disk, written once and then mapped: task vectors larger than memory.

An entry is the rows' file and, beside it, a file with what else is known of base and experts.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import mmap
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from map_bo.errors import CheckpointError, MergeError
from map_bo.foreign import parse_json
from map_bo.merging.adapters.adapter import adapter_over
from map_bo.merging.adapters.low_rank import AdaptedTensor
from map_bo.merging.align.layout import FlatLayout
from map_bo.merging.checkpoints.checkpoint import Checkpoint, content_digest
from map_bo.merging.checkpoints.positioned_reads import WeightFile
from map_bo.merging.checkpoints.safetensors_files import SafetensorsReader, read_header
from map_bo.merging.checkpoints.tensors import raw_bytes
from map_bo.merging.vectors.parallel import parallel_for
from map_bo.merging.vectors.row_filling import Extras, Put
from map_bo.merging.vectors.storage import format_bytes

__all__ = ["MappedRows", "RowsCache", "read_extras", "rows_key", "write_extras"]

_ABOUT = "map_bo_rows"

_FORMAT = 1  # to be raised whenever the same inputs give other files
# Names of 0.1 within an entry and its metadata, so that its entries stay good.
_ROWS, _EXTRAS = "rows", "beside.safetensors"
_BLOCK = 1 << 24  # bytes that are hashed together

logger = logging.getLogger(__name__)


def rows_key(
    base: Checkpoint, experts: Mapping[str, Checkpoint], layout: FlatLayout, dtype: torch.dtype
) -> str:
    """Return what rows depend on, as a digest: the same key means the same bytes.

    In it are the contents of base and experts in their order (not their names), the layout with
    its ties, the dtype, and the version of the format. Every checkpoint is read once for its
    digest, unless it knows it.

    Args:
        base: The base.
        experts: Name -> checkpoint.
        layout: Where each tensor lies.
        dtype: Storage.

    Raises:
        CheckpointError: When a file cannot be read.
    """
    found: dict[int, list[str]] = {}

    def identify(item: tuple[int, Checkpoint], _: None) -> None:
        index, checkpoint = item
        if adapter_over(base, checkpoint) is not None:
            found[index] = ["adapter", checkpoint.digest()]
        elif type(checkpoint) is Checkpoint:
            found[index] = ["model", checkpoint.digest()]
        else:  # its digest is that of what it was made of, perhaps over another base
            found[index] = ["model", content_digest(checkpoint)]

    parallel_for(identify, list(enumerate((base, *experts.values()))), lambda: None)
    about = {
        "format": _FORMAT,
        "dtype": str(dtype),
        "models": [found[i] for i in range(1 + len(experts))],
        "slots": [[s.name, list(s.shape), s.offset, str(s.dtype)] for s in layout.slots],
        "fixed": list(layout.fixed),
        "ties": sorted(layout.ties.items()),
        "size": layout.size,
    }
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class MappedRows:
    """Rows that are mapped from a file; pickled, they are the place of the file.

    Nothing can write to them: an attempt ends the process. Pages of the file are read when they
    are first used, count as resident memory of the process, and are taken back by the system
    whenever it wants memory.

    Attributes:
        entry: The folder in the cache.
        key: See `rows_key`.
        shape: ``(1 + D, P)``.
        dtype: Storage.
        rows: The rows.
    """

    entry: Path
    key: str
    shape: tuple[int, int]
    dtype: torch.dtype
    rows: Tensor
    _memory: mmap.mmap

    @classmethod
    def open(
        cls, entry: Path, key: str, shape: tuple[int, int], dtype: torch.dtype
    ) -> tuple[MappedRows, Extras]:
        """Map the rows of an entry, and read what is beside them.

        A file that is as it was left (size, time of change, inode) is taken as it is; one that was
        copied or touched is read whole and compared with its digest.

        Raises:
            OSError: When there is no entry.
            ValueError: When it is damaged, or of something else.
        """
        if not os.path.lexists(entry):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(entry))
        try:
            about, extras = read_extras(entry / _EXTRAS)
        except CheckpointError as error:
            raise ValueError(error.message) from error
        expected = {"key": key, "shape": list(shape), "dtype": str(dtype)}
        if any(about.get(name) != value for name, value in expected.items()):
            raise ValueError("it holds the rows of other models")
        path = entry / _ROWS
        if not path.is_file():
            raise ValueError("its rows are missing")
        state = _state(path)
        if state[0] != shape[0] * shape[1] * dtype.itemsize:
            raise ValueError(f"its rows have {state[0]} bytes")
        if state != about.get("state") and _file_digest(path) != about.get("digest"):
            raise ValueError("its rows have changed")
        with path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():
            # torch has no tensors that cannot be written to, and says so.
            warnings.simplefilter("ignore", UserWarning)
            rows = torch.frombuffer(memory, dtype=dtype).view(shape)
        return cls(entry, key, shape, dtype, rows, memory), extras

    def release(self) -> None:
        """Give the pages back now; they are read again when they are used."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.entry, self.key, self.shape, self.dtype)


def _reopen(entry: Path, key: str, shape: tuple[int, int], dtype: torch.dtype) -> MappedRows:
    try:
        return MappedRows.open(entry, key, shape, dtype)[0]
    except (OSError, ValueError) as error:
        raise MergeError(
            f"the task vectors in {entry} cannot be mapped: {error}",
            hint="load them from the checkpoints again; processes that share them need the same "
            "cache folder",
        ) from error


@dataclass(frozen=True)
class RowsCache:
    """Rows of task vectors, in one folder for each key.

    An entry appears complete or not at all. Several processes may use a cache at once: one
    writes an entry, the others wait for it. Nothing is ever deleted; entries may be, whenever no
    program has yet to open them.

    Attributes:
        folder: Where entries are.
    """

    folder: Path

    def rows(
        self,
        key: str,
        shape: tuple[int, int],
        dtype: torch.dtype,
        fill: Callable[[Put], Extras],
    ) -> tuple[MappedRows, Extras]:
        """Return the rows of a key, mapped; they are written first where they are not there.

        Args:
            key: See `rows_key`.
            shape: ``(1 + D, P)``.
            dtype: Storage.
            fill: Puts the rows; see `map_bo.merging.vectors.row_filling.fill`.

        Raises:
            MergeError: When the disk is full or cannot be written, and what ``fill`` raises;
                nothing is left behind.
        """
        entry = self.folder / key
        # An entry that is there needs no right to write.
        if (found := self._open(entry, shape, dtype, warn=False)) is not None:
            return found
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / f".{key}.lock"):
                if (found := self._open(entry, shape, dtype, warn=True)) is not None:
                    return found
                for left in self.folder.glob(f".{key}.*.tmp"):  # by a process that was killed
                    shutil.rmtree(left, ignore_errors=True)
                draft = self.folder / f".{key}.{uuid.uuid4().hex}.tmp"
                try:
                    self._write(draft, key, shape, dtype, fill)
                    if entry.is_dir() and not entry.is_symlink():
                        shutil.rmtree(entry)
                    else:
                        entry.unlink(missing_ok=True)
                    draft.rename(entry)
                    _sync_folder(self.folder)
                finally:
                    shutil.rmtree(draft, ignore_errors=True)
        found = self._open(entry, shape, dtype, warn=True)
        if found is None:
            raise MergeError(
                f"the task vectors were written to {entry} and cannot be read back",
                hint="check the disk, or choose another cache folder",
            )
        return found

    def _open(
        self, entry: Path, shape: tuple[int, int], dtype: torch.dtype, *, warn: bool
    ) -> tuple[MappedRows, Extras] | None:
        try:
            return MappedRows.open(entry, entry.name, shape, dtype)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            if warn:
                logger.warning("task vectors in %s are written again: %s", entry, error)
            return None

    def _write(
        self,
        draft: Path,
        key: str,
        shape: tuple[int, int],
        dtype: torch.dtype,
        fill: Callable[[Put], Extras],
    ) -> None:
        count, columns = shape
        size = count * columns * dtype.itemsize
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise MergeError(
                f"task vectors are to be mapped from {self.folder}, which has {format_bytes(free)} "
                f"free, and they take {format_bytes(size)}",
                hint="free some space, choose another cache folder, or allow more memory",
            )
        draft.mkdir()
        path = draft / _ROWS
        with path.open("wb") as file:
            file.truncate(size)  # what nothing is put to, between tensors, is 0

            def put(row: int, start: int, piece: Tensor) -> None:
                content = raw_bytes(piece)
                at = (row * columns + start) * dtype.itemsize
                while len(content):
                    written = os.pwrite(file.fileno(), content, at)
                    content, at = content[written:], at + written

            extras = fill(put)
            file.flush()
            os.fsync(file.fileno())
        about = {
            "key": key,
            "shape": shape,
            "dtype": str(dtype),
            "digest": _file_digest(path),
            "state": _state(path),
        }
        write_extras(draft / _EXTRAS, about, extras)
        _sync_folder(draft)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            raise MergeError(
                f"task vectors cannot be kept in {self.folder}: {error.strerror or error}",
                hint="free some space or choose another cache folder; nothing was left behind"
                if full
                else "choose a cache folder that can be written",
            ) from error


def write_extras(path: Path, about: Mapping[str, Any], extras: Extras) -> None:
    """Write a safetensors file, to the disk itself.

    Args:
        path: The file to create.
        about: Plain data on the rows.
        extras: What there is.

    Raises:
        OSError: When it cannot be written.
    """
    tensors = {f"fixed.{name}": value for name, value in extras.fixed.items()}
    tensors |= {f"floor.{index}": floor for index, floor in extras.floors.items()}
    for index, part in extras.adapted.items():
        here = f"adapted.{index}"
        tensors |= {f"{here}.A": part.A, f"{here}.B": part.B, f"{here}.owner": part.owner}
        tensors |= {f"{here}.value.{i}": value for i, value in part.values.items()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    told = {
        **about,
        "likeness": {str(i): list(sums) for i, sums in extras.similarity.items()},
        "beside": _tensors_digest(tensors),
    }
    try:
        save_file(tensors, path, metadata={_ABOUT: json.dumps(told)})
    except SafetensorError as error:  # so it calls what the system says
        raise OSError(errno.EIO, str(error)) from error
    with path.open("rb") as file:
        os.fsync(file.fileno())


def read_extras(path: Path) -> tuple[dict[str, Any], Extras]:
    """Read what `write_extras` wrote.

    Raises:
        CheckpointError: When the file is missing, damaged, or no safetensors file.
        ValueError: When it holds something else than was written.
    """
    header = read_header(WeightFile(path))
    reader = SafetensorsReader(path)
    try:
        about: dict[str, Any] = parse_json(header.metadata[_ABOUT])
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
        adapted = {index: _adapt(part) for index, part in sorted(parts.items())}
        similarity = {int(i): sums for i, sums in about["likeness"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name} is of something else") from error
    return about, Extras(fixed, floors, adapted, similarity)


def _adapt(part: Mapping[str, Tensor]) -> AdaptedTensor:
    values = {
        int(label.removeprefix("value.")): tensor
        for label, tensor in part.items()
        if label.startswith("value.")
    }
    return AdaptedTensor(part["B"], part["A"], part["owner"], dict(sorted(values.items())))


def _tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        total.update(raw_bytes(tensor))
    return total.hexdigest()


def _file_digest(path: Path) -> str:
    """Return a digest of a file: the SHA-256 of those of its blocks, taken on all cores."""
    size = path.stat().st_size
    found: dict[int, bytes] = {}

    def digest(start: int, _: None) -> None:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            block = hashlib.sha256()
            left = min(_BLOCK, size - start)
            while left and (content := file.read(min(left, 1 << 20))):
                block.update(content)
                left -= len(content)
        found[start] = block.digest()

    parallel_for(digest, range(0, size, _BLOCK), lambda: None)
    return hashlib.sha256(b"".join(found[start] for start in sorted(found))).hexdigest()


def _state(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not every file system lets folders be synced
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
