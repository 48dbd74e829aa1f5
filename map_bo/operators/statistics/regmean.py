"""RegMean: linear layers are merged so that their outputs change least on the experts' inputs."""

from __future__ import annotations

import copy
import math
import threading
from collections import OrderedDict
from collections.abc import Mapping
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

__all__ = ["RegMean", "scaled_products"]


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
        ridge = settings["ridge"]
        if not (math.isfinite(ridge) and ridge >= 0):
            raise MergeError(
                f"ridge must be finite and not negative, got {ridge}",
                hint="give a small share, such as 1e-6",
            )

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
        require_statistics(self.name, "grams", self.statistics, experts)
        return super().space(experts, lower=lower, upper=upper)

    def kernel(self, deltas: Deltas) -> Kernel:
        """Match the products to the layers, and multiply them with the task vectors.

        Raises:
            MergeError: When they do not fit the model.
        """
        return _RegressionKernel(self, deltas)

    def describe(self) -> dict[str, Any]:
        """Return plain data in which statistics are told by their content, not by their files."""
        told = known_statistics.describe(self.statistics, "grams")
        return known_statistics.with_told(self, told)

    def recipe(self) -> dict[str, Any]:
        """Return the description and the files of the statistics; see `Followable`."""
        told = known_statistics.recipe(self.statistics, "grams")
        return known_statistics.with_told(self, told)


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


@dataclass(frozen=True)
class _Layer:
    """A linear layer: its products, and its task vectors times them where they are kept."""

    grams: Tensor  # N x d x d
    extra: float  # added to each diagonal
    transposed: bool
    right: Tensor | None = None  # N x numel in float64, in the order of the tensor's elements

    @property
    def inputs(self) -> int:
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


class _RegressionKernel(Kernel):
    # Factors that pieces of one layer share; threads are at neighbouring layers.
    _KEPT = 8

    def __init__(self, operator: RegMean, deltas: Deltas) -> None:
        known = statistics_by_expert(operator.statistics, deltas.experts, "grams")
        self._alpha = operator.alpha
        self._layers: dict[int, _Layer] = {}
        self._factors: OrderedDict[tuple[object, ...], Tensor | None] = OrderedDict()
        self._lock = threading.Lock()
        for index, names in match_statistics(deltas.layout, known).items():
            slot = deltas.layout.slots[index]
            _check_shapes(known, names, slot)
            found = [
                load_statistic(known[e], e, name) for e, name in zip(known, names, strict=True)
            ]
            grams = torch.stack(found).to(deltas.device)
            diagonals = grams.diagonal(dim1=1, dim2=2)
            extra = operator.ridge * float(diagonals.mean(dtype=torch.float64))
            layer = _Layer(grams, extra, _is_transposed(known, names, slot))
            if deltas.resident:
                v = layer.matrix(deltas.read(index, 0, slot.numel)[1:])
                layer = replace(layer, right=layer.flat(v.double() @ grams.double()))
            self._layers[index] = layer

    def at(self, settings: Mapping[str, float]) -> Kernel:
        if "alpha" not in settings:
            return self
        other = copy.copy(self)
        other._alpha = settings["alpha"]
        return other

    def whole(self, slot: int) -> bool:
        layer = self._layers.get(slot)
        return layer is not None and layer.transposed

    def unit(self, slot: int) -> int:
        layer = self._layers.get(slot)
        return 1 if layer is None else layer.inputs

    def overhead(self, threads: int) -> int:
        # The factors that are kept, and for each thread products that it sums, scales or widens.
        widest = max((layer.inputs for layer in self._layers.values()), default=0)
        return 8 * widest**2 * (self._KEPT + 4 * threads)

    def piece(self, rows: Tensor, slot: int, start: int, c: Tensor) -> Tensor:
        refuse_negative(c)
        layer = self._layers.get(slot)
        factor = None if layer is None else self._factor(slot, layer, c)
        if layer is None or factor is None:
            return rows.t() @ torch.cat([c.new_ones(1), c]).to(rows)
        right = layer.weighted(rows[1:], c, self._alpha, start)
        change = _solve(factor, right)
        return rows[0] + float(c.sum()) * layer.flat(change).float()

    def _factor(self, slot: int, layer: _Layer, c: Tensor) -> Tensor | None:
        key = (slot, self._alpha, *c.tolist())
        with self._lock:
            if key in self._factors:
                return self._factors[key]
        factor = _cholesky(layer.left(c, self._alpha))
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


def _is_transposed(known: Mapping[str, Statistics], names: list[str], slot: Slot) -> bool:
    (first, *_), name = known.values(), names[0]
    size = first.tensors.shape(name)[0]
    inputs, *_ = _inputs(slot)
    return size != inputs or name in first.settings.get("transposed", ())
