"""What adapters change in one tensor of a resident model, kept as factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from map_bo.merging.low_rank import LowRank, exact_products

__all__ = ["Adapted"]

# Numbers of a product that is made in a wider dtype, or merged apart, at once.
_CHUNK = 1 << 20


@dataclass(frozen=True, eq=False)
class Adapted:
    """The changes of one tensor by adapters, side by side.

    The tensor is seen as a matrix ``rows x columns``. The factors of all adapters are one pair,
    ``B`` of ``rows x R`` and ``A`` of ``R x columns``, so that a linear merge adds them all with
    one product: ``B diag(w) A`` with each expert's weight at its own ranks.

    Attributes:
        B: ``rows x R`` in float32, scales included.
        A: ``R x columns`` in float32.
        owner: ``R``: index of the expert that each rank belongs to, ascending.
        values: Expert -> ``rows * columns``: changes that are not of low rank.
    """

    B: Tensor
    A: Tensor
    owner: Tensor
    values: Mapping[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        changes: Mapping[int, LowRank],
        values: Mapping[int, Tensor],
        shape: Sequence[int],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> Adapted:
        """Lay the factors of several adapters side by side.

        Args:
            changes: Expert -> its change of low rank.
            values: Expert -> its other change, in the tensor's shape; kept in ``dtype``.
            shape: The tensor's shape.
            dtype: Storage of ``values``; factors are float32.
            device: Where all of it is kept.
        """
        rows = shape[0] if shape else 1
        columns = torch.Size(shape).numel() // max(rows, 1)
        pairs = sorted(changes.items())
        left = [(change.scale * change.B).float() for _, change in pairs]
        right = [change.A.float() for _, change in pairs]
        owner = [expert for expert, change in pairs for _ in range(change.rank)]
        return cls(
            torch.cat([torch.empty(rows, 0), *left], dim=1).to(device),
            torch.cat([torch.empty(0, columns), *right]).to(device),
            torch.tensor(owner, dtype=torch.long),
            {n: value.flatten().to(device, dtype) for n, value in values.items()},
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        kept = (self.B, self.A, self.owner, *self.values.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    @property
    def experts(self) -> tuple[int, ...]:
        """The experts that change this tensor, ascending."""
        return tuple(sorted({*self.owner.tolist(), *self.values}))

    def add(self, weights: Tensor, target: Tensor, first: int = 0) -> None:
        """Add the weighted changes to some rows of the tensor.

        Args:
            weights: ``N`` weights of the experts (float64, CPU).
            target: Whole rows of the tensor in float32, flat and contiguous.
            first: Index of the first of them.
        """
        columns = self.A.shape[1]
        stop = first + target.numel() // max(columns, 1)
        scale = weights[self.owner]
        if bool(scale.any()):
            matrix = target.view(stop - first, columns)
            if exact_products(target.device):
                B = self.B[first:stop] * scale.to(self.B)
                matrix.addmm_(B, self.A)
            else:
                A = self.A.double()
                step = max(1, _CHUNK // max(columns, 1))
                for row in range(0, stop - first, step):
                    part = slice(first + row, min(first + row + step, stop))
                    product = (self.B[part].double() * scale.to(A.device)) @ A
                    matrix[row : row + step] += product.float()
        for expert, value in self.values.items():
            weight = float(weights[expert])
            if weight:
                target.add_(value[first * columns : stop * columns], alpha=weight)

    def read(self, expert: int, start: int, stop: int, out: Tensor) -> None:
        """Add the elements ``start`` to ``stop``, row-major, of an expert's change to ``out``."""
        mine = self._span(expert)
        if mine.start < mine.stop:
            out += LowRank(self.B[:, mine], self.A[mine]).piece(start, stop)
        if expert in self.values:
            out += self.values[expert][start:stop]

    def project(self, flat: Tensor, experts: int, *, dense: bool = True) -> Tensor:
        """Return the inner products of a tensor with every expert's change.

        With factors they are ``sum((B^T G) * A)`` over an expert's ranks.

        Args:
            flat: ``rows * columns`` numbers.
            experts: How many experts ``N`` there are.
            dense: Whether to count ``values`` too.

        Returns:
            ``N`` products in float64 on the CPU, 0 for those that leave the tensor as it is.
        """
        result = torch.zeros(experts, dtype=torch.float64)
        if len(self.owner):
            G = flat.view(self.B.shape[0], self.A.shape[1])
            products = (_product(self.B.T, G.float()) * self.A).sum(1, dtype=torch.float64)
            result.index_add_(0, self.owner, products.cpu())
        if dense:
            for expert, value in self.values.items():
                result[expert] += float(value.double() @ flat.double())
        return result

    def gram(self, experts: int) -> Tensor:
        """Return the inner products of the changes of every two experts, ``N x N`` in float64.

        Between factors they are products of ``R x R``: ``(B^T B) * (A A^T)``, summed by experts.
        """
        B, A = self.B.double(), self.A.double()
        ranks = ((B.T @ B) * (A @ A.T)).cpu()
        result = torch.zeros(experts, experts, dtype=torch.float64)
        by_row = torch.zeros(experts, len(self.owner), dtype=torch.float64)
        by_row.index_add_(0, self.owner, ranks)
        result.index_add_(1, self.owner, by_row)
        for expert, value in self.values.items():
            mixed = self.project(value, experts, dense=False)
            result[expert] += mixed
            result[:, expert] += mixed
            for other, second in self.values.items():
                result[expert, other] += float(value.double() @ second.double())
        return result

    def _span(self, expert: int) -> slice:
        found = (self.owner == expert).nonzero().flatten().tolist()
        return slice(found[0], found[-1] + 1) if found else slice(0, 0)


def _product(first: Tensor, second: Tensor) -> Tensor:
    if exact_products(first.device):
        return first @ second
    return (first.double() @ second.double()).float()
