"""The flat layout: how the floating tensors of a model lie behind each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.checkpoints.checkpoint import Checkpoint
from map_bo.merging.checkpoints.tensors import exceeds_range

__all__ = ["FlatLayout", "Slot", "is_variance", "join_ties"]

_ALIGNMENT = 32  # numbers: every tensor starts on 64 bytes in bfloat16 and 128 in float32


def is_variance(name: str) -> bool:
    """Return whether a tensor of this name holds variances, which must not become negative.

    Batch normalisation calls its buffer ``running_var``, whatever the module around it.
    """
    return name.rpartition(".")[2] == "running_var"


@dataclass(frozen=True)
class Slot:
    """Where one floating tensor lies in the flat layout.

    Attributes:
        name: Its canonical name.
        shape: Its shape.
        offset: Index of its first number.
        dtype: The dtype that it has in the base; a merged checkpoint gets it back.
    """

    name: str
    shape: torch.Size
    offset: int
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        """Index after its last number."""
        return self.offset + self.numel

    def of(self, flat: Tensor) -> Tensor:
        """Return this tensor as a view of ``flat`` (``P``)."""
        return flat[self.offset : self.stop].view(self.shape)


@dataclass(frozen=True)
class FlatLayout:
    """How the floating tensors of a model lie behind each other in one flat tensor.

    Attributes:
        slots: One for each floating tensor, by ascending offset; tied tensors have one slot.
        fixed: Names of the other tensors (integers, booleans, masks): copied from the base, not
            merged.
        ties: Alias -> canonical name, for the names that are another's tensor.
        size: ``P``, the length of the flat tensor, padding included.
    """

    slots: tuple[Slot, ...]
    fixed: tuple[str, ...] = ()
    ties: Mapping[str, str] = field(default_factory=dict)
    size: int = 0

    @classmethod
    def of(cls, base: Checkpoint, ties: Mapping[str, str]) -> FlatLayout:
        """Lay out the tensors of ``base``; ``ties`` maps the aliases to canonical names."""
        slots: list[Slot] = []
        fixed: list[str] = []
        end = 0
        for name in base.names:
            dtype = base.dtype(name)
            if dtype.is_complex:
                raise MergeError(
                    f"tensor {name!r} of the base is {dtype}; complex tensors cannot be merged "
                    "resident",
                    hint="merge them as two real tensors (torch.view_as_real)",
                )
            if not dtype.is_floating_point or name in base.masks:
                fixed.append(name)
            elif name not in ties:
                slot = Slot(name, base.shape(name), end, dtype)
                slots.append(slot)
                end += -(-slot.numel // _ALIGNMENT) * _ALIGNMENT
        if not end:
            raise MergeError(
                f"{base.source} has no floating tensors to merge",
                hint="give the weights of a model; quantised weights are expanded first",
            )
        return cls(tuple(slots), tuple(fixed), dict(ties), end)

    def state_dict(self, flat: Tensor, fixed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return new tensors under all names, from ``flat`` (``P``) and the fixed ones.

        They have the base's shapes and dtypes; tied names share one tensor.

        Raises:
            MergeError: When a number is beyond the range of its dtype.
        """
        result: dict[str, Tensor] = {}
        for slot in self.slots:
            values = slot.of(flat)
            result[slot.name] = values.to(slot.dtype, copy=True)
            if exceeds_range(values, result[slot.name]):
                raise MergeError(
                    f"merged values of tensor {slot.name!r} are beyond the range of {slot.dtype}, "
                    "the base's",
                    hint="choose smaller coefficients, or convert the base to bfloat16 or float32",
                )
        result |= {name: fixed[name].clone() for name in self.fixed if name not in self.ties}
        return result | {alias: result[name] for alias, name in self.ties.items()}


def join_ties(base: Checkpoint, further: Mapping[str, str]) -> dict[str, str]:
    """Return the ties of ``base`` and those of ``further`` that it knows: alias -> canonical."""
    groups: dict[str, set[str]] = {}
    for alias, canonical in (*base.ties.items(), *further.items()):
        both = groups.get(alias, {alias}) | groups.get(canonical, {canonical})
        groups.update(dict.fromkeys(both, both))
    ties: dict[str, str] = {}
    for group in groups.values():
        known = sorted(group & set(base.names), key=lambda name: (name in base.ties, name))
        ties.update((alias, known[0]) for alias in known[1:])
    return ties
