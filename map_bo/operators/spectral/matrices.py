"""What spectral operators share: which tensors are matrices, and merges that are linear once ready.

An operator of `ReadyOperator` turns the task vectors of a matrix into one ready matrix for each
expert. A candidate is then the base and a weighted sum of ready matrices, so it costs what task
arithmetic costs, and its derivatives are known.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.adapters.low_rank import AdaptedTensor, LowRank, stack
from map_bo.merging.align.layout import FlatLayout, Slot
from map_bo.merging.vectors.blocks import Blocks
from map_bo.merging.vectors.kernel import Kernel, KernelMerge, SpanKernel
from map_bo.merging.vectors.linear_merge import LinearMerge, segments
from map_bo.merging.vectors.operator import Deltas, HasFactors
from map_bo.merging.vectors.parallel import parallel_for
from map_bo.merging.vectors.row_filling import Extras, Put
from map_bo.merging.vectors.rows_cache import RowsCache
from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.operators.searchable import SearchableOperator, one_of
from map_bo.operators.spectral.singular import Change
from map_bo.plain import to_plain

__all__ = [
    "OTHERS",
    "ReadyOperator",
    "SpectralOperator",
    "changes_of",
    "is_matrix",
    "matrices_of",
    "require_pattern",
]

OTHERS = ("mean", "sum")
_FORMAT = 1  # to be raised whenever the same task vectors are made ready in another way


@dataclass(frozen=True, kw_only=True)
class SpectralOperator(SearchableOperator):
    """Settings that the operators on singular vectors have.

    Attributes:
        skip: Regular expression that is searched for in names of tensors: matrices that are merged
            as what is no matrix. For language models ``"embed|lm_head"`` is usual. None skips none.
        others: What becomes of all else (biases, norms, convolutions, skipped matrices):
            ``"mean"``: ``theta_0 + (1 / N) sum_n c_n v_n``, as in the papers, whose coefficients
            are one common factor; ``"sum"``: task arithmetic, ``theta_0 + sum_n c_n v_n``.
        blocks: See `SearchableOperator`.
        search: See `SearchableOperator`.
    """

    skip: str | None = None
    others: str = "mean"

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings that are not possible; see `SearchableOperator`."""
        one_of("others", settings["others"], OTHERS)
        require_pattern("skip", settings["skip"])

    def share_of_others(self, experts: int) -> float:
        """Return the factor of the task vectors of all else."""
        return 1.0 / experts if self.others == "mean" else 1.0


def require_pattern(name: str, value: object) -> None:
    """Refuse a setting that is neither None nor a regular expression.

    Raises:
        MergeError: Naming the setting.
    """
    hint = "give one that is searched for in names of tensors, such as embed|lm_head"
    if value is None:
        return
    if not isinstance(value, str):
        raise MergeError(f"{name} must be a regular expression, got {value!r}", hint=hint)
    try:
        re.compile(value)
    except re.error as error:
        message = f"{name} is not a regular expression: {value!r}: {error}"
        raise MergeError(message, hint=hint) from error


def is_matrix(slot: Slot, skip: str | None = None) -> bool:
    """Return whether a tensor is a matrix, and its name does not have the pattern ``skip``."""
    named = skip is not None and re.search(skip, slot.name) is not None
    return len(slot.shape) == 2 and slot.numel > 0 and not named


def matrices_of(layout: FlatLayout, skip: str | None = None) -> frozenset[int]:
    """Return the indices of the tensors that `is_matrix` tells."""
    return frozenset(i for i, slot in enumerate(layout.slots) if is_matrix(slot, skip))


def changes_of(deltas: Deltas, index: int, rows: Tensor | None = None) -> list[Change]:
    """Return the ``N`` changes of a matrix; of adapters as factors, where they can be.

    Args:
        deltas: The task vectors.
        index: Index of the tensor.
        rows: ``(1 + N) x numel``, where they are read already.
    """
    slot = deltas.layout.slots[index]
    factors: Mapping[int, LowRank] = deltas.factors(index) if isinstance(deltas, HasFactors) else {}
    if len(factors) < len(deltas.experts) and rows is None:
        rows = deltas.read(index, 0, slot.numel)
    found: list[Change] = []
    for n in range(len(deltas.experts)):
        if n in factors:
            found.append(factors[n])
        else:
            assert rows is not None
            found.append(rows[1 + n].view(slot.shape))
    return found


@dataclass(frozen=True, kw_only=True)
class ReadyOperator(SpectralOperator):
    """An operator that is linear in the coefficients once the task vectors are made ready.

    Ready matrices are kept where the task vectors are: in memory as rows (those of adapters as
    factors), or in a file beside mapped rows, made once and shared by processes; in float32,
    whatever the storage. Where task vectors stay on disk, or memory is short, they are made anew
    for each candidate, matrix by matrix.
    """

    @abstractmethod
    def ready(self, changes: Sequence[Change]) -> list[LowRank]:
        """Return the ready matrices (float64) for the ``N`` changes of a matrix."""

    def prepares_derivatives(self) -> bool:
        """Return True; see `PreparesDerivatives`."""
        return True

    def prepare_pieces(self, deltas: Deltas) -> KernelMerge:
        """Make the task vectors ready, once; see `SearchableOperator`."""
        blocks = Blocks(self.blocks)
        table = blocks.table(deltas.layout)
        if isinstance(deltas, TaskVectors) and (deltas.resident or deltas.mapped is not None):
            vectors = _make_ready(self, deltas)
            linear = LinearMerge(vectors, segments(blocks, deltas.layout), len(blocks))
            return _ReadyMerge(vectors, linear, table, len(blocks))
        return KernelMerge(deltas, self.kernel(deltas), table, len(blocks), signed=self.signed)

    def kernel(self, deltas: Deltas) -> Kernel:
        """Return a kernel that makes whole matrices ready for each candidate."""
        return _Anew(self, deltas)


class _ReadyMerge(KernelMerge):
    """A weighted sum of ready rows, with the derivatives by its coefficients."""

    def __init__(
        self, vectors: TaskVectors, linear: LinearMerge, blocks: tuple[int, ...], count: int
    ) -> None:
        super().__init__(vectors, _Sum(), blocks, count)
        self._linear = linear
        self._has_factors = vectors.dense is not None

    def write(self, c: Tensor, out: Tensor) -> None:
        """Write the merged numbers; adapters are added by their factors, as in `LinearMerge`."""
        if self._has_factors:
            self._linear.write(c, out)
        else:
            super().write(c, out)

    def directional(self, gradient: Tensor) -> Tensor:
        """Return derivatives by the coefficients; see `HasDerivatives`."""
        return self._linear.directional(gradient)


class _Sum(SpanKernel):
    def weights(self, slot: int, c: Tensor) -> Tensor:
        return torch.cat([c.new_ones(1), c])


@dataclass(frozen=True, eq=False)
class _Anew(Kernel):
    operator: ReadyOperator
    deltas: Deltas

    def whole(self, slot: int) -> bool:
        return is_matrix(self.deltas.layout.slots[slot], self.operator.skip)

    def room(self, experts: int) -> int:
        # In float64: the vectors of all experts on both sides, their orthogonal factors, and of one
        # matrix itself, its products and its decomposition.
        return 128 + 48 * experts

    def piece(self, rows: Tensor, slot: int, start: int, c: Tensor) -> Tensor:
        if not self.whole(slot):
            share = self.operator.share_of_others(len(c))
            return rows.t() @ torch.cat([c.new_ones(1), share * c]).to(rows)
        ready = self.operator.ready(changes_of(self.deltas, slot, rows))
        both = zip(ready, c.tolist(), strict=True)
        change = stack([replace(part, scale=part.scale * weight) for part, weight in both])
        return rows[0] + change.dense().flatten().to(rows)


def _make_ready(operator: ReadyOperator, vectors: TaskVectors) -> TaskVectors:
    """Return ready task vectors, kept where the given ones are."""
    shape = vectors.rows.shape
    if vectors.mapped is None:
        rows = torch.zeros(shape, device=vectors.device)

        def put(row: int, start: int, piece: Tensor) -> None:
            rows[row, start : start + len(piece)].copy_(piece)

        return replace(vectors, rows=rows, adapted=_fill(operator, vectors, put))
    told = to_plain(replace(operator, blocks=None, search=()))
    about = json.dumps([_FORMAT, vectors.mapped.key, told], sort_keys=True)
    key = hashlib.sha256(about.encode()).hexdigest()
    cache = RowsCache(vectors.mapped.entry.parent)
    mapped, extras = cache.rows(
        key,
        (shape[0], shape[1]),
        torch.float32,
        lambda put: Extras(adapted=_fill(operator, vectors, put)),
    )
    return replace(vectors, rows=mapped.rows, adapted=extras.adapted, mapped=mapped)


def _fill(operator: ReadyOperator, vectors: TaskVectors, put: Put) -> dict[int, AdaptedTensor]:
    """Put base and ready rows of the experts that have one, and return what adapters change."""
    matrices = matrices_of(vectors.layout, operator.skip)
    share = operator.share_of_others(len(vectors.experts))
    row_of = {expert: 1 + row for row, expert in enumerate(vectors.dense_experts)}
    adapted: dict[int, AdaptedTensor] = {}

    def work(index: int, _: None) -> None:
        slot = vectors.layout.slots[index]
        own = vectors.rows[:, slot.offset : slot.stop]
        put(0, slot.offset, own[0].float())
        if index not in matrices:
            for row in row_of.values():
                put(row, slot.offset, share * own[row].float())
            if index in vectors.adapted:
                adapted[index] = _scaled(vectors.adapted[index], share)
            return
        ready = operator.ready(changes_of(vectors, index))
        for expert, row in row_of.items():
            put(row, slot.offset, ready[expert].dense().flatten().float())
        factors = {n: part for n, part in enumerate(ready) if n not in row_of and part.rank}
        if factors:
            adapted[index] = AdaptedTensor.of(
                factors, {}, slot.shape, dtype=torch.float32, device=vectors.device
            )

    # The largest first: no thread is left with one of them in the end.
    order = sorted(range(len(vectors.layout.slots)), key=lambda i: -vectors.layout.slots[i].numel)
    parallel_for(work, order, lambda: None, threads=vectors.threads)
    return dict(sorted(adapted.items()))


def _scaled(part: AdaptedTensor, factor: float) -> AdaptedTensor:
    values = {n: factor * value.float() for n, value in part.values.items()}
    return replace(part, B=factor * part.B, values=values)
