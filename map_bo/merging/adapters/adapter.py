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

import torch
from torch import Tensor, nn

from map_bo.errors import CheckpointError, MergeError
from map_bo.merging.adapters.lora import (
    LoraSettings,
    is_counter,
    own_tensors,
    read_settings,
    require_quick_patterns,
)
from map_bo.merging.adapters.low_rank import LowRank
from map_bo.merging.adapters.places import AdapterFiles, Factors, Kind, check_ties, find_places
from map_bo.merging.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointSource,
    absolute_path,
    adapter_file,
    open_checkpoint,
)
from map_bo.merging.checkpoints.hub import fetch, hub_model
from map_bo.merging.checkpoints.read_sharded import open_file, require_inside
from map_bo.merging.checkpoints.saved_names import Saved
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

logger = logging.getLogger(__name__)


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
        parts: Tensor -> what it is of the module's tensor, for those of ``values`` and ``biases``
            that are not the whole of it.
    """

    source: str
    factors: Mapping[str, Factors]
    values: Mapping[str, str]
    biases: Mapping[str, tuple[str, float]]
    base: Checkpoint
    reader: TensorReader = field(repr=False)
    settings: LoraSettings
    prefix: tuple[str, str] = ("", "")
    parts: Mapping[str, Saved] = field(default_factory=dict)
    _kept: dict[str, Tensor] = field(default_factory=dict, repr=False)

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
        if pair is None or pair.dense:
            return None
        change = self._matrix(pair, pair.index)
        return change if pair.cut is None else change.cut(pair.cut)

    def _matrix(self, pair: Factors, index: int) -> LowRank:
        """Return the change of a module's matrix, or of one matrix of its stack."""
        if pair.kind != "stack":
            A, B = self._load(pair.A), self._load(pair.B)
            if pair.flipped:
                A, B = B.T.contiguous(), A.T.contiguous()
            return LowRank(B.flatten(1), A.flatten(1), pair.scale)
        A, B = self._keep(pair.A), self._keep(pair.B)
        count = pair.shape[0]
        # peft lays the ranks of one expert side by side in A, and the experts of one rank in B.
        right = A.view(count, -1, A.shape[1])[index]
        left = B.reshape(B.shape[0], -1, count)[:, :, index]
        if pair.in_by_out:
            left, right = right.T, left.T
        return LowRank(left.contiguous(), right.contiguous(), pair.scale)

    def _keep(self, own: str) -> Tensor:
        """Load a factor of a stack, and keep it: the next tensors of the base want it too."""
        found = self._kept.get(own)
        if found is None:
            found = self._load(own)
            if len(self._kept) >= 4:
                self._kept.clear()
            self._kept[own] = found
        return found

    def _multiplied(self, pair: Factors) -> Tensor:
        """Return the change of one of the base's tensors, multiplied out."""
        if pair.kind == "stack":
            whole = torch.stack([self._matrix(pair, i).dense() for i in range(pair.shape[0])])
        else:
            whole = self._matrix(pair, 0).dense().view(pair.shape)
        return whole if pair.part is None else pair.part.of(whole.contiguous()).contiguous()

    def _value(self, name: str) -> Tensor:
        """Return the full new value of a tensor."""
        return self._part(name, self._load(self.values[name]))

    def _part(self, name: str, tensor: Tensor) -> Tensor:
        part = self.parts.get(name)
        return tensor if part is None else part.of(tensor.contiguous()).contiguous()

    def dense(self, name: str) -> Tensor | None:
        """Return the rest of a tensor's change, in the base's shape, or None where there is none.

        Raises:
            MergeError: When the adapter's tensor holds NaN or infinity.
        """
        delta: Tensor | None = None
        if name in self.values:
            value, pre = self._value(name), self.base.load(name)
            both = torch.promote_types(value.dtype, wide(pre.dtype))
            delta = value.to(both) - pre.to(both)
        if name in self.biases:
            own, scale = self.biases[name]
            shift = scale * self._part(name, self._load(own))
            delta = shift if delta is None else delta + shift
        pair = self.factors.get(name)
        if pair is not None and pair.dense:
            product = self._multiplied(pair)
            delta = product if delta is None else delta + product
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
        pair = self.factors.get(name)
        if name in self.parts or (pair is not None and pair.dense):
            whole = self.dense(name)
            return None if whole is None else whole.flatten()[start:stop]
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
            elif (pair := self.factors.get(name)) is not None:
                add(f"{name} change", self._multiplied(pair))
            if name in self.values:
                add(name, self._part(name, self.reader.load(self.values[name])))
            if name in self.biases:
                own, scale = self.biases[name]
                add(f"{name} added", self._part(name, self.reader.load(own)), scale)
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


def open_adapter(
    source: str | Path,
    base: Checkpoint,
    *,
    label: str | None = None,
    model: nn.Module | None = None,
) -> Adapter:
    """Open a PEFT LoRA adapter over its base; names and shapes are checked, nothing is read yet.

    Read are plain LoRA factors of linear layers (GPT-2's ``Conv1D`` too), embeddings and
    convolutions without groups; factors of bare parameters (``target_parameters``), among them
    those of a mixture's experts; ranks and scales by module; rank-stabilised scaling; modules to
    save and trained biases, as full values; and ``lora_bias``. A base of another name than the
    adapter's configuration gives is only logged, since the same model has many names.

    An adapter goes by the names of modules. Where the base's files have other names, or cut
    tensors otherwise, these are translated through the model: the given one, or the one that the
    base's ``config.json`` describes, see `map_bo.merging.checkpoints.skeleton.skeleton`.

    Args:
        source: The adapter's folder, or the file of weights in it. Weights are
            ``adapter_model.safetensors``, or ``adapter_model.bin``, which is read without
            running code.
        base: The base that it was trained from.
        label: What to call the source; by default the folder.
        model: The model of the base, where it is known; its weights do not matter.

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
    taken = {n: layout for n, layout in reader.layouts.items() if not is_counter(n, layout.dtype)}
    odd = [name for name, layout in taken.items() if not layout.dtype.is_floating_point]
    if odd:
        raise CheckpointError(
            f"tensor {odd[0]!r} of the adapter {folder} is {reader.layouts[odd[0]].dtype}",
            hint="an adapter holds floating numbers; save it unquantised",
        )
    own = own_tensors(taken, str(folder))
    require_quick_patterns(settings, {tensor.target for tensor in own.values()}, str(folder))
    found = find_places(own, settings, base, str(folder), model)
    _note_base(settings, base, folder)
    check_ties(found, settings, base, str(folder), model)
    for name, tensor in found.own.items():
        for target, _ in found.parts(tensor.target):
            if not base.dtype(target).is_floating_point:
                raise MergeError(
                    f"the adapter {folder} changes {target!r} by {name!r}, and the base's tensor "
                    f"is {base.dtype(target)}",
                    hint="quantised bases are expanded before merging",
                )
    files = AdapterFiles(found, settings, reader, base, folder)
    values = files.values()
    biases = files.biases()
    return Adapter(
        source=label or str(folder),
        factors=files.factors(),
        values=values,
        biases=biases,
        base=base,
        reader=reader,
        settings=settings,
        prefix=found.prefix,
        parts=files.parts_of({*values, *biases}),
    )


def _note_base(settings: LoraSettings, base: Checkpoint, folder: Path) -> None:
    named = settings.base
    if named is not None and Path(named).name != Path(base.source).name:
        logger.warning(
            "the adapter %s was trained from %s; the base here is %s", folder, named, base.source
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


def adapter_checkpoint(
    source: str | Path, base: Checkpoint, *, model: nn.Module | None = None
) -> AdapterCheckpoint:
    """Open a PEFT LoRA adapter as the checkpoint of its base with it merged in.

    Args:
        source: See `open_adapter`.
        base: The base.
        model: See `open_adapter`.

    Raises:
        CheckpointError: When files are missing or damaged, or the adapter is not plain LoRA.
        MergeError: When it does not fit the base.
    """
    return AdapterCheckpoint(open_adapter(source, base, model=model))


def adapter_over(base: Checkpoint, expert: Checkpoint) -> Adapter | None:
    """Return the adapter over this very base that an expert is, or None where it is none."""
    if isinstance(expert, AdapterCheckpoint) and expert.adapter.base is base:
        return expert.adapter
    return None


def open_expert(
    source: CheckpointSource, base: Checkpoint, *, model: nn.Module | None = None
) -> Checkpoint:
    """Open an expert: whatever `open_checkpoint` takes, or a LoRA adapter's folder or hub name.

    Args:
        source: Where the expert is.
        base: The base, which an adapter is added to.
        model: The model of the base, where it is known; see `open_adapter`.

    Raises:
        CheckpointError: When it cannot be read.
        MergeError: When an adapter does not fit the base.
    """
    if isinstance(source, str) and (named := hub_model(source)) is not None:
        snapshot = fetch(named)
        if adapter_file(snapshot.folder) is not None:
            return AdapterCheckpoint(
                open_adapter(snapshot.folder, base, label=snapshot.source, model=model)
            )
    elif isinstance(source, (str, Path)):
        path = absolute_path(source)
        if adapter_file(path) is not None:
            return adapter_checkpoint(path, base, model=model)
    return open_checkpoint(source)
