"""Designs that cover the space without looking at what was measured: Sobol, uniform, Dirichlet.

Each is one endless sequence of points, fixed by the generator's seed. A proposal is the next
points of that sequence that were neither seen nor are pending, so that proposing one at a time,
in batches or all at once gives the same points, and nothing is ever proposed twice, failed
evaluations included. With ``anchors`` (the default) the sequence starts with the points that a
user has anyway: the base, the experts and their uniform blend.

Constraints. The unit cube is mapped to the box; where every constraint bounds a plain sum of
coefficients (``sum <= s`` or the simplex, per block or over all), a second map spreads the same
points evenly over the simplex below the bound. The map that leaves the smaller share of its points
outside the space is used. While at least one point in sixteen lands inside, the others are left
out, so that the points are uniform in the space; below that they are moved to the nearest point of
the space, which gathers them on its boundary.

A choice shares one edge of the cube evenly among its options, so what is spread evenly over the
cube is balanced over them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from map_bo.data import Observations
from map_bo.errors import SamplerError
from map_bo.rng import child, child_seed, numpy_generator
from map_bo.scale import SAME_POINT, same_points
from map_bo.space import CoefficientSpace

__all__ = [
    "Dirichlet",
    "Sobol",
    "Uniform",
    "anchored",
    "fresh_points",
    "is_repeat",
    "sobol_points",
    "spread_in_space",
    "uniform_points",
]

_CHUNK = 64  # rows drawn at a time; fixed, so that the sequence does not depend on how it is asked
_PROBES = 1024  # points that the accepted share of a map is estimated from
_ACCEPTED = 1 / 16
_PATIENCE = 1024  # repeats in a row after which the space is held to have no new point

Cube = Callable[[int], Iterator[Tensor]]
Image = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Sobol:
    """Anchors, then a scrambled Sobol sequence.

    Attributes:
        anchors: Whether the base, the experts and the uniform blend come first.
    """

    fills_space: ClassVar[bool] = True
    takes_choice: ClassVar[bool] = True

    anchors: bool = True

    def propose(
        self,
        seen: Observations,
        space: CoefficientSpace,
        n: int,
        *,
        pending: Tensor | None = None,
        generator: Generator,
    ) -> Tensor:
        """Return the next ``n x d`` points of the sequence; see :class:`Sampler`.

        Raises:
            SamplerError: When the space has more coefficients than the sequence has dimensions.
        """
        points = anchored(self.anchors, space, sobol_points(space, generator=generator))
        return fresh_points(points, seen, space, n, pending=pending)


@dataclass(frozen=True)
class Uniform:
    """Anchors, then independent uniform points.

    Attributes:
        anchors: Whether the base, the experts and the uniform blend come first.
    """

    fills_space: ClassVar[bool] = True
    takes_choice: ClassVar[bool] = True

    anchors: bool = True

    def propose(
        self,
        seen: Observations,
        space: CoefficientSpace,
        n: int,
        *,
        pending: Tensor | None = None,
        generator: Generator,
    ) -> Tensor:
        """Return the next ``n x d`` points of the sequence; see :class:`Sampler`."""
        points = anchored(self.anchors, space, uniform_points(space, generator=generator))
        return fresh_points(points, seen, space, n, pending=pending)


@dataclass(frozen=True)
class Dirichlet:
    """Anchors, then blends: the experts' coefficients are Dirichlet weights times a total.

    In a space with blocks every block has weights of its own. The total is the bound of a
    constraint on the block's sum, where there is one (on ``sum <= s`` at most 1), else
    ``total``. Points that leave the space all the same are moved to its nearest point.

    Attributes:
        anchors: Whether the base, the experts and the uniform blend come first.
        concentration: Above 1 for balanced blends, 1 for uniform ones, below 1 for blends of few.
        total: Sum of a block's coefficients where no constraint sets it.
    """

    fills_space: ClassVar[bool] = True
    takes_choice: ClassVar[bool] = True

    anchors: bool = True
    concentration: float = 1.0
    total: float = 1.0

    def __post_init__(self) -> None:
        if not self.concentration > 0:
            raise SamplerError(
                f"the Dirichlet concentration is {self.concentration}",
                hint="it must be positive; 1 is uniform on the simplex",
            )
        if not self.total > 0:
            raise SamplerError(
                f"the Dirichlet total is {self.total}", hint="it must be positive; 1 is a blend"
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
        """Return the next ``n x d`` points of the sequence; see :class:`Sampler`.

        Raises:
            SamplerError: When there is a single expert, whose weight could only be 1.
        """
        if len(space.experts) < 2:
            raise SamplerError(
                "Dirichlet weights need at least two experts and this space has one",
                hint="use the Sobol or the uniform sampler",
            )
        blocks = _blocks(space)
        totals = [_total(space, block, self.total) for block in blocks]
        settings = torch.tensor(space.owner) < 0

        def draws() -> Iterator[Tensor]:
            source = numpy_generator(generator, "dirichlet")
            while True:
                # A setting of the operator is no weight; it is drawn uniformly.
                U = torch.zeros(_CHUNK, space.d, dtype=torch.float64)
                U[:, settings] = torch.from_numpy(source.random((_CHUNK, int(settings.sum()))))
                X = torch.where(settings, space.unnormalise(U), 0.0)
                for block, total in zip(blocks, totals, strict=True):
                    alpha = [self.concentration] * len(block)
                    X[:, block] = total * torch.from_numpy(source.dirichlet(alpha, _CHUNK))
                inside = space.contains(X).unsqueeze(-1)
                yield torch.where(inside, X, space.project(X))

        points = anchored(self.anchors, space, draws())
        return fresh_points(points, seen, space, n, pending=pending)


def sobol_points(space: CoefficientSpace, *, generator: Generator) -> Iterator[Tensor]:
    """Yield chunks (``c x d``) of an endless scrambled Sobol sequence in the space.

    Raises:
        SamplerError: When the space has more coefficients than the sequence has dimensions.
    """

    def cube(dimension: int) -> Iterator[Tensor]:
        limit = torch.quasirandom.SobolEngine.MAXDIM
        if dimension > limit:
            raise SamplerError(
                f"the Sobol sequence has {limit} dimensions and {dimension} are needed",
                hint="use the uniform sampler, or fewer blocks",
            )
        engine = torch.quasirandom.SobolEngine(  # type: ignore[no-untyped-call]
            dimension, scramble=True, seed=child_seed(generator, "sobol")
        )
        while True:
            yield engine.draw(_CHUNK, dtype=torch.float64)

    return spread_in_space(cube, space)


def uniform_points(space: CoefficientSpace, *, generator: Generator) -> Iterator[Tensor]:
    """Yield chunks (``c x d``) of an endless sequence of uniform points of the space."""

    def cube(dimension: int) -> Iterator[Tensor]:
        source = child(generator, "uniform")
        while True:
            yield torch.rand(_CHUNK, dimension, generator=source, dtype=torch.float64)

    return spread_in_space(cube, space)


def is_repeat(
    X: Tensor, others: Tensor, space: CoefficientSpace, *, tolerance: float = SAME_POINT
) -> Tensor:
    """Return for each row of ``X`` (``n x d``) whether ``others`` (``p x d``) has it already.

    Args:
        X: ``n x d`` points.
        others: ``p x d`` points.
        space: The space of both.
        tolerance: Points are the same when no coefficient differs by more than this share of its
            range.
    """
    return same_points(X, others, space, tolerance=tolerance).any(-1)


def fresh_points(
    points: Iterator[Tensor],
    seen: Observations,
    space: CoefficientSpace,
    n: int,
    *,
    pending: Tensor | None = None,
) -> Tensor:
    """Return the first ``n`` points of a sequence that were not seen and are not pending.

    Args:
        points: Chunks ``c x d`` of points in the space.
        seen: All evaluations so far.
        space: The space.
        n: How many points to return.
        pending: ``p x d`` points that are being evaluated, or ``None``.

    Returns:
        ``n x d`` distinct points. When the sequence has brought nothing new for long (a space
        with fewer points than were asked for), points are repeated rather than none returned.

    Raises:
        SamplerError: When ``n`` is negative, or the evaluations are of another space.
    """
    if n < 0:
        raise SamplerError(f"{n} points were asked for", hint="ask for 0 or more")
    taken = [seen.X] if pending is None else [seen.X, pending.to(torch.float64)]
    if any(part.dim() != 2 or part.shape[-1] != space.d for part in taken):
        raise SamplerError(
            f"points of shapes {[tuple(part.shape) for part in taken]} were seen or are pending "
            f"in a space of {space.d} coefficients",
            hint="give the evaluations of this space",
        )
    old = torch.cat(taken)
    chosen = torch.zeros(0, space.d, dtype=torch.float64)
    stale, patience = 0, len(old) + _PATIENCE
    while len(chosen) < n:
        chunk = next(points)
        for row, repeat in zip(chunk, is_repeat(chunk, old, space).tolist(), strict=True):
            point = row.unsqueeze(0)
            if (repeat or bool(is_repeat(point, chosen, space))) and stale < patience:
                stale += 1
                continue
            stale = 0 if stale < patience else stale
            chosen = torch.cat([chosen, point])
            if len(chosen) == n:
                break
    return chosen


def anchored(anchors: bool, space: CoefficientSpace, points: Iterator[Tensor]) -> Iterator[Tensor]:
    """Yield the anchors of the space, if ``anchors``, and then the chunks of ``points``."""
    if anchors:
        yield space.anchors().X
    yield from points


def spread_in_space(cube: Cube, space: CoefficientSpace) -> Iterator[Tensor]:
    """Yield chunks (``c x d``) of the space made from chunks of a unit cube.

    Args:
        cube: Returns the endless sequence of chunks ``c x k`` in the unit cube for a dimension
            ``k``, which is ``d``, or larger where a constraint needs a slack variable.
        space: The space.
    """
    # The maps are compared on points of their own, so the choice depends on the space alone.
    if not space.constraints:
        yield from (space.unnormalise(U) for U in cube(space.d))
        return
    maps: list[tuple[int, Image]] = [(space.d, space.unnormalise)]
    simplices = _simplices(space)
    if simplices is not None:
        maps.append(simplices)
    shares = [_accepted(space, dimension, image) for dimension, image in maps]
    best = max(range(len(maps)), key=lambda i: shares[i])
    dimension, image = maps[best]
    for U in cube(dimension):
        X = image(U)
        yield X[space.contains(X)] if shares[best] >= _ACCEPTED else space.project(X)


def _accepted(space: CoefficientSpace, dimension: int, image: Callable[[Tensor], Tensor]) -> float:
    probes = torch.rand(
        _PROBES, dimension, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    return float(space.contains(image(probes)).double().mean())


def _simplices(space: CoefficientSpace) -> tuple[int, Image] | None:
    """Return the map from a cube to box and simplices, with the cube's dimension, if it applies.

    It applies when every constraint has one positive weight on a set of coefficients of its own.
    Over such a set, exponential variables divided by their sum are uniform on the simplex
    (Devroye, *Non-Uniform Random Variate Generation*, 1986, section V.2); one variable more, for
    the slack, makes them uniform below it.
    """
    low = space.bounds[0]
    groups: list[tuple[list[int], float, bool]] = []
    for constraint in space.constraints:
        members = [i for i, weight in enumerate(constraint.weights) if weight]
        weights = {constraint.weights[i] for i in members}
        room = constraint.bound / max(weights) - float(low[members].sum())
        if len(weights) > 1 or min(weights) <= 0 or room <= 0:
            return None
        groups.append((members, room, constraint.equality))
    used = [i for members, _, _ in groups for i in members]
    if len(set(used)) < len(used):
        return None
    slacks = sum(not equality for _, _, equality in groups)

    def image(U: Tensor) -> Tensor:
        X = space.unnormalise(U[:, : space.d])
        exponential = -U.clamp(1e-12, 1 - 1e-12).log()
        slack = space.d
        for members, room, equality in groups:
            parts = exponential[:, members]
            whole = parts.sum(-1, keepdim=True)
            if not equality:
                whole = whole + exponential[:, slack : slack + 1]
                slack += 1
            X[:, members] = low[members] + room * parts / whole
        return X

    return space.d + slacks, image


def _blocks(space: CoefficientSpace) -> list[list[int]]:
    """Return the coefficients of each block: the j-th one of every expert makes block j.

    Settings of the operator are in none.
    """
    seen = [0] * len(space.experts)
    blocks: dict[int, list[int]] = {}
    for i, owner in enumerate(space.owner):
        if owner < 0:
            continue
        blocks.setdefault(seen[owner], []).append(i)
        seen[owner] += 1
    return list(blocks.values())


def _total(space: CoefficientSpace, block: list[int], default: float) -> float:
    for constraint in space.constraints:
        members = [i for i, weight in enumerate(constraint.weights) if weight]
        weight = constraint.weights[block[0]]
        if members == block and {constraint.weights[i] for i in members} == {weight}:
            bound = constraint.bound / weight
            if weight > 0 and bound > 0:
                return bound if constraint.equality else min(default, bound)
    return default
