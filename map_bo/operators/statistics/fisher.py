"""Fisher-weighted averaging: a number counts as much as its expert's predictions depend on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.checkpoints.checkpoint import Checkpoint
from map_bo.merging.vectors.kernel import Kernel
from map_bo.merging.vectors.operator import Deltas
from map_bo.operators.searchable import SearchableOperator
from map_bo.operators.statistics import known_statistics
from map_bo.operators.statistics.known_statistics import (
    load_statistic,
    match_statistics,
    refuse_negative,
    require_statistics,
    statistics_by_expert,
)
from map_bo.operators.statistics.statistics import StatisticsSource
from map_bo.space import CoefficientSpace

__all__ = ["Fisher", "fisher_average"]


@dataclass(frozen=True, eq=False)
class Fisher(SearchableOperator):
    r"""``theta_0 + s (sum_n c_n F_n v_n) / (sum_n c_n F_n)``, elementwise, with ``s = sum_n c_n``.

    Matena and Raffel, *Merging Models with Fisher-Weighted Averaging*, arXiv 2111.09832: where
    coefficients sum to 1 it is their closed form ``sum_n c_n F_n theta_n / sum_n c_n F_n``.
    Elsewhere ``s`` moves along the line from the base through that average: coefficients of zero
    give the base, and one coefficient of 1 gives that expert. Tensors without a Fisher (buffers)
    are averaged with the coefficients alone.

    Attributes:
        statistics: Expert -> what `fisher` returned for it, or the file that it was saved in. May
            be left empty for a problem that fills it in (the digits zoo does).
        normalise: Divide each expert's Fisher by its norm over all tensors, as the authors' code
            does, so that coefficients compare experts and not the sizes of their gradients: the
            Fisher of an expert that is sure of its predictions is smaller by orders of magnitude.
        floor: Each Fisher is at least this share of its own mean over all tensors. It keeps
            0 / 0 away. (The authors' code has a floor of 1e-6 for every model, above which hardly
            a number of a large model would rise.) With 0, numbers whose Fisher is zero in all
            experts that count are averaged with the coefficients alone.
        blocks: See `SearchableOperator`; nothing else can be searched.

    Raises:
        MergeError: When ``floor`` is negative or not finite, or on blocks that cannot be.
    """

    name: ClassVar[str] = "fisher"
    signed: ClassVar[bool] = False

    statistics: Mapping[str, StatisticsSource] = field(default_factory=dict)
    normalise: bool = True
    floor: float = 1e-6

    def __post_init__(self) -> None:
        object.__setattr__(self, "statistics", dict(self.statistics or {}))
        super().__post_init__()

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse a floor that is not a share; see `SearchableOperator.check`."""
        floor = settings["floor"]
        if not (math.isfinite(floor) and floor >= 0):
            raise MergeError(
                f"floor must be finite and not negative, got {floor}",
                hint="give a small share, such as 1e-6",
            )

    @property
    def statistics_kind(self) -> str:
        """``"fisher"``."""
        return "fisher"

    def with_statistics(self, statistics: Mapping[str, StatisticsSource]) -> Fisher:
        """Return the same operator with these statistics."""
        return replace(self, statistics=statistics)

    def check_experts(self, experts: Mapping[str, Checkpoint]) -> None:
        """Check that the statistics belong to these weights; see `NeedsStatistics`."""
        known_statistics.check_experts(self.statistics, experts, "fisher")

    def space(self, experts: tuple[str, ...], *, lower: float, upper: float) -> CoefficientSpace:
        """Return a box with one coefficient for each expert, or each expert and block.

        Raises:
            MergeError: When an expert has no statistics, or ``lower`` is negative.
        """
        require_statistics(self.name, "fisher", self.statistics, experts)
        return super().space(experts, lower=lower, upper=upper)

    def kernel(self, deltas: Deltas) -> Kernel:
        """Match the Fishers to the tensors, and measure them: one pass over the statistics.

        Raises:
            MergeError: When they do not fit the model, are negative, or zero everywhere.
        """
        return _FisherKernel(self, deltas)

    def describe(self) -> dict[str, Any]:
        """Return plain data in which statistics are told by their content, not by their files."""
        return known_statistics.with_told(
            self, known_statistics.describe(self.statistics, "fisher")
        )

    def recipe(self) -> dict[str, Any]:
        """Return the description and the files of the statistics; see `Followable`."""
        told = known_statistics.recipe(self.statistics, "fisher")
        return known_statistics.with_told(self, told)


def fisher_average(base: Tensor, deltas: Tensor, fishers: Tensor, c: Tensor) -> Tensor:
    """Return the Fisher-weighted average of a piece, ``k``; see `Fisher`.

    Args:
        base: ``k`` numbers of the base.
        deltas: ``N x k`` task vectors.
        fishers: ``N x k``, not negative.
        c: ``N`` coefficients in float64 on the CPU, not negative.
    """
    total = float(c.sum())
    used = [(n, weight) for n, weight in enumerate(c.tolist()) if weight]
    if len(used) < 2:  # the base, or an expert: without the rounding of F v / F
        return base + total * deltas[used[0][0]] if used else base.clone()
    mass, sums = torch.zeros_like(base), torch.zeros_like(base)
    for n, weight in used:
        counted = fishers[n] * weight
        mass += counted
        sums.addcmul_(counted, deltas[n])
    average = sums / mass
    nothing = mass == 0
    if bool(nothing.any()):
        average = torch.where(nothing, (c / total).to(deltas) @ deltas, average)
    return base + total * average


class _FisherKernel(Kernel):
    def __init__(self, operator: Fisher, deltas: Deltas) -> None:
        known = statistics_by_expert(operator.statistics, deltas.experts, "fisher")
        slots = deltas.layout.slots
        self._names = match_statistics(deltas.layout, known)
        self._tensors = [statistics.tensors for statistics in known.values()]
        self._held: dict[tuple[int, int], Tensor] = {}
        squares = [0.0] * len(known)
        sums = [0.0] * len(known)
        count = 0
        for index, names in self._names.items():
            count += slots[index].numel
            for n, (expert, name) in enumerate(zip(known, names, strict=True)):
                tensor = load_statistic(known[expert], expert, name)
                if tensor.shape != slots[index].shape:
                    raise MergeError(
                        f"the Fisher of {expert!r} for {name!r} is {list(tensor.shape)}, and the "
                        f"tensor {list(slots[index].shape)}",
                        hint="it is that of another model; compute it again",
                    )
                least, most = map(float, torch.aminmax(tensor)) if tensor.numel() else (0.0, 0.0)
                if least < 0:
                    raise MergeError(
                        f"the Fisher of {expert!r} is negative in {name!r}",
                        hint="a Fisher is a mean of squares; compute it with `fisher`",
                    )
                if most:  # squares of small Fishers leave float32
                    squares[n] += (most * float(torch.linalg.vector_norm(tensor / most))) ** 2
                sums[n] += float(tensor.sum(dtype=torch.float64))
                if deltas.resident:
                    self._held[index, n] = tensor.flatten().to(deltas.device)
        zero = [expert for expert, total in zip(known, sums, strict=True) if not total]
        if zero:
            raise MergeError(
                f"the Fisher of {', '.join(zero)} is zero everywhere",
                hint="its labels are fitted perfectly (use labels='exact'), or the model gave no "
                "gradients",
            )
        self._floors = [operator.floor * total / count for total in sums]
        self._scales = [1 / math.sqrt(s) if operator.normalise else 1.0 for s in squares]

    def piece(self, rows: Tensor, slot: int, start: int, c: Tensor) -> Tensor:
        refuse_negative(c)
        if slot not in self._names:
            return rows.t() @ torch.cat([c.new_ones(1), c]).to(rows)
        fishers = torch.empty_like(rows[1:])
        stop = start + rows.shape[1]
        for n, name in enumerate(self._names[slot]):
            if (held := self._held.get((slot, n))) is not None:
                part = held[start:stop]
            else:
                part = self._tensors[n].read(name, start, stop).to(fishers)
            torch.clamp(part, min=self._floors[n], out=fishers[n]).mul_(self._scales[n])
        return fisher_average(rows[0], rows[1:], fishers, c)
