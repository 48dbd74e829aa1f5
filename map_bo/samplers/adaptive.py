"""The default sampler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Generator, Tensor

from map_bo.data import Observations
from map_bo.samplers.designs.blocks import TiedSobol
from map_bo.samplers.posterior.driven import PosteriorDriven
from map_bo.samplers.posterior.front_uncertainty import FrontUncertainty
from map_bo.samplers.sampler import Sampler
from map_bo.space import CoefficientSpace
from map_bo.surrogates.surrogate import Surrogate

__all__ = ["Adaptive"]


@dataclass(frozen=True)
class Adaptive:
    """The default: anchors, then what the posterior says, for any number of metrics.

    In spaces with several coefficients an expert the design is one for blocks.

    Attributes:
        acquisition: Chooses by the posterior; its design is used as it is in spaces with one
            coefficient an expert.
        blocks: The design in spaces with more.
    """

    acquisition: PosteriorDriven = field(default_factory=FrontUncertainty)
    blocks: Sampler = field(default_factory=TiedSobol)

    def with_reference(self, reference: Mapping[str, float]) -> Adaptive:
        """Return the sampler with this reference point, unless it has one of its own."""
        return replace(self, acquisition=self.acquisition.with_reference(reference))

    def fitting(self, surrogate: Surrogate, *, initial: int | None = None) -> Adaptive:
        """Return the sampler with this surrogate; see :class:`FitsSurrogate`."""
        return replace(self, acquisition=self.acquisition.fitting(surrogate, initial=initial))

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
        return self._chosen(space).propose(seen, space, n, pending=pending, generator=generator)

    def propose_and_tell(
        self,
        seen: Observations,
        space: CoefficientSpace,
        n: int,
        *,
        pending: Tensor | None = None,
        generator: Generator,
    ) -> tuple[Tensor, Mapping[str, Any]]:
        """Return the points and the scores of the fit; see :class:`TellsFit`."""
        chosen = self._chosen(space)
        return chosen.propose_and_tell(seen, space, n, pending=pending, generator=generator)

    def _chosen(self, space: CoefficientSpace) -> PosteriorDriven:
        if space.blocks > 1:
            return replace(self.acquisition, design=self.blocks)
        return self.acquisition
