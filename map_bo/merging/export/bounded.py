"""One merge of checkpoints, and its tensors made within bounded memory, whatever the models' size.

By pieces, in float32 and on all cores, where the operator reads pieces alone; tensor by tensor, in
the base's precision, where it is linear.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from map_bo.errors import MergeError, listed
from map_bo.merging.adapters.adapter import adapter_over
from map_bo.merging.align.experts import (
    align_names,
    pieces_of,
    require_alike,
    require_finite,
    require_same_fixed,
)
from map_bo.merging.align.layout import is_variance, join_ties
from map_bo.merging.checkpoints.checkpoint import Checkpoint
from map_bo.merging.checkpoints.tensors import all_finite, exceeds_range
from map_bo.merging.export.write_shards import Pieces, Put
from map_bo.merging.vectors.kernel import KernelMerge, ReadsPieces
from map_bo.merging.vectors.on_disk import OnDiskVectors
from map_bo.merging.vectors.operator import Linear, MergeOperator, Weights
from map_bo.merging.vectors.storage import resident_bytes
from map_bo.moved import renamed

__all__ = [
    "Merge",
    "check_weights",
    "merge_bounded",
    "merge_by_pieces",
    "merge_by_tensor",
    "merge_linearly",
    "merges_files",
    "reads_pieces",
    "tie_weights",
]

_SPARE = 64_000_000  # bytes that a program needs besides, such as buffers of files and threads
_PREPARING = 8_000_000  # bytes that a thread takes for each row while an operator is prepared
_WIDE = (torch.float64, torch.complex64, torch.complex128)


@dataclass(frozen=True, eq=False)
class Merge:
    """One merge: all that its files follow from.

    Attributes:
        base: The base checkpoint.
        experts: Name -> checkpoint of the ``N`` experts.
        operator: How to merge; its blocks are patterns.
        names: ``d`` names of the coefficients.
        c: ``d`` coefficients in float64 on the CPU.
        ties: Further ties of the base, alias -> canonical name, that its files do not record.
        check_base: Whether to refuse experts that do not look fine-tuned from the base.
        tensors: The merged tensors by name, where the operator cannot make them from the files;
            see `merges_files`.
        recalibrated: Tensors, by name, that take the place of merged ones: the statistics of
            batch normalisation that were measured anew.
    """

    base: Checkpoint
    experts: Mapping[str, Checkpoint]
    operator: MergeOperator
    names: tuple[str, ...]
    c: Tensor
    ties: Mapping[str, str] = field(default_factory=dict)
    check_base: bool = True
    tensors: Mapping[str, Tensor] | None = None
    recalibrated: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def coefficients(self) -> dict[str, float]:
        """Coefficient name -> value."""
        return dict(zip(self.names, self.c.tolist(), strict=True))

    @property
    def weights(self) -> Weights | None:
        """Tensor name -> weight of each expert, where the operator is linear."""
        if not isinstance(self.operator, Linear):
            return None
        return tie_weights(self.operator.weights(tuple(self.experts), self.c), self.ties)


def reads_pieces(base: Checkpoint, operator: MergeOperator) -> bool:
    """Return whether a merge can be made by pieces, in float32."""
    return isinstance(operator, ReadsPieces) and not any(
        base.dtype(name) in _WIDE for name in base.names
    )


def merges_files(base: Checkpoint, operator: MergeOperator) -> bool:
    """Return whether a merge can be made from the files, without loading the task vectors."""
    return isinstance(operator, Linear) or reads_pieces(base, operator)


def tie_weights(weights: Weights, ties: Mapping[str, str]) -> Weights:
    """Return the weights with every tied name under that of its tensor (alias -> canonical)."""
    return lambda name: weights(ties.get(name, name))


def merge_bounded(
    merge: Merge, max_memory: int | None = None
) -> Pieces | Iterator[tuple[str, Tensor]]:
    """Return the merged tensors as `write_model` takes them.

    Args:
        merge: The merge.
        max_memory: Bytes of resident memory for the whole process.

    Raises:
        MergeError: When the inputs do not fit each other, the memory does not suffice, or the
            operator can merge them neither by pieces nor linearly.
    """
    if merge.tensors is not None:
        return iter(merge.tensors.items())
    if isinstance(merge.operator, Linear) and not reads_pieces(merge.base, merge.operator):
        return merge_by_tensor(merge, max_memory)
    return merge_by_pieces(merge, max_memory)


def merge_by_pieces(merge: Merge, max_memory: int | None = None) -> Pieces:
    """Return what puts the merged model of checkpoints, piece by piece; see `merge_bounded`.

    Names, shapes and a sample of the weights are checked now. What takes a pass over the
    checkpoints, such as thresholds, is done when the pieces are asked for.

    Raises:
        MergeError: When the inputs do not fit each other, or the memory does not suffice.
    """
    operator = merge.operator
    if not isinstance(operator, ReadsPieces):
        raise MergeError(
            f"the operator {type(operator).__name__} cannot merge by pieces",
            hint="export the merge of a loaded problem instead",
        )
    threads = None
    if max_memory is not None:
        each = _PREPARING * (1 + len(merge.experts))
        threads = max(1, min(torch.get_num_threads(), _memory_left(max_memory) // each))
        _require(max_memory, each)
    deltas = OnDiskVectors(
        merge.base, merge.experts, ties=merge.ties, check_base=merge.check_base, threads=threads
    )

    def put_all(put: Put) -> None:
        deltas.require_consistent()
        prepared = operator.prepare_pieces(deltas)
        if max_memory is not None:
            _require(max_memory, prepared.least_memory())
            prepared.limit(_memory_left(max_memory), torch.get_num_threads())
        _put_merged(prepared, merge.c, deltas, put)
        _put_fixed(deltas, put)

    return put_all


def _put_merged(prepared: KernelMerge, c: Tensor, deltas: OnDiskVectors, put: Put) -> None:
    base, slots = deltas.base, deltas.layout.slots
    # Names that are one tensor in the model and that the base stores apart are written apart.
    names = {slot.name: [slot.name] for slot in slots}
    for alias, canonical in deltas.layout.ties.items():
        if alias not in base.ties and canonical in names:
            names[canonical].append(alias)

    def sink(slot: int, start: int, piece: Tensor) -> None:
        for name in names[slots[slot].name]:
            put(name, start, _round(piece, base.dtype(name), name))

    prepared.run(c, sink)


def _round(piece: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    values = piece.to(dtype)
    if exceeds_range(piece, values) or not all_finite(values):
        raise MergeError(
            f"merged values of tensor {name!r} are beyond the range of {dtype}, the base's",
            hint="choose smaller coefficients, or convert the base to bfloat16 or float32",
        )
    return values


def _put_fixed(deltas: OnDiskVectors, put: Put) -> None:
    for name in deltas.layout.fixed:
        if name not in deltas.base.ties:
            for start, stop in pieces_of(deltas.base.shape(name).numel()):
                put(name, start, deltas.base.read(name, start, stop))


def merge_by_tensor(merge: Merge, max_memory: int | None = None) -> Iterator[tuple[str, Tensor]]:
    """Return the tensors of a linear merge one by one, in the base's precision.

    For what is not merged in float32; see `merge_bounded` and `merge_linearly`.

    Raises:
        MergeError: When the operator is not linear, the inputs do not fit each other, or the
            memory does not suffice.
    """
    base, experts, weights = merge.base, merge.experts, merge.weights
    if weights is None:
        raise MergeError(
            f"the operator {type(merge.operator).__name__} is not linear, and only linear "
            "merges are made tensor by tensor",
            hint="export the merge of a loaded problem instead",
        )
    joined = join_ties(base, merge.ties)
    if max_memory is not None:
        largest = max((base.layout(name).nbytes for name in base.names), default=0)
        # Base, expert, their difference, the sum, and what is read; in twice the bytes at most.
        _require(max_memory, 10 * largest)
    for label, expert in experts.items():
        names = align_names(base, expert, label, joined)
        if merge.check_base:
            require_alike(base, expert, names, label)
        for name, own in names.items():
            dtype = base.dtype(name)
            if name in base.masks or not (dtype.is_floating_point or dtype.is_complex):
                require_same_fixed(base, name, expert, own, label)
    return merge_linearly(base, experts, weights, ties=joined, check_finite=True)


def merge_linearly(
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
    joined = join_ties(base, ties or {})
    names = {
        expert: align_names(base, checkpoint, expert, joined)
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

    def check(value: Tensor, name: str, label: str) -> Tensor:
        return require_finite(value, name, label) if check_finite else value

    for name in base.names:
        if name in ties:
            continue
        merged = base.load(name)
        dtype = merged.dtype
        merges = dtype.is_floating_point or dtype.is_complex
        if merges and name not in base.masks:
            wide = dtype if dtype.is_complex or dtype == torch.float64 else torch.float32
            pre = check(merged, name, "the base").to(wide)
            _require_tied(name, aliases.get(name, []), merged, "the base", base)
            total = pre.clone()
            given = check_weights(weights(name), name, experts)
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
                tuned = check(tuned, name, label)
                if least is not None:
                    least = torch.minimum(least, tuned.to(wide))
                if weight != 0:
                    total.add_(tuned.to(wide) - pre, alpha=weight)
            total = total if least is None else torch.maximum(total, least)
            merged = _round(total, dtype, name) if check_finite else total.to(dtype)
        yield name, merged
        for alias in aliases.get(name, []):
            yield alias, merged


def check_weights(
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


def _memory_left(max_memory: int) -> int:
    return max_memory - resident_bytes() - _SPARE


def _require(max_memory: int, needed: int) -> None:
    if needed > _memory_left(max_memory):
        least = resident_bytes() + _SPARE + needed
        raise MergeError(
            f"max_memory is {max_memory / 1e6:.0f} MB, and this merge needs {least / 1e6:.0f} MB, "
            f"of which the program itself takes {(least - needed) / 1e6:.0f} MB",
            hint=f"allow {math.ceil(1.05 * least / 1e6)}MB or more",
        )


def __getattr__(name: str) -> Any:
    return renamed(__name__, name)
