"""The tensors of a live model: what each was before, and whether its weights are still as written.

Weights that an evaluator left alone need not be merged again for the next one. Two things tell, and
both are asked: the version counters of the tensors, which every in-place operation that torch knows
of raises, and a checksum of the buffer's bits, for what is written behind torch's back (through
``.data``, an array of numpy, DLPack, a storage, or a fused optimiser).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from map_bo.merging.align.layout import Slot
from map_bo.merging.vectors.module_state import TensorHooks, hooks_of, restore_hooks, same_items

__all__ = ["Bound", "HeldWeights", "bit_sums"]

_ROW = 1024  # words of 8 bytes that one sum is over
_SAMPLED = 8  # one row in as many is also summed by columns


@dataclass(eq=False)
class Bound:
    """One tensor of the model: what it was before, and what it is while it is live."""

    tensor: Tensor
    found: Tensor  # the memory that it had
    grad: Tensor | None
    requires_grad: bool
    live: Tensor  # the memory that it has while live: a view of the buffer, or a copy
    slot: Slot | None  # None for a tensor that is not merged
    value: Tensor | None = None  # what a tensor that is not merged starts each candidate with
    tags: dict[str, Any] = field(default_factory=dict)  # attributes that somebody gave it
    hooks: TensorHooks = (None, None)

    def __post_init__(self) -> None:
        self.tags = dict(vars(self.tensor))
        self.hooks = hooks_of(self.tensor)

    def attach(self) -> None:
        """Give the tensor its live memory, whatever an evaluator did to it."""
        self._point_at(self.live)

    def restore(self) -> None:
        """Give the tensor back what it had."""
        self._point_at(self.found)
        self.tensor.grad = self.grad

    def _point_at(self, memory: Tensor) -> None:
        tensor = self.tensor
        tensor.grad = None  # a gradient of another shape would forbid the exchange
        if tensor.grad_fn is not None:  # it was computed in place from others
            tensor.detach_()
        try:
            tensor.data = memory
        except RuntimeError:  # of another kind now, such as a tensor without memory
            kind = type(tensor)
            other = nn.Parameter(memory, False) if issubclass(kind, nn.Parameter) else memory[...]
            torch.utils.swap_tensors(tensor, other)  # type: ignore[no-untyped-call]
        if tensor.requires_grad != self.requires_grad:
            tensor.requires_grad_(self.requires_grad)
        if not same_items(vars(tensor), self.tags):
            vars(tensor).clear()
            vars(tensor).update(self.tags)
        restore_hooks(tensor, self.hooks)


class HeldWeights:
    """The merged weights of a live model as they are now, told apart from what becomes of them.

    Args:
        bound: The tensors of the model.
        flat: ``P``: the buffer that its weights are views of.
    """

    def __init__(self, bound: Sequence[Bound], flat: Tensor) -> None:
        self._bound = [each for each in bound if each.value is None]
        start = flat.untyped_storage().data_ptr()
        apart = {
            id(each.live): each.live
            for each in self._bound
            if each.live.untyped_storage().data_ptr() != start
        }
        self._memories = [flat, *apart.values()]
        self._sums = [bit_sums(memory) for memory in self._memories]
        self._versions: list[int] = []
        self.renew()

    def renew(self) -> None:
        """Take the tensors as they are now for untouched."""
        self._versions = [each.tensor._version for each in self._bound]

    def untouched(self) -> bool:
        """Return whether torch knows of no operation in place on the tensors."""
        try:
            return self._versions == [each.tensor._version for each in self._bound]
        except RuntimeError:  # one is an inference tensor now, which has no version
            return False

    def intact(self) -> bool:
        """Return whether the bits are those that were held, whoever wrote them."""
        return all(
            all(map(torch.equal, bit_sums(memory), sums))
            for memory, sums in zip(self._memories, self._sums, strict=True)
        )


def bit_sums(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return sums of a tensor's bits, which any one write changes, at memory bandwidth.

    All words of 8 bytes are added up in rows of 1024, modulo ``2^64``, so that no change of a
    single word is missed. Words that changed places within a row leave its sum as it was; of one
    row in eight the columns are added up too.

    Args:
        tensor: Any dense tensor.
    """
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    words = content[: len(content) // 8 * 8].view(torch.int64)
    rows = words[: len(words) // _ROW * _ROW].view(-1, _ROW)
    # The remainder is short: it is kept as it is.
    rest = content[rows.numel() * 8 :].clone()
    return rows.sum(1), rows[::_SAMPLED].sum(0), rest
