"""Tensors as the readers of all formats give them, and the reader of those in memory.

A reader knows the layout (shape and dtype) of every tensor without reading any, and loads one
tensor, or a piece of one, at a time. Nothing here runs code that a file contains. Refused in any
format are names that no program writes in good faith, and, where asked for, numbers that are not
finite.
"""

from __future__ import annotations

import math
import mmap
import unicodedata
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from map_bo.errors import CheckpointError

__all__ = [
    "DTYPES",
    "Layout",
    "MemoryReader",
    "TensorReader",
    "all_finite",
    "buffer_for",
    "byte_view",
    "exceeds_range",
    "name_problem",
    "piece_of",
    "raw_bytes",
    "refuse_odd_names",
]

_LONGEST = 1024
# Control characters, lone surrogates, and the separators of lines and paragraphs.
_REFUSED = {"Cc", "Cs", "Zl", "Zp"}

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

_LARGE = 1 << 22  # bytes


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

    def read(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return the row-major elements ``start`` to ``stop`` of one tensor, 1-D on the CPU.

        With ``out`` (see `buffer_for`) they are written there. Several threads may call it.
        """
        ...

    def version(self) -> object | None:
        """Return a value that changes when the tensors do, or None when that cannot be told."""
        ...


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

    def read(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return a view of the elements from ``start`` to ``stop``, or a copy of them in ``out``.

        Of a tensor that is not contiguous, or on another device, the piece is a copy.
        """
        return piece_of(self._tensors[name], start, stop, out)

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


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the elements of a CPU tensor in row-major order as bytes, copying only if needed."""
    flat = tensor.detach().contiguous().reshape(-1)
    # Conjugate and negative views are lazy in torch; their bytes are not those of their values.
    flat = flat.resolve_conj().resolve_neg()
    return flat.view(torch.uint8).numpy().data


def byte_view(flat: Tensor) -> memoryview:
    """Return the memory of a contiguous 1-D CPU tensor as writable bytes."""
    return flat.detach().view(torch.uint8).numpy().data


def _new(count: int, dtype: torch.dtype) -> Tensor:
    size = count * dtype.itemsize
    if size < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(count, dtype=dtype, device="cpu")
    # To be given memory page by page costs more than to copy from the page cache into it: 512 MB
    # in tensors of 64 MB took .67 s in ordinary pages and .25 s in huge ones (Linux 6, one core).
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


def buffer_for(count: int, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """Return a 1-D CPU tensor of ``count`` elements: a new one, or the beginning of ``out``.

    Args:
        count: Number of elements.
        dtype: Their dtype.
        out: Memory to use: contiguous, on the CPU, of this dtype or of bytes (uint8), and at
            least as large.

    Raises:
        CheckpointError: When ``out`` cannot be used.
    """
    if out is None:
        return _new(count, dtype)
    hint = f"give a contiguous CPU tensor of {count} {dtype} or {count * dtype.itemsize} uint8"
    if out.device.type != "cpu" or not out.is_contiguous() or out.dtype not in (dtype, torch.uint8):
        raise CheckpointError(
            f"out cannot hold the elements: it is {out.dtype} on {out.device}"
            + ("" if out.is_contiguous() else ", not contiguous"),
            hint=hint,
        )
    flat = out.detach().reshape(-1)
    if flat.numel() * flat.element_size() < count * dtype.itemsize:
        raise CheckpointError(f"out is too small: it has {flat.numel()} elements", hint=hint)
    if flat.dtype == dtype:
        return flat[:count]
    if flat.data_ptr() % dtype.itemsize or flat.storage_offset() % dtype.itemsize:
        raise CheckpointError(
            f"out does not begin at a multiple of {dtype.itemsize} bytes", hint=hint
        )
    return flat[: count * dtype.itemsize].view(dtype)


def piece_of(tensor: Tensor, start: int, stop: int, out: Tensor | None = None) -> Tensor:
    """Return the row-major elements ``start`` to ``stop`` of a tensor, 1-D on the CPU.

    A contiguous CPU tensor gives a view. Of another, no more is copied than the rows that the
    piece touches. With ``out`` (see `buffer_for`) the piece is copied there.
    """
    while tensor.dim() > 1 and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.dim() > 1 and start < stop and not tensor.is_contiguous():
        row = tensor.numel() // tensor.shape[0]
        first = start // row
        tensor = tensor[first : (stop - 1) // row + 1]
        start, stop = start - first * row, stop - first * row
    # Conjugate and negative views are lazy in torch; their bytes are not those of their values.
    piece = tensor.reshape(-1)[start:stop].cpu().resolve_conj().resolve_neg()
    if out is None:
        return piece
    return buffer_for(stop - start, tensor.dtype, out).copy_(piece)


def refuse_odd_names(names: Iterable[str], source: str) -> None:
    """Refuse names that are empty, unprintable, overlong or parts of a path.

    Raises:
        CheckpointError: For the first such name.
    """
    for name in names:
        problem = name_problem(name)
        if problem is not None:
            shown = ascii(name) if len(name) <= 80 else ascii(name[:80]) + "..."
            raise CheckpointError(
                f"{source}: the tensor name {shown} {problem}",
                hint="a model's own names are short printable text; save the state dict again, "
                "and do not trust a file that came with such names",
            )


def name_problem(name: str) -> str | None:
    """Return what is wrong with a tensor's name, or None.

    Names go into messages, recipes, JSON and other programs' file names, so they must be text
    that is printed as it reads and leads to no other folder. Slashes within are allowed.
    """
    if not name:
        return "is empty"
    if len(name) > _LONGEST:
        return f"has {len(name)} characters"
    if not name.isascii() or not name.isprintable():
        for character in name:
            if unicodedata.category(character) in _REFUSED:
                return f"holds the character {character!a}"
    if name.startswith("/") or "\\" in name or ".." in name.split("/"):
        return "reads as a path that leads elsewhere"
    return None


def all_finite(values: Tensor) -> bool:
    """Return whether a tensor of any dtype holds neither NaN nor infinity.

    NaN and infinity reach a sum, which takes a thirtieth of the time of testing every number.
    Where large finite numbers overflow the sum, every number is tested after all.
    """
    values = values.detach()
    if not (values.is_floating_point() or values.is_complex()):
        return True
    if values.element_size() == 1:  # float8 has neither sums nor isfinite
        values = values.float()
    dtype = values.dtype if values.is_complex() or values.dtype.itemsize > 4 else torch.float32
    total = complex(values.sum(dtype=dtype))
    finite = math.isfinite(total.real) and math.isfinite(total.imag)
    return finite or bool(torch.isfinite(values).all())


def exceeds_range(values: Tensor, rounded: Tensor) -> bool:
    """Return whether finite numbers were beyond the range of the dtype that they were rounded to.

    Most dtypes make infinity or NaN of them; ``float8_e4m3fn`` makes its largest number.
    """
    if not rounded.is_floating_point() or rounded.dtype == values.dtype:
        return False
    if not all_finite(rounded):
        return all_finite(values)
    if rounded.element_size() > 1 or not rounded.numel():
        return False
    info = torch.finfo(rounded.dtype)
    step = info.eps * 2.0 ** math.floor(math.log2(info.max))  # between its two largest numbers
    largest = values.detach().abs().max() if values.element_size() > 1 else rounded.float().max()
    return float(largest) > info.max + step / 2
