"""Model Stock: how far to go towards the mean of the experts, from the angle between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from map_bo.merging.vectors.kernel import Kernel, SpanKernel
from map_bo.merging.vectors.operator import Deltas
from map_bo.merging.vectors.parallel import arena
from map_bo.operators.averages import products
from map_bo.operators.searchable import SearchableOperator, one_of
from map_bo.operators.spherical import line_products, line_width

__all__ = ["ModelStock", "mean_cosine", "stock_ratio"]

EACH = ("tensor", "row")


@dataclass(frozen=True, kw_only=True)
class ModelStock(SearchableOperator):
    r"""The point between base and experts that is closest to the centre of fine-tuned weights.

    Jang, Yun and Han, *Model Stock: All we need is just a few fine-tuned models*, arXiv
    2403.19522. Fine-tuned weights lie on a thin shell around a centre, at right angles to each
    other as seen from it. Of ``N`` experts at a mean angle ``theta`` between their task vectors the
    point of the line from base to average that is closest to the centre lies at the fraction
    ``t = N cos(theta) / (1 + (N - 1) cos(theta))``, tensor by tensor.

    The paper has no coefficients. Here they are shares: with ``s = sum_n c_n`` and
    ``a_n = c_n / s`` the experts' point is ``sum_n a_n theta_n``, and the same geometry gives the
    closest point at
    ``t = cos(theta) / (q + (1 - q) cos(theta))`` with ``q = sum_n a_n^2``; the model is
    ``theta_0 + t sum_n c_n v_n``. Coefficients of ``1 / N`` each are the paper's; the sum ``s``
    goes a part of the way, or beyond. What is searched is thus how the experts share, while ``t``
    follows from the angles. The angle is that of all experts, whatever their coefficients.

    Attributes:
        each: What has an angle of its own: each ``"tensor"`` (the paper's layers) or each
            ``"row"`` (mergekit's ``filter_wise``).
    """

    name: ClassVar[str] = "model_stock"
    signed: ClassVar[bool] = False

    each: str = "tensor"

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings that are not possible; see `SearchableOperator`."""
        one_of("each", settings["each"], EACH)

    def kernel(self, deltas: Deltas) -> Kernel:
        """Measure the angles: one pass over all tensors."""
        if self.each == "tensor":
            return _Stock(mean_cosine(products(deltas)[:, 1:, 1:]))
        cosines = [mean_cosine(grams[:, 1:, 1:]) for grams in line_products(deltas, "row")]
        widths = [line_width(slot.shape, "row") for slot in deltas.layout.slots]
        return _StockRows(cosines, widths)


class _Stock(SpanKernel):
    def __init__(self, cosines: Tensor) -> None:
        self._cosines = cosines

    def weights(self, slot: int, c: Tensor) -> Tensor:
        return torch.cat([c.new_ones(1), stock_ratio(self._cosines[slot], c) * c])


class _StockRows(Kernel):
    def __init__(self, cosines: Sequence[Tensor], widths: Sequence[int]) -> None:
        self._cosines, self._widths = cosines, widths

    def unit(self, slot: int) -> int:
        return self._widths[slot]

    def overhead(self, threads: int) -> int:
        return sum(each.nbytes for each in self._cosines)

    def piece(self, rows: Tensor, slot: int, start: int, c: Tensor) -> Tensor:
        width, size = self._widths[slot], rows.shape[1]
        cosines = self._cosines[slot][start // width : (start + size) // width]
        ratios = stock_ratio(cosines, c).to(rows)
        out = arena.empty(size, device=rows.device)
        torch.mv(rows[1:].t(), c.to(rows), out=out)
        out.view(-1, width).mul_(ratios[:, None])
        return out.add_(rows[0])


def mean_cosine(grams: Tensor) -> Tensor:
    """Return the mean cosine of the angles between all pairs of ``N`` vectors.

    Args:
        grams: ``... x N x N`` inner products, float64.

    Returns:
        ``...`` numbers from 0 to 1. The angle to a zero vector counts as right, and a mean angle
        above a right one as right: then the experts have no centre apart from the base. Of one
        vector it is 1.
    """
    count = grams.shape[-1]
    if count == 1:
        return torch.ones(grams.shape[:-2], dtype=grams.dtype)
    lengths = grams.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    cosines = grams / (lengths.unsqueeze(-1) * lengths.unsqueeze(-2))
    cosines = cosines.nan_to_num(0.0, 0.0, 0.0).clamp(-1.0, 1.0)
    upper = torch.ones(count, count, dtype=torch.bool).triu(1)
    return cosines[..., upper].mean(-1).clamp_min(0.0)


def stock_ratio(cosine: Tensor, c: Tensor) -> Tensor:
    """Return how far to go towards the experts' weighted mean; see `ModelStock`.

    Args:
        cosine: Any shape, from 0 to 1.
        c: ``N`` coefficients from 0, not all 0.
    """
    even = (c.square().sum() / c.sum().square()).to(cosine)
    return cosine / (even + (1 - even) * cosine)
