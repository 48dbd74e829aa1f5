"""Scales that change linearly with depth: two coefficients per expert for models of many layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.vectors.blocks import Blocks, depth_blocks
from map_bo.merging.vectors.kernel import KernelMerge, SpanKernel, check_coefficients
from map_bo.merging.vectors.linear_merge import LinearMerge, segments
from map_bo.merging.vectors.operator import Deltas, Weights
from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.space import CoefficientSpace

__all__ = ["DepthProfile", "ProfileMerge"]

_ENDS = ("first", "last")
_WORD = "depths"


@dataclass(frozen=True)
class DepthProfile:
    r"""Task arithmetic whose scales go linearly from the first layer to the last.

    ``theta_0 + sum_n (f_n + (l_n - f_n) p) v_n`` for a tensor at the position ``p`` in depth, from
    0 (first layer) to 1 (last). Wang, Dimitriadis et al., *LiNeS: Post-training Layer Scaling
    Prevents Forgetting and Enhances Model Merging*, arXiv 2410.17146, scale the layers of the
    merged task vector by ``alpha + beta (l - 1) / (L - 1)``: that is ``f_n = alpha`` and
    ``l_n = alpha + beta`` for all experts. Here each expert has a profile of its own, so that what
    the layers need is searched with two coefficients per expert, however many layers there are.
    Where an expert's two are equal it is task arithmetic, and the merge is linear in all of them.

    The coefficients are named ``expert/first`` and ``expert/last``.

    Attributes:
        blocks: Where tensors stand in depth: position from 0 to 1, as text -> regular expression
            that is searched for in tensor names, as for `Blocks`; or ``"depths"``, which reads it
            from the names, see `depth_blocks`. There embeddings have the scale of the first layer
            and the final norm and head that of the last. (The authors' code gives whatever is
            outside of the layers the first scale; to have that, give positions.)

    Raises:
        MergeError: When a position is not a number from 0 to 1, or not in ascending order, or a
            pattern is not a regular expression.
    """

    blocks: Mapping[str, str] | str = _WORD

    def __post_init__(self) -> None:
        known = self.blocks
        if isinstance(known, Mapping):  # YAML reads positions as numbers
            known = {str(position): pattern for position, pattern in known.items()}
        blocks = Blocks(known)
        if blocks.patterns is None:
            raise MergeError(
                "a profile in depth has no positions",
                hint=f"leave blocks at {_WORD!r}, or give {{position: regular expression}}",
            )
        if isinstance(blocks.patterns, str):
            if blocks.patterns.strip() != _WORD:
                raise MergeError(
                    f"the blocks of a profile in depth are {blocks.patterns!r}",
                    hint=f"leave them at {_WORD!r}, or give {{position: regular expression}}",
                )
        else:
            _positions(tuple(blocks.patterns))
        object.__setattr__(self, "blocks", blocks.patterns)

    def space(self, experts: tuple[str, ...], *, lower: float, upper: float) -> CoefficientSpace:
        """Return a box with two coefficients per expert: at the first layer and at the last."""
        return CoefficientSpace.box(experts, blocks=_ENDS, lower=lower, upper=upper)

    def with_blocks(self, patterns: Mapping[str, str]) -> DepthProfile:
        """Return the same profile with these positions; see `HasBlocks`."""
        return replace(self, blocks=patterns)

    def prepare(self, deltas: Deltas) -> ProfileMerge | KernelMerge:
        """Find where the tensors stand.

        Raises:
            MergeError: When a tensor belongs to no position or to several.
        """
        if not isinstance(deltas, TaskVectors):
            return self.prepare_pieces(deltas)
        blocks = self._known(deltas)
        inner = LinearMerge(deltas, segments(blocks, deltas.layout), len(blocks))
        return ProfileMerge(inner, _positions(blocks.names), len(deltas.experts))

    def prepare_pieces(self, deltas: Deltas) -> KernelMerge:
        """Prepare a merge that reads pieces alone; see `ReadsPieces`.

        Raises:
            MergeError: When a tensor belongs to no position or to several.
        """
        blocks = self._known(deltas)
        return _ProfilePieces(deltas, blocks.table(deltas.layout), _positions(blocks.names))

    def weights(self, experts: tuple[str, ...], c: Tensor) -> Weights:
        """Return tensor name -> weight of each expert; see `Linear`.

        Raises:
            MergeError: When ``c`` is not ``2 N`` finite numbers.
        """
        blocks = Blocks(self.blocks)
        table = _spread(check_coefficients(c, 2 * len(experts)), _positions(blocks.names))

        def of(name: str) -> Mapping[str, float]:
            return dict(zip(experts, table[blocks.of(name)].tolist(), strict=True))

        return of

    def _known(self, deltas: Deltas) -> Blocks:
        if not isinstance(self.blocks, str):
            return Blocks(self.blocks)
        return Blocks(depth_blocks([slot.name for slot in deltas.layout.slots]))


class ProfileMerge:
    """A linear merge by positions in depth: a `PreparedMerge` that knows its derivatives.

    Args:
        inner: The merge with one coefficient per expert and position.
        positions: ``B`` positions from 0 to 1.
        experts: ``N``, the number of experts.
    """

    def __init__(self, inner: LinearMerge, positions: Tensor, experts: int) -> None:
        self._inner, self._positions, self._experts = inner, positions, experts

    def write(self, c: Tensor, out: Tensor) -> None:
        """Write the merged numbers for ``c`` (``2 N``) into ``out`` (``P``); see `LinearMerge`.

        Raises:
            MergeError: When ``c`` or ``out`` has another shape, ``c`` is not finite, or ``out``
                lives on another device.
        """
        c = check_coefficients(c, 2 * self._experts)
        self._inner.write(_spread(c, self._positions).T.flatten(), out)

    def directional(self, gradient: Tensor) -> Tensor:
        """Return the derivatives by the coefficients, ``2 N``; see `HasDerivatives`.

        Raises:
            MergeError: When ``gradient`` has another shape, dtype or device.
        """
        by_position = self._inner.directional(gradient).view(self._experts, -1)
        ends = torch.stack([1 - self._positions, self._positions], dim=1)
        return (by_position @ ends).flatten()


class _ProfilePieces(KernelMerge):
    def __init__(self, deltas: Deltas, blocks: tuple[int, ...], positions: Tensor) -> None:
        super().__init__(deltas, _Sum(), blocks, len(_ENDS))
        self._positions = positions

    def table(self, c: Tensor) -> Tensor:
        return _spread(c, self._positions)


class _Sum(SpanKernel):
    """The base plus the weighted task vectors."""

    def weights(self, slot: int, c: Tensor) -> Tensor:
        return torch.cat([c.new_ones(1), c])


def _spread(c: Tensor, positions: Tensor) -> Tensor:
    """Return the coefficients by position, ``B x N``, of ``c`` (``2 N``, expert by expert)."""
    ends = c.view(-1, 2)
    return ends[:, 0] + (ends[:, 1] - ends[:, 0]) * positions[:, None]


def _positions(names: tuple[str, ...]) -> Tensor:
    """Return the positions that blocks are named by, ``B``, ascending from 0 to 1."""
    try:
        places = [float(name) for name in names]
    except (TypeError, ValueError):
        places = [-1.0]
    ordered = all(left < right for left, right in pairwise(places))
    if not (ordered and all(0 <= place <= 1 for place in places)):
        raise MergeError(
            f"positions in depth must ascend from 0 to 1, got {', '.join(map(str, names))}",
            hint="give {position: regular expression}, such as {'0': 'embed', '0.5': ..., '1': "
            "'head'}",
        )
    return torch.tensor(places, dtype=torch.float64)
