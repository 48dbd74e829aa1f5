"""File formats of checkpoints: lazy readers that all look alike.

A reader knows the layout (shape and dtype) of every tensor without reading any, and loads one
tensor at a time. Safetensors files are memory-mapped; so are ``.pt`` files in torch's zip
format. Nothing here runs code that a file contains.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from map_bo.errors import CheckpointError
from map_bo.merging.messages import first_line, listed
from map_bo.merging.pickles import read_pickle

__all__ = [
    "DTYPES",
    "Layout",
    "MemoryReader",
    "SafetensorsReader",
    "ShardedReader",
    "TensorReader",
    "listed",
    "open_file",
    "raw_bytes",
]

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "C64": torch.complex64,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U64": torch.uint64,
        "U32": torch.uint32,
        "U16": torch.uint16,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)
"""The safetensors name of every dtype that is read and written."""

PICKLE_SUFFIXES = (".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Layout:
    """Shape and dtype of a stored tensor."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's elements."""
        return self.shape.numel() * self.dtype.itemsize


class TensorReader(Protocol):
    """Named tensors with their layouts, each loaded on demand to the CPU."""

    @property
    def layouts(self) -> Mapping[str, Layout]:
        """Layout of every tensor, aliases included."""
        ...

    @property
    def ties(self) -> Mapping[str, str]:
        """Alias -> canonical name, for tensors that are one tensor under several names."""
        ...

    def load(self, name: str) -> Tensor:
        """Return one tensor on the CPU."""
        ...

    def version(self) -> object | None:
        """Return a value that changes when the tensors do, or None when that cannot be told."""
        ...


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the elements of a CPU tensor in row-major order as bytes, copying only if needed."""
    flat = tensor.detach().contiguous().reshape(-1)
    # Conjugate and negative views are lazy in torch; their bytes are not those of their values.
    flat = flat.resolve_conj().resolve_neg()
    return flat.view(torch.uint8).numpy().data


class MemoryReader:
    """Tensors held in memory or memory-mapped by torch; they are referenced, not copied.

    Names that share one storage with the same offset, shape and strides are ties: the name that
    comes first in ``tensors`` is the canonical one, as in Hugging Face's own files.

    Args:
        tensors: Name -> tensor.
        origin: What to call the source in an error.

    Raises:
        CheckpointError: For a tensor without data (meta device), a sparse or quantised one, or a
            dtype that no merge can handle.
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, origin: str) -> None:
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        layouts: dict[str, Layout] = {}
        ties: dict[str, str] = {}
        seen: dict[tuple[object, ...], str] = {}
        for name, tensor in self._tensors.items():
            _refuse_unreadable(name, tensor, origin)
            layouts[name] = Layout(tensor.shape, tensor.dtype)
            if tensor.numel():
                key = (
                    tensor.device,
                    tensor.untyped_storage().data_ptr(),
                    tensor.storage_offset(),
                    tensor.shape,
                    tensor.stride(),
                    tensor.dtype,
                )
                canonical = seen.setdefault(key, name)
                if canonical != name:
                    ties[name] = canonical
        self.layouts: Mapping[str, Layout] = layouts
        self.ties: Mapping[str, str] = ties

    def load(self, name: str) -> Tensor:
        """Return the tensor itself, or a CPU copy of one on another device."""
        return self._tensors[name].cpu()

    def version(self) -> object | None:
        """Return torch's own write counters; None for inference tensors, which have none."""
        if any(tensor.is_inference() for tensor in self._tensors.values()):
            return None
        return tuple(tensor._version for tensor in self._tensors.values())


def _refuse_unreadable(name: str, tensor: Tensor, origin: str) -> None:
    if tensor.is_meta:
        raise CheckpointError(
            f"{origin}: tensor {name!r} has no data (it is on the meta device)",
            hint="load the weights before using the model as a checkpoint",
        )
    if tensor.layout != torch.strided or tensor.is_quantized:
        kind = "quantised" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
        raise CheckpointError(
            f"{origin}: tensor {name!r} is {kind}; only dense tensors can be merged",
            hint="convert it to a dense tensor first (.to_dense(), or dequantise the model)",
        )


class SafetensorsReader:
    """One ``.safetensors`` file, memory-mapped; only the header is read on opening.

    Files leave out the further names of tied tensors. Where the metadata record them as
    ``alias: canonical`` (as ``safetensors.torch.save_model`` and this package do), the aliases
    are read back as ties; Hugging Face records nothing, so there they are simply absent.

    Raises:
        CheckpointError: For a file that is truncated, damaged, or of an unknown dtype.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: Any = None
        layouts: dict[str, Layout] = {}
        with self._damaged():
            handle = self._open()
            for name in handle.keys():  # noqa: SIM118 - the handle is no mapping
                part = handle.get_slice(name)
                label = str(part.get_dtype())
                if label not in DTYPES:
                    raise CheckpointError(
                        f"{path}: tensor {name!r} has the dtype {label}, which cannot be merged",
                        hint=f"convert it to one of {', '.join(DTYPES)}",
                    )
                layouts[name] = Layout(torch.Size(part.get_shape()), DTYPES[label])
            metadata = handle.metadata() or {}
        # Opening again on the first load keeps no file handle for checkpoints only listed.
        del handle
        ties = {
            alias: kept
            for alias, kept in metadata.items()
            if alias not in layouts and kept in layouts
        }
        layouts.update({alias: layouts[kept] for alias, kept in ties.items()})
        self.layouts: Mapping[str, Layout] = layouts
        self.ties: Mapping[str, str] = ties

    def _open(self) -> Any:
        return safe_open(self.path, framework="pt", device="cpu")

    def _damaged(self) -> _Translate:
        return _Translate(self.path)

    def load(self, name: str) -> Tensor:
        """Read one tensor."""
        with self._damaged():
            if self._handle is None:
                self._handle = self._open()
            tensor: Tensor = self._handle.get_tensor(self.ties.get(name, name))
        return tensor

    def version(self) -> object | None:
        """Return the file's size and time of change."""
        status = self.path.stat()
        return (status.st_size, status.st_mtime_ns)

    def __getstate__(self) -> dict[str, Any]:
        # A worker process maps the file itself and shares the pages.
        return {
            "path": self.path,
            "layouts": self.layouts,
            "ties": self.ties,
            "_handle": None,
        }


class _Translate:
    """Turns what a damaged or unreadable file raises into a `CheckpointError` with its path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, CheckpointError) or not isinstance(error, Exception):
            return
        if isinstance(error, (SafetensorError, OSError, EOFError, RuntimeError, ValueError)):
            raise CheckpointError(
                f"{self.path} cannot be read: {first_line(error)}",
                hint="the file is truncated, damaged or not readable; copy or download it again",
            ) from error


class ShardedReader:
    """Several files joined by an index; a shard's tensors are read only when they are asked for.

    Raises:
        CheckpointError: When the index is malformed or names a missing shard or tensor.
    """

    def __init__(self, index: Path) -> None:
        self.index = index
        weight_map = _weight_map(index)
        shards: dict[str, TensorReader] = {}
        for shard in sorted(set(weight_map.values())):
            path = index.parent / shard
            if not path.is_file():
                raise CheckpointError(
                    f"{index} names the shard {shard!r}, which is missing from {index.parent}",
                    hint="the download or copy is incomplete; fetch the missing file",
                )
            shards[shard] = open_file(path)
        home: dict[str, TensorReader] = {}
        ties: dict[str, str] = {}
        for name, shard in weight_map.items():
            if name not in shards[shard].layouts:
                raise CheckpointError(
                    f"{index} says that tensor {name!r} is in {shard!r}, which does not hold it",
                    hint="index and shards are of different checkpoints; fetch both again",
                )
            home[name] = shards[shard]
        for reader in shards.values():
            for alias, kept in reader.ties.items():
                if kept in home and home.setdefault(alias, reader) is reader:
                    ties[alias] = kept
        self._home = home
        self._shards = tuple(shards.values())
        self.layouts: Mapping[str, Layout] = {n: r.layouts[n] for n, r in home.items()}
        self.ties: Mapping[str, str] = ties

    def load(self, name: str) -> Tensor:
        """Read one tensor from its shard."""
        return self._home[name].load(name)

    def version(self) -> object | None:
        """Return the versions of all shards."""
        return tuple(shard.version() for shard in self._shards)


def _weight_map(index: Path) -> dict[str, str]:
    hint = "an index is JSON with a 'weight_map' from tensor names to files beside it"
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{index} cannot be read: {first_line(error)}", hint=hint) from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(
        # A shard is a plain name: an index must not lead out of its own folder.
        isinstance(shard, str) and Path(shard).name == shard
        for shard in weight_map.values()
    ):
        raise CheckpointError(f"{index} holds no usable weight_map", hint=hint)
    return weight_map


def open_file(path: Path) -> TensorReader:
    """Return the reader for one weight file, by its suffix.

    Raises:
        CheckpointError: For an unknown suffix, and whatever the reader refuses.
    """
    if path.suffix == ".safetensors":
        return SafetensorsReader(path)
    if path.suffix in PICKLE_SUFFIXES:
        return MemoryReader(read_pickle(path), origin=str(path))
    raise CheckpointError(
        f"{path} has the unknown suffix {path.suffix!r}",
        hint="known are .safetensors, .pt, .pth, .bin, a *.index.json, or a folder with them",
    )
