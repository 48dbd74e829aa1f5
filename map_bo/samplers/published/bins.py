"""Bayesian adaptive sampling: directions are cut into bins, and bins the fit predicts ill get more.

MAP's sampler for few tasks (Li et al., *MAP*, arXiv 2406.07529, "Bayesian adaptive sampling"),
with a posterior, residuals of today, and bins that fit any number of tasks. As its public code
has it, the sampler is :class:`map_bo.samplers.published.public_code.PublishedBins`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from map_bo.errors import SamplerError
from map_bo.pareto.dominance import non_dominated
from map_bo.rng import numpy_generator
from map_bo.samplers.designs.space_filling import is_repeat
from map_bo.samplers.posterior.driven import NEAREST, PosteriorDriven, Situation
from map_bo.samplers.published.angles import angles_of, directions_of, evenly, from_evenly, reach
from map_bo.space import CoefficientSpace
from map_bo.surrogates.surrogate import Surrogate
from map_bo.surrogates.validation import LeavesOneOut, promises_leave_one_out

__all__ = ["Bin", "Bins", "grow_bins", "pooled_residuals"]

_SMALLEST = 1 / 16  # a side of a bin is not cut below twice this
_BLUR = 0.15  # standard deviation of a radius around a good one, share of what the ray offers
_ATTEMPTS = 32  # to find a point that is not known already
_HINT = (
    "give the sampler a surrogate that does (sampler.surrogate=quadratic, gp, hybrid, sparse or "
    "auto), or use sampler=bins_published, which takes any"
)


@dataclass(frozen=True, eq=False)
class Bin:
    """A box of directions, in the cube of :func:`map_bo.samplers.published.angles.evenly`.

    Attributes:
        lower: ``d - 1`` lower ends.
        upper: ``d - 1`` upper ends.
        rows: Which of the evaluations lie in it.
    """

    lower: Tensor
    upper: Tensor
    rows: Tensor

    @property
    def volume(self) -> float:
        """Share of all directions that lie in the bin."""
        return float((self.upper - self.lower).prod())

    def holds(self, U: Tensor) -> Tensor:
        """Return for each point of the cube (``n x (d - 1)``) whether it lies in the bin."""
        last = self.upper >= 1.0
        return ((U >= self.lower) & ((U < self.upper) | last)).all(-1)


@dataclass(frozen=True)
class Bins(PosteriorDriven):
    """Bayesian adaptive sampling with a posterior over adaptive bins of directions.

    A point is a direction and a radius, seen from the lower corner of the box (the base, in the
    usual box from 0), in shares of the box's widths. After the design, at every proposal:

    1. *Residuals.* The surrogate is fitted to all evaluations, and each is predicted from all
       others (leave-one-out, link scale). Squared residuals are divided by their mean metric by
       metric, and averaged over the metrics; so every metric counts the same.
    2. *Bins.* The directions are cut in halves, at the middle of a longest side, wherever more
       than ``capacity`` evaluations lie together, in any number of dimensions. Of the sides that
       separate evaluations the one with the highest marginal likelihood is cut. Bins are measured
       so that their volume is the share of directions in them.
    3. *Prior and posterior.* In a bin the residuals are ``N(0, s)`` and ``s`` has a scaled
       inverse chi-square prior, ``strength`` degrees of freedom and a mean of 1, the mean over
       all bins; the posterior after ``n`` squared residuals ``q`` has ``strength + n`` degrees
       and the mean ``(strength - 2 + sum q) / (strength - 2 + n)``. One evaluation counts once,
       however many metrics it has, since their residuals go together. An empty bin has the prior.
    4. *Draw.* With ``s`` drawn from the posterior (Thompson sampling), a bin of volume ``V``
       deserves a share ``~ V sqrt(s)`` of all points, which is Neyman's allocation for the least
       error of a stratified mean. The next bin is drawn in proportion to how many points each
       falls short of its share. Failed and pending points count as points, so their
       surroundings get no more than their due. A bin above its share waits; none waits for ever.
    5. *Radius.* Directions are even within the bin. The radius, as a share of the part of the ray
       that lies in the space, follows the posterior of a Dirichlet process: of weight
       ``strength`` around the same for all bins, that of weight ``strength`` around a density
       ``~ r^(d - 1)``, even in volume, with the non-dominated evaluations as data, blurred.

    A ray that misses a space with constraints gives the nearest point of the space. ``reference``
    plays no part, and the surrogate has to be one that leaves evaluations out.

    Attributes:
        capacity: Evaluations that a bin may hold before it is cut.
        strength: How many evaluations a prior is worth; more than 2.
    """

    capacity: int = 4
    strength: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.capacity < 1:
            raise SamplerError(f"the capacity of a bin is {self.capacity}", hint="give 1 or more")
        if not self.strength > 2:
            raise SamplerError(
                f"the prior strength is {self.strength}",
                hint="it must be more than 2, or the prior of a bin has no mean",
            )

    @property
    def takes_choice(self) -> bool:
        """A choice has no direction, so bins of directions do not handle one."""
        return False

    def check_surrogate(self, surrogate: Surrogate) -> None:
        """Refuse a surrogate whose models cannot leave evaluations out.

        Raises:
            SamplerError: With the alternative in its hint.
        """
        if isinstance(surrogate, Surrogate) and not promises_leave_one_out(surrogate):
            raise SamplerError(
                f"bins are made of leave-one-out residuals, and {type(surrogate).__name__} does "
                "not leave evaluations out",
                hint=_HINT,
            )
        super().check_surrogate(surrogate)

    def choose(self, situation: Situation, n: int) -> Tensor:
        """Return up to ``n`` new points, one after the other.

        Raises:
            SamplerError: When the surrogate cannot leave evaluations out.
        """
        if not isinstance(situation.model, LeavesOneOut):  # its settings promised otherwise
            raise SamplerError(
                f"{type(situation.model).__name__} cannot leave evaluations out", hint=_HINT
            )
        space, good = situation.space, situation.good
        mean, _ = situation.model.leave_one_out()
        residuals = situation.model.training_targets()[0] - mean
        squares = pooled_residuals(
            residuals if situation.whole is None else residuals[situation.whole]
        )
        # Points in the lower corner have no direction and are in no bin.
        U, share, directed = _polar(good.X, space)
        U, share, squares = U[directed], share[directed], squares[directed]
        front = non_dominated(situation.observed)[directed]
        bins = grow_bins(U, squares, capacity=self.capacity, strength=self.strength)
        taken_U, _, taken = _polar(situation.taken, space)
        sizes = np.array([float(len(place.rows)) for place in bins])
        sums = np.array([float(squares[place.rows].sum()) for place in bins])
        volumes = np.array([place.volume for place in bins])
        counts = sizes + [float(place.holds(taken_U[taken]).sum()) for place in bins]
        found = good.X[:0]
        for i in range(n):
            source = numpy_generator(situation.generator, "bins", i)
            s = (self.strength - 2 + sums) / source.chisquare(self.strength + sizes)
            shares = volumes * np.sqrt(s)
            short = (shares / shares.sum() * (counts.sum() + 1) - counts).clip(0.0)
            known = torch.cat([situation.known, found])
            for _ in range(_ATTEMPTS):
                chosen = int(source.choice(len(bins), p=short / short.sum()))
                rows = bins[chosen].rows
                radii = (share[rows[front[rows]]].numpy(), share[front].numpy())
                point = self._point(bins[chosen], radii, space, source)
                likely = situation.feasibility
                # A point is kept as often as it is likely to be feasible.
                if likely is not None and source.random() > float(likely.probability(point)):
                    continue
                if not bool(is_repeat(point, known, space, tolerance=NEAREST)):
                    found = torch.cat([found, point])
                    counts[chosen] += 1
                    break
            else:
                break
        return found

    def _point(
        self,
        place: Bin,
        radii: tuple[np.ndarray, np.ndarray],
        space: CoefficientSpace,
        source: np.random.Generator,
    ) -> Tensor:
        U = torch.from_numpy(source.random(len(place.lower))).unsqueeze(0)
        direction = directions_of(from_evenly(place.lower + U * (place.upper - place.lower)))
        # The bin's own good radii first, then everybody's, then any: even in volume, for in many
        # dimensions nearly all of a space is far from its corner.
        share = source.random() ** (1 / space.d)
        for known in radii:
            if source.random() * (len(known) + self.strength) < len(known):
                share = abs(source.choice(known) + _BLUR * source.standard_normal()) % 2
                share = min(share, 2 - share)  # reflected at both ends
                break
        shortest, longest = reach(space, direction)
        radius = shortest + share * (longest - shortest)
        if bool(shortest > longest):
            radius = share / direction.amax(-1)
        return space.project(space.unnormalise(radius.unsqueeze(-1) * direction))


def pooled_residuals(residuals: Tensor) -> Tensor:
    """Return one squared residual an evaluation, ``n``, with a mean of 1, from ``n x m``."""
    squares = residuals.square()
    mean = squares.mean(0)
    # A metric that is predicted perfectly says nothing about where to look.
    return torch.where(mean > 0, squares / mean.clamp_min(1e-300), 1.0).mean(-1)


def grow_bins(U: Tensor, squares: Tensor, *, capacity: int, strength: float) -> list[Bin]:
    """Cut the cube of directions into bins that hold at most ``capacity`` evaluations each.

    Args:
        U: ``n x (d - 1)`` directions of the evaluations, in the unit cube.
        squares: ``n`` squared residuals.
        capacity: Evaluations that a bin may hold; more where they cannot be told apart by bins
            with sides of at least a sixteenth.
        strength: Degrees of freedom of the prior.

    Returns:
        Bins that cover the cube and do not overlap.
    """
    k = U.shape[-1]
    waiting = [Bin(torch.zeros(k).double(), torch.ones(k).double(), torch.arange(len(U)))]
    done: list[Bin] = []
    while waiting:
        place = waiting.pop()
        sides = place.upper - place.lower
        if len(place.rows) <= capacity or k == 0 or float(sides.max()) < 2 * _SMALLEST:
            done.append(place)
            continue
        longest = (sides >= sides.max()).nonzero().flatten().tolist()
        halves = [_halves(place, axis, U) for axis in longest]
        parting = [pair for pair in halves if len(pair[0].rows) and len(pair[1].rows)]

        def evidence(pair: tuple[Bin, Bin]) -> float:
            return sum(_log_evidence(squares[half.rows], strength) for half in pair)

        best: tuple[Bin, Bin] = max(parting or halves[:1], key=evidence)
        waiting.extend(best)
    return done


def _halves(place: Bin, axis: int, U: Tensor) -> tuple[Bin, Bin]:
    middle = float(place.lower[axis] + place.upper[axis]) / 2
    upper, lower = place.upper.clone(), place.lower.clone()
    upper[axis] = lower[axis] = middle
    below = U[place.rows, axis] < middle
    return (
        Bin(place.lower, upper, place.rows[below]),
        Bin(lower, place.upper, place.rows[~below]),
    )


def _log_evidence(squares: Tensor, strength: float) -> float:
    """Return the log marginal likelihood of a bin, up to a constant an evaluation."""
    scale = strength - 2  # degrees of freedom times scale: a prior mean of 1
    degrees = strength + len(squares)
    return (
        math.lgamma(degrees / 2)
        - math.lgamma(strength / 2)
        + strength / 2 * math.log(scale)
        - degrees / 2 * math.log(scale + float(squares.sum()))
    )


def _polar(X: Tensor, space: CoefficientSpace) -> tuple[Tensor, Tensor, Tensor]:
    """Return directions in the cube, radii as a share of the ray, and which rows have either."""
    V = space.normalise(X)
    radius, theta = angles_of(V)
    directed = radius > 1e-9
    direction = V.clamp_min(0.0) / radius.clamp_min(1e-9).unsqueeze(-1)
    shortest, longest = reach(space, torch.where(directed.unsqueeze(-1), direction, 1.0))
    room = (longest - shortest).clamp_min(1e-9)
    return evenly(theta), ((radius - shortest) / room).clamp(0.0, 1.0), directed
