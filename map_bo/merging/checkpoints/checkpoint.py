"""Checkpoints: the named tensors of a model, read lazily, whatever they are stored in.

Weights that are quantised are refused: their numbers mean something only together with their
scales, and merging them as they are would give a wrong model without a word. Tensors of 8-bit
floats (``float8_e4m3fn``, ``float8_e5m2``) without scales are plain values and are merged like any
others, in float32.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from map_bo.errors import CheckpointError, first_line
from map_bo.merging.checkpoints.hub import HubModel, fetch, hub_model
from map_bo.merging.checkpoints.pickles import state_dict
from map_bo.merging.checkpoints.positioned_reads import GGUF_HINT
from map_bo.merging.checkpoints.read_sharded import ShardedReader, open_file
from map_bo.merging.checkpoints.tensors import (
    Layout,
    MemoryReader,
    TensorReader,
    all_finite,
    raw_bytes,
    refuse_odd_names,
)

__all__ = [
    "Checkpoint",
    "CheckpointSource",
    "absolute_path",
    "adapter_file",
    "content_digest",
    "open_checkpoint",
    "read_object",
    "refuse_quantised",
]

_FP8 = {
    dtype
    for dtype in (getattr(torch, name) for name in dir(torch) if name.startswith("float8"))
    if isinstance(dtype, torch.dtype)
}
_PACKED = {torch.int8, torch.uint8, torch.int16, torch.int32}
# The last part of a scale's name, as in weight_scale, weight_scale_inv, input_scale,
# scale_weight, weight_scales, scale. The temperature of CLIP is none.
_SCALE = re.compile(r"(?!logit_scale$)(?:.*_)?scales?(?:_(?:inv|weight|input|output|2))*")

# In the order in which they are looked for: safetensors first, and a whole file before shards,
# as transformers does.
_KNOWN_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    # The same of diffusers.
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
)
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PLACES = (
    "give a file or folder on this machine, or a model of the Hugging Face hub as "
    "organisation/name or hf://organisation/name"
)
_CHUNK = 1 << 23  # bytes that the digest holds
_LARGEST_JSON = 1 << 24  # bytes of a configuration
# Numbers: tensors up to the first are looked through for -inf, of larger ones so many at each end.
_PEEK, _ENDS = 1 << 14, 1 << 10


class Checkpoint:
    """The named tensors of a model. Make one with `open_checkpoint`.

    Ties: where several names are one tensor (an embedding shared with the output layer), all
    names are kept and ``ties`` maps each further name (alias) to the canonical one, which is the
    first in the order of the state dict. Ties are known for models and state dicts in memory,
    for ``.pt`` files (shared storage), and for safetensors files whose metadata record them.
    Hugging Face safetensors leave out the aliases without a record: such a checkpoint does not
    have those names at all.

    Tensors of a checkpoint in memory are referenced, not copied: do not write to what ``load``
    returns.

    Numbers are read as they are stored. Tensors of 8-bit floats without scales are plain values;
    weights that are quantised (fp8 with scales, bitsandbytes, GPTQ, AWQ and the like) are refused,
    since they mean nothing without their scales.

    A checkpoint may be read by several threads at once, and sent to other processes.

    Attributes:
        source: Readable origin: an absolute path, ``organisation/name@commit`` of the Hugging
            Face hub, or what was given in memory.
        directory: The folder, when it is a Hugging Face directory (``config.json`` inside) or the
            snapshot of a model of the hub.

    Raises:
        CheckpointError: When there are no tensors, a name is no plain text, or weights are
            quantised.
    """

    def __init__(
        self,
        reader: TensorReader,
        *,
        source: str,
        directory: Path | None,
        configuration: Mapping[str, Any] | None = None,
    ) -> None:
        if not reader.layouts:
            raise CheckpointError(
                f"{source} holds no tensors", hint="give the weights of a trained model"
            )
        refuse_odd_names(reader.layouts, source)
        refuse_quantised(reader.layouts, source)
        self._reader = reader
        self.source = source
        self.directory = directory
        self._names = tuple(sorted(reader.layouts))
        self._digest: tuple[object, str] | None = None
        self._configuration = configuration

    def __repr__(self) -> str:
        return f"Checkpoint({self.source!r}, {len(self._names)} tensors)"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, aliases included, sorted."""
        return self._names

    @property
    def ties(self) -> Mapping[str, str]:
        """Alias -> canonical name; both are in ``names``."""
        return MappingProxyType(dict(self._reader.ties))

    @property
    def vocabulary_changes(self) -> Mapping[str, Any]:
        """Plain data on how the tensors differ from those of the source; empty where they do not.

        The digest is that of the source. See `map_bo.merging.align.conform.align_experts`.
        """
        return MappingProxyType({})

    @property
    def original(self) -> Checkpoint | None:
        """The checkpoint whose tensors this one presents in other names or shapes, if any."""
        return None

    @property
    def configuration(self) -> Mapping[str, Any] | None:
        """The model's configuration as plain data: ``config.json``, or that of a model in memory.

        None where there is none, and where the file cannot be read.
        """
        if self._configuration is None and self.directory is not None:
            self._configuration = read_object(self.directory / "config.json")
        return self._configuration

    @cached_property
    def masks(self) -> frozenset[str]:
        """Floating tensors that hold -inf, and neither +inf nor NaN: attention masks.

        They are constant: they come from the base as they are, and experts must have the same.
        Long tensors are told by their first and last numbers.
        """
        found = set()
        for name, layout in self._reader.layouts.items():
            if not layout.dtype.is_floating_point:
                continue
            count = layout.shape.numel()
            if count <= 1:
                continue
            ends = [(0, count)] if count <= _PEEK else [(0, _ENDS), (count - _ENDS, count)]
            parts = [self._reader.read(name, *end) for end in ends]
            if not all(all_finite(part) for part in parts):
                values = torch.cat([part.detach().to(torch.float32) for part in parts])
                if not bool(values.isnan().any() | values.isposinf().any()):
                    found.add(name)
        return frozenset(found)

    def layout(self, name: str) -> Layout:
        """Return shape and dtype of a tensor without reading it.

        Raises:
            CheckpointError: When there is no tensor of this name.
        """
        try:
            return self._reader.layouts[name]
        except KeyError:
            raise CheckpointError(
                f"{self.source} has no tensor {name!r}", hint="see its .names"
            ) from None

    def shape(self, name: str) -> torch.Size:
        """Return the shape of a tensor without reading it."""
        return self.layout(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor without reading it."""
        return self.layout(name).dtype

    def load(self, name: str) -> Tensor:
        """Read one tensor to the CPU.

        Raises:
            CheckpointError: When there is no tensor of this name or its file cannot be read.
        """
        self.layout(name)
        return self._reader.load(name)

    def read(self, name: str, start: int, stop: int, *, out: Tensor | None = None) -> Tensor:
        """Read a piece of one tensor: its elements ``start`` to ``stop`` in row-major order.

        From safetensors no more is read, and held, than the piece. ``.pt`` files are mapped by
        torch, so their pages count as resident memory while the checkpoint is open. Checkpoints
        in memory give a view where they can: do not write to it.

        Args:
            name: The tensor.
            start: First element, from 0.
            stop: One past the last, at most the number of elements.
            out: Memory for the piece, in place of new memory or a view: a contiguous CPU tensor
                of the stored dtype or of bytes (uint8), at least as large.

        Returns:
            A 1-D CPU tensor of ``stop - start`` elements in the stored dtype; the beginning of
            ``out``, when that is given.

        Raises:
            CheckpointError: When there is no such tensor or piece, ``out`` does not fit, or the
                file cannot be read or has changed since it was opened.
        """
        count = self.layout(name).shape.numel()
        if not 0 <= start <= stop <= count:
            raise CheckpointError(
                f"{self.source} has no elements {start} to {stop} of tensor {name!r}, which has "
                f"{count}",
                hint="give 0 <= start <= stop <= the number of elements",
            )
        return self._reader.read(name, start, stop, out)

    def digest(self) -> str:
        """Return a SHA-256 over names, dtypes, shapes and bytes of the tensors, sorted by name.

        It does not depend on the file format, the shards or the order: the same weights have the
        same digest. Aliases of tied tensors are left out, since files leave them out too. Pieces
        of 8 MiB are read. The result is kept until the tensors or files change.
        """
        version = self._reader.version()
        if self._digest is not None and version is not None and self._digest[0] == version:
            return self._digest[1]
        self._digest = (version, content_digest(self))
        return self._digest[1]


def content_digest(checkpoint: Checkpoint) -> str:
    """Return the SHA-256 of the tensors as they are read, which `Checkpoint.digest` describes.

    Where a checkpoint presents other tensors than those of its source (an adapter merged into a
    base, a vocabulary that was fitted), its own digest is that of the source; this is not.
    """
    total, ties = hashlib.sha256(), checkpoint.ties
    for name in checkpoint.names:
        if name in ties:
            continue
        layout = checkpoint.layout(name)
        dtype = str(layout.dtype).removeprefix("torch.")
        total.update(json.dumps([name, dtype, list(layout.shape)]).encode() + b"\n")
        count, step = layout.shape.numel(), _CHUNK // layout.dtype.itemsize
        for start in range(0, count, step):
            total.update(raw_bytes(checkpoint.read(name, start, min(start + step, count))))
    return total.hexdigest()


CheckpointSource = nn.Module | Mapping[str, Tensor] | Checkpoint | str | Path
"""What `open_checkpoint` takes."""


def open_checkpoint(source: CheckpointSource) -> Checkpoint:
    """Open the weights of a model; nothing but names, shapes and dtypes is read yet.

    Args:
        source: One of

            - a module or a mapping from names to tensors (referenced, not copied);
            - a checkpoint, returned as it is;
            - a ``.safetensors`` file, or a ``.pt``, ``.pth``, ``.bin`` or ``.ckpt`` file of
              ``torch.save``, read with ``weights_only=True``: a state dict, or a dict that holds
              one under ``state_dict``, ``model``, ``module``, ``ema`` or the like;
            - a ``*.index.json`` of a sharded checkpoint;
            - a folder: ``model.safetensors``, its sharded form, ``pytorch_model.bin``, its
              sharded form, or else the only safetensors file or index in it. With a
              ``config.json`` beside the weights it is a Hugging Face directory;
            - a model of the Hugging Face hub as text, ``organisation/name`` or
              ``organisation/name@revision`` where no such path exists, or with ``hf://`` before
              it. It is fetched to the hub's cache, or found there without a connection.

    Raises:
        CheckpointError: For anything that is missing, truncated, damaged, empty, unsafe, quantised
            or of an unknown kind; the message names the file and the cause.
        MissingDependencyError: For a model of the hub when huggingface_hub is not installed.
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, nn.Module):
        origin = f"{type(source).__name__} in memory"
        tensors = state_dict(source.state_dict(), origin=origin)
        reader = MemoryReader(tensors, origin=origin)
        return Checkpoint(
            reader, source=origin, directory=None, configuration=_configuration_of(source)
        )
    if isinstance(source, Mapping):
        tensors = state_dict(source, origin="the state dict")
        origin = f"state dict in memory ({len(tensors)} tensors)"
        return Checkpoint(MemoryReader(tensors, origin=origin), source=origin, directory=None)
    if isinstance(source, str) and (model := hub_model(source)) is not None:
        return _open_snapshot(model)
    if isinstance(source, (str, Path)):
        return _open_path(absolute_path(source))
    raise CheckpointError(
        f"a {type(source).__name__} is not a checkpoint",
        hint="give a path, a module, or a mapping from names to tensors",
    )


def _configuration_of(model: nn.Module) -> dict[str, Any] | None:
    """Return the configuration of a model of transformers as plain data, None for other models."""
    library: Any = sys.modules.get("transformers")
    kind = getattr(library, "PreTrainedModel", None)
    if kind is None or not isinstance(model, kind):
        return None
    return dict(model.config.to_dict())


def read_object(file: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, None where there is none or it cannot be read.

    Whoever needs the file says what is wrong with it.
    """
    try:
        if not file.is_file() or file.stat().st_size > _LARGEST_JSON:
            return None
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def absolute_path(source: str | Path) -> Path:
    """Return a path, absolute, with ``~`` expanded; it need not exist.

    Raises:
        CheckpointError: When it is not a path, or its folder may not be entered.
    """
    try:
        path = Path(source).expanduser().absolute()
        os.lstat(path)
    except FileNotFoundError:
        pass
    # No such user behind ~, a NUL in the name, a name too long, a folder that may not be entered.
    except (RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{str(source)!r} cannot be read as a path: {first_line(error)}", hint=_PLACES
        ) from error
    return path


def _open_path(path: Path) -> Checkpoint:
    if not os.path.lexists(path):
        raise CheckpointError(f"{path} does not exist", hint=_PLACES)
    directory = path if path.is_dir() and (path / "config.json").is_file() else None
    return Checkpoint(_reader(path), source=str(path), directory=directory)


def _open_snapshot(model: HubModel) -> Checkpoint:
    snapshot = fetch(model)
    try:
        reader = _reader(snapshot.folder)
    except CheckpointError as error:
        if snapshot.complete:
            raise
        raise CheckpointError(
            f"the copy of {model} in the cache cannot be used, and the Hugging Face hub was not "
            f"asked or gave no access: {error.message}",
            hint=f"connect, or complete the copy where there is a connection with "
            f"`hf download {model.name}`",
        ) from error
    return Checkpoint(reader, source=snapshot.source, directory=snapshot.folder)


def _reader(path: Path) -> TensorReader:
    file = _weights_in(path) if path.is_dir() else path
    return ShardedReader(file) if _INDEX.fullmatch(file.name) else open_file(file)


def adapter_file(path: Path) -> Path | None:
    """Return the weights of an adapter: the file of that name, or the one in a folder.

    None where there is no such file, and for a folder that holds a whole model too.
    """
    if path.name in _ADAPTER_FILES and path.is_file():
        return path
    if any((path / name).is_file() for name in _KNOWN_FILES):
        return None
    return next((path / name for name in _ADAPTER_FILES if (path / name).is_file()), None)


def _weights_in(folder: Path) -> Path:
    for name in _KNOWN_FILES:
        # A link to nothing counts: other files beside it are not what the folder says it holds.
        if os.path.lexists(folder / name):
            return folder / name
    if adapter_file(folder) is not None:
        raise CheckpointError(
            f"{folder} holds an adapter, not the weights of a whole model",
            hint="give it as an expert beside its base, or merge it first (peft: "
            "merge_and_unload, then save_pretrained)",
        )
    # Libraries have variants of a model beside it: model.safetensors.index.fp16.json.
    for pattern in ("*.safetensors.index.json", "*.safetensors.index.*.json", "*.safetensors"):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(file.name for file in found[:5])
            raise CheckpointError(
                f"{folder} holds {len(found)} weight files and no model.safetensors: {names}",
                hint="name the one to read",
            )
        if found:
            return found[0]
    inner = sorted(file.parent.name for name in _ADAPTER_FILES for file in folder.glob(f"*/{name}"))
    if inner:
        raise CheckpointError(
            f"{folder} holds no weights, but adapters in folders of it: {', '.join(inner[:5])}",
            hint=f"give one of these folders as an expert, such as {folder / inner[0]}",
        )
    if packed := sorted(folder.glob("*.gguf")):
        raise CheckpointError(
            f"{folder} holds no weights that can be merged, but the GGUF file {packed[0].name}",
            hint=GGUF_HINT,
        )
    raise CheckpointError(
        f"{folder} holds no weights",
        hint=f"expected {', '.join(_KNOWN_FILES)} or one other safetensors file; "
        "name a .pt file directly",
    )


def _packed(layout: Layout) -> bool:
    return layout.dtype in _PACKED


def _any(layout: Layout) -> bool:
    return True


_INDEX = re.compile(r".*\.index(\.[\w-]+)?\.json")
# Names that only a scheme of quantisation gives, and what their tensors must be.
_MARKS: tuple[tuple[str, re.Pattern[str], Callable[[Layout], bool]], ...] = (
    ("bitsandbytes", re.compile(r".*\.(?:nested_)?absmax|.*\.quant_state\..*"), _any),
    ("bitsandbytes", re.compile(r"(?:.*\.)?(?:SCB|quant_map)"), _any),
    ("GPTQ or AWQ", re.compile(r"(?:.*\.)?(?:qweight|qzeros)"), _packed),
    ("compressed-tensors", re.compile(r"(?:.*\.)?weight_packed"), _packed),
    ("HQQ", re.compile(r"(?:.*\.)?W_q"), _packed),
    ("MXFP4", re.compile(r".*_blocks"), lambda layout: layout.dtype == torch.uint8),
    ("fp8 with scales", re.compile(r"scaled_fp8"), _any),
)


def refuse_quantised(layouts: Mapping[str, Layout], source: str) -> None:
    """Refuse a checkpoint whose weights are quantised.

    Known by their names are the packed weights of bitsandbytes, GPTQ, AWQ, compressed-tensors,
    HQQ and MXFP4; in general, 8-bit floats or packed integers with a tensor of scales beside
    them, in the same module or under the weight's own name.

    Raises:
        CheckpointError: With the scheme and the tensor that tells it.
    """
    for name, layout in layouts.items():
        for scheme, pattern, fits in _MARKS:
            if pattern.fullmatch(name) and fits(layout):
                raise _refusal(source, scheme, name)
    coded = [n for n, layout in layouts.items() if layout.dtype in _FP8 or _packed(layout)]
    if not coded:
        return
    modules = {name.rpartition(".")[0]: name for name in coded}
    own = set(coded)
    for name in layouts:
        module, _, last = name.rpartition(".")
        if not _SCALE.fullmatch(last) or name in own:
            continue
        # A scale beside its weight, or named after it (experts.down_proj_scale, weight._scale).
        stem = re.sub(r"[._]+scales?(?:_inv)?$", "", name)
        weight = stem if stem in own else modules.get(module)
        if weight is not None:
            kind = "fp8" if layouts[weight].dtype in _FP8 else "integer"
            raise _refusal(source, f"{kind} values with scales for {weight!r}", name)


def _refusal(source: str, scheme: str, name: str) -> CheckpointError:
    return CheckpointError(
        f"{source} holds quantised weights ({scheme}; see {name!r})",
        hint="expand quantised weights first: take the checkpoint from before quantisation, or "
        "dequantise it (transformers: model.dequantize(), then save_pretrained)",
    )
