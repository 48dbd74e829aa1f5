"""Averages of the experts themselves: weighted, and on the sphere.

Both give, for each tensor, a combination of base and task vectors whose weights come from the
coefficients and, on the sphere, from the angles between the tensors. So a candidate costs what a
linear merge costs.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from map_bo.merging.vectors.kernel import Kernel, SpanKernel
from map_bo.merging.vectors.operator import Deltas
from map_bo.merging.vectors.parallel import parallel_for
from map_bo.operators.searchable import SearchableOperator, one_of

__all__ = [
    "Slerp",
    "SphereKernel",
    "WeightedAverage",
    "products",
    "spherical_mean",
    "turned_products",
]

_PIECE = 1 << 18
_STEPS, _CLOSE = 100, 1e-11
_PARALLEL = 1e-8  # the sine of an angle below which the chord is as good as the arc
_CANCELLED = 1e-6  # the length of a mean of unit vectors, or the angle from opposite ones
_ROUNDED = 1e-8  # what rounding leaves of a length that is zero, by the weights of its parts
_LARGE = 16.0  # sums of weights above which vectors are taken to depend on each other
_NEAR = 0.25  # the mean cosine down to which vectors are on the side of their mean
_OTHER = 1e-6  # the relative difference from which weights are others
_REMEMBERED = 64  # coefficient vectors whose weights are kept


@dataclass(frozen=True, kw_only=True)
class WeightedAverage(SearchableOperator):
    """The average of the experts, weighted by the coefficients: ``sum_n c_n theta_n / sum_n c_n``.

    Model soups (Wortsman et al., arXiv 2203.05482, section 2) with weights that are free. Only the
    ratios of the coefficients count, so that one of them is superfluous: `TaskArithmetic` with
    coefficients that sum to 1 gives the same models. With all coefficients 0 it is the base.
    """

    name: ClassVar[str] = "weighted_average"
    signed: ClassVar[bool] = False

    def kernel(self, deltas: Deltas) -> Kernel:
        """Return the kernel; nothing needs preparing."""
        return _Average()


class _Average(SpanKernel):
    def weights(self, slot: int, c: Tensor) -> Tensor:
        return torch.cat([c.new_ones(1), c / c.sum()])


@dataclass(frozen=True, kw_only=True)
class Slerp(SearchableOperator):
    r"""Spherical interpolation, tensor by tensor, of two experts or more.

    Of two vectors with weights ``1 - t`` and ``t`` it is Shoemake's SLERP (*Animating rotation
    with quaternion curves*, SIGGRAPH 1985, section 3.3). Of more it is the weighted mean on the
    sphere: the point with the least weighted sum of squared angles (Buss and Fillmore, *Spherical
    averages and applications to spherical splines and interpolation*, ACM TOG 20(2), 2001), found
    by their algorithm A1 from the angles alone.

    With coefficients ``c`` and ``s = sum_n c_n`` the weights are ``c_n / s``, and the merged model
    lies ``s`` of the way from the base to the mean. So with all coefficients 0 it is the base, with
    one of them 1 and the others 0 that expert, and where they sum to 1 the mean itself.

    Attributes:
        of: ``"deltas"``: what is turned are the task vectors (mergekit's ``nuslerp`` with a base
            model); ``"weights"``: the experts' weights themselves (its ``slerp``, ``karcher``).
        norms: ``"mean"``: the result has the weighted mean of the norms (as in mergekit's
            ``karcher``); ``"own"``: each vector keeps its own, as where the formula of SLERP is
            applied to vectors of different norms (its ``slerp`` and ``nuslerp``).
    """

    name: ClassVar[str] = "slerp"
    signed: ClassVar[bool] = False

    of: str = "deltas"
    norms: str = "mean"

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings that are not possible; see `SearchableOperator`."""
        one_of("of", settings["of"], ("deltas", "weights"))
        one_of("norms", settings["norms"], ("mean", "own"))

    def kernel(self, deltas: Deltas) -> Kernel:
        """Measure the angles: one pass over all tensors."""
        return SphereKernel(products(deltas), self.of, partial(spherical_mean, norms=self.norms))


class SphereKernel(SpanKernel):
    """A part of the way to a mean on the sphere, whose weights follow from the angles.

    Args:
        grams: ``S x (1 + N) x (1 + N)`` inner products by tensor, see `products`.
        of: Whether task vectors (``"deltas"``) or whole weights (``"weights"``) are turned.
        mean: Inner products ``S x N x N`` and ``N`` weights that sum to 1 -> ``S x N`` weights of
            the vectors in their mean.
    """

    def __init__(self, grams: Tensor, of: str, mean: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._of, self.mean = of, mean
        self._grams = turned_products(grams, of)
        self._lock = threading.Lock()
        self._found: dict[tuple[float, ...], Tensor] = {}

    def weights(self, slot: int, c: Tensor) -> Tensor:
        """Return the weights of base and task vectors; see `SpanKernel`."""
        # Asked for each piece, and found for all tensors at once. There are as many different c
        # at a time as there are blocks.
        asked = tuple(c.tolist())
        with self._lock:
            if asked not in self._found:
                while len(self._found) >= _REMEMBERED:
                    self._found.pop(next(iter(self._found)))
                self._found[asked] = self._weights(c)
            return self._found[asked][slot]

    def _weights(self, c: Tensor) -> Tensor:
        total = c.sum()
        mean = total * self.mean(self._grams, c / total)
        # theta_0 + s (sum_n a_n theta_n - theta_0), where the a_n need not sum to 1.
        base = 1 - total + mean.sum(-1) if self._of == "weights" else mean.new_ones(len(mean))
        return torch.cat([base[:, None], mean], dim=1)


def turned_products(grams: Tensor, of: str) -> Tensor:
    """Return the inner products ``... x N x N`` of what is turned.

    Args:
        grams: ``... x (1 + N) x (1 + N)`` inner products of the base and the task vectors.
        of: ``"deltas"``, or ``"weights"`` for the experts' own weights.
    """
    inner = grams[..., 1:, 1:]
    if of != "weights":
        return inner
    # theta_n = theta_0 + v_n, from the products of theta_0 and the v_n.
    return inner + grams[..., :1, 1:] + grams[..., 1:, :1] + grams[..., :1, :1]


def spherical_mean(
    grams: Tensor, w: Tensor, norms: str = "mean", *, close: float = _CLOSE
) -> Tensor:
    """Return the weights of ``N`` vectors whose combination is their mean on the sphere.

    Args:
        grams: ``... x N x N`` inner products of the vectors, float64.
        w: ``N`` weights, not negative, that sum to 1.
        norms: See `Slerp`.
        close: The length of a step below which a mean is found.

    Returns:
        ``... x N`` numbers. Where two vectors with weight are opposite, one is zero, or they
        cancel, there is no direction to turn into, and it is ``w`` itself: the average. Of vectors
        that depend on each other many combinations are the mean, which differ with norms of their
        own: it is the one in proportion to ``w_n angle_n / sin(angle_n)``, by the angles to the
        mean, as it is of all others; the average where those angles are about right, or obtuse.
    """
    used = w > 0
    result = w.expand(grams.shape[:-1]).clone()
    if int(used.sum()) == 1:
        return result
    share, part = w[used], grams[..., used, :][..., used]
    lengths = part.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    cosines = part / (lengths.unsqueeze(-1) * lengths.unsqueeze(-2))
    turned = (lengths > 0).all(-1)
    cosines = torch.where(turned[..., None, None], cosines, 1.0).clamp(-1.0, 1.0)
    size = _length(share.expand_as(lengths), cosines)
    turned &= size.squeeze(-1) > _CANCELLED
    mean = share / size.clamp_min(_CANCELLED)
    moving = turned.clone()
    for _ in range(_STEPS):
        angle_cosines = (cosines @ mean.unsqueeze(-1)).squeeze(-1).clamp(-1.0, 1.0)
        angles = angle_cosines.acos()
        turned &= (angles < math.pi - _CANCELLED).all(-1)
        sines = angles.sin()
        stretch = torch.where(sines > _PARALLEL, angles / sines.clamp_min(_PARALLEL), 1.0)
        # Logarithms at the mean, averaged: sum_n w_n (u_n - cos_n mean) angle_n / sin_n.
        turn = share * stretch
        tangent = turn - (turn * angle_cosines).sum(-1, keepdim=True) * mean
        size = _length(tangent, cosines)
        # Of vectors that depend on each other the weights of a zero tangent are not zero.
        floor = (_ROUNDED * tangent.abs().sum(-1)).clamp_min(close)
        moving &= turned & (size.squeeze(-1) > floor)
        if not bool(moving.any()):
            break
        moved = size.cos() * mean + torch.sinc(size / math.pi) * tangent
        moved = moved / _length(moved, cosines).clamp_min(_CANCELLED)
        large = moving & (moved.abs().sum(-1) > _LARGE)
        if bool(large.any()):  # the same point has smaller weights
            part = cosines[large]
            least = torch.linalg.pinv(part, rtol=1e-12, hermitian=True) @ part
            moved[large] = (least @ moved[large].unsqueeze(-1)).squeeze(-1)
        mean = torch.where(moving.unsqueeze(-1), moved, mean)
    if norms == "own":
        mean, known = _in_proportion(mean, share, cosines)
        turned &= known
    if norms == "mean":
        mean = mean * (lengths @ share).unsqueeze(-1) / lengths
    turned &= torch.isfinite(mean).all(-1)
    mean = torch.where(turned.unsqueeze(-1), mean, share)
    result[..., used] = mean
    return result


def _in_proportion(mean: Tensor, share: Tensor, cosines: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean's own weights, where vectors depend on each other; and where there are any.

    At the mean ``sum_n w_n (u_n - cos_n mean) angle_n / sin_n = 0``, which says what they are; of
    vectors that are independent no others exist, and they stay as they were found.
    """
    angle_cosines = (cosines @ mean.unsqueeze(-1)).squeeze(-1).clamp(-1.0, 1.0)
    angles = angle_cosines.acos()
    sines = angles.sin()
    turn = share * torch.where(sines > _PARALLEL, angles / sines.clamp_min(_PARALLEL), 1.0)
    total = (turn * angle_cosines).sum(-1, keepdim=True)
    own = turn / total.clamp_min(_CANCELLED)
    other = (own - mean).abs().amax(-1) > _OTHER * mean.abs().amax(-1)
    known = ~other | (total.squeeze(-1) > _NEAR * turn.sum(-1))
    return torch.where(other.unsqueeze(-1), own, mean), known


def _length(weights: Tensor, cosines: Tensor) -> Tensor:
    """Return the lengths ``... x 1`` of combinations of unit vectors."""
    square = weights.unsqueeze(-2) @ cosines @ weights.unsqueeze(-1)
    return square.squeeze(-1).clamp_min(0).sqrt()


def products(deltas: Deltas) -> Tensor:
    """Return the inner products of base and task vectors by tensor, ``S x (1 + N) x (1 + N)``.

    Summed in float64 piece by piece, in one pass.
    """
    slots, rows = deltas.layout.slots, 1 + len(deltas.experts)
    result = torch.zeros(len(slots), rows, rows, dtype=torch.float64)

    def measure(slot: int, _: None) -> None:
        for start in range(0, slots[slot].numel, _PIECE):
            part = deltas.read(slot, start, min(start + _PIECE, slots[slot].numel)).double()
            result[slot] += (part @ part.t()).cpu()

    order = sorted(range(len(slots)), key=lambda i: -slots[i].numel)
    parallel_for(measure, order, lambda: None, threads=deltas.threads)
    return result
