"""Reading experts beside their base: what must fit, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.checkpoint import Checkpoint
from map_bo.merging.layout import FlatLayout
from map_bo.merging.likeness import Likeness
from map_bo.merging.messages import listed
from map_bo.merging.vocabulary import require_shapes

__all__ = ["ExpertReader", "finite", "fixed_tensors", "require_tied"]

_ARCHITECTURE = "experts must be fine-tuned from this base, with the same architecture"


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
        self.own = _matched(base, expert, label, layout)
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


def _matched(
    base: Checkpoint, expert: Checkpoint, label: str, layout: FlatLayout
) -> dict[str, str]:
    """Return, for each canonical name of the base, the expert's name of the same tensor."""
    own: dict[str, str] = {}
    present = set(expert.names)
    for name in base.names:  # canonical names are found under their own name first
        canonical = layout.ties.get(name, name)
        if name in present and (name == canonical or canonical not in own):
            own[canonical] = name
    canonical_names = [name for name in base.names if name not in layout.ties]
    missing = [name for name in canonical_names if name not in own]
    if missing:
        raise MergeError(
            f"expert {label!r} lacks {len(missing)} of the base's tensors: {listed(missing)}",
            hint=_ARCHITECTURE,
        )
    known = set(base.names)
    extra = sorted(name for name in present - known if expert.ties.get(name) not in known)
    if extra:
        raise MergeError(
            f"expert {label!r} has {len(extra)} tensors that the base lacks: {listed(extra)}",
            hint=_ARCHITECTURE,
        )
    require_shapes(base, expert, label, own)
    kinds = [
        f"{name} {expert.dtype(mine)} against {base.dtype(name)}"
        for name, mine in own.items()
        if expert.dtype(mine).is_floating_point != base.dtype(name).is_floating_point
    ]
    if kinds:
        raise MergeError(
            f"expert {label!r} has other kinds of dtype than the base: {listed(kinds)}",
            hint="expand quantised weights before merging",
        )
    return own


def require_tied(checkpoint: Checkpoint, ties: Mapping[str, str], label: str) -> None:
    """Refuse a checkpoint in which tensors that are one in the model differ.

    Args:
        checkpoint: The checkpoint.
        ties: Alias -> canonical name.
        label: What to call it.

    Raises:
        MergeError: When they differ.
    """
    for alias, canonical in ties.items():
        if alias not in checkpoint.names or alias == canonical:
            continue
        if checkpoint.ties.get(alias, alias) == checkpoint.ties.get(canonical, canonical):
            continue
        if not torch.equal(checkpoint.load(alias), checkpoint.load(canonical)):
            raise MergeError(
                f"{canonical!r} and {alias!r} are one tensor in the model but differ in {label}",
                hint="use checkpoints that keep them tied, or untie them in the base and model",
            )


def finite(tensor: Tensor, name: str, label: str) -> Tensor:
    """Return a tensor, float8 widened, that holds neither NaN nor infinity.

    Raises:
        MergeError: When it does.
    """
    # float8 has no isfinite of its own; everything else is tested as it is.
    tested = tensor.float() if tensor.element_size() == 1 else tensor
    if not bool(torch.isfinite(tested).all()):
        raise MergeError(
            f"tensor {name!r} of {label} holds NaN or infinity",
            hint="this model diverged in training or its file is damaged; leave it out",
        )
    return tested.detach()


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
        value = base.load(name)
        for reader in readers:
            other = reader.expert.load(reader.own[name])
            if value.numel() > 1 and not torch.equal(value, other):
                raise MergeError(
                    f"tensor {name!r} ({value.dtype}) differs between the base and expert "
                    f"{reader.label!r}, and only floating tensors can be merged",
                    hint="quantised weights are expanded before merging; index tables must be "
                    "those of the base",
                )
        result[name] = value.detach().clone()
    return result
