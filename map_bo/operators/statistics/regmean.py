"""RegMean: linear layers are merged so that their outputs change least on the experts' inputs."""

from __future__ import annotations

import copy
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.align.layout import Slot
from map_bo.merging.checkpoints.checkpoint import Checkpoint
from map_bo.merging.vectors.kernel import Kernel
from map_bo.merging.vectors.operator import Deltas
from map_bo.operators.searchable import SearchableOperator, share
from map_bo.operators.statistics import known_statistics
from map_bo.operators.statistics.known_statistics import (
    load_statistic,
    match_statistics,
    refuse_negative,
    require_statistics,
    statistics_by_expert,
)
from map_bo.operators.statistics.statistics import Statistics, StatisticsSource
from map_bo.space import CoefficientSpace

__all__ = [
    "Layer",
    "RegMean",
    "RegMeanPlusPlus",
    "RegressionKernel",
    "check_ridge",
    "scaled_products",
]


@dataclass(frozen=True, eq=False)
class RegMean(SearchableOperator):
    r"""Linear layers by regression, everything else by the weighted average.

    Jin et al., *Dataless Knowledge Fusion by Merging Weights of Language Models*, arXiv 2212.09849:
    ``W = (sum_n c_n G_n)^-1 sum_n c_n G_n W_n`` (``W`` as ``inputs x outputs``) with the inner
    products ``G_n = X_n^T X_n`` of the layer's inputs on expert ``n``'s data. It minimises
    ``sum_n c_n |X_n W - X_n W_n|^2``. For coefficients of any sum ``s`` it is
    ``theta_0 + s ((sum_n c_n G_n)^-1 sum_n c_n G_n v_n)``, the same where ``s`` is 1: zero
    coefficients give the base, and one coefficient of 1 gives that expert.

    The work is in float64, as the inverse loses digits. ``G_n v_n`` is kept where the task vectors
    are resident (8 bytes per number of every linear layer and expert), so that a candidate is a
    weighted sum and one Cholesky solve per layer; where they stay on disk it is computed anew.

    Attributes:
        statistics: Expert -> what `grams` returned for it, or the file that it was saved in. May
            be left empty for a problem that fills it in (the digits zoo does).
        alpha: What the products off the diagonal are multiplied by, from 0 (the diagonal alone) to
            1 (plain regression). The authors use 0.9 for most models, and 0.1 for T5.
        ridge: ``ridge`` times the layer's mean diagonal, over experts, is added to every ``G_n`` on
            both sides. So it pulls to the weighted average, and only in directions that no input
            has; it is always added, because a term that comes and goes with the coefficients
            would make the merge jump.
        blocks: See `SearchableOperator`.
        search: The same; ``alpha`` can be searched.

    Raises:
        MergeError: When ``alpha`` is not from 0 to 1, or ``ridge`` negative or not finite, or on
            blocks that cannot be.
    """

    name: ClassVar[str] = "regmean"
    signed: ClassVar[bool] = False
    searchable: ClassVar[Mapping[str, tuple[float, float]]] = {"alpha": (0.0, 1.0)}

    statistics: Mapping[str, StatisticsSource] = field(default_factory=dict)
    alpha: float = 0.9
    ridge: float = 1e-6

    def __post_init__(self) -> None:
        object.__setattr__(self, "statistics", dict(self.statistics or {}))
        super().__post_init__()

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse an alpha or a ridge that is not a share; see `SearchableOperator.check`."""
        share("alpha", settings["alpha"])
        check_ridge(settings["ridge"])

    @property
    def statistics_kind(self) -> str:
        """``"grams"``."""
        return "grams"

    def with_statistics(self, statistics: Mapping[str, StatisticsSource]) -> RegMean:
        """Return the same operator with these statistics."""
        return replace(self, statistics=statistics)

    def check_experts(self, experts: Mapping[str, Checkpoint]) -> None:
        """Check that the statistics belong to these weights; see `NeedsStatistics`."""
        known_statistics.check_experts(self.statistics, experts, self.statistics_kind)

    def space(self, experts: tuple[str, ...], *, lower: float, upper: float) -> CoefficientSpace:
        """Return a box with one coefficient for each expert, or each expert and block.

        Raises:
            MergeError: When an expert has no statistics, or ``lower`` is negative.
        """
        require_statistics(self.name, self.statistics_kind, self.statistics, experts)
        return super().space(experts, lower=lower, upper=upper)

    def kernel(self, deltas: Deltas) -> Kernel:
        """Match the products to the layers, and multiply them with the task vectors.

        Raises:
            MergeError: When they do not fit the model.
        """
        layers = _layers_of(self, deltas)
        sides = {index: (layer.inputs, layer.transposed) for index, layer in layers.items()}
        return RegressionKernel(sides, layers.__getitem__, self.alpha)

    def describe(self) -> dict[str, Any]:
        """Return plain data in which statistics are told by their content, not by their files."""
        told = known_statistics.describe(self.statistics, self.statistics_kind)
        return known_statistics.with_told(self, told)

    def recipe(self) -> dict[str, Any]:
        """Return the description and the files of the statistics; see `Followable`."""
        told = known_statistics.recipe(self.statistics, self.statistics_kind)
        return known_statistics.with_told(self, told)


@dataclass(frozen=True, eq=False)
class RegMeanPlusPlus(RegMean):
    """RegMean by the inputs that layers have in the merged model.

    Nguyen et al., *RegMean++: Enhancing Effectiveness and Generalization of Regression Mean for
    Model Merging*, arXiv 2508.03121: the inputs ``X_n`` of a block of layers are what the merged
    blocks before it make of expert ``n``'s data, in place of what that expert's own blocks do. The
    formula is that of `RegMean`, and the statistics are those of `merged_grams`, which merges block
    after block. They belong to the coefficients that it merged with; with those this is the
    paper's merge, and with others the same statistics are used.

    Attributes:
        statistics: Expert -> what `merged_grams` returned for it, or the file that it was saved in.
        alpha: See `RegMean`; as `merged_grams` was given.
        ridge: See `RegMean`; as `merged_grams` was given.
        blocks: See `SearchableOperator`.
        search: The same; ``alpha`` can be searched.
    """

    name: ClassVar[str] = "regmean++"

    @property
    def statistics_kind(self) -> str:
        """``"merged_grams"``."""
        return "merged_grams"


def check_ridge(ridge: float) -> None:
    """Refuse a ridge that is negative or not finite.

    Raises:
        MergeError: When it is.
    """
    if not (math.isfinite(ridge) and ridge >= 0):
        raise MergeError(
            f"ridge must be finite and not negative, got {ridge}",
            hint="give a small share, such as 1e-6",
        )


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


def _cholesky(left: Tensor) -> Tensor | None:
    """Return the Cholesky factor of a sum of products (``d x d``); None where it is all zero."""
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


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear layer: its products, and its task vectors times them where they are kept.

    Attributes:
        grams: ``N x d x d`` inner products of the inputs, for each expert.
        extra: What is added to each diagonal.
        mean: Mean of the diagonals of all experts, of which ``extra`` is a share.
        transposed: Whether the weight is ``inputs x outputs``.
        right: ``N x numel`` in float64: the task vectors times the products, in the order of the
            tensor's elements; None where they are computed for each candidate.
    """

    grams: Tensor
    extra: float
    mean: float
    transposed: bool
    right: Tensor | None = None

    @classmethod
    def of(cls, grams: Tensor, ridge: float, *, transposed: bool = False) -> Layer:
        """Return the layer with a share ``ridge`` of its mean diagonal added to each."""
        mean = float(grams.diagonal(dim1=1, dim2=2).mean(dtype=torch.float64))
        return cls(grams, ridge * mean, mean, transposed)

    def with_ridge(self, ridge: float) -> Layer:
        """Return the layer with another share of its mean diagonal added to each."""
        return replace(self, extra=ridge * self.mean)

    def kept(self, deltas: Tensor) -> Layer:
        """Return the layer with the products of its task vectors, ``N x numel``, kept."""
        v = self.matrix(deltas)
        return replace(self, right=self.flat(v.double() @ self.grams.double()))

    @property
    def inputs(self) -> int:
        """How many inputs ``d`` it has."""
        return self.grams.shape[1]

    def left(self, c: Tensor, alpha: float) -> Tensor:
        """Return the weighted sum of the scaled products, in float64."""
        result = torch.zeros_like(self.grams[0], dtype=torch.float64)
        for weight, gram in zip(c.tolist(), self.grams, strict=True):
            result.add_(gram, alpha=weight)
        diagonal = result.diagonal() + float(c.sum()) * self.extra
        result.mul_(alpha).diagonal().copy_(diagonal)
        return result

    def weighted(self, v: Tensor, c: Tensor, alpha: float, start: int) -> Tensor:
        """Return the sum of task vectors times scaled products, ``outputs x inputs``.

        Args:
            v: ``N x k`` task vectors, from the element ``start`` on.
            c: ``N`` coefficients.
            alpha: Factor of what is off the diagonal.
            start: First element.
        """
        if self.right is not None:
            kept = self.right[:, start : start + v.shape[1]]
            result = self.matrix(c.to(kept) @ kept).mul(alpha)
        else:
            result = torch.zeros_like(self.matrix(v[0]), dtype=torch.float64)
            for weight, row, gram in zip(c.tolist(), v, self.grams, strict=True):
                result.addmm_(self.matrix(row.double()), gram.double(), alpha=alpha * weight)
        for weight, row, gram in zip(c.tolist(), v, self.grams, strict=True):
            own = (1 - alpha) * gram.diagonal().double() + self.extra
            result.addcmul_(self.matrix(row).double(), own, value=weight)
        return result

    def matrix(self, flat: Tensor) -> Tensor:
        """Return elements (``... x k``) as ``... x outputs x inputs``."""
        if self.transposed:
            return flat.reshape(*flat.shape[:-1], self.inputs, -1).transpose(-1, -2)
        return flat.reshape(*flat.shape[:-1], -1, self.inputs)

    def flat(self, matrix: Tensor) -> Tensor:
        """Return ``... x outputs x inputs`` as elements in the tensor's order."""
        ordered = matrix.transpose(-1, -2) if self.transposed else matrix
        return ordered.reshape(*matrix.shape[:-2], -1)


class RegressionKernel(Kernel):
    """Merges linear layers by regression, and all else by the weighted sum.

    Args:
        sides: Index of a linear layer's tensor -> its number of inputs, and whether its weight is
            ``inputs x outputs``.
        layer: Returns the layer of an index; asked for each piece.
        alpha: What the products off the diagonal are multiplied by.
        products: How many products of inputs are made anew and in memory at once.
    """

    # Factors that pieces of one layer share; threads are at neighbouring layers.
    _KEPT = 8

    def __init__(
        self,
        sides: Mapping[int, tuple[int, bool]],
        layer: Callable[[int], Layer],
        alpha: float,
        products: int = 0,
    ) -> None:
        self._products = products
        self._sides = dict(sides)
        self._layer = layer
        self._alpha = alpha
        self._ridge: float | None = None  # that of the layers
        self._factors: OrderedDict[tuple[object, ...], Tensor | None] = OrderedDict()
        self._lock = threading.Lock()

    def at(self, settings: Mapping[str, float]) -> Kernel:
        """Return the kernel for another ``alpha`` and ``ridge``; see `Kernel`."""
        if not settings:
            return self
        other = copy.copy(self)
        other._alpha = settings.get("alpha", self._alpha)
        other._ridge = settings.get("ridge", self._ridge)
        return other

    def whole(self, slot: int) -> bool:
        """Return whether the inputs are not along rows; see `Kernel`."""
        return slot in self._sides and self._sides[slot][1]

    def unit(self, slot: int) -> int:
        """Return the number of inputs; see `Kernel`."""
        return self._sides[slot][0] if slot in self._sides else 1

    def overhead(self, threads: int) -> int:
        """Return what factors and products take; see `Kernel`."""
        # The factors that are kept, and for each thread products that it sums, scales or widens.
        widest = max((inputs for inputs, _ in self._sides.values()), default=0)
        return 8 * widest**2 * (self._KEPT + 4 * threads + self._products)

    def piece(self, rows: Tensor, slot: int, start: int, c: Tensor) -> Tensor:
        """Merge a piece; see `Kernel`."""
        refuse_negative(c)
        layer = self._layer(slot) if slot in self._sides else None
        if layer is not None and self._ridge is not None:
            layer = layer.with_ridge(self._ridge)
        factor = None if layer is None else self._factor(slot, layer, c)
        if layer is None or factor is None:
            return rows.t() @ torch.cat([c.new_ones(1), c]).to(rows)
        right = layer.weighted(rows[1:], c, self._alpha, start)
        change = _solve(factor, right)
        return rows[0] + float(c.sum()) * layer.flat(change).float()

    def _factor(self, slot: int, layer: Layer, c: Tensor) -> Tensor | None:
        key = (slot, self._alpha, self._ridge, *c.tolist())
        with self._lock:
            if key in self._factors:
                return self._factors[key]
        factor = _cholesky(layer.left(c, self._alpha))
        with self._lock:
            self._factors[key] = factor
            while len(self._factors) > self._KEPT:
                self._factors.popitem(last=False)
        return factor


def _layers_of(operator: RegMean, deltas: Deltas) -> dict[int, Layer]:
    """Return the layers by the index of their tensors."""
    known = statistics_by_expert(operator.statistics, deltas.experts, operator.statistics_kind)
    found: dict[int, Layer] = {}
    for index, names in match_statistics(deltas.layout, known).items():
        slot = deltas.layout.slots[index]
        _check_shapes(known, names, slot)
        loaded = [load_statistic(known[e], e, name) for e, name in zip(known, names, strict=True)]
        grams = torch.stack(loaded).to(deltas.device)
        layer = Layer.of(grams, operator.ridge, transposed=_is_transposed(known, names, slot))
        if deltas.resident:
            layer = layer.kept(deltas.read(index, 0, slot.numel)[1:])
        found[index] = layer
    return found


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


def _is_transposed(known: Mapping[str, Statistics], names: list[str], slot: Slot) -> bool:
    (first, *_), name = known.values(), names[0]
    size = first.tensors.shape(name)[0]
    inputs, *_ = _inputs(slot)
    return size != inputs or name in first.settings.get("transposed", ())
