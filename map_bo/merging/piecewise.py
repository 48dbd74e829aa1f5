"""The content of a merged model, made from checkpoints within bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.checkpoint import Checkpoint
from map_bo.merging.chunked import ChunkedMerge
from map_bo.merging.comparing import pieces_of, require_same_fixed
from map_bo.merging.finite import all_finite
from map_bo.merging.layout import joined_ties
from map_bo.merging.likeness import require_alike
from map_bo.merging.names import aligned_names
from map_bo.merging.operator import MergeOperator
from map_bo.merging.recipe import Weights
from map_bo.merging.shards import Pieces, Put
from map_bo.merging.sizes import resident_bytes
from map_bo.merging.streamed import StreamedVectors
from map_bo.merging.streaming import merge_streamed

__all__ = ["merged_content", "merged_pieces", "merged_tensors", "streams", "tied_weights"]

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
            f"the operator {operator.describe().get('name')} cannot merge by pieces",
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
