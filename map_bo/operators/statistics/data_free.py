"""RegMean without data: the task vectors themselves stand for the inputs of the layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.align.layout import Slot
from map_bo.merging.vectors.kernel import Kernel
from map_bo.merging.vectors.operator import Deltas
from map_bo.merging.vectors.parallel import parallel_for
from map_bo.operators.searchable import SearchableOperator, share
from map_bo.operators.spectral.matrices import require_pattern
from map_bo.operators.spectral.shared_results import SharedResults
from map_bo.operators.statistics.regmean import Layer, RegressionKernel, check_ridge

__all__ = ["EMBEDDINGS", "DataFreeRegMean", "products_of_changes"]

EMBEDDINGS = r"embed|\bwte\b|\bwpe\b|\bshared\.weight|relative_attention_bias"
"""Names of tables that are looked up: their rows are no weights of inputs."""

_PIECE = 1 << 18  # numbers of a task vector that are in float64 at once
_ANEW = 2  # layers whose products are made anew, and then kept for a while


@dataclass(frozen=True, kw_only=True)
class DataFreeRegMean(SearchableOperator):
    r"""RegMean whose inner products are those of the task vectors, ``G_n = V_n^T V_n / |V_n|^2``.

    The change of a linear layer is a sum of outer products of gradients and inputs, so that the
    rows of ``V_n`` (``outputs x inputs``) lie where the inputs of expert ``n`` do: Cheng et al.,
    *Whoever Started the Interference Should End It*, arXiv 2503.08099 (WUDI-Merging), and Abdel
    Hameed et al., *Model Merging via Data-Free Covariance Estimation*, arXiv 2604.01329. With the
    products so estimated the merge is that of `RegMean`:
    ``theta_0 + s (sum_n c_n V_n G_n) (sum_n c_n G_n)^-1`` with ``s = sum_n c_n``. For equal
    coefficients that sum to 1 it minimises ``sum_n |(V - V_n) V_n^T|^2 / |V_n|^2``, the objective
    that WUDI-Merging goes down by gradient steps. All else is averaged by the coefficients.

    Attributes:
        alpha: What the products off the diagonal are multiplied by; see `RegMean`.
        ridge: Share of the layer's mean diagonal that is added to each; see `RegMean`. Much larger
            than there: few directions carry a task vector, and in all others the estimate is noise,
            where the ridge leads to the weighted average. The default is ours: on the digits zoo
            smaller values merge worse. Papers stop the descent early, or filter those directions.
        normalise: Whether products are divided by ``|V_n|^2``, so that experts that were trained
            longer do not count more.
        skip: Regular expression that is searched for in names of tensors: matrices that are
            averaged. The default names embeddings; None skips none.
        transposed: Regular expression for weights that are ``inputs x outputs``, which shapes
            cannot tell: for GPT-2 ``"c_attn|c_proj|c_fc"``.
        blocks: See `SearchableOperator`.
        search: The same; ``alpha`` and ``ridge`` can be searched.
    """

    name: ClassVar[str] = "regmean_data_free"
    signed: ClassVar[bool] = False
    searchable: ClassVar[Mapping[str, tuple[float, float]]] = {
        "alpha": (0.0, 1.0),
        "ridge": (0.01, 2.0),
    }

    alpha: float = 1.0
    ridge: float = 1.0
    normalise: bool = True
    skip: str | None = EMBEDDINGS
    transposed: str | None = None

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings that are not possible; see `SearchableOperator`."""
        share("alpha", settings["alpha"])
        check_ridge(settings["ridge"])
        require_pattern("skip", settings["skip"])
        require_pattern("transposed", settings["transposed"])
        if not isinstance(settings["normalise"], bool):
            raise MergeError(
                f"normalise must be true or false, got {settings['normalise']!r}",
                hint="true is the objective of WUDI-Merging",
            )

    def kernel(self, deltas: Deltas) -> Kernel:
        """Multiply the task vectors with themselves, where they are resident; else when needed."""
        sides = {
            index: (_inputs(slot, self._is_transposed(slot)), self._is_transposed(slot))
            for index, slot in enumerate(deltas.layout.slots)
            if self._is_linear(slot)
        }

        def make(index: int) -> Layer:
            grams = products_of_changes(deltas, index, sides[index][1], normalise=self.normalise)
            return Layer.of(grams.float(), self.ridge, transposed=sides[index][1])

        if not deltas.resident:
            anew: SharedResults[Layer] = SharedResults(_ANEW)
            return RegressionKernel(
                sides,
                lambda i: anew.get((i,), lambda: make(i)),
                self.alpha,
                2 * _ANEW * len(deltas.experts),
            )
        layers: dict[int, Layer] = {}

        def keep(index: int, _: None) -> None:
            numel = deltas.layout.slots[index].numel
            layers[index] = make(index).kept(deltas.read(index, 0, numel)[1:])

        order = sorted(sides, key=lambda i: -deltas.layout.slots[i].numel)
        parallel_for(keep, order, lambda: None, threads=deltas.threads)
        return RegressionKernel(sides, layers.__getitem__, self.alpha)

    def _is_linear(self, slot: Slot) -> bool:
        skipped = self.skip is not None and re.search(self.skip, slot.name) is not None
        return len(slot.shape) in (2, 4) and slot.numel > 0 and not skipped

    def _is_transposed(self, slot: Slot) -> bool:
        named = self.transposed is not None and re.search(self.transposed, slot.name) is not None
        return named and len(slot.shape) == 2


def _inputs(slot: Slot, transposed: bool) -> int:
    """Return how many inputs a layer has: for a convolution, as many as a patch has numbers."""
    return slot.shape[0] if transposed else slot.shape[1:].numel()


def products_of_changes(
    deltas: Deltas, index: int, transposed: bool = False, *, normalise: bool = True
) -> Tensor:
    """Return the products ``V_n^T V_n`` of the task vectors of a layer, ``N x d x d`` in float64.

    Args:
        deltas: The task vectors.
        index: Index of the layer's tensor.
        transposed: Whether its weight is ``inputs x outputs``.
        normalise: Whether they are divided by ``|V_n|^2``; those that are zero stay.
    """
    slot, experts = deltas.layout.slots[index], len(deltas.experts)
    inputs = _inputs(slot, transposed)
    result = torch.zeros(experts, inputs, inputs, dtype=torch.float64, device=deltas.device)
    step = slot.numel if transposed else inputs * max(1, _PIECE // inputs)
    for start in range(0, slot.numel, step):
        rows = deltas.read(index, start, min(start + step, slot.numel))[1:]
        for product, row in zip(result, rows, strict=True):
            v = row.double().view(inputs, -1).mT if transposed else row.double().view(-1, inputs)
            product.addmm_(v.mT, v)
    if normalise:
        squares = result.diagonal(dim1=1, dim2=2).sum(1)
        result.div_(torch.where(squares > 0, squares, 1.0)[:, None, None])
    return result
