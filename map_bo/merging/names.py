"""Which tensor of an expert belongs to which of the base."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from map_bo.errors import MergeError
from map_bo.merging.checkpoint import Checkpoint
from map_bo.merging.messages import listed
from map_bo.merging.vocabulary import require_shapes

__all__ = ["aligned_names"]

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
