"""Resident task vectors: all experts' deltas as rows of one matrix, laid out like the base.

Task vectors ``v_n = theta_n - theta_base`` are those of Ilharco et al., *Editing Models with
Task Arithmetic*, arXiv 2212.04089, section 2. Shapes: ``N`` experts, ``P`` numbers in the flat
layout (the floating values of the model and a little padding).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.checkpoint import Checkpoint
from map_bo.merging.layout import FlatLayout, is_variance, joined_ties
from map_bo.merging.messages import listed

__all__ = ["TaskVectors"]

_STORAGE = (torch.float32, torch.bfloat16)
# Measured on MLPs for digits: trained from its random start for 2000 steps at a learning rate of
# .01, a model keeps a cosine of .34 with that start; two trainings from different starts have .02.
_UNRELATED = 0.1
_ENOUGH = 1000  # numbers from which a cosine between unrelated weights is reliably below .1
_ARCHITECTURE = "experts must be fine-tuned from this base, with the same architecture"


@dataclass(frozen=True, eq=False)
class TaskVectors:
    """The base and the task vectors of all experts, resident on one device.

    Attributes:
        experts: ``N`` names, in the order of the rows of ``deltas``.
        layout: Where each tensor lies.
        rows: ``(1 + N) x P``; row 0 is the base, the others are the deltas. They are one matrix
            so that a linear merge is one product that reads each number once.
        fixed: Canonical name -> the base's value, for the tensors that are not merged.
        floors: For each variance the slice that it has in the flat layout and the smallest value
            that the base or an expert has, by element.
    """

    experts: tuple[str, ...]
    layout: FlatLayout
    rows: Tensor
    fixed: Mapping[str, Tensor] = field(default_factory=dict)
    floors: tuple[tuple[slice, Tensor], ...] = ()

    @property
    def device(self) -> torch.device:
        """Where the rows live."""
        return self.rows.device

    @property
    def resident(self) -> bool:
        """True; see `Deltas`."""
        return True

    @property
    def in_place(self) -> bool:
        """Whether pieces are views; see `Deltas`."""
        return self.rows.dtype == torch.float32

    def read(self, slot: int, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return a piece of a tensor in float32, a view where it can be; see `Deltas`."""
        offset = self.layout.slots[slot].offset
        part = self.rows[:, offset + start : offset + stop]
        if part.dtype == torch.float32:
            return part
        return part.float() if out is None else out.copy_(part)

    def floor_piece(self, slot: int, start: int, piece: Tensor) -> None:
        """Raise a merged piece of a variance to the least of its models; see `Deltas`."""
        offset = self.layout.slots[slot].offset
        for where, floor in self.floors:
            if where.start == offset:
                part = floor[start : start + len(piece)]
                torch.maximum(piece, part.to(piece.dtype), out=piece)

    @property
    def base(self) -> Tensor:
        """``P``: the base, in the storage dtype."""
        return self.rows[0]

    @property
    def deltas(self) -> Tensor:
        """``N x P``: the task vectors, in the storage dtype."""
        return self.rows[1:]

    def keep_variances(self, out: Tensor) -> None:
        """Raise every merged variance in ``out`` (``P``) to the least of its models.

        Deltas add up: with coefficients that sum to more than 1 a ``running_var`` can come out
        negative or near zero, and batch normalisation would then return NaN or explode. Every
        operator ends its ``write`` with this. It changes neither the base nor an expert.
        """
        for where, floor in self.floors:
            part = out[where]
            torch.maximum(part, floor.to(out.dtype), out=part)

    @classmethod
    def load(
        cls,
        base: Checkpoint,
        experts: Mapping[str, Checkpoint],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        check_base: bool = True,
        ties: Mapping[str, str] | None = None,
    ) -> TaskVectors:
        """Read base and experts, one tensor at a time, and check that they fit each other.

        The rules:

        - All have the same tensor names and shapes. Where several names are one tensor (tied),
          it is merged once, and a checkpoint may leave out all but one of its names.
        - Floating tensors are merged, buffers such as BatchNorm's running mean and variance
          included, for which see `keep_variances`. The dtypes of base and expert may differ:
          deltas are taken in float32 (float64 where one of them is) and stored in ``dtype``.
        - Other tensors come from the base. Experts may differ in counters (integers with one
          element, such as ``num_batches_tracked``), in nothing larger.
        - An expert that equals the base, or another expert, is refused: its coefficient would
          mean nothing.
        - With ``check_base``, so is an expert that was not fine-tuned from this base. Over all
          tensors of two or more dimensions, two unrelated trainings have a cosine similarity
          near 0 and a difference longer than the base; an expert is refused where the cosine
          is below 0.1 and the difference longer than the base. Below 1000 numbers, where
          chance could decide, and for a base of zeros nothing is refused.

        Args:
            base: The base checkpoint.
            experts: Name -> checkpoint of the ``N`` experts.
            dtype: Storage: float32 (default) or bfloat16, which halves memory and keeps three
                digits of every base weight and every delta.
            device: Where the rows live.
            check_base: Whether to refuse experts that do not look fine-tuned from the base.
            ties: Further ties, alias -> canonical name, that the model has and the base does
                not record; names that the base lacks are passed over.

        Raises:
            MergeError: When a rule is broken; the message names the expert and the tensors.
        """
        dtype = dtype or torch.float32
        if dtype not in _STORAGE:
            raise MergeError(
                f"task vectors cannot be stored as {dtype}",
                hint="choose torch.float32 or torch.bfloat16",
            )
        if not experts:
            raise MergeError("there are no experts", hint="give at least one fine-tuned model")
        layout = FlatLayout.of(base, joined_ties(base, ties or {}))
        readers = {name: _Reader(base, expert, name, layout) for name, expert in experts.items()}
        _require_tied(base, layout.ties, "the base")
        rows = torch.zeros(1 + len(experts), layout.size, dtype=dtype, device=device)
        floors: list[tuple[slice, Tensor]] = []
        for slot in layout.slots:
            pre = _finite(base.load(slot.name), slot.name, "the base")
            where = slice(slot.offset, slot.stop)
            rows[0, where].copy_(pre.flatten())
            least = pre.float().flatten()
            for row, reader in zip(rows[1:], readers.values(), strict=True):
                tuned = reader.load(slot.name)
                row[where].copy_(reader.compare(pre, tuned).flatten())
                least = torch.minimum(least, tuned.float().flatten())
            if is_variance(slot.name):
                floors.append((where, least.to(device)))
        for reader in readers.values():
            reader.judge(check_base)
        vectors = cls(tuple(experts), layout, rows, _fixed(base, readers, layout), tuple(floors))
        vectors._require_distinct()
        return vectors

    def _require_distinct(self) -> None:
        sums = [float(row.sum(dtype=torch.float64)) for row in self.deltas]
        for i, first in enumerate(self.experts):
            for j in range(i):
                if sums[i] == sums[j] and torch.equal(self.deltas[i], self.deltas[j]):
                    raise MergeError(
                        f"experts {self.experts[j]!r} and {first!r} have the same weights",
                        hint="leave one of them out, or check the paths",
                    )


class _Reader:
    """One expert, read tensor by tensor beside the base."""

    def __init__(self, base: Checkpoint, expert: Checkpoint, label: str, layout: FlatLayout):
        self.label = label
        self.expert = expert
        self.own = _matched(base, expert, label, layout)
        self._moved = False
        self._size = 0
        self._pre = self._tuned = self._both = self._gap = 0.0
        _require_tied(expert, {a: self.own[c] for a, c in layout.ties.items()}, f"expert {label!r}")

    def load(self, name: str) -> Tensor:
        return _finite(self.expert.load(self.own[name]), name, f"expert {self.label!r}")

    def compare(self, pre: Tensor, tuned: Tensor) -> Tensor:
        """Return the delta, and gather what `judge` needs."""
        wide = torch.float64 if torch.float64 in (pre.dtype, tuned.dtype) else torch.float32
        a, b = pre.to(wide).flatten(), tuned.to(wide).flatten()
        delta = b - a
        self._moved = self._moved or bool(delta.any())
        if pre.dim() >= 2:
            self._size += pre.numel()
            self._pre += float(a @ a)
            self._tuned += float(b @ b)
            self._both += float(a @ b)
            self._gap += float(delta @ delta)
        return delta

    def judge(self, check_base: bool) -> None:
        if not self._moved:
            raise MergeError(
                f"expert {self.label!r}: its task vector is zero: it is the base",
                hint="leave it out; the base is coefficient 0 of every expert",
            )
        if not check_base or self._size < _ENOUGH or not self._pre:
            return
        cosine = self._both / math.sqrt(self._pre * self._tuned) if self._tuned else 0.0
        reach = math.sqrt(self._gap / self._pre)
        if cosine < _UNRELATED and reach > 1:
            raise MergeError(
                f"expert {self.label!r} does not look fine-tuned from this base: the cosine "
                f"similarity of their weights is {cosine:.3f}, and they differ by {reach:.2f} "
                "times the norm of the base",
                hint="fine-tuning leaves the similarity near 1; give the base that the expert "
                "was trained from, or pass check_base=False",
            )


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
    shapes = [
        f"{name} {list(expert.shape(mine))} against {list(base.shape(name))}"
        for name, mine in own.items()
        if expert.shape(mine) != base.shape(name)
    ]
    if shapes:
        raise MergeError(
            f"expert {label!r} has other shapes than the base: {listed(shapes)}",
            hint=_ARCHITECTURE,
        )
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


def _require_tied(checkpoint: Checkpoint, ties: Mapping[str, str], label: str) -> None:
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


def _finite(tensor: Tensor, name: str, label: str) -> Tensor:
    # float8 has no isfinite of its own; everything else is tested as it is.
    tested = tensor.float() if tensor.element_size() == 1 else tensor
    if not bool(torch.isfinite(tested).all()):
        raise MergeError(
            f"tensor {name!r} of {label} holds NaN or infinity",
            hint="this model diverged in training or its file is damaged; leave it out",
        )
    return tested.detach()


def _fixed(
    base: Checkpoint, readers: Mapping[str, _Reader], layout: FlatLayout
) -> dict[str, Tensor]:
    """Return the tensors that are not merged, from the base."""
    result: dict[str, Tensor] = {}
    for name in layout.fixed:
        if name in layout.ties:
            continue
        value = base.load(name)
        for label, reader in readers.items():
            other = reader.expert.load(reader.own[name])
            if value.numel() > 1 and not torch.equal(value, other):
                raise MergeError(
                    f"tensor {name!r} ({value.dtype}) differs between the base and expert "
                    f"{label!r}, and only floating tensors can be merged",
                    hint="quantised weights are expanded before merging; index tables must be "
                    "those of the base",
                )
        result[name] = value.detach().clone()
    return result
