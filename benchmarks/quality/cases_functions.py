"""Cases that are functions: synthetic ones with known fronts, and botorch's own."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Generator, Tensor

from benchmarks.quality.cases_core import Case, Scale
from map_bo.data import Metric, Observations, to_maximisation
from map_bo.plain import to_plain
from map_bo.problems.botorch_functions import BotorchProblem
from map_bo.problems.synthetic import ConcaveQuadratics, MultiBump, SigmoidQuadratics
from map_bo.rng import child, make_generator
from map_bo.space import CoefficientSpace

__all__ = ["BOTORCH", "SYNTHETIC", "UnitBox"]

NOISE = 0.05
COUNT = 100
_FRONT = 1000
_MARGIN = 0.1
_CONFLICT = 0.3
_SEARCHED = 2**15
_DENSE_METRICS = 4  # up to here the front of the bumps is searched densely

Synthetic = ConcaveQuadratics | SigmoidQuadratics | MultiBump


@cache
def conflicting_seed(n: int) -> int:
    """Return the first seed at which each of ``n`` quadratics loses .3 or more along the front.

    At others two centres may fall together, and there is next to nothing to trade.
    """
    generator = child(make_generator(0), "conflict")
    for seed in itertools.count():
        front = ConcaveQuadratics(n, n, seed).pareto_front(_FRONT, generator=generator)
        if bool((front.amax(0) - front.amin(0) >= _CONFLICT).all()):
            break
    return seed


def _concave(n: int, noise: bool, seed: int | None) -> Synthetic:
    seed = conflicting_seed(n) if seed is None else seed
    return ConcaveQuadratics(n, n, seed, noise=NOISE if noise else 0.0)


def _sigmoid(n: int, noise: bool, seed: int | None) -> Synthetic:
    seed = conflicting_seed(n) if seed is None else seed
    return SigmoidQuadratics(n, n, seed, count=COUNT if noise else None)


def _bumps(n: int, noise: bool, seed: int | None) -> Synthetic:
    # Bumps as wide as the cube's diagonal grows: else nearly all of eight dimensions is flat.
    return MultiBump(n, n, seed or 0, noise=NOISE if noise else 0.0, width=0.2 * (n / 2) ** 0.5)


def _synthetic(
    name: str,
    make: Callable[[int, bool, int | None], Synthetic],
    n: int,
    *,
    noise: bool,
    seed: int | None = None,
) -> Case:
    problem = make(n, noise, seed)
    generator = child(make_generator(0), "front")
    if isinstance(problem, MultiBump) and n > _DENSE_METRICS:
        scale = _searched(problem.space, problem.true_values, problem.metrics, None)
    else:
        front = problem.pareto_front(_FRONT, generator=generator)
        best, worst = front.amax(0), front.amin(0)
        least = [-torch.inf if x.lower is None else x.lower for x in problem.metrics]
        low = torch.maximum(worst - _MARGIN * (best - worst), torch.tensor(least).double())
        scale = Scale(low, best, front)
    return Case(name, "synthetic", problem, problem.true_values, scale, False, to_plain(problem))


@dataclass(frozen=True, eq=False)
class UnitBox:
    """A test function seen from the unit cube, as the other problems are.

    Attributes:
        inner: The function, in its own box.
    """

    inner: BotorchProblem

    @property
    def space(self) -> CoefficientSpace:
        """The unit cube."""
        return CoefficientSpace.box(self.inner.space.names)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The function's metrics."""
        return self.inner.metrics

    def true_values(self, X: Tensor) -> Tensor:
        """Return the metrics without noise, ``n x m``, at ``X`` (``n x d``) in the unit cube."""
        return self.inner.true_values(self.inner.space.unnormalise(X))

    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        """Measure every metric at every row of ``X`` (``n x d``).

        Raises:
            SpaceError: When a row lies outside the unit cube.
        """
        X = self.space.check(X)
        inner = self.inner.space
        seen = self.inner.evaluate(inner.project(inner.unnormalise(X)), generator=generator)
        return Observations(X, seen.Y, seen.metrics, seen.Yvar, seen.counts)


def _botorch(name: str, function: str, m: int | None = None, *, noise_std: float = 0.0) -> Case:
    problem = UnitBox(BotorchProblem(function, num_objectives=m, noise_std=noise_std))
    low = to_maximisation(problem.inner.reference_point, problem.metrics)
    if function == "DTLZ2":
        # Its front is the part of the unit sphere where no metric is negative (Deb et al. 2005).
        generator = child(make_generator(0), "front")
        draws = torch.randn(_FRONT, len(low), generator=generator, dtype=torch.float64).abs()
        corners = torch.eye(len(low), dtype=torch.float64)
        front = -torch.cat([corners, draws / draws.norm(dim=-1, keepdim=True)])
        scale = Scale(low, front.amax(0), front)
    else:
        scale = _searched(problem.space, problem.true_values, problem.metrics, low)
    return Case(name, "botorch", problem, problem.true_values, scale, False, to_plain(problem))


def _searched(
    space: CoefficientSpace,
    values: Callable[[Tensor], Tensor],
    metrics: tuple[Metric, ...],
    low: Tensor | None,
) -> Scale:
    """Return a scale from the best point of each metric, and ``low`` from them where not given.

    The best points are those of 32,768 Sobol points, refined by ever smaller random steps.
    """
    engine = torch.quasirandom.SobolEngine(space.d, scramble=False)  # type: ignore[no-untyped-call]
    X = space.unnormalise(engine.draw(_SEARCHED, dtype=torch.float64))
    best = X[to_maximisation(values(X), metrics).argmax(0)]
    generator = child(make_generator(0), "best of each metric")
    own = torch.arange(len(metrics))
    for step in torch.logspace(-1, -4, 40, dtype=torch.float64):
        moves = torch.randn(64, *best.shape, generator=generator, dtype=torch.float64)
        moves[0] = 0.0
        near = space.project((best + step * moves).flatten(0, 1)).view(moves.shape)
        reached = to_maximisation(values(near.flatten(0, 1)), metrics).view(64, len(own), -1)
        best = near[reached[:, own, own].argmax(0), own]
    pay_off = to_maximisation(values(best), metrics)
    high = pay_off.diagonal().clone()
    if low is None:
        # As for a known front: what each metric falls to at the best points of the others.
        low = pay_off.amin(0) - _MARGIN * (high - pay_off.amin(0))
    return Scale(low, high)


SYNTHETIC: dict[str, Callable[..., Case]] = {
    f"{kind}-{n}{'-noisy' if noise else ''}": partial(_synthetic, make=make, n=n, noise=noise)
    for kind, make in (("concave", _concave), ("sigmoid", _sigmoid), ("bumps", _bumps))
    for n in (2, 4, 8)
    for noise in (False, True)
}
"""Name -> what makes the case, given its name; option ``seed`` of the function."""

BOTORCH: dict[str, Callable[..., Case]] = {
    "botorch-dtlz2-2": partial(_botorch, function="DTLZ2", m=2),
    "botorch-dtlz2-4": partial(_botorch, function="DTLZ2", m=4),
    "botorch-branin-currin": partial(_botorch, function="BraninCurrin"),
    "botorch-vehicle-safety": partial(_botorch, function="VehicleSafety"),
}
"""Name -> what makes the case, given its name; option ``noise_std``."""
