"""MAP's Bayesian adaptive sampling as its public code has it: a baseline, with nothing improved.

Li, Zhang, Bu et al., *MAP: Low-compute Model Merging with Amortized Pareto Fronts via Quadratic
Approximation*, arXiv 2406.07529. The repaired sampler is
:class:`map_bo.samplers.published.bins.Bins`.

The published design: one-hots and a random part of a regular grid.

Li, Zhang, Bu et al., *MAP: Low-compute Model Merging with Amortized Pareto Fronts via Quadratic
Approximation*, arXiv 2406.07529, as its public code intends it; a baseline to compare with.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Generator, Tensor

from map_bo.data import Observations
from map_bo.errors import SamplerError, SurrogateError
from map_bo.moved import renamed
from map_bo.rng import child, numpy_generator
from map_bo.samplers.designs.space_filling import fresh_points, is_repeat, uniform_points
from map_bo.samplers.posterior.driven import NEAREST
from map_bo.samplers.published.angles import angles_of, directions_of
from map_bo.samplers.sampler import Sampler
from map_bo.space import CoefficientSpace
from map_bo.surrogates.features import n_features
from map_bo.surrogates.links import from_link
from map_bo.surrogates.published import PublishedQuadratic
from map_bo.surrogates.surrogate import Surrogate

__all__ = ["PublishedBins", "PublishedDesign", "bin_scores"]

_ENUMERATED = 2**16  # grids up to this size are shuffled whole, larger ones are drawn from
_CHUNK = 64


@dataclass(frozen=True)
class PublishedDesign:
    """``N`` one-hots, then a random subset of the regular grid on ``[0, 1]^N``.

    The grid has the fewest levels ``g`` with ``g^N >= 2 m`` for the ``m = points - N`` points that
    the one-hots leave, that is ``g = ceil((2 m)^(1/N))``. One-hots, points whose coordinates sum
    to exactly 1 and the diagonal are left out, and so is what lies outside the space; the grid
    stays in ``[0, 1]^N`` however large the box is. After ``points`` points the proposals go on
    through the rest of the grid in the same random order, then with uniform points of the space.

    In a space with blocks a one-hot is an expert (1 in all its blocks) and ``N`` counts
    coefficients. The grid of an operator's setting is over its bounds.

    Attributes:
        points: Size of the whole design; ``None`` is ``(N + 1) (N + 2)``, the published default.
        anchors: Whether the base, the experts and the uniform blend come first, in place of the
            one-hots alone. The published design has neither base nor blend. They come on top:
            the levels of the grid stay as they are.
    """

    points: int | None = None
    anchors: bool = False

    def __post_init__(self) -> None:
        if self.points is not None and self.points < 1:
            raise SamplerError(
                f"the published design has {self.points} points",
                hint="give the number of evaluations of the run, or None for (N + 1) (N + 2)",
            )

    def propose(
        self,
        seen: Observations,
        space: CoefficientSpace,
        n: int,
        *,
        pending: Tensor | None = None,
        generator: Generator,
    ) -> Tensor:
        """Return the next ``n x d`` points of the design; see :class:`Sampler`."""
        points = self._points(space, generator)
        return fresh_points(points, seen, space, n, pending=pending)

    def levels(self, d: int) -> int:
        """Return the number of levels ``g`` of the grid over ``d`` coefficients."""
        total = (d + 1) * (d + 2) if self.points is None else self.points
        # Counted in integers: a root in floating point may come out just above a whole number.
        return next(g for g in itertools.count(2) if g**d >= 2 * max(total - d, 1))

    def _points(self, space: CoefficientSpace, generator: Generator) -> Iterator[Tensor]:
        anchors, moving = space.anchors(), torch.tensor(space.owner) >= 0
        yield anchors.X[[self.anchors or kind == "expert" for kind in anchors.kinds]]
        for indices in _shuffled(self.levels(space.d), space.d, child(generator, "grid")):
            top = self.levels(space.d) - 1
            weights = indices[:, moving]
            keep = (weights.sum(-1) != top) & (weights != weights[:, :1]).any(-1)
            X = indices[keep].double() / top
            X[:, ~moving] = space.unnormalise(X)[:, ~moving]
            yield X[space.contains(X)]
        yield from uniform_points(space, generator=generator)


def _shuffled(g: int, d: int, source: Generator) -> Iterator[Tensor]:
    """Yield chunks of level indices (``c x d``) of the grid in random order."""
    if g**d <= _ENUMERATED:
        order = torch.randperm(g**d, generator=source)
        powers = torch.tensor([g**i for i in range(d)])
        for chunk in torch.split(order, _CHUNK):
            yield chunk.unsqueeze(-1) // powers % g
        return
    # Too many to list, and many more than a run takes: repeats are rare and are skipped.
    for _ in range(_ENUMERATED // _CHUNK):
        yield torch.randint(g, (_CHUNK, d), generator=source)


_ROUNDS = 30
_DROPPED = 5  # each round drops one row in so many, rounded down: 20 %
_SPREAD = 0.5  # weight of the spread over the rounds in a score
_TEMPERATURE = 0.07
_RADII = (0.2, 0.8)
_LARGEST_RADIUS = 1.5  # no radius that is drawn reaches it; kept as published
_ATTEMPTS = 32

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PublishedBins:
    """The published adaptive sampler, apart for each task.

    The first ``initial`` evaluations come from the design. Each of them is turned into a radius
    and ``d - 1`` angles in the positive orthant, around the base (the point 0). Each angle is cut
    into ``B`` equal bins on ``[0, pi/2]``, 4 below four coefficients and else 2, joint bins
    ``B^(d - 1)``. A bin's score for a task is the mean squared residual of the surrogate in it,
    in the metric's own unit, plus half its standard deviation over 30 rounds, each of which drops
    a further 20 % (rounded down) of the bin's own remaining rows. A bin is drawn from
    ``softmax(score / 0.07)``, the angles uniformly in it, and the radius from ``U(0.2, 0.8)``,
    clipped to ``[0, 1.5]``.

    Its faults are kept: the scores are those of the design, however much has been measured since;
    residuals are those of the rows that were fitted; bins without an evaluation are never
    visited; the rows that rounds drop never come back, so a bin keeps four rows from early on, and
    one of up to five rows has no spread at all; metrics in large units have softmax pick one bin;
    and angles that are uniform crowd the last coefficients near 0 when there are many.

    What had to be settled: points are dealt to the tasks in turn, by how many were evaluated or
    are pending; negative coefficients count as 0 when angles are taken; points outside the space
    are moved to its nearest point; points known already are drawn again, and when that does not
    help, or nothing of the design succeeded, the design goes on.

    Attributes:
        initial: Evaluations before the first bins. ``None``: as many as a quadratic has
            coefficients, ``(d + 1) (d + 2) / 2``, the fewest that the published fit starts from.
        surrogate: What is fitted: the published fit, whatever the surrogate of the run is, unless
            another is given.
        design: Proposes the initial points; ``None`` is the published design of that size.
    """

    initial: int | None = None
    surrogate: Surrogate = field(default_factory=PublishedQuadratic)
    design: Sampler | None = None

    def __post_init__(self) -> None:
        if self.initial is not None and self.initial < 1:
            raise SamplerError(
                f"initial is {self.initial}", hint="give 1 or more, or None for the default"
            )

    def with_surrogate(self, surrogate: Surrogate) -> PublishedBins:
        """Return the sampler with another fit than the published one."""
        return replace(self, surrogate=surrogate)

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
        initial = n_features(space.d) if self.initial is None else self.initial
        design = PublishedDesign(initial) if self.design is None else self.design
        waiting = seen.X[:0] if pending is None else pending.to(torch.float64)
        count = len(seen) + len(waiting)
        first = min(n, max(0, initial - count))
        chosen = design.propose(seen, space, first, pending=pending, generator=generator)
        if first < n:
            known = torch.cat([seen.X, waiting, chosen])
            ids = range(count + first, count + n)
            found = self._adapt(
                seen.select(range(min(initial, len(seen)))), space, known, ids, generator
            )
            chosen = torch.cat([chosen, found])
        together = torch.cat([waiting, chosen])
        rest = design.propose(seen, space, n - len(chosen), pending=together, generator=generator)
        return torch.cat([chosen, rest])

    def _adapt(
        self,
        stale: Observations,
        space: CoefficientSpace,
        known: Tensor,
        ids: range,
        generator: Generator,
    ) -> Tensor:
        """Return a point for each of ``ids``, or fewer; ``stale`` is the evaluated design."""
        good = stale.succeeded()
        try:
            model = self.surrogate.fit(good, space)
        except SurrogateError as error:
            _log.warning("the design goes on: %s", error.message)
            return known[:0]
        with torch.no_grad():
            residuals = from_link(model.link_mean(good.X), model.links) - good.Y
        cuts = 4 if space.d < 4 else 2
        bins = _bins(good.X, cuts)

        @cache
        def scores_of(task: int) -> dict[tuple[int, ...], float]:
            source = numpy_generator(generator, "bins rounds", task)
            return bin_scores(residuals[:, task].square().numpy(), bins, source)

        found = known[:0]
        for i in ids:
            scores = scores_of(i % len(good.metrics))
            places, source = sorted(scores), numpy_generator(generator, "bins", i)
            for _ in range(_ATTEMPTS):
                point = _draw(places, [scores[place] for place in places], cuts, space, source)
                if not bool(is_repeat(point, torch.cat([known, found]), space, tolerance=NEAREST)):
                    found = torch.cat([found, point])
                    break
            else:
                _log.warning("the design goes on: the bins hold points known already")
                break
        return found


def bin_scores(
    squares: npt.NDArray[np.float64],
    bins: Sequence[tuple[int, ...]],
    source: np.random.Generator,
) -> dict[tuple[int, ...], float]:
    """Return the score of every bin that holds an evaluation.

    Args:
        squares: ``n`` squared residuals.
        bins: The ``n`` bins that they lie in.
        source: Draws the rows to drop.
    """
    scores = {}
    for place in sorted(set(bins)):
        own = squares[[row == place for row in bins]]
        left, means = source.permutation(own), []
        for _ in range(_ROUNDS):
            left = left[len(left) // _DROPPED :]
            means.append(left.mean())
        scores[place] = float(own.mean() + _SPREAD * np.std(means))
    return scores


def _bins(X: Tensor, cuts: int) -> list[tuple[int, ...]]:
    _, theta = angles_of(X)
    index = (theta / (math.pi / 2) * cuts).floor().clamp(0, cuts - 1).long()
    return [tuple(row) for row in index.tolist()]


def _draw(
    places: list[tuple[int, ...]],
    scores: list[float],
    cuts: int,
    space: CoefficientSpace,
    source: np.random.Generator,
) -> Tensor:
    share = np.exp((np.array(scores) - max(scores)) / _TEMPERATURE)
    place = np.array(places[source.choice(len(places), p=share / share.sum())])
    theta = (place + source.random(len(place))) / cuts * (math.pi / 2)
    radius = float(np.clip(source.uniform(*_RADII), 0.0, _LARGEST_RADIUS))
    return space.project(radius * directions_of(torch.from_numpy(theta).reshape(1, -1)))


def __getattr__(name: str) -> Any:
    return renamed(__name__, name)
