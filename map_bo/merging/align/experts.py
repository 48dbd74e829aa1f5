"""Reading experts beside their base: what must fit, and what is refused.

Which tensor of an expert belongs to which of the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from map_bo.errors import MergeError, listed
from map_bo.merging.align.layout import FlatLayout
from map_bo.merging.align.same_base import Likeness, require_same_fixed, require_tied
from map_bo.merging.align.vocabulary import require_shapes
from map_bo.merging.checkpoints.checkpoint import Checkpoint
from map_bo.merging.checkpoints.tensors import all_finite

__all__ = ["ExpertReader", "aligned_names", "finite", "fixed_tensors"]

_HINT = "experts must be fine-tuned from this base, with the same architecture"


def aligned_names(
    base: Checkpoint, expert: Checkpoint, label: str, ties: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return, for each canonical name of the base, the expert's name of the same tensor.

    Args:
        base: The base.
        expert: The expert; of the names of one tensor it may leave out all but one.
        label: The expert's name, for errors.
        ties: Alias -> canonical name of the tensors that are one; by default the base's own.

    Raises:
        MergeError: When the expert has missing or further tensors, or other shapes or kinds of
            dtype.
    """
    ties = base.ties if ties is None else ties
    of_expert, known = set(expert.names), set(base.names)
    groups: dict[str, list[str]] = {name: [name] for name in base.names if name not in ties}
    for name in base.names:
        if name in ties:
            groups[ties[name]].append(name)
    names = {
        canonical: present[0]
        for canonical, group in groups.items()
        if (present := [name for name in group if name in of_expert])
    }
    missing = sorted(set(groups) - set(names))
    # An alias of a tensor that the base has is no further tensor.
    extra = sorted(name for name in of_expert - known if expert.ties.get(name) not in known)
    if missing:
        raise MergeError(
            f"expert {label!r} lacks {len(missing)} of the base's tensors: {listed(missing)}",
            hint=_HINT,
        )
    if extra:
        raise MergeError(
            f"expert {label!r} has {len(extra)} tensors that the base lacks: {listed(extra)}",
            hint=_HINT,
        )
    require_shapes(base, expert, label, names)
    kinds = [
        f"{name} {expert.dtype(own)} against {base.dtype(name)}"
        for name, own in names.items()
        if _kind(expert.dtype(own)) != _kind(base.dtype(name))
    ]
    if kinds:
        raise MergeError(
            f"expert {label!r} has other kinds of dtype than the base: {listed(kinds)}",
            hint="expand quantised weights before merging",
        )
    return names


def _kind(dtype: torch.dtype) -> str:
    return "complex" if dtype.is_complex else "float" if dtype.is_floating_point else "other"


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
