"""Further means on the sphere: barycentric interpolation, and spheres of single rows and columns.

`~map_bo.operators.averages.Slerp` turns whole tensors along great circles, towards the mean on the
sphere (the Karcher mean). Here are the mean of directions, which needs no iteration, and SLERP of
each row or column apart. The coefficients mean the same in all of them: with ``s = sum_n c_n`` the
experts' shares in the mean are ``c_n / s``, and the model lies at the fraction ``s`` of the way
from the base to that mean.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from map_bo.merging.vectors.kernel import Kernel
from map_bo.merging.vectors.operator import Deltas
from map_bo.merging.vectors.parallel import arena, parallel_for
from map_bo.operators.averages import SphereKernel, products, spherical_mean, turned_products
from map_bo.operators.searchable import SearchableOperator, one_of
from map_bo.operators.sparsify import row_width

__all__ = ["MultiSlerp", "NuSlerp", "arc_mean", "direction_mean", "line_products", "line_width"]

ALONG = ("tensor", "row", "column")
_PIECE = 1 << 18
_CLOSE = 1e-8  # many means at once, for weights in float32
_PARALLEL = 1e-8  # the sine of an angle below which the chord is as good as the arc
_CANCELLED = 1e-6  # the length of a mean of unit vectors below which it has no direction


@dataclass(frozen=True, kw_only=True)
class MultiSlerp(SearchableOperator):
    r"""Barycentric interpolation on the sphere, tensor by tensor, of any number of experts.

    Directions are averaged and brought back to the sphere: with the unit vectors ``u_n`` and the
    shares ``a_n`` the mean is ``(sum_n a_n |v_n|) m / |m|`` with ``m = sum_n a_n u_n``. It is what
    mergekit's ``multislerp`` computes (C. Goddard,
    goddard.blog/posts/multislerp-wow-what-a-cool-idea), whose step along the tangent space at ``m``
    sums to zero. In equal parts of two vectors it is the mean of `Slerp`; in other parts it is the
    point that the iteration of `Slerp` starts from.

    Attributes:
        of: What is turned: task vectors (``"deltas"``, mergekit's with a base model) or whole
            weights (``"weights"``, without).
    """

    name: ClassVar[str] = "multislerp"
    signed: ClassVar[bool] = False

    of: str = "deltas"

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings that are not possible; see `SearchableOperator`."""
        one_of("of", settings["of"], ("deltas", "weights"))

    def kernel(self, deltas: Deltas) -> Kernel:
        """Measure the angles: one pass over all tensors."""
        return SphereKernel(products(deltas), self.of, direction_mean)


@dataclass(frozen=True, kw_only=True)
class NuSlerp(SearchableOperator):
    r"""Spherical interpolation of each row, column or tensor, whose vectors keep their norms.

    mergekit's ``nuslerp``, which takes two models: Shoemake's SLERP (*Animating rotation with
    quaternion curves*, SIGGRAPH 1985, section 3.3) of vectors that are not brought to one length.
    Of more than two it is the weighted mean on the sphere, see `Slerp`; ``along="tensor"`` is
    ``Slerp(norms="own")``.

    Attributes:
        of: What is turned: task vectors (``"deltas"``, mergekit's with a base model) or whole
            weights (``"weights"``, without).
        along: What turns as one vector. ``"row"``: what makes one output: the last dimension, of
            four and more dimensions all but the first (mergekit's ``nuslerp_flatten: false``).
            ``"column"``: the first dimension (``nuslerp_row_wise: true``). ``"tensor"``: all of it
            (``nuslerp_flatten: true``).
    """

    name: ClassVar[str] = "nuslerp"
    signed: ClassVar[bool] = False

    of: str = "deltas"
    along: str = "row"

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings that are not possible; see `SearchableOperator`."""
        one_of("of", settings["of"], ("deltas", "weights"))
        one_of("along", settings["along"], ALONG)

    def kernel(self, deltas: Deltas) -> Kernel:
        """Measure the angles: one pass over all tensors.

        ``N^2`` numbers of eight bytes are kept for each row or column.
        """
        if self.along == "tensor":
            return SphereKernel(products(deltas), self.of, partial(spherical_mean, norms="own"))
        shapes = [slot.shape for slot in deltas.layout.slots]
        grams = [turned_products(each, self.of) for each in line_products(deltas, self.along)]
        return _Lines(
            grams, self.of, [line_width(shape, self.along) for shape in shapes], self.along == "row"
        )


class _Lines(Kernel):
    """A part of the way to the mean on the sphere of each row or column."""

    def __init__(self, grams: Sequence[Tensor], of: str, widths: Sequence[int], rows: bool) -> None:
        self._grams, self._of, self._widths, self._rows = grams, of, widths, rows
        # A row is of one piece; columns are of all pieces of a tensor, which has one coefficient
        # vector at a time.
        self._locks = [threading.Lock() for _ in grams]
        self._found: list[tuple[tuple[float, ...], Tensor] | None] = [None] * len(grams)

    def unit(self, slot: int) -> int:
        return self._widths[slot]

    def room(self, experts: int) -> int:
        # Some matrices of experts by experts in float64 for each row; columns are found together.
        narrowest = min(
            (w for w, g in zip(self._widths, self._grams, strict=True) if len(g) > 64), default=64
        )
        lines = 48 * (1 + experts) ** 2 // max(narrowest, 1) if self._rows else 0
        return super().room(experts) + lines

    def overhead(self, threads: int) -> int:
        return 2 * sum(gram.nbytes for gram in self._grams)

    def piece(self, rows: Tensor, slot: int, start: int, c: Tensor) -> Tensor:
        width, size = self._widths[slot], rows.shape[1]
        if self._rows:
            grams = self._grams[slot][start // width : (start + size) // width]
            weights = self._weights(grams, c).to(rows)
        else:
            weights = self._known(slot, c).to(rows)
        # Of rows one weight each, of columns the same weights in each row.
        shaped = weights[:, None] if self._rows else weights[None]
        parts = rows.view(len(rows), -1, width)
        out = arena.empty(size // width, width, device=rows.device)
        torch.mul(parts[0], shaped[..., 0], out=out)
        for n, part in enumerate(parts[1:], start=1):
            out.addcmul_(part, shaped[..., n])
        return out.view(-1)

    def _known(self, slot: int, c: Tensor) -> Tensor:
        """Return the weights for the columns of a tensor, found once for all of its pieces."""
        asked = tuple(c.tolist())
        with self._locks[slot]:
            known = self._found[slot]
            if known is None or known[0] != asked:
                known = self._found[slot] = (asked, self._weights(self._grams[slot], c))
            return known[1]

    def _weights(self, grams: Tensor, c: Tensor) -> Tensor:
        """Return the weights of base and task vectors, ``L x (1 + N)``, for ``L`` lines."""
        total = c.sum()
        mean = total * arc_mean(grams, c / total)
        base = mean.new_ones(len(mean))
        if self._of == "weights":
            base = base - total + mean.sum(-1)
        return torch.cat([base[:, None], mean], dim=1)


def line_width(shape: Sequence[int], along: str) -> int:
    """Return how many neighbouring numbers of a tensor make a row, or stand across all columns."""
    if along == "row" or len(shape) < 2:
        return row_width(shape)
    return math.prod(shape[1:])


def line_products(deltas: Deltas, along: str) -> list[Tensor]:
    """Return the inner products of base and task vectors by row or column of each tensor.

    Args:
        deltas: ``N`` task vectors; read once.
        along: ``"row"`` or ``"column"``; see `NuSlerp`.

    Returns:
        For each tensor ``L x (1 + N) x (1 + N)`` of its ``L`` rows or columns, float64 on the CPU.
    """
    slots, count = deltas.layout.slots, 1 + len(deltas.experts)
    result: list[Tensor] = []
    for slot in slots:
        width = max(line_width(slot.shape, along), 1)
        by_row = along == "row" or len(slot.shape) < 2
        lines = slot.numel // width if by_row else width * bool(slot.numel)
        result.append(torch.zeros(lines, count, count, dtype=torch.float64))

    def measure(slot: int, _: None) -> None:
        shape, size = slots[slot].shape, slots[slot].numel
        width = max(line_width(shape, along), 1)
        step = width * max(1, _PIECE // width)
        for start in range(0, size, step):
            part = deltas.read(slot, start, min(start + step, size)).double()
            part = part.view(count, -1, width)
            if along == "row" or len(shape) < 2:
                lines = part.transpose(0, 1)
                first = start // width
                result[slot][first : first + len(lines)] = (lines @ lines.mT).cpu()
                continue
            for i in range(count):
                for j in range(i + 1):
                    found = (part[i] * part[j]).sum(0).cpu()
                    result[slot][:, i, j] += found
                    if i != j:
                        result[slot][:, j, i] += found

    order = sorted(range(len(slots)), key=lambda i: -slots[i].numel)
    parallel_for(measure, order, lambda: None, threads=deltas.threads)
    return result


def direction_mean(grams: Tensor, w: Tensor) -> Tensor:
    """Return the weights of ``N`` vectors whose combination is their barycentre on the sphere.

    Args:
        grams: ``... x N x N`` inner products of the vectors, float64.
        w: ``N`` weights, not negative, that sum to 1.

    Returns:
        ``... x N`` numbers; see `MultiSlerp`. A zero vector has no direction and adds nothing to
        the mean. Where directions cancel it is ``w`` itself: the average.
    """
    if int((w > 0).sum()) == 1:
        return w.expand(grams.shape[:-1]).clone()
    lengths = grams.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    turned = torch.where(lengths > 0, w / lengths, 0.0)
    square = turned.unsqueeze(-2) @ grams @ turned.unsqueeze(-1)
    size = square.squeeze(-1).clamp_min(0).sqrt()
    mean = turned * (lengths @ w).unsqueeze(-1) / size.clamp_min(_CANCELLED)
    return torch.where(size > _CANCELLED, mean, w)


def arc_mean(grams: Tensor, w: Tensor) -> Tensor:
    """Return the weights of ``N`` vectors, which keep their norms, in their mean on the sphere.

    Of two vectors by Shoemake's formula, of more by `spherical_mean`; see `NuSlerp`.

    Args:
        grams: ``... x N x N`` inner products of the vectors, float64.
        w: ``N`` weights, not negative, that sum to 1.

    Returns:
        ``... x N`` numbers. Where vectors have no direction or are opposite it is ``w`` itself:
        the average.
    """
    used = w > 0
    if int(used.sum()) != 2:
        return spherical_mean(grams, w, "own", close=_CLOSE)
    share, part = w[used], grams[..., used, :][..., used]
    lengths = part.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    cosine = part[..., 0, 1] / lengths.prod(-1)
    angle = cosine.nan_to_num(1.0).clamp(-1.0, 1.0).acos().unsqueeze(-1)
    sine = angle.sin()
    turned = (sine > _PARALLEL) & (lengths > 0).all(-1, keepdim=True)
    arc = torch.where(turned, (share * angle).sin() / sine.clamp_min(_PARALLEL), share)
    result = torch.zeros(grams.shape[:-1], dtype=grams.dtype)
    result[..., used] = arc
    return result
