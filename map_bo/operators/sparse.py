"""Operators that leave out parts of the task vectors and join what stays.

They differ in what is left out (by magnitude, by chance, both) and in how the rest is joined (a
sum, or the mean of those that agree on a sign). What is left out depends on no coefficient. Joining
is a pure function on pieces ``N x n`` in float32, made of few operations on whole pieces.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.vectors.kernel import Kernel
from map_bo.merging.vectors.operator import Deltas
from map_bo.merging.vectors.parallel import Empty, arena
from map_bo.operators.searchable import SearchableOperator, number, one_of, share, whole
from map_bo.operators.sparsify import (
    Band,
    Drop,
    RankDrop,
    Sparsifier,
    Trim,
    element_keys,
    rank_all,
    row_width,
)
from map_bo.operators.thresholds import TRIMS, Thresholds, ceilings, sketches, thresholds

__all__ = [
    "ELECTIONS",
    "NORMALISATIONS",
    "Breadcrumbs",
    "Dare",
    "Della",
    "Magnitude",
    "SparseOperator",
    "Ties",
    "elected_sum",
    "weighted_sum",
]

ELECTIONS = ("mass", "weighted_mass", "count")
NORMALISATIONS = ("agreeing", "weights", "none")
_LEAST = 1e-6

JOININGS = ("sum", "elect")


def weighted_sum(rows: Tensor, c: Tensor, *, empty: Empty = torch.empty) -> Tensor:
    """Return ``sum_n c_n t_n`` (``n``) of rows ``N x n``."""
    out = empty(rows.shape[1], dtype=rows.dtype, device=rows.device)
    return torch.mv(rows.t(), c.to(rows), out=out)


def elected_sum(
    rows: Tensor, c: Tensor, election: str, normalisation: str, *, empty: Empty = torch.empty
) -> Tensor:
    r"""Return the merge of the rows that agree with the elected sign, by element.

    TIES, Yadav et al., *TIES-Merging*, arXiv 2306.01708, section 4 (elect sign, disjoint merge):
    ``gamma = sign(sum_n t_n)``, and the mean over ``A = {n : sign t_n = gamma}``. With
    coefficients the mean is ``(1 / |A|) sum_{n in A} c_n t_n``, which for ``c_n = lambda`` is the
    paper's ``lambda tau_m``.

    Args:
        rows: ``N x n`` trimmed task vectors. Zeros agree with nobody.
        c: ``N`` coefficients.
        election: Whose mass decides: ``"mass"`` of the rows themselves (the paper's, so that
            signs depend on no coefficient), ``"weighted_mass"`` of ``c_n t_n`` (mergekit's), or
            ``"count"``, the more frequent sign. Ties go to plus.
        normalisation: Divide by the number of rows that agree (``"agreeing"``, the paper's), by
            the sum of their coefficients (``"weights"``, mergekit's ``normalize``), or by nothing
            (``"none"``).
        empty: Where temporary tensors come from.

    Returns:
        ``n`` numbers.
    """
    c = c.to(rows)
    weighted = election == "weighted_mass"
    side = empty(rows.shape[1], dtype=rows.dtype, device=rows.device)
    signed = empty(*rows.shape, dtype=rows.dtype, device=rows.device)
    if weighted:
        torch.mv(rows.t(), c, out=side)
    elif election == "mass":
        torch.mv(rows.t(), torch.ones_like(c), out=side)
    else:
        torch.mv(torch.sign(rows, out=signed).t(), torch.ones_like(c), out=side)
    # +1 where the mass is at least zero and else -1. Selecting by a mask of booleans is ten times
    # slower than any of these.
    torch.ge(side, 0.0, out=side).mul_(2.0).sub_(1.0)
    # What is positive here agrees. sign(c t) is the side where sign t is sign(c) times the side;
    # c t is zero where c is, and agrees with nobody.
    toward = c.sign() if weighted else torch.ones_like(c)
    torch.mul(rows, side, out=signed)
    if weighted and not bool((c > 0).all()):
        signed.mul_(toward[:, None])
    signed.clamp_min_(0.0)
    total = weighted_sum(signed, c * toward, empty=empty).mul_(side)
    if normalisation == "none":
        return total
    signed.sign_()
    share = torch.mv(signed.t(), c if normalisation == "weights" else torch.ones_like(c), out=side)
    # Where nobody agrees, or weights cancel, there is nothing to divide by.
    if normalisation == "agreeing":
        return total.div_(share.clamp_min_(1.0))
    some = empty(rows.shape[1], dtype=rows.dtype, device=rows.device)
    torch.gt(torch.abs(share, out=some), _LEAST, out=some)
    return total.div_(share.mul_(some).sub_(some.sub_(1.0)))


@dataclass(frozen=True)
class _SparseKernel(Kernel):
    sparsifier: Sparsifier
    joining: str
    election: str
    normalisation: str
    scale: float

    def at(self, settings: Mapping[str, float]) -> Kernel:
        if not settings:
            return self
        scale = settings.get("scale", self.scale)
        return replace(self, sparsifier=self.sparsifier.at(settings), scale=scale)

    def unit(self, slot: int) -> int:
        return self.sparsifier.unit(slot)

    def piece(self, rows: Tensor, slot: int, start: int, c: Tensor) -> Tensor:
        sparse = self.sparsifier.apply(rows[1:], slot, start)
        if self.joining == "sum":
            joined = weighted_sum(sparse, c, empty=arena.empty)
        else:
            joined = elected_sum(sparse, c, self.election, self.normalisation, empty=arena.empty)
        return joined.mul_(self.scale).add_(rows[0]) if self.scale != 1 else joined.add_(rows[0])


@dataclass(frozen=True, kw_only=True)
class SparseOperator(SearchableOperator):
    """Settings that all of these operators have.

    Attributes:
        joining: ``"sum"``: ``theta_0 + scale sum_n c_n t_n`` of the sparse task vectors ``t_n``;
            ``"elect"``: only what agrees with the elected sign counts, see `elected_sum`.
        election: Whose mass elects the sign: ``"mass"``, ``"weighted_mass"`` or ``"count"``.
        normalisation: What the sum of those that agree is divided by: ``"agreeing"`` (their
            number), ``"weights"`` (the sum of their coefficients) or ``"none"``.
        scale: Factor of all coefficients, the ``lambda`` of the papers.
        blocks: See `SearchableOperator`.
        search: See `SearchableOperator`.
    """

    joining: str = "sum"
    election: str = "mass"
    normalisation: str = "agreeing"
    scale: float = 1.0

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings that are not possible; see `SearchableOperator`."""
        one_of("joining", settings["joining"], JOININGS)
        one_of("election", settings["election"], ELECTIONS)
        one_of("normalisation", settings["normalisation"], NORMALISATIONS)
        if "trim" in settings:
            one_of("trim", settings["trim"], TRIMS)
        if "density" in settings:
            share("density", settings["density"])
        if "drop_rate" in settings:
            share("drop_rate", settings["drop_rate"], open_above=True)
        if "seed" in settings:
            whole("seed", settings["seed"])
        number("scale", settings["scale"])

    def kernel(self, deltas: Deltas) -> Kernel:
        """Return the kernel: masks and thresholds of these task vectors, and how to join."""
        return _SparseKernel(
            self.sparsifier(deltas), self.joining, self.election, self.normalisation, self.scale
        )

    @abstractmethod
    def sparsifier(self, deltas: Deltas) -> Sparsifier:
        """Prepare what is left out of these task vectors."""


@dataclass(frozen=True, kw_only=True)
class Magnitude(SparseOperator):
    r"""Magnitude pruning: the largest ``density`` of each task vector, summed.

    ``theta_0 + sum_n c_n t_n``, where ``t_n`` is ``v_n`` with all but its largest numbers set to
    zero: the trimming of TIES (arXiv 2306.01708, section 4, step 1) without the election.

    Attributes:
        density: Share of the numbers that stay.
        trim: ``"global"`` ranks the numbers of a whole task vector, ``"tensor"`` those of each
            tensor apart, as mergekit does.
    """

    name: ClassVar[str] = "magnitude"
    searchable: ClassVar[Mapping[str, tuple[float, float]]] = {
        "density": (0.05, 1.0),
        "scale": (0.1, 2.0),
    }

    density: float = 0.2
    trim: str = "global"

    def sparsifier(self, deltas: Deltas) -> Sparsifier:
        """Find the thresholds, or sketches of the magnitudes where the density is searched."""
        if "density" in self.search:
            found = sketches(deltas, self.trim)

            def limits(density: float) -> Thresholds:
                return tuple(tuple(s.threshold(density) for s in row) for row in found)

            return Trim(limits(self.density), limits)
        return Trim(thresholds(deltas, self.density, self.trim), None)


@dataclass(frozen=True, kw_only=True)
class Ties(Magnitude):
    r"""TIES: trim, elect signs, and average what agrees.

    Yadav et al., *TIES-Merging: Resolving Interference When Merging Models*, arXiv 2306.01708,
    section 4. With all coefficients equal to ``lambda`` it is the paper's
    ``theta_0 + lambda tau_m``; the defaults (the largest 20 %, ranked over the whole task vector,
    signs elected by the mass of the trimmed vectors) are the paper's too. With
    ``trim="tensor", election="weighted_mass", normalisation="weights"`` it is mergekit's.

    Attributes:
        density: Share of the numbers that stay.
        trim: See `Magnitude`.
    """

    name: ClassVar[str] = "ties"

    joining: str = "elect"


@dataclass(frozen=True, kw_only=True)
class Breadcrumbs(SparseOperator):
    r"""Model Breadcrumbs: without the smallest numbers and without the outliers.

    Davari and Belilovsky, *Model Breadcrumbs*, arXiv 2312.06795, section 3: in each layer the
    numbers between the ``beta``-th and the ``gamma``-th percentile of magnitude stay. The paper
    takes 85 % and 99.3 %, so that 14.3 % stay and the largest 0.7 % go. Of ``n`` numbers the
    largest ``floor(gamma n)`` go and the next ``floor(density n)`` stay, as in mergekit.

    Attributes:
        density: Share of the numbers that stay.
        gamma: Share of the largest numbers that go. Where ``density + gamma > 1`` fewer go.
        trim: ``"tensor"`` (the paper's layers) or ``"global"``.
    """

    name: ClassVar[str] = "breadcrumbs"
    searchable: ClassVar[Mapping[str, tuple[float, float]]] = {
        "density": (0.05, 0.95),
        "gamma": (0.0, 0.05),
        "scale": (0.1, 2.0),
    }

    density: float = 0.143
    gamma: float = 0.007
    trim: str = "tensor"

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings that are not possible; see `SearchableOperator`."""
        super().check(settings)
        share("gamma", settings["gamma"])

    def sparsifier(self, deltas: Deltas) -> Sparsifier:
        """Find both thresholds, or sketches of the magnitudes where a share is searched."""
        if {"density", "gamma"} & set(self.search):
            found = sketches(deltas, self.trim)

            def low(density: float, gone: float) -> Thresholds:
                share = density + gone if density > 0 else 0.0
                return tuple(tuple(s.threshold(share) for s in row) for row in found)

            def high(share: float) -> Thresholds:
                return tuple(tuple(s.ceiling(share) for s in row) for row in found)

            return Band.of(self.density, self.gamma, low, high, True)
        return Band.of(
            self.density,
            self.gamma,
            lambda density, gone: thresholds(deltas, density, self.trim, above=gone),
            lambda share: ceilings(deltas, share, self.trim),
            False,
        )


@dataclass(frozen=True, kw_only=True)
class Dare(SparseOperator):
    r"""DARE: drop numbers by chance, and rescale what stays.

    Yu et al., *Language Models are Super Mario*, arXiv 2311.03099, equation (1):
    ``t_n = m_n v_n / (1 - p)`` with ``m_n ~ Bernoulli(1 - p)``. With ``joining="sum"`` it is the
    paper's DARE with task arithmetic, with ``joining="elect"`` DARE with TIES. (mergekit rescales
    each tensor to its old 1-norm instead, which is the same in expectation.)

    Attributes:
        drop_rate: ``p``, in ``[0, 1)``, taken to the nearest ``1 / 65536``.
        seed: Seed of the masks. The mask of an element depends on the seed, the expert's name,
            the tensor's name and the element's index alone.
    """

    name: ClassVar[str] = "dare"
    searchable: ClassVar[Mapping[str, tuple[float, float]]] = {
        "drop_rate": (0.0, 0.95),
        "scale": (0.1, 2.0),
    }

    drop_rate: float = 0.9
    seed: int = 0

    def sparsifier(self, deltas: Deltas) -> Sparsifier:
        """Make the keys of the random numbers."""
        return Drop(element_keys(deltas, self.seed), self.drop_rate)


@dataclass(frozen=True, kw_only=True)
class Della(SparseOperator):
    r"""DELLA: drop small numbers more often than large ones, then elect signs.

    Deep et al., *DELLA-Merging*, arXiv 2406.11617, section 3: MAGPRUNE within each row of a
    matrix, then sign election, then the mean of those that agree. A vector is one row; a row of a
    convolution (four dimensions or more) is all that makes one output; else a row is along the
    last dimension.

    Attributes:
        drop_rate: Mean drop rate ``p``.
        epsilon: From the lowest to the highest drop rate: the largest number of a row is dropped
            with ``p - epsilon / 2``, the smallest with almost ``p + epsilon / 2``.
        seed: Seed of the masks, see `Dare`.
    """

    name: ClassVar[str] = "della"
    searchable: ClassVar[Mapping[str, tuple[float, float]]] = {
        "drop_rate": (0.1, 0.9),
        "epsilon": (0.0, 0.15),
        "scale": (0.1, 2.0),
    }

    joining: str = "elect"
    drop_rate: float = 0.7
    epsilon: float = 0.1
    seed: int = 0

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings that are not possible; see `SearchableOperator`."""
        super().check(settings)
        share("epsilon", settings["epsilon"])
        rate, half = float(settings["drop_rate"]), float(settings["epsilon"]) / 2
        if rate - half < 0 or rate + half >= 1:
            raise MergeError(
                f"drop rates from {rate - half:g} to {rate + half:g} are not in [0, 1)",
                hint="choose epsilon <= 2 drop_rate and < 2 (1 - drop_rate)",
            )

    def sparsifier(self, deltas: Deltas) -> Sparsifier:
        """Rank the numbers of every matrix row; kept (2 bytes each) where deltas are resident."""
        widths = tuple(row_width(slot.shape) for slot in deltas.layout.slots)
        ranks = None
        if deltas.resident:
            ranks = rank_all(deltas, widths)
        return RankDrop(
            element_keys(deltas, self.seed), widths, ranks, self.drop_rate, self.epsilon
        )
