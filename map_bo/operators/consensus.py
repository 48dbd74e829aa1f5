"""Consensus merging: weights that matter to too few tasks are left as they were."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.vectors.kernel import Kernel
from map_bo.merging.vectors.operator import Deltas
from map_bo.merging.vectors.parallel import Empty, arena
from map_bo.operators.searchable import SearchableOperator, number, whole

__all__ = ["Consensus", "task_masks"]


@dataclass(frozen=True, kw_only=True)
class Consensus(SearchableOperator):
    r"""Consensus task arithmetic with TALL masks.

    Wang et al., *Localizing Task Information for Improved Model Merging and Compression*, arXiv
    2405.07813. A weight matters to task ``n`` where (equation 4)
    ``m_n = 1[|v_n| >= lambda_n |sum_k v_k - v_n|]``; only weights that matter to at least
    ``agreement`` tasks move (equation 6): ``theta_0 + m * sum_n c_n v_n``. Weights that matter to
    one task ("selfish") or none ("catastrophic") keep the base's value.

    Attributes:
        strictness: ``lambda``: larger values make masks sparser. One for all experts here; the
            paper tunes one for each on validation data, between 0.2 and 0.6.
        agreement: To how many tasks a weight must matter, from 1 to the number of experts.
    """

    name: ClassVar[str] = "consensus"
    searchable: ClassVar[Mapping[str, tuple[float, float]]] = {"strictness": (0.1, 1.0)}

    strictness: float = 0.4
    agreement: int = 2

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings that are not possible; see `SearchableOperator`."""
        number("strictness", settings["strictness"], least=0.0)
        whole("agreement", settings["agreement"], least=1)

    def kernel(self, deltas: Deltas) -> Kernel:
        """Return the kernel.

        Raises:
            MergeError: When there are fewer experts than must agree.
        """
        if self.agreement > len(deltas.experts):
            raise MergeError(
                f"{self.agreement} tasks must agree and there are {len(deltas.experts)} experts",
                hint=f"choose agreement from 1 to {len(deltas.experts)}",
            )
        return _Masked(self.strictness, self.agreement)


@dataclass(frozen=True)
class _Masked(Kernel):
    strictness: float
    agreement: int

    def at(self, settings: Mapping[str, float]) -> Kernel:
        return replace(self, strictness=settings.get("strictness", self.strictness))

    def piece(self, rows: Tensor, slot: int, start: int, c: Tensor) -> Tensor:
        deltas = rows[1:]
        masks = task_masks(deltas, self.strictness, empty=arena.empty)
        count = arena.empty(rows.shape[1], device=rows.device)
        torch.mv(masks.t(), torch.ones(len(masks), device=rows.device), out=count)
        merged = arena.empty(rows.shape[1], device=rows.device)
        torch.mv(deltas.t(), c.to(deltas), out=merged)
        # Counts are whole numbers: 1 from the agreement on, 0 below.
        count.sub_(self.agreement - 1).clamp_(0.0, 1.0)
        return torch.addcmul(rows[0], merged, count, out=merged)


def task_masks(deltas: Tensor, strictness: float, *, empty: Empty = torch.empty) -> Tensor:
    """Return 1 where each of ``N x n`` task vectors outweighs the others and else 0.

    TALL masks, Wang et al., arXiv 2405.07813, equation 4.
    """
    total = empty(deltas.shape[1], device=deltas.device)
    torch.sum(deltas, 0, out=total)
    others = empty(*deltas.shape, device=deltas.device)
    torch.sub(total, deltas, out=others).abs_().mul_(strictness)
    sizes = empty(*deltas.shape, device=deltas.device)
    torch.abs(deltas, out=sizes)
    return torch.ge(sizes, others, out=others)
