"""The default sampler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Generator, Tensor

from map_bo.choice import handles_choice
from map_bo.data import Observations
from map_bo.samplers.designs.blocks import TiedSobol
from map_bo.samplers.posterior.driven import PosteriorDriven
from map_bo.samplers.posterior.front_uncertainty import FrontUncertainty
from map_bo.samplers.sampler import Sampler
from map_bo.space import CoefficientSpace
from map_bo.surrogates.feasibility import Requirements
from map_bo.surrogates.surrogate import Surrogate

__all__ = ["Adaptive"]


@dataclass(frozen=True)
class Adaptive:
    """The default: anchors, then what the posterior says, for any number of metrics.

    In spaces with several coefficients per expert the design is one for blocks.

    Attributes:
        acquisition: Chooses by the posterior; its design is used as it is in spaces with one
            coefficient per expert.
        blocks: The design in spaces with more.
        surrogate: What the acquisition looks through, in place of any that it has; ``None`` is
            that of the acquisition, if it has one, and else that of the run.
    """

    acquisition: PosteriorDriven = field(default_factory=FrontUncertainty)
    blocks: Sampler = field(default_factory=TiedSobol)
    surrogate: Surrogate | None = None

    def __post_init__(self) -> None:
        if self.surrogate is None:
            object.__setattr__(self, "surrogate", self.acquisition.surrogate)
        elif self.acquisition.surrogate is not self.surrogate:
            chosen = self.acquisition.with_surrogate(self.surrogate)
            object.__setattr__(self, "acquisition", chosen)

    def with_reference(self, reference: Mapping[str, float]) -> Adaptive:
        """Return the sampler with this reference point, unless it has one of its own."""
        return replace(self, acquisition=self.acquisition.with_reference(reference))

    def with_requirements(self, requirements: Requirements) -> Adaptive:
        """Return the sampler that keeps to these requirements; see `HasRequirements`."""
        return replace(self, acquisition=self.acquisition.with_requirements(requirements))

    def with_surrogate(self, surrogate: Surrogate) -> Adaptive:
        """Return the sampler that looks through this surrogate; see `SeesThroughSurrogate`."""
        return replace(self, surrogate=surrogate)

    def fitting(self, surrogate: Surrogate, *, initial: int | None = None) -> Adaptive:
        """Return the sampler with this surrogate; the name of `with_surrogate` in version 0.1."""
        return replace(
            self,
            acquisition=self.acquisition.fitting(surrogate, initial=initial),
            surrogate=surrogate,
        )

    @property
    def takes_choice(self) -> bool:
        """Whether its parts handle a space with a choice; see `map_bo.choice.TakesChoice`."""
        return handles_choice(self.acquisition) and handles_choice(self.blocks)

    def without_design(self) -> Adaptive:
        """Return the sampler that chooses from its first proposal on; see `StartsWithDesign`."""
        return replace(self, acquisition=self.acquisition.without_design())

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
        """Return the points and what was fitted; see :class:`TellsFit`."""
        chosen = self._chosen(space)
        return chosen.propose_and_tell(seen, space, n, pending=pending, generator=generator)

    def _chosen(self, space: CoefficientSpace) -> PosteriorDriven:
        if space.blocks > 1:
            return replace(self.acquisition, design=self.blocks)
        return self.acquisition
