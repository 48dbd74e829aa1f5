"""The content of a merged model, made from checkpoints within bounded memory.

Base and task vectors read from checkpoints piece by piece, for models larger than memory.

Linear merging tensor by tensor, for models that need not fit into memory.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from map_bo.errors import MergeError, listed
from map_bo.merging.adapters.checkpoint import adapter_over
from map_bo.merging.align.experts import aligned_names, finite
from map_bo.merging.align.layout import FlatLayout, is_variance, joined_ties
from map_bo.merging.align.same_base import (
    pieces_of,
    require_alike,
    require_same_fixed,
    require_tied,
)
from map_bo.merging.checkpoints.checkpoint import Checkpoint
from map_bo.merging.checkpoints.tensors import all_finite
from map_bo.merging.export.recipe import Weights
from map_bo.merging.export.shards import Pieces, Put
from map_bo.merging.vectors.kernel import ChunkedMerge
from map_bo.merging.vectors.memory import resident_bytes
from map_bo.merging.vectors.operator import MergeOperator
from map_bo.merging.vectors.parallel import spread

__all__ = [
    "StreamedVectors",
    "checked_weights",
    "merge_streamed",
    "merged_content",
    "merged_pieces",
    "merged_tensors",
    "streams",
    "tied_weights",
]


class StreamedVectors:
    """Base and task vectors on disk: a :class:`~map_bo.merging.vectors.operator.Deltas`.

    A piece is read with positioned reads into memory that each thread uses again, so that no more
    is in memory than what is being merged. Values of any floating dtype are widened to float32;
    float8 are taken as plain values.

    Args:
        base: The base checkpoint.
        experts: Name -> checkpoint, with the same tensors as the base.
        ties: Further ties of the base, alias -> canonical name.
        check_base: Whether to refuse experts that do not look fine-tuned from the base, by a
            sample of their largest tensors; the rule is that of `TaskVectors.load`.
        threads: How many threads may read at once; by default those of torch.

    Raises:
        MergeError: When an expert has missing or further tensors, other shapes or kinds of dtype,
            or is of another base.
    """

    def __init__(
        self,
        base: Checkpoint,
        experts: Mapping[str, Checkpoint],
        *,
        ties: Mapping[str, str] | None = None,
        check_base: bool = True,
        threads: int | None = None,
    ) -> None:
        if not experts:
            raise MergeError("there are no experts", hint="give at least one fine-tuned model")
        self.base = base
        self.checkpoints = dict(experts)
        self.threads = threads
        for name in base.names:
            dtype = base.dtype(name)
            if dtype == torch.float64 or dtype.is_complex:
                raise MergeError(
                    f"tensor {name!r} is {dtype}, and pieces are merged in float32",
                    hint="merge it with task arithmetic, which keeps its precision, or convert "
                    "the base to float32",
                )
        self.layout = FlatLayout.of(base, joined_ties(base, ties or {}))
        self._names = {
            label: aligned_names(base, expert, label, self.layout.ties)
            for label, expert in experts.items()
        }
        self._adapters = {label: adapter_over(base, each) for label, each in experts.items()}
        self._raw = threading.local()
        if check_base:
            self._check_base()

    @property
    def experts(self) -> tuple[str, ...]:
        """``N`` names, in the order of the rows."""
        return tuple(self.checkpoints)

    @property
    def device(self) -> torch.device:
        """The CPU: pieces are read there."""
        return torch.device("cpu")

    @property
    def resident(self) -> bool:
        """False; see `Deltas`."""
        return False

    @property
    def in_place(self) -> bool:
        """False; see `Deltas`."""
        return False

    def read(self, slot: int, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return a piece of base and task vectors in float32; see `Deltas`.

        Raises:
            MergeError: When a value is NaN or infinite.
            CheckpointError: When a file cannot be read.
        """
        name = self.layout.slots[slot].name
        rows = torch.empty(1 + len(self.checkpoints), stop - start) if out is None else out
        self._values(self.base, name, name, "the base", start, stop, rows[0])
        for row, (label, checkpoint) in zip(rows[1:], self.checkpoints.items(), strict=True):
            own, adapter = self._names[label][name], self._adapters[label]
            if adapter is None:
                self._values(checkpoint, own, name, f"expert {label!r}", start, stop, row)
                row.sub_(rows[0])
                continue
            # What an adapter adds is its task vector, whose digits are not lost beside the base's.
            change = adapter.piece(self.base.ties.get(own, own), start, stop)
            if change is None:
                row.zero_()
            else:
                row.copy_(change)
        return rows

    def floor_piece(self, slot: int, start: int, piece: Tensor) -> None:
        """Raise a merged piece of a variance to the least of its models; see `Deltas`."""
        if not is_variance(self.layout.slots[slot].name):
            return
        rows = self.read(slot, start, start + len(piece))
        rows[1:].add_(rows[0])
        torch.maximum(piece, rows.amin(0), out=piece)

    def require_consistent(self) -> None:
        """Check, as `TaskVectors.load` does, tied tensors and those that are not merged.

        Raises:
            MergeError: When tensors that are tied differ in a checkpoint, or one that is not merged
                and has more than one element differs from the base's.
        """
        layout = self.layout
        require_tied(self.base, layout.ties, "the base")
        for label, checkpoint in self.checkpoints.items():
            own = self._names[label]
            ties = {alias: own[kept] for alias, kept in layout.ties.items()}
            require_tied(checkpoint, ties, f"expert {label!r}")
            for name in layout.fixed:
                if name not in layout.ties:
                    require_same_fixed(self.base, name, checkpoint, own[name], label)

    def _check_base(self) -> None:
        def check(label: str, _: None) -> None:
            require_alike(self.base, self.checkpoints[label], self._names[label], label)

        whole = [label for label in self.checkpoints if self._adapters[label] is None]
        spread(check, whole, lambda: None, threads=self.threads)

    def _values(
        self,
        checkpoint: Checkpoint,
        own: str,
        name: str,
        label: str,
        start: int,
        stop: int,
        row: Tensor,
    ) -> None:
        dtype = checkpoint.dtype(own)
        if dtype == torch.float32:
            checkpoint.read(own, start, stop, out=row)
        else:
            raw = self._room((stop - start) * dtype.itemsize)
            row.copy_(checkpoint.read(own, start, stop, out=raw))
        if not all_finite(row):
            raise MergeError(
                f"tensor {name!r} of {label} holds NaN or infinity",
                hint="this model diverged in training or its file is damaged; leave it out",
            )

    def _room(self, size: int) -> Tensor:
        held: Tensor | None = getattr(self._raw, "memory", None)
        if held is None or len(held) < size:
            with torch.inference_mode(False):
                held = self._raw.memory = torch.empty(size, dtype=torch.uint8)
        return held[:size]


def merge_streamed(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    weights: Weights,
    *,
    ties: Mapping[str, str] | None = None,
    check_finite: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Merge linearly, ``base + sum_n w_n (expert_n - base)``, one tensor at a time.

    Sums are in float32, in float64 for float64 tensors, and in the dtype of complex tensors;
    the result has the base's dtype. Tensors of other dtypes (counters, masks) are the base's.
    Variances (``running_var``) are raised to the least of base and experts, as
    `TaskVectors.keep_variances` does for resident merging, so that both give the same model.
    Otherwise an expert of weight zero is not read. A tied tensor is merged once, with the
    weights of its canonical name, and follows at once under its aliases.

    Args:
        base: The base checkpoint.
        experts: Name -> checkpoint, with the same tensors as the base.
        weights: Tensor name -> weight of each expert; an expert left out has weight zero.
        ties: Further ties of the base, alias -> canonical name.
        check_finite: Whether to refuse NaN and infinity; experts of weight zero are read too.

    Yields:
        Name and merged tensor (on the CPU), canonical names in sorted order.

    Raises:
        MergeError: Before anything is merged, when an expert has missing or further tensors, or
            other shapes or kinds of dtype; while merging, for a weight that is not finite or of
            an unknown expert, and for an expert in which tied tensors of the base differ.
    """
    joined = joined_ties(base, ties or {})
    names = {
        expert: aligned_names(base, checkpoint, expert, joined)
        for expert, checkpoint in experts.items()
    }
    return _merge(base, experts, weights, names, joined, check_finite)


def _merge(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    weights: Weights,
    names: Mapping[str, Mapping[str, str]],
    ties: Mapping[str, str],
    check_finite: bool,
) -> Iterator[tuple[str, Tensor]]:
    aliases: dict[str, list[str]] = {}
    for alias, canonical in sorted(ties.items()):
        aliases.setdefault(canonical, []).append(alias)

    def checked(value: Tensor, name: str, label: str) -> Tensor:
        return finite(value, name, label) if check_finite else value

    for name in base.names:
        if name in ties:
            continue
        merged = base.load(name)
        dtype = merged.dtype
        if dtype.is_floating_point or dtype.is_complex:
            wide = dtype if dtype.is_complex or dtype == torch.float64 else torch.float32
            pre = checked(merged, name, "the base").to(wide)
            _require_tied(name, aliases.get(name, []), merged, "the base", base)
            total = pre.clone()
            given = checked_weights(weights(name), name, experts)
            least = pre if is_variance(name) else None
            for expert, checkpoint in experts.items():
                weight = given.get(expert, 0.0)
                if weight == 0 and least is None and not check_finite:
                    continue
                adapter = adapter_over(base, checkpoint) if least is None else None
                if adapter is not None and set(aliases.get(name, ())) & set(adapter.names):
                    adapter = None  # whether it keeps the tie is seen below
                if adapter is not None:  # the base is not read again for what it leaves alone
                    delta = adapter.delta(name)
                    if delta is not None:
                        total.add_(delta, alpha=weight)
                    continue
                own, label = names[expert][name], f"expert {expert!r}"
                tuned = checkpoint.load(own)
                others = [alias for alias in (name, *aliases.get(name, [])) if alias != own]
                _require_tied(own, others, tuned, label, checkpoint)
                tuned = checked(tuned, name, label)
                if least is not None:
                    least = torch.minimum(least, tuned.to(wide))
                if weight != 0:
                    total.add_(tuned.to(wide) - pre, alpha=weight)
            merged = (total if least is None else torch.maximum(total, least)).to(dtype)
        yield name, merged
        for alias in aliases.get(name, []):
            yield alias, merged


def checked_weights(
    weights: Mapping[str, float], name: str, experts: Mapping[str, Checkpoint]
) -> dict[str, float]:
    """Return the weights of a tensor.

    Raises:
        MergeError: When one is not finite, or of an unknown expert.
    """
    unknown = [expert for expert in weights if expert not in experts]
    if unknown:
        raise MergeError(
            f"weights for the unknown experts {listed(unknown)}",
            hint=f"the experts are {', '.join(experts)}",
        )
    bad = [expert for expert, weight in weights.items() if not math.isfinite(weight)]
    if bad:
        raise MergeError(
            f"the weight of {listed(bad)} for tensor {name!r} is not finite",
            hint="coefficients are finite numbers",
        )
    return {expert: float(weight) for expert, weight in weights.items()}


def _require_tied(
    name: str, aliases: list[str], value: Tensor, label: str, checkpoint: Checkpoint
) -> None:
    for alias in aliases:
        if alias not in checkpoint.names:
            continue
        if checkpoint.ties.get(alias, alias) == checkpoint.ties.get(name, name):
            continue
        if not torch.equal(checkpoint.load(alias), value):
            raise MergeError(
                f"{name!r} and {alias!r} are one tensor in the model but differ in {label}",
                hint="use checkpoints that keep them tied, or untie them in the base and model",
            )


_SPARE = 64_000_000  # bytes that a program needs besides, such as buffers of files and threads
_PREPARING = 8_000_000  # bytes that a thread takes for each row while an operator is prepared
_WIDE = (torch.float64, torch.complex64, torch.complex128)


def streams(base: Checkpoint, operator: MergeOperator) -> bool:
    """Return whether a merge can be made by pieces, in float32."""
    return getattr(operator, "streams", False) and not any(
        base.dtype(name) in _WIDE for name in base.names
    )


def tied_weights(weights: Weights, ties: Mapping[str, str]) -> Weights:
    """Return the weights with every tied name under that of its tensor (alias -> canonical)."""
    return lambda name: weights(ties.get(name, name))


def merged_content(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    operator: MergeOperator,
    c: Tensor,
    *,
    weights: Weights | None = None,
    ties: Mapping[str, str] | None = None,
    check_base: bool = True,
    max_memory: int | None = None,
) -> Pieces | Iterator[tuple[str, Tensor]]:
    """Return the merged tensors of checkpoints as `export_merged` takes them.

    Args:
        base: The base checkpoint.
        experts: Name -> checkpoint.
        operator: How to merge.
        c: ``d`` coefficients.
        weights: Tensor name -> weight of each expert, where the operator is linear.
        ties: Further ties of the base, alias -> canonical name.
        check_base: Whether to refuse experts that do not look fine-tuned from the base.
        max_memory: Bytes of resident memory for the whole process.

    Raises:
        MergeError: When the inputs do not fit each other, the memory does not suffice, or the
            operator can merge them neither by pieces nor linearly.
    """
    if weights is not None and not streams(base, operator):
        return merged_tensors(
            base, experts, weights, ties=ties, check_base=check_base, max_memory=max_memory
        )
    return merged_pieces(
        base, experts, operator, c, ties=ties, check_base=check_base, max_memory=max_memory
    )


def merged_pieces(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    operator: MergeOperator,
    c: Tensor,
    *,
    ties: Mapping[str, str] | None = None,
    check_base: bool = True,
    max_memory: int | None = None,
) -> Pieces:
    """Return what puts the merged model of checkpoints, piece by piece; see `merged_content`.

    Names, shapes and a sample of the weights are checked now. What takes a pass over the
    checkpoints, such as thresholds, is done when the pieces are asked for.

    Raises:
        MergeError: When the inputs do not fit each other, or the memory does not suffice.
    """
    if not getattr(operator, "streams", False):
        raise MergeError(
            f"the operator {type(operator).__name__} cannot merge by pieces",
            hint="export the merge of a loaded problem instead",
        )
    threads = None
    if max_memory is not None:
        each = _PREPARING * (1 + len(experts))
        threads = max(1, min(torch.get_num_threads(), _left(max_memory) // each))
        _require(max_memory, each)
    deltas = StreamedVectors(base, experts, ties=ties, check_base=check_base, threads=threads)

    def put_all(put: Put) -> None:
        deltas.require_consistent()
        prepared = operator.prepare(deltas)
        assert isinstance(prepared, ChunkedMerge)
        if max_memory is not None:
            _require(max_memory, prepared.least_memory())
            prepared.limit(_left(max_memory), torch.get_num_threads())
        _put_merged(prepared, c, deltas, put)
        _put_fixed(deltas, put)

    return put_all


def _put_merged(prepared: ChunkedMerge, c: Tensor, deltas: StreamedVectors, put: Put) -> None:
    base, slots = deltas.base, deltas.layout.slots
    # Names that are one tensor in the model and that the base stores apart are written apart.
    names = {slot.name: [slot.name] for slot in slots}
    for alias, canonical in deltas.layout.ties.items():
        if alias not in base.ties and canonical in names:
            names[canonical].append(alias)

    def sink(slot: int, start: int, piece: Tensor) -> None:
        for name in names[slots[slot].name]:
            put(name, start, _rounded(piece, base.dtype(name), name))

    prepared.run(c, sink)


def _rounded(piece: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    values = piece.to(dtype)
    if not all_finite(values):
        raise MergeError(
            f"merged values of tensor {name!r} are beyond the range of {dtype}, the base's",
            hint="choose smaller coefficients, or convert the base to bfloat16 or float32",
        )
    return values


def _put_fixed(deltas: StreamedVectors, put: Put) -> None:
    for name in deltas.layout.fixed:
        if name not in deltas.base.ties:
            for start, stop in pieces_of(deltas.base.shape(name).numel()):
                put(name, start, deltas.base.read(name, start, stop))


def merged_tensors(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    weights: Weights,
    *,
    ties: Mapping[str, str] | None = None,
    check_base: bool = True,
    max_memory: int | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Return the tensors of a linear merge one by one, in the base's precision.

    For what is not merged in float32; see `merged_content` and `merge_streamed`.

    Raises:
        MergeError: When the inputs do not fit each other, or the memory does not suffice.
    """
    joined = joined_ties(base, ties or {})
    if max_memory is not None:
        largest = max((base.layout(name).nbytes for name in base.names), default=0)
        # Base, expert, their difference, the sum, and what is read; in twice the bytes at most.
        _require(max_memory, 10 * largest)
    for label, expert in experts.items():
        names = aligned_names(base, expert, label, joined)
        if check_base:
            require_alike(base, expert, names, label)
        for name, own in names.items():
            dtype = base.dtype(name)
            if not (dtype.is_floating_point or dtype.is_complex):
                require_same_fixed(base, name, expert, own, label)
    return merge_streamed(base, experts, weights, ties=joined, check_finite=True)


def _left(max_memory: int) -> int:
    return max_memory - resident_bytes() - _SPARE


def _require(max_memory: int, needed: int) -> None:
    if needed > _left(max_memory):
        least = resident_bytes() + _SPARE + needed
        raise MergeError(
            f"max_memory is {max_memory / 1e6:.0f} MB, and this merge needs {least / 1e6:.0f} MB, "
            f"of which the program itself takes {(least - needed) / 1e6:.0f} MB",
            hint=f"allow {math.ceil(1.05 * least / 1e6)}MB or more",
        )
