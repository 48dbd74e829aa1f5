"""What a sampler is: it says which coefficient vectors to evaluate next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

from map_bo.data import Observations
from map_bo.ordering import Ordering
from map_bo.scale import anchor_rows
from map_bo.space import CoefficientSpace
from map_bo.surrogates.feasibility import Requirements
from map_bo.surrogates.surrogate import Surrogate

__all__ = [
    "FillsSpace",
    "HasRequirements",
    "Sampler",
    "SeesThroughSurrogate",
    "StartsWithDesign",
    "TellsFit",
    "design_points",
    "looking_through",
    "proposed",
    "with_requirements",
]

_PATIENCE = 64  # points of a design in a row that are left out before the likeliest is taken


@runtime_checkable
class Sampler(Protocol):
    """Settings of a sampler. It keeps no state: everything is rebuilt from what was seen.

    So resuming, replaying a recorded table and simulating come free, and the same seed proposes
    the same points in any process.
    """

    def propose(
        self,
        seen: Observations,
        space: CoefficientSpace,
        n: int,
        *,
        pending: Tensor | None = None,
        generator: Generator,
    ) -> Tensor:
        """Return ``n x d`` points of ``space`` to evaluate next.

        Args:
            seen: All evaluations so far, the failed ones included.
            space: The space to propose in.
            n: How many points to return.
            pending: ``p x d`` points that are being evaluated now, in the order in which they
                were proposed. Proposals neither repeat nor crowd them, and points that are asked
                one by one with those before pending are as good as a batch.
            generator: Source of all randomness. A run passes the same generator at every call and
                a sampler only derives children from it (:func:`map_bo.rng.child`), named by how
                many points were seen and are pending, so nothing depends on earlier draws.
        """
        ...


@runtime_checkable
class SeesThroughSurrogate(Protocol):
    """A sampler that looks through the posterior of a surrogate.

    A run hands it its own surrogate, so that what proposes and what predicts the front are the
    same, unless the sampler was given one (:func:`looking_through`).
    """

    @property
    def surrogate(self) -> Surrogate | None:
        """What the sampler looks through; None for the surrogate of the run."""
        ...

    def with_surrogate(self, surrogate: Surrogate) -> Sampler:
        """Return the sampler that looks through this surrogate.

        Raises:
            SamplerError: When it cannot look through it; the hint names the alternatives.
        """
        ...


def looking_through(sampler: Sampler, surrogate: Surrogate) -> Sampler:
    """Return a sampler as a run with this surrogate uses it.

    Samplers that were given a surrogate of their own, and those that fit none, stay as they are.

    Raises:
        SamplerError: When the sampler cannot look through the surrogate.
    """
    if isinstance(sampler, SeesThroughSurrogate) and sampler.surrogate is None:
        return sampler.with_surrogate(surrogate)
    return sampler


@runtime_checkable
class StartsWithDesign(Protocol):
    """A sampler that begins with a design of its own, and can do without."""

    def without_design(self) -> Sampler:
        """Return the sampler that chooses by what was seen from its first proposal on."""
        ...


@runtime_checkable
class TellsFit(Protocol):
    """A sampler that fits a surrogate, and says how good the fit was that it chose by."""

    def propose_and_tell(
        self,
        seen: Observations,
        space: CoefficientSpace,
        n: int,
        *,
        pending: Tensor | None = None,
        generator: Generator,
    ) -> tuple[Tensor, Mapping[str, Any]]:
        """Return what ``propose`` returns, and what the fit was as plain data.

        That is the surrogate's ``settings``, the ``model`` and, where it leaves evaluations out,
        its scores; nothing where nothing was fitted.
        """
        ...


@runtime_checkable
class HasRequirements(Protocol):
    """A sampler that keeps to what the points of a run have to fulfil."""

    def with_requirements(self, requirements: Requirements) -> Sampler:
        """Return the sampler that keeps to these requirements."""
        ...


def with_requirements(sampler: Sampler, requirements: Requirements) -> Sampler:
    """Return ``sampler`` with the run's requirements, or as it is where it takes none."""
    if isinstance(sampler, HasRequirements):
        return sampler.with_requirements(requirements)
    return sampler


@runtime_checkable
class FillsSpace(Protocol):
    """A design: what was measured has no say in its points, so any of them can be left out."""

    fills_space: ClassVar[bool]


def design_points(
    design: Sampler,
    seen: Observations,
    space: CoefficientSpace,
    n: int,
    *,
    pending: Tensor | None,
    generator: Generator,
    requirements: Requirements,
) -> Tensor:
    """Return a sampler's next ``n x d`` points; a design leaves out those that are to fail.

    Anchors are never left out, as the scale of a run is made of them. Where a design has nothing
    but points that are to fail, the likeliest to work are taken.
    """
    region = requirements.region(seen, space) if isinstance(design, FillsSpace) and n else None
    if region is None:
        return design.propose(seen, space, n, pending=pending, generator=generator)
    waiting = seen.X[:0] if pending is None else pending.to(torch.float64)
    kept = left_out = seen.X[:0]
    while len(kept) < n and len(left_out) < _PATIENCE:
        passed = torch.cat([waiting, kept, left_out])
        X = design.propose(seen, space, n - len(kept), pending=passed, generator=generator)
        works = region.probability(X) >= requirements.least
        works = works | anchor_rows(X, space).any(0)
        kept, left_out = torch.cat([kept, X[works]]), torch.cat([left_out, X[~works]])
    likeliest = region.probability(left_out).argsort(descending=True, stable=True)
    return torch.cat([kept, left_out[likeliest[: n - len(kept)]]])


def proposed(
    sampler: Sampler,
    seen: Observations,
    space: CoefficientSpace,
    n: int,
    *,
    pending: Tensor | None,
    generator: Generator,
    requirements: Requirements | None = None,
) -> tuple[Tensor, Mapping[str, Any]]:
    """Return a sampler's proposal, and what it tells of its fit, if it tells anything.

    Samplers that look at what was measured keep to the requirements that they have
    (:class:`HasRequirements`); designs leave out what is to fail (:func:`design_points`).

    Samplers see experts and metrics in the order of their names, so that the order in which they
    were given changes nothing.
    """
    order = Ordering.of(space, seen.metrics)
    if not order.is_given:
        X, scores = proposed(
            sampler,
            order.observations(seen),
            order.space(space),
            n,
            pending=None if pending is None else order.points(pending),
            generator=generator,
            requirements=requirements,
        )
        return order.back(X), scores
    if isinstance(sampler, TellsFit):
        return sampler.propose_and_tell(seen, space, n, pending=pending, generator=generator)
    points = design_points(
        sampler,
        seen,
        space,
        n,
        pending=pending,
        generator=generator,
        requirements=Requirements() if requirements is None else requirements,
    )
    return points, {}
