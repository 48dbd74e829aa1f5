"""PEFT LoRA adapters: what they add to each tensor of a base, read without peft.

An adapter is a folder with ``adapter_config.json`` and ``adapter_model.safetensors``. Over its base
it is also a checkpoint: the base with the adapter merged in, one tensor at a time, so that
everything that takes a checkpoint takes an adapter.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from map_bo.errors import CheckpointError, MergeError
from map_bo.merging.adapters.lora import (
    LoraSettings,
    Orientation,
    OwnTensor,
    own_tensors,
    place,
    read_settings,
)
from map_bo.merging.adapters.low_rank import LowRank
from map_bo.merging.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointSource,
    absolute_path,
    adapter_file,
    open_checkpoint,
)
from map_bo.merging.checkpoints.hub import fetch, hub_model
from map_bo.merging.checkpoints.read_sharded import open_file, require_inside
from map_bo.merging.checkpoints.tensors import (
    Layout,
    TensorReader,
    all_finite,
    buffer_for,
    raw_bytes,
    refuse_odd_names,
)

__all__ = [
    "Adapter",
    "AdapterCheckpoint",
    "AdapterReader",
    "Kind",
    "adapter_checkpoint",
    "adapter_over",
    "open_adapter",
    "open_expert",
    "wide",
]

Kind = Literal["linear", "transposed", "embedding", "conv"]
"""How a module uses its weight: ``out x in``, ``in x out`` (GPT-2's ``Conv1D``), a table of rows,
or a convolution without groups."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Factors:
    """The names of a pair of factors in the adapter's file."""

    A: str
    B: str
    scale: float
    kind: Kind

    @property
    def flipped(self) -> bool:
        """Whether the base stores the transpose of what the factors multiply to."""
        return self.kind in ("transposed", "embedding")


@dataclass(frozen=True, eq=False)
class Adapter:
    """What a LoRA adapter adds to each tensor of a base; read on demand. See `open_adapter`.

    All names are canonical names of the base's tensors.

    Attributes:
        source: Where it was read from, absolute.
        factors: Tensor -> its pair of factors.
        values: Tensor -> name of the full new value in the adapter's file (modules to save,
            trained biases).
        biases: Tensor -> name and scale of a bias that is added (peft's ``lora_bias``).
        base: The base.
        reader: The adapter's file.
        settings: Its configuration.
        prefix: What the names of the trained model begin with and the base's do not, and the
            other way round.
    """

    source: str
    factors: Mapping[str, _Factors]
    values: Mapping[str, str]
    biases: Mapping[str, tuple[str, float]]
    base: Checkpoint
    reader: TensorReader = field(repr=False)
    settings: LoraSettings
    prefix: tuple[str, str] = ("", "")

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The tensors that it changes, sorted."""
        return tuple(sorted({*self.factors, *self.values, *self.biases}))

    @property
    def kinds(self) -> dict[str, Kind]:
        """Tensor -> kind of its module, for those that have factors."""
        return {name: pair.kind for name, pair in self.factors.items()}

    def low_rank(self, name: str) -> LowRank | None:
        """Return the change of low rank of a tensor, ``shape[0] x numel / shape[0]``, or None.

        Raises:
            MergeError: When a factor holds NaN or infinity.
        """
        pair = self.factors.get(name)
        if pair is None:
            return None
        A, B = self._load(pair.A), self._load(pair.B)
        if pair.flipped:
            A, B = B.T.contiguous(), A.T.contiguous()
        return LowRank(B.flatten(1), A.flatten(1), pair.scale)

    def dense(self, name: str) -> Tensor | None:
        """Return the rest of a tensor's change, in the base's shape, or None where there is none.

        Raises:
            MergeError: When the adapter's tensor holds NaN or infinity.
        """
        delta: Tensor | None = None
        if name in self.values:
            value, pre = self._load(self.values[name]), self.base.load(name)
            both = torch.promote_types(value.dtype, wide(pre.dtype))
            delta = value.to(both) - pre.to(both)
        if name in self.biases:
            own, scale = self.biases[name]
            shift = scale * self._load(own)
            delta = shift if delta is None else delta + shift
        return delta

    def delta(self, name: str) -> Tensor | None:
        """Return the whole change of a tensor, in the base's shape, or None where it has none."""
        delta = self.dense(name)
        low_rank = self.low_rank(name)
        if low_rank is None:
            return delta
        product = low_rank.dense().view(self.base.shape(name))
        return product if delta is None else delta + product

    def piece(self, name: str, start: int, stop: int) -> Tensor | None:
        """Return the elements ``start`` to ``stop``, row-major, of a tensor's change, or None."""
        low_rank, dense = self.low_rank(name), self._dense_piece(name, start, stop)
        if low_rank is None:
            return dense
        product = low_rank.piece(start, stop)
        return product if dense is None else product + dense

    def _dense_piece(self, name: str, start: int, stop: int) -> Tensor | None:
        """Return a piece of `dense`; no more is read than that."""
        delta: Tensor | None = None
        if name in self.values:
            own = self.values[name]
            value = self._finite(self.reader.read(own, start, stop), own)
            pre = self.base.read(name, start, stop)
            both = torch.promote_types(value.dtype, wide(pre.dtype))
            delta = value.to(both) - pre.to(both)
        if name in self.biases:
            own, scale = self.biases[name]
            shift = scale * self._finite(self.reader.read(own, start, stop), own)
            delta = shift if delta is None else delta + shift
        return delta

    def digest(self) -> str:
        """Return a SHA-256 over names, scales, shapes and values of the adapter's own tensors.

        Names are the base's, and factors lie as `low_rank` returns them: the same adapter has the
        same digest whatever its file format. The base is not in it.
        """
        total = hashlib.sha256()

        def add(label: str, tensor: Tensor, *further: object) -> None:
            dtype = str(tensor.dtype).removeprefix("torch.")
            head = [label, dtype, list(tensor.shape), *further]
            total.update(json.dumps(head).encode() + b"\n")
            total.update(raw_bytes(tensor))

        for name in self.names:
            change = self.low_rank(name)
            if change is not None:
                add(f"{name} B", change.B, change.scale)
                add(f"{name} A", change.A)
            if name in self.values:
                add(name, self.reader.load(self.values[name]))
            if name in self.biases:
                own, scale = self.biases[name]
                add(f"{name} added", self.reader.load(own), scale)
        return total.hexdigest()

    def _load(self, own: str) -> Tensor:
        return self._finite(self.reader.load(own), own)

    def _finite(self, tensor: Tensor, own: str) -> Tensor:
        tensor = tensor.detach()
        tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
        if not all_finite(tensor):
            raise MergeError(
                f"tensor {own!r} of the adapter {self.source} holds NaN or infinity",
                hint="this adapter diverged in training or its file is damaged; leave it out",
            )
        return tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which changes of a tensor are added: float32, or float64 for float64."""
    return dtype if dtype == torch.float64 else torch.float32


def open_adapter(source: str | Path, base: Checkpoint, *, label: str | None = None) -> Adapter:
    """Open a PEFT LoRA adapter over its base; names and shapes are checked, nothing is read yet.

    Read are plain LoRA factors of linear layers (GPT-2's ``Conv1D`` too), embeddings and
    convolutions without groups; ranks and scales by module; rank-stabilised scaling; modules to
    save and trained biases, as full values; and ``lora_bias``. A base of another name than the
    adapter's configuration gives is only logged, since the same model has many names.

    Args:
        source: The adapter's folder, or the file of weights in it. Weights are
            ``adapter_model.safetensors``, or ``adapter_model.bin``, which is read without
            running code.
        base: The base that it was trained from.
        label: What to call the source; by default the folder.

    Raises:
        CheckpointError: When files are missing or damaged, or the adapter is not plain LoRA.
        MergeError: When it does not fit the base; the message names the tensor.
    """
    path = Path(source).expanduser().absolute()
    folder = path.parent if path.is_file() else path
    file = adapter_file(path)
    if file is None:
        raise CheckpointError(
            f"{folder} holds no adapter weights",
            hint="expected adapter_model.safetensors or adapter_model.bin beside "
            "adapter_config.json",
        )
    settings = read_settings(folder)
    if file != path:  # a file that is given by name may be a link anywhere
        require_inside(file)
    reader = open_file(file)
    refuse_odd_names(reader.layouts, str(folder))
    odd = [name for name, layout in reader.layouts.items() if not layout.dtype.is_floating_point]
    if odd:
        raise CheckpointError(
            f"tensor {odd[0]!r} of the adapter {folder} is {reader.layouts[odd[0]].dtype}",
            hint="an adapter holds floating numbers; save it unquantised",
        )
    own = own_tensors(reader.layouts, str(folder))
    placed, prefix = place(
        dict.fromkeys(tensor.target for tensor in own.values()), base, str(folder)
    )
    _note_base(settings, base, folder)
    _note_ties(placed, base, folder)
    for name, tensor in own.items():
        target = placed[tensor.target]
        if not base.dtype(target).is_floating_point:
            raise MergeError(
                f"the adapter {folder} changes {target!r} by {name!r}, and the base's tensor is "
                f"{base.dtype(target)}",
                hint="quantised bases are expanded before merging",
            )
    return Adapter(
        source=label or str(folder),
        factors=_factors(own, placed, settings, reader, base, folder),
        values=_values(own, placed, reader, base, folder),
        biases=_biases(own, placed, settings, reader, base, folder),
        base=base,
        reader=reader,
        settings=settings,
        prefix=prefix,
    )


def _note_base(settings: LoraSettings, base: Checkpoint, folder: Path) -> None:
    named = settings.base
    if named is not None and Path(named).name != Path(base.source).name:
        logger.warning(
            "the adapter %s was trained from %s; the base here is %s", folder, named, base.source
        )


def _note_ties(placed: Mapping[str, str], base: Checkpoint, folder: Path) -> None:
    changed = list(placed.values())
    for alias, name in base.ties.items():
        if changed.count(name) == 1:
            logger.warning(
                "the adapter %s changes %s, which the base ties to %s: merged, both change, and "
                "the adapter was trained with one of them changed",
                folder,
                name,
                alias,
            )


def _factors(
    own: Mapping[str, OwnTensor],
    placed: Mapping[str, str],
    settings: LoraSettings,
    reader: TensorReader,
    base: Checkpoint,
    folder: Path,
) -> dict[str, _Factors]:
    pairs: dict[str, dict[str, str]] = {}
    for name, tensor in own.items():
        if tensor.role in ("A", "B", "embedding_A", "embedding_B"):
            pairs.setdefault(tensor.module, {})[tensor.role] = name
    found: dict[str, _Factors] = {}
    square: list[tuple[str, str, str, float]] = []
    orientation = Orientation(base, settings.fan_in_fan_out)
    for module, pair in pairs.items():
        target = placed[f"{module}.weight"]
        embedded = "embedding_A" in pair
        roles = ("embedding_A", "embedding_B") if embedded else ("A", "B")
        if set(pair) != set(roles):
            raise CheckpointError(
                f"the adapter {folder} lacks a factor of module {module!r}: it has only "
                f"{_factor_names(pair)}",
                hint="factors come in pairs, lora_A and lora_B; save the adapter again",
            )
        if target in found or target in (other for other, *_ in square):
            raise MergeError(
                f"the adapter {folder} changes the tied tensor {target!r} under two names",
                hint="merge it into its base first (peft: merge_and_unload) and give that",
            )
        A, B = (pair[role] for role in roles)
        a, b, shape = reader.layouts[A].shape, reader.layouts[B].shape, base.shape(target)
        rank, scale = settings.rank(module), settings.scale(module)
        if embedded:
            plain, flipped = False, len(shape) == 2 and shape == (a[-1], b[0])
        else:
            plain = shape == (b[0], *a[1:])
            flipped = len(a) == 2 and shape == (a[1], b[0])
        if not (plain or flipped) or a[0] != b[1:].numel():
            raise MergeError(
                f"the adapter {folder} changes {target!r}, which is {list(shape)}, by factors "
                f"of {list(a)} and {list(b)}",
                hint="give the base that the adapter was trained from; of convolutions only those "
                "without groups are read",
            )
        if a[0] != rank:
            raise CheckpointError(
                f"the adapter {folder} has rank {a[0]} in {module!r}, and {rank} by its "
                "configuration",
                hint="the scale depends on it: give adapter_config.json and weights of one adapter",
            )
        if plain and flipped:
            square.append((target, A, B, scale))
        else:
            kind: Kind = "embedding" if embedded else "conv" if len(a) > 2 else _linear(flipped)
            found[target] = _Factors(A, B, scale, kind)
            if kind in ("linear", "transposed"):
                orientation.seen[target] = flipped
    for target, A, B, scale in square:
        found[target] = _Factors(A, B, scale, _linear(orientation.of_square(target)))
    return found


def _linear(flipped: bool) -> Kind:
    return "transposed" if flipped else "linear"


def _factor_names(pair: Mapping[str, str]) -> str:
    """Return the names of the factors that there are, for an error."""
    return " and ".join(f"lora_{role}" for role in sorted(pair))


def _values(
    own: Mapping[str, OwnTensor],
    placed: Mapping[str, str],
    reader: TensorReader,
    base: Checkpoint,
    folder: Path,
) -> dict[str, str]:
    values: dict[str, str] = {}
    for name, tensor in own.items():
        if tensor.role != "value":
            continue
        target = placed[tensor.target]
        _require_shape(name, reader, target, base, folder)
        if target in values and not torch.equal(reader.load(values[target]), reader.load(name)):
            raise MergeError(
                f"the adapter {folder} gives the tied tensor {target!r} two values, "
                f"{values[target]!r} and {name!r}",
                hint="untie the base's weights and save it again",
            )
        values.setdefault(target, name)
    return values


def _biases(
    own: Mapping[str, OwnTensor],
    placed: Mapping[str, str],
    settings: LoraSettings,
    reader: TensorReader,
    base: Checkpoint,
    folder: Path,
) -> dict[str, tuple[str, float]]:
    biases: dict[str, tuple[str, float]] = {}
    for name, tensor in own.items():
        if tensor.role == "bias":
            target = placed[tensor.target]
            _require_shape(name, reader, target, base, folder)
            biases[target] = (name, settings.scale(tensor.module))
    return biases


def _require_shape(
    own: str, reader: TensorReader, target: str, base: Checkpoint, folder: Path
) -> None:
    if reader.layouts[own].shape != base.shape(target):
        raise MergeError(
            f"the adapter {folder} has {own!r} of {list(reader.layouts[own].shape)}, and "
            f"{target!r} is {list(base.shape(target))} in the base",
            hint="give the base that the adapter was trained from; a resized embedding needs a "
            "base of that size",
        )


class AdapterReader:
    """The tensors of a base with an adapter merged in, one at a time.

    Changed tensors are in float32 (float64 for a base of float64), so that a base in bfloat16
    does not round the change away; the others are the base's as they are.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        base = adapter.base
        changed = set(adapter.names)
        self.ties: Mapping[str, str] = base.ties
        self.layouts: Mapping[str, Layout] = {
            name: Layout(base.shape(name), wide(base.dtype(name)))
            if self.ties.get(name, name) in changed
            else base.layout(name)
            for name in base.names
        }

    def load(self, name: str) -> Tensor:
        """Return one merged tensor."""
        value = self.adapter.base.load(name)
        delta = self.adapter.delta(self.ties.get(name, name))
        if delta is None:
            return value
        dtype = self.layouts[name].dtype
        return (value.to(delta.dtype) + delta).to(dtype)

    def read(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return the elements ``start`` to ``stop`` of one merged tensor, row-major."""
        base = self.adapter.base
        delta = self.adapter.piece(self.ties.get(name, name), start, stop)
        if delta is None:
            return base.read(name, start, stop, out=out)
        merged = base.read(name, start, stop).to(delta.dtype) + delta
        dtype = self.layouts[name].dtype
        return (
            merged.to(dtype) if out is None else buffer_for(stop - start, dtype, out).copy_(merged)
        )

    def version(self) -> object | None:
        """Return the version of the adapter's file: a digest is over its tensors alone."""
        return self.adapter.reader.version()


class AdapterCheckpoint(Checkpoint):
    """An adapter seen as the checkpoint of the model that it makes of its base.

    Its digest is that of the adapter alone; the base has its own. It has no ``directory``, since
    its folder is not a model.

    Attributes:
        adapter: The adapter.
    """

    def __init__(self, adapter: Adapter) -> None:
        super().__init__(AdapterReader(adapter), source=adapter.source, directory=None)
        self.adapter = adapter

    def digest(self) -> str:
        """Return the digest of the adapter's own tensors; see `Adapter.digest`."""
        version = self._reader.version()
        if self._digest is None or version is None or self._digest[0] != version:
            self._digest = (version, self.adapter.digest())
        return self._digest[1]


def adapter_checkpoint(source: str | Path, base: Checkpoint) -> AdapterCheckpoint:
    """Open a PEFT LoRA adapter as the checkpoint of its base with it merged in.

    Raises:
        CheckpointError: When files are missing or damaged, or the adapter is not plain LoRA.
        MergeError: When it does not fit the base.
    """
    return AdapterCheckpoint(open_adapter(source, base))


def adapter_over(base: Checkpoint, expert: Checkpoint) -> Adapter | None:
    """Return the adapter over this very base that an expert is, or None where it is none."""
    if isinstance(expert, AdapterCheckpoint) and expert.adapter.base is base:
        return expert.adapter
    return None


def open_expert(source: CheckpointSource, base: Checkpoint) -> Checkpoint:
    """Open an expert: whatever `open_checkpoint` takes, or a LoRA adapter's folder or hub name.

    Args:
        source: Where the expert is.
        base: The base, which an adapter is added to.

    Raises:
        CheckpointError: When it cannot be read.
        MergeError: When an adapter does not fit the base.
    """
    if isinstance(source, str) and (model := hub_model(source)) is not None:
        snapshot = fetch(model)
        if adapter_file(snapshot.folder) is not None:
            return AdapterCheckpoint(open_adapter(snapshot.folder, base, label=snapshot.source))
    elif isinstance(source, (str, Path)):
        path = absolute_path(source)
        if adapter_file(path) is not None:
            return adapter_checkpoint(path, base)
    return open_checkpoint(source)
