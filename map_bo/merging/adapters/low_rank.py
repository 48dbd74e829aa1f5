"""Changes of low rank: ``scale * B @ A``, never multiplied out unless asked for.

Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, arXiv 2106.09685, section 4.1.
`LowRank` is one change of one tensor; `AdaptedTensor` is the changes of one tensor by several
adapters, which a resident model keeps as factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

__all__ = [
    "AdaptedTensor",
    "Cut",
    "LowRank",
    "approximate",
    "cut_of",
    "exact_products",
    "stack",
    "truncate",
]

# Up to this length of its shorter side a matrix is decomposed whole, in float64.
_WHOLE = 512
_OVERSAMPLED, _POWER = 16, 4

# Numbers of a product that is made in a wider dtype, or merged apart, at once.
_CHUNK = 1 << 20


@dataclass(frozen=True, eq=False)
class LowRank:
    """A change ``scale * B @ A`` of one tensor, seen as a matrix ``rows x columns``.

    A tensor of more dimensions (a convolution) is flattened from its second one on.

    Attributes:
        B: ``rows x r``.
        A: ``r x columns``.
        scale: What the product is multiplied by.
    """

    B: Tensor
    A: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """The bound ``r`` of the rank."""
        return self.A.shape[0]

    def dense(self) -> Tensor:
        """Return the change multiplied out, ``rows x columns``."""
        return (self.scale * self.B) @ self.A

    def piece(self, start: int, stop: int) -> Tensor:
        """Return the elements ``start`` to ``stop``, row-major; only their rows are multiplied."""
        columns = self.A.shape[1]
        if start >= stop or not self.rank:
            return self.A.new_zeros(stop - start)
        top, bottom = start // columns, -(-stop // columns)
        B, A = self.scale * self.B[top:bottom], self.A
        where = slice(start - top * columns, stop - top * columns)
        if bottom - top == 1:  # of one long row no more than the piece
            A, where = A[:, where], slice(None)
        product = B @ A if exact_products(B.device) else (B.double() @ A.double()).to(B.dtype)
        return product.reshape(-1)[where]

    def cut(self, cut: Cut) -> LowRank:
        """Return the change of a part of the matrix."""
        B, A = self.B[cut.rows], self.A[:, cut.columns]
        if cut.flipped:
            A, B = B.T, A.T
        return LowRank(B.contiguous(), A.contiguous(), self.scale)

    def put(self, cut: Cut, shape: Sequence[int]) -> LowRank:
        """Return the change of a matrix of this shape of which this is the part's; see `cut`."""
        A, B = (self.B.T, self.A.T) if cut.flipped else (self.A, self.B)
        rows, columns = B.new_zeros(shape[0], B.shape[1]), A.new_zeros(A.shape[0], shape[1])
        rows[cut.rows], columns[:, cut.columns] = B, A
        return LowRank(rows, columns, self.scale)


@dataclass(frozen=True)
class Cut:
    """A part of a matrix: some rows and columns.

    Attributes:
        rows: Which rows.
        columns: Which columns.
        flipped: Whether the part is seen transposed, with the columns first.
    """

    rows: slice
    columns: slice
    flipped: bool


def cut_of(
    shape: Sequence[int], part: Sequence[int], stride: Sequence[int], offset: int
) -> Cut | None:
    """Return which part of a matrix a view of its memory is, or None where it is none.

    Args:
        shape: ``rows x columns`` of the matrix, which lies row by row.
        part: Shape of the view.
        stride: Its strides.
        offset: Index of its first number.
    """
    if len(part) != 2 or len(shape) != 2 or not all(part) or not all(shape):
        return None
    rows, columns = shape
    top, left = divmod(offset, columns)
    for flipped in (False, True):
        (m, n), (down, right) = (reversed(part), reversed(stride)) if flipped else (part, stride)
        # A single row or column may have any stride.
        step, rest = divmod(down, columns) if m > 1 else (1, 0)
        across = right if n > 1 else 1
        last = (top + step * (m - 1), left + across * (n - 1))
        if rest or step < 1 or across < 1 or last[0] >= rows or last[1] >= columns:
            continue
        return Cut(slice(top, last[0] + 1, step), slice(left, last[1] + 1, across), flipped)
    return None


def exact_products(device: torch.device) -> bool:
    """Return whether float32 products on this device keep float32's precision.

    A user may have allowed TF32 or bfloat16 inside products, which must not reach the weights.
    """
    if device.type == "cuda":
        return not torch.backends.cuda.matmul.allow_tf32
    precision: str = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return precision in ("none", "ieee")


def stack(parts: Sequence[LowRank]) -> LowRank:
    """Return the sum of changes of one tensor as one change; its rank is the sum of theirs."""
    B = torch.cat([part.scale * part.B for part in parts], dim=1)
    return LowRank(B, torch.cat([part.A for part in parts]))


def truncate(change: LowRank, rank: int | None) -> tuple[LowRank, float, float]:
    """Return the best approximation of a change by one of at most ``rank``, with its error.

    By Eckart and Young that is the truncated singular value decomposition. It is found without
    multiplying out: with ``B = Q R`` and ``A^T = P S`` the singular values of ``B A`` are those of
    the small ``R S^T``. In float64. The singular values are shared out evenly: both factors get
    their roots.

    Args:
        change: What to approximate.
        rank: Largest rank; None keeps all singular values above rounding.

    Returns:
        The approximation with scale 1, in float32, of rank at least 1; the Frobenius norm of what
        was cut off; and that of the whole change.
    """
    Q, R = torch.linalg.qr(change.scale * change.B.double())
    P, S = torch.linalg.qr(change.A.double().T)
    U, values, Vh = torch.linalg.svd(R @ S.T, full_matrices=False)
    # What float32 factors cannot tell from zero is not rank.
    least = float(values[0]) * torch.finfo(torch.float32).eps if len(values) else 0.0
    keep = max(1, int((values > least).sum()))
    keep = keep if rank is None else min(keep, rank)
    roots = values[:keep].sqrt()
    B = (Q @ (U[:, :keep] * roots)).float()
    A = ((roots[:, None] * Vh[:keep]) @ P.T).float()
    return LowRank(B, A), float(values[keep:].norm()), float(values.norm())


def approximate(matrix: Tensor, rank: int, *, generator: Generator) -> tuple[LowRank, float, float]:
    """Return an approximation of a matrix by one of at most ``rank``, with its error.

    Small matrices go through their singular value decomposition. Large ones, of which few
    singular vectors are wanted, go through a randomised range finder with power iterations
    (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1). The error is measured
    either way.

    Args:
        matrix: ``rows x columns``.
        rank: Largest rank.
        generator: Draws the random directions, where there are any.

    Returns:
        The approximation with scale 1, in float32; the Frobenius norm of the error; and that of
        the matrix.
    """
    wide = matrix.double() if min(matrix.shape) <= _WHOLE else matrix.float()
    size = rank + _OVERSAMPLED
    if min(matrix.shape) <= _WHOLE or 4 * size > min(matrix.shape):
        U, values, Vh = torch.linalg.svd(wide, full_matrices=False)
    else:
        draws = torch.randn(wide.shape[1], size, generator=generator, dtype=wide.dtype)
        Q = torch.linalg.qr(wide @ draws.to(wide.device)).Q
        for _ in range(_POWER):
            Q = torch.linalg.qr(wide @ torch.linalg.qr(wide.T @ Q).Q).Q
        small, values, Vh = torch.linalg.svd(Q.T @ wide, full_matrices=False)
        U = Q @ small
    roots = values[:rank].sqrt()
    change = LowRank((U[:, :rank] * roots).float(), (roots[:, None] * Vh[:rank]).float())
    return change, float((wide - change.dense()).norm()), float(wide.norm())


@dataclass(frozen=True, eq=False)
class AdaptedTensor:
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
    ) -> AdaptedTensor:
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

    def change(self, expert: int) -> LowRank:
        """Return the change of low rank by an expert, of rank 0 where there is none."""
        mine = self._span(expert)
        return LowRank(self.B[:, mine], self.A[mine])

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
