"""Reading experts beside their base: what must fit, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.checkpoint import Checkpoint
from map_bo.merging.comparing import require_same_fixed, require_tied
from map_bo.merging.finite import all_finite
from map_bo.merging.layout import FlatLayout
from map_bo.merging.likeness import Likeness
from map_bo.merging.names import aligned_names

__all__ = ["ExpertReader", "finite", "fixed_tensors"]


class ExpertReader:
    """One expert, read piece by piece beside the base.

    Args:
        base: The base.
        expert: The expert.
        label: What to call it in an error.
        layout: The layout of the base.

    Raises:
        MergeError: When names, shapes or kinds of dtype do not fit the base.
    """

    def __init__(self, base: Checkpoint, expert: Checkpoint, label: str, layout: FlatLayout):
        self.label = label
        self.expert = expert
        self.own = aligned_names(base, expert, label, layout.ties)
        self.moved = False
        self.likeness = Likeness(label)
        require_tied(expert, {a: self.own[c] for a, c in layout.ties.items()}, f"expert {label!r}")

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return a piece of the expert's tensor of a canonical name (1-D); it is finite."""
        piece = self.expert.read(self.own[name], start, stop)
        return finite(piece, name, f"expert {self.label!r}")

    def compare(self, pre: Tensor, tuned: Tensor) -> Tensor:
        """Return the delta of a piece (1-D), and note whether there is one.

        What `judge` needs besides, of tensors of two or more dimensions, goes to ``likeness``.
        """
        wide = torch.float64 if torch.float64 in (pre.dtype, tuned.dtype) else torch.float32
        delta = tuned.to(wide) - pre.to(wide)
        self.moved = self.moved or bool(delta.any())
        return delta

    def judge(self, check_base: bool) -> None:
        """Refuse, after all tensors were compared, an expert that is the base or unrelated.

        Raises:
            MergeError: When it is; unrelated ones only with ``check_base``.
        """
        if not self.moved:
            raise MergeError(
                f"expert {self.label!r}: its task vector is zero: it is the base",
                hint="leave it out; the base is coefficient 0 of every expert",
            )
        if check_base:
            self.likeness.judge()


def finite(tensor: Tensor, name: str, label: str) -> Tensor:
    """Return a tensor, float8 widened, that holds neither NaN nor infinity.

    Raises:
        MergeError: When it does.
    """
    widened = tensor.float() if tensor.element_size() == 1 else tensor
    if not all_finite(widened):
        raise MergeError(
            f"tensor {name!r} of {label} holds NaN or infinity",
            hint="this model diverged in training or its file is damaged; leave it out",
        )
    return widened.detach()


def fixed_tensors(
    base: Checkpoint, readers: Sequence[ExpertReader], layout: FlatLayout
) -> dict[str, Tensor]:
    """Return the tensors that are not merged, from the base.

    Raises:
        MergeError: When an expert differs from the base in more than a counter.
    """
    result: dict[str, Tensor] = {}
    for name in layout.fixed:
        if name in layout.ties:
            continue
        for reader in readers:
            require_same_fixed(base, name, reader.expert, reader.own[name], reader.label)
        result[name] = base.load(name).detach().clone()
    return result
