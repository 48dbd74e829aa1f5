"""RegMean: linear layers are merged so that their outputs change least on the experts' inputs."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.blocks import Blocks
from map_bo.merging.checkpoint import Checkpoint
from map_bo.merging.chunked import ChunkedMerge, Kernel
from map_bo.merging.deltas import Deltas
from map_bo.merging.layout import Slot
from map_bo.operators import known_statistics
from map_bo.operators.known_statistics import (
    loaded,
    matched,
    refuse_negative,
    space_of,
    statistics_by_expert,
)
from map_bo.operators.statistics import Statistics, StatisticsSource
from map_bo.space import CoefficientSpace

__all__ = ["RegMean", "regression_mean", "scaled_products"]


@dataclass(frozen=True, eq=False)
class RegMean:
    r"""Linear layers by regression, everything else by the weighted average.

    Jin et al., *Dataless Knowledge Fusion by Merging Weights of Language Models*, arXiv 2212.09849:
    ``W = (sum_n c_n G_n)^-1 sum_n c_n G_n W_n`` (``W`` as ``inputs x outputs``) with the inner
    products ``G_n = X_n^T X_n`` of the layer's inputs on expert ``n``'s data. It minimises
    ``sum_n c_n |X_n W - X_n W_n|^2``. For coefficients of any sum ``s`` it is
    ``theta_0 + s ((sum_n c_n G_n)^-1 sum_n c_n G_n v_n)``, the same where ``s`` is 1: zero
    coefficients give the base, and one coefficient of 1 gives that expert.

    The work is in float64, as the inverse loses digits. ``G_n v_n`` is kept where the task vectors
    are resident (8 bytes a number of every linear layer and expert), so that a candidate is a
    weighted sum and one Cholesky solve a layer; where they are streamed it is computed anew.

    Attributes:
        statistics: Expert -> what `grams` returned for it, or the file that it was saved in. May
            be left empty for a problem that fills it in (the digits zoo does).
        alpha: What the products off the diagonal are multiplied by, from 0 (the diagonal alone) to
            1 (plain regression). The authors use 0.9 for most models, and 0.1 for T5.
        ridge: ``ridge`` times the layer's mean diagonal, over experts, is added to every ``G_n`` on
            both sides. So it pulls to the weighted average, and only in directions that no input
            has; it is always added, because a term that comes and goes with the coefficients
            would make the merge jump.
        blocks: Block name -> pattern of tensor names, as of `TaskArithmetic`.

    Raises:
        MergeError: When ``alpha`` is not from 0 to 1, or ``ridge`` negative or not finite, or on
            blocks that cannot be.
    """

    statistics: Mapping[str, StatisticsSource] = field(default_factory=dict)
    alpha: float = 0.9
    ridge: float = 1e-6
    blocks: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "statistics", dict(self.statistics or {}))
        object.__setattr__(self, "blocks", Blocks(self.blocks).patterns)
        if not 0 <= self.alpha <= 1:
            raise MergeError(f"alpha is {self.alpha}", hint="give a number from 0 to 1")
        if not (math.isfinite(self.ridge) and self.ridge >= 0):
            raise MergeError(f"ridge is {self.ridge}", hint="give a small share, such as 1e-6")

    @property
    def statistics_kind(self) -> str:
        """``"grams"``."""
        return "grams"

    def with_statistics(self, statistics: Mapping[str, StatisticsSource]) -> RegMean:
        """Return the same operator with these statistics."""
        return replace(self, statistics=statistics)

    def check_experts(self, experts: Mapping[str, Checkpoint]) -> None:
        """Check that the statistics belong to these weights; see `NeedsStatistics`."""
        known_statistics.check_experts(self.statistics, experts, "grams")

    def space(self, experts: tuple[str, ...], *, lower: float, upper: float) -> CoefficientSpace:
        """Return a box with one coefficient for each expert, or each expert and block.

        Raises:
            MergeError: When an expert has no statistics, or ``lower`` is negative.
        """
        names = Blocks(self.blocks).names
        return space_of("RegMean", self.statistics, experts, names, lower=lower, upper=upper)

    def prepare(self, deltas: Deltas) -> ChunkedMerge:
        """Match the products to the layers, and multiply them with the task vectors.

        Raises:
            MergeError: When they do not fit the model.
        """
        blocks = Blocks(self.blocks)
        kernel = _RegressionKernel(self, deltas)
        return ChunkedMerge(deltas, kernel, blocks.table(deltas.layout), len(blocks))

    def describe(self) -> dict[str, Any]:
        """Return name, settings and what the statistics are, as plain data."""
        return {
            "name": "regmean",
            "alpha": self.alpha,
            "ridge": self.ridge,
            "blocks": None if self.blocks is None else dict(self.blocks),
            "statistics": known_statistics.describe(self.statistics, "grams"),
        }


def scaled_products(grams: Tensor, alpha: float, ridge: float) -> Tensor:
    """Return the products ``G_n`` (``N x d x d``) with the off-diagonal scaled and a ridge added.

    Args:
        grams: ``N x d x d``.
        alpha: What is off the diagonal is multiplied by it.
        ridge: Share of the mean diagonal of all experts that is added to each diagonal.
    """
    result = grams * alpha
    diagonal = grams.diagonal(dim1=-2, dim2=-1)
    extra = ridge * diagonal.double().mean()
    result.diagonal(dim1=-2, dim2=-1).copy_(diagonal + extra.to(diagonal))
    return result


def regression_mean(base: Tensor, deltas: Tensor, products: Tensor, c: Tensor) -> Tensor:
    """Return the RegMean of a linear layer, ``outputs x inputs``; see `RegMean`.

    Args:
        base: ``outputs x inputs`` weights of the base.
        deltas: ``N x outputs x inputs`` task vectors.
        products: ``N x inputs x inputs`` from `scaled_products`.
        c: ``N`` coefficients in float64, not negative.
    """
    total = float(c.sum())
    if not total:
        return base.clone()
    factor = _factor(products, c)
    if factor is None:
        change = torch.einsum("n,noi->oi", c / total, deltas.double())
    else:
        right = torch.einsum("n,noi,nij->oj", c, deltas.double(), products.double())
        change = _solve(factor, right)
    return (base.double() + total * change).to(base.dtype)


def _factor(products: Tensor, c: Tensor) -> Tensor | None:
    """Return the Cholesky factor of ``sum_n c_n G_n``; None where all of it is zero."""
    left = torch.zeros(products.shape[1:], dtype=torch.float64, device=products.device)
    for weight, product in zip(c.tolist(), products, strict=True):
        left.add_(product, alpha=weight)
    if not bool(left.any()):
        return None
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(left)
    if int(failed):
        raise MergeError(
            "the inner products of a layer's inputs cannot be inverted",
            hint="some inputs depend on each other: raise ridge, or lower alpha",
        )
    return factor


def _solve(factor: Tensor, right: Tensor) -> Tensor:
    """Return ``right A^-1`` (``o x d``) for the factor of ``A``."""
    found: Tensor = torch.cholesky_solve(right.mT, factor).mT
    return found


@dataclass(frozen=True)
class _Layer:
    """A linear layer: its products, and its task vectors times them where they are kept."""

    products: Tensor  # N x d x d
    transposed: bool
    right: Tensor | None  # N x numel in float64, in the order of the tensor's elements

    @property
    def inputs(self) -> int:
        return self.products.shape[1]

    def matrix(self, flat: Tensor) -> Tensor:
        """Return elements (``... x k``) as ``... x outputs x inputs``."""
        if self.transposed:
            return flat.reshape(*flat.shape[:-1], self.inputs, -1).transpose(-1, -2)
        return flat.reshape(*flat.shape[:-1], -1, self.inputs)

    def flat(self, matrix: Tensor) -> Tensor:
        """Return ``... x outputs x inputs`` as elements in the tensor's order."""
        ordered = matrix.transpose(-1, -2) if self.transposed else matrix
        return ordered.reshape(*matrix.shape[:-2], -1)


class _RegressionKernel(Kernel):
    # Factors that pieces of one layer share; threads are at neighbouring layers.
    _KEPT = 8

    def __init__(self, operator: RegMean, deltas: Deltas) -> None:
        known = statistics_by_expert(operator.statistics, deltas.experts, "grams")
        self._layers: dict[int, _Layer] = {}
        self._factors: OrderedDict[tuple[object, ...], Tensor | None] = OrderedDict()
        self._lock = threading.Lock()
        for index, names in matched(deltas.layout, known).items():
            slot = deltas.layout.slots[index]
            _check_shapes(known, names, slot)
            found = [loaded(known[e], e, name) for e, name in zip(known, names, strict=True)]
            grams = torch.stack(found).to(deltas.device)
            products = scaled_products(grams, operator.alpha, operator.ridge)
            layer = _Layer(products, _transposed(known, names, slot), None)
            if deltas.in_place:
                v = layer.matrix(deltas.read(index, 0, slot.numel)[1:])
                layer = replace(layer, right=layer.flat(v.double() @ products.double()))
            self._layers[index] = layer

    def whole(self, slot: int) -> bool:
        layer = self._layers.get(slot)
        return layer is not None and layer.transposed

    def unit(self, slot: int) -> int:
        layer = self._layers.get(slot)
        return 1 if layer is None else layer.inputs

    def piece(self, rows: Tensor, slot: int, start: int, c: Tensor) -> Tensor:
        refuse_negative(c)
        layer = self._layers.get(slot)
        factor = None if layer is None else self._factor(slot, layer, c)
        if layer is None or factor is None:
            return rows.t() @ torch.cat([c.new_ones(1), c]).to(rows)
        if layer.right is not None:
            right = layer.matrix(c.to(layer.right) @ layer.right[:, start : start + rows.shape[1]])
        else:
            right = torch.zeros_like(layer.matrix(rows[0]), dtype=torch.float64)
            for weight, v, product in zip(c.tolist(), rows[1:], layer.products, strict=True):
                right.add_(layer.matrix(v.double()) @ product.double(), alpha=weight)
        change = _solve(factor, right)
        return rows[0] + float(c.sum()) * layer.flat(change).float()

    def _factor(self, slot: int, layer: _Layer, c: Tensor) -> Tensor | None:
        key = (slot, *c.tolist())
        with self._lock:
            if key in self._factors:
                return self._factors[key]
        factor = _factor(layer.products, c)
        with self._lock:
            self._factors[key] = factor
            while len(self._factors) > self._KEPT:
                self._factors.popitem(last=False)
        return factor


def _check_shapes(known: Mapping[str, Statistics], names: list[str], slot: Slot) -> None:
    sizes = _inputs(slot)
    for (expert, statistics), name in zip(known.items(), names, strict=True):
        shape = statistics.tensors.shape(name)
        if len(shape) != 2 or shape[0] != shape[1] or shape[0] not in sizes:
            raise MergeError(
                f"the inner products of {expert!r} for {name!r} are {list(shape)}, and the weight "
                f"{list(slot.shape)}",
                hint="they are those of another model; compute them again",
            )
    if len({k.tensors.shape(n) for k, n in zip(known.values(), names, strict=True)}) > 1:
        raise MergeError(
            f"the inner products for {slot.name!r} differ in shape between experts",
            hint="compute them for all experts in the same way",
        )


def _inputs(slot: Slot) -> tuple[int, ...]:
    """Return what the number of inputs of this weight may be: as a linear layer, as ``Conv1D``."""
    if len(slot.shape) < 2:
        return ()
    inputs = math.prod(slot.shape[1:])
    return (inputs, slot.shape[0]) if len(slot.shape) == 2 else (inputs,)


def _transposed(known: Mapping[str, Statistics], names: list[str], slot: Slot) -> bool:
    (first, *_), name = known.values(), names[0]
    size = first.tensors.shape(name)[0]
    inputs, *_ = _inputs(slot)
    return size != inputs or name in first.settings.get("transposed", ())
