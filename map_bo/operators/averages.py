"""Averages of the experts themselves: weighted, and on the sphere.

Both give, for each tensor, a combination of base and task vectors whose weights come from the
coefficients and, on the sphere, from the angles between the tensors. So a candidate costs what a
linear merge costs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from map_bo.merging.chunked import Kernel, SpanKernel
from map_bo.merging.deltas import Deltas
from map_bo.merging.workers import spread
from map_bo.operators.searchable import SearchableOperator, one_of

__all__ = ["Slerp", "WeightedAverage", "products", "spherical_mean"]

_PIECE = 1 << 18
_STEPS, _CLOSE = 100, 1e-12
_PARALLEL = 1e-8  # the sine of an angle below which the chord is as good as the arc


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
            model); ``"weights"``: the experts' weights themselves (its ``slerp``).
        norms: ``"mean"``: the result has the weighted mean of the norms (mergekit's
            ``multislerp`` and ``karcher``); ``"own"``: each vector keeps its own, as where the
            formula of SLERP is applied to vectors of different norms (its ``slerp``).
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
        return _Sphere(products(deltas), self.of, self.norms)


class _Sphere(SpanKernel):
    def __init__(self, grams: Tensor, of: str, norms: str) -> None:
        self._of, self._norms = of, norms
        if of == "weights":
            # theta_n = theta_0 + v_n, from the products of theta_0 and the v_n.
            inner = grams[:, 1:, 1:] + grams[:, :1, 1:] + grams[:, 1:, :1] + grams[:, :1, :1]
        else:
            inner = grams[:, 1:, 1:]
        self._grams = inner
        self._found: dict[int, tuple[list[float], Tensor]] = {}

    def weights(self, slot: int, c: Tensor) -> Tensor:
        # Asked for each piece of a tensor, and the same for all of them.
        asked = c.tolist()
        before, found = self._found.get(slot, (None, c))
        if before != asked:
            found = self._weights(slot, c)
            self._found[slot] = asked, found
        return found

    def _weights(self, slot: int, c: Tensor) -> Tensor:
        total = c.sum()
        mean = total * spherical_mean(self._grams[slot], c / total, self._norms)
        # theta_0 + s (sum_n a_n theta_n - theta_0), where the a_n need not sum to 1.
        base = 1 - total + mean.sum() if self._of == "weights" else total.new_ones(())
        return torch.cat([base.view(1), mean])


def spherical_mean(gram: Tensor, w: Tensor, norms: str = "mean") -> Tensor:
    """Return the weights of ``N`` vectors whose combination is their mean on the sphere.

    Args:
        gram: ``N x N`` inner products of the vectors.
        w: ``N`` weights, not negative, that sum to 1.
        norms: See `Slerp`.

    Returns:
        ``N`` numbers. Where two vectors with weight are opposite, or one is zero, there is no
        direction to turn into, and it is ``w`` itself: the average.
    """
    lengths = gram.diagonal().clamp_min(0).sqrt()
    used = w > 0
    if int(used.sum()) == 1 or bool((lengths[used] == 0).any()):
        return w.clone()
    cosines = (gram / torch.outer(lengths, lengths))[used][:, used].clamp(-1.0, 1.0)
    share = w[used]
    mean = share / _length(share, cosines)
    if not bool(torch.isfinite(mean).all()):
        return w.clone()
    for _ in range(_STEPS):
        angle_cosines = (cosines @ mean).clamp(-1.0, 1.0)
        angles = angle_cosines.acos()
        sines = angles.sin()
        if bool((angles > math.pi - 1e-6).any()):
            return w.clone()
        stretch = torch.where(sines > _PARALLEL, angles / sines.clamp_min(_PARALLEL), 1.0)
        # Logarithms at the mean, averaged: sum_n w_n (u_n - cos_n mean) angle_n / sin_n.
        turn = share * stretch
        tangent = turn - (turn @ angle_cosines) * mean
        size = _length(tangent, cosines)
        if float(size) < _CLOSE:
            break
        mean = size.cos() * mean + (size.sin() / size) * tangent
        mean = mean / _length(mean, cosines)
    result = torch.zeros_like(w)
    if norms == "own":
        result[used] = mean
        return result
    result[used] = mean * (share @ lengths[used]) / lengths[used]
    return result


def _length(weights: Tensor, cosines: Tensor) -> Tensor:
    return (weights @ cosines @ weights).clamp_min(0).sqrt()


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
    spread(measure, order, lambda: None, threads=deltas.threads)
    return result
