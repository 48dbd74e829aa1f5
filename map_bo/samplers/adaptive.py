"""The default sampler."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Generator, Tensor

from map_bo.data import Observations
from map_bo.samplers.hypervolume import MOST_METRICS, QLogNEHVI
from map_bo.samplers.sampler import Sampler
from map_bo.space import CoefficientSpace

__all__ = ["Adaptive"]


@dataclass(frozen=True)
class Adaptive:
    """The default: noisy expected hypervolume improvement, where the metrics are few enough.

    With at most four metrics it is :class:`QLogNEHVI`, with more its design all the way.

    Attributes:
        acquisition: The sampler for up to four metrics.
    """

    acquisition: QLogNEHVI = field(default_factory=QLogNEHVI)

    def propose(
        self,
        seen: Observations,
        space: CoefficientSpace,
        n: int,
        *,
        pending: Tensor | None = None,
        generator: Generator,
    ) -> Tensor:
        """Return ``n x d`` points to evaluate next; see :class:`Sampler`."""
        few = len(seen.metrics) <= MOST_METRICS
        chosen: Sampler = self.acquisition if few else self.acquisition.design
        return chosen.propose(seen, space, n, pending=pending, generator=generator)
