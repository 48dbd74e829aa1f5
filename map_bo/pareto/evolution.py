"""Evolutionary search through pymoo: front solvers for comparison, and direct search.

Neither uses gradients. :class:`NSGA2` and :class:`NSGA3` stand behind the same protocol as the
gradient solver; :func:`direct_search` spends true evaluations and is the ground truth that
benchmarks compare with.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import comb
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from map_bo.errors import ConfigError, SurrogateError, require
from map_bo.pareto.dominance import non_dominated
from map_bo.rng import child, child_seed
from map_bo.space import CoefficientSpace

__all__ = ["NSGA2", "NSGA3", "direct_search", "reference_directions"]


@dataclass(frozen=True)
class NSGA2:
    """NSGA-II (Deb et al. 2002) with simulated binary crossover and polynomial mutation.

    Attributes:
        population: Size of the population, and so the largest number of points returned.
        generations: Number of generations; ``population * generations`` points are evaluated.
        eta: Distribution index of crossover and mutation.
    """

    population: int = 100
    generations: int = 100
    eta: float = 20.0

    def __post_init__(self) -> None:
        _check(self.population, self.generations, self.eta)

    def solve(
        self,
        mean: Callable[[Tensor], Tensor],
        space: CoefficientSpace,
        *,
        generator: Generator,
    ) -> Tensor:
        """Return the distinct non-dominated points (``k x d``) of the last population."""
        return _solve("nsga2", self, mean, space, generator)


@dataclass(frozen=True)
class NSGA3:
    """NSGA-III (Deb and Jain 2014); the defaults are those of the published reference method.

    Attributes:
        population: Size of the population, and so the largest number of points returned.
        generations: Number of generations; ``population * generations`` points are evaluated.
        eta: Distribution index of simulated binary crossover and polynomial mutation.
    """

    population: int = 100
    generations: int = 25
    eta: float = 20.0

    def __post_init__(self) -> None:
        _check(self.population, self.generations, self.eta)

    def solve(
        self,
        mean: Callable[[Tensor], Tensor],
        space: CoefficientSpace,
        *,
        generator: Generator,
    ) -> Tensor:
        """Return the distinct non-dominated points (``k x d``) of the last population."""
        return _solve("nsga3", self, mean, space, generator)


def direct_search(
    evaluate: Callable[[Tensor], Tensor],
    space: CoefficientSpace,
    *,
    evaluations: int,
    population: int = 100,
    generator: Generator,
    algorithm: Literal["nsga2", "nsga3"] = "nsga2",
    eta: float = 20.0,
) -> tuple[Tensor, Tensor]:
    """Search with true evaluations and return everything that was evaluated.

    Args:
        evaluate: Maps ``n x d`` points of ``space`` to ``n x m`` values, larger is better; called
            once a generation.
        space: Where to search.
        evaluations: Number of rows evaluated in all; the last generation is cut to fit.
        population: Size of the population.
        generator: Source of all randomness; read, never advanced.
        algorithm: ``"nsga2"`` or ``"nsga3"``.
        eta: Distribution index of crossover and mutation.

    Returns:
        All points ``n x d`` and their values ``n x m``, in the order of evaluation; ``n`` is
        ``evaluations``, or less when the search can breed no new point.

    Raises:
        ConfigError: When a setting is not positive or the algorithm is unknown.
        SurrogateError: When a value is NaN or infinite.
    """
    _check(population, evaluations, eta)
    if algorithm not in ("nsga2", "nsga3"):
        raise ConfigError(f"there is no algorithm {algorithm!r}", hint="choose nsga2 or nsga3")
    points, values = [], []
    for X, Y in _generations(
        algorithm, evaluate, space, min(population, evaluations), eta, generator, evaluations
    ):
        points.append(X)
        values.append(Y)
    return torch.cat(points), torch.cat(values)


def reference_directions(m: int, population: int) -> Tensor:
    """Return ``k x m`` Das-Dennis directions, ``k <= population`` as large as it allows.

    When the lattice has fewer than ``m`` divisions it has no point inside the simplex; a second,
    half-sized layer is then put inside it (Deb and Jain 2014, section IV).
    """
    from pymoo.util.ref_dirs import get_reference_directions

    def lattice(partitions: int) -> Any:
        return get_reference_directions("das-dennis", m, n_partitions=partitions)

    def finest(room: int, limit: int) -> int:
        partitions = 0
        while partitions < limit and comb(partitions + m, m - 1) <= room:
            partitions += 1
        return partitions

    if m == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    outer = max(finest(population, population), 1)
    directions = torch.from_numpy(lattice(outer))
    inner = finest(population - len(directions), outer) if outer < m else 0
    if inner:
        second = 0.5 * torch.from_numpy(lattice(inner)) + 0.5 / m
        directions = torch.cat([directions, second])
    return directions[:population]


def _check(population: int, rounds: int, eta: float) -> None:
    require("pymoo", by="the evolutionary search", extra="baselines")
    if population < 1 or rounds < 1 or not eta > 0:
        raise ConfigError(
            "population, generations (or evaluations) and eta must be positive, got "
            f"{population}, {rounds} and {eta}",
            hint="raise what is not positive",
        )


def _solve(
    algorithm: str,
    settings: NSGA2 | NSGA3,
    mean: Callable[[Tensor], Tensor],
    space: CoefficientSpace,
    generator: Generator,
) -> Tensor:
    def values(X: Tensor) -> Tensor:
        with torch.no_grad():
            return mean(X).detach()

    last: list[Tensor] = []
    total = settings.population * settings.generations
    for _ in _generations(
        algorithm, values, space, settings.population, settings.eta, generator, total, last
    ):
        pass
    X = last[0]
    return X[non_dominated(values(X))]


def _generations(
    algorithm: str,
    evaluate: Callable[[Tensor], Tensor],
    space: CoefficientSpace,
    population: int,
    eta: float,
    generator: Generator,
    evaluations: int,
    last: list[Tensor] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the points and values of each generation; ``last`` receives the final population."""
    import numpy as np
    from pymoo.core.evaluator import Evaluator
    from pymoo.core.problem import Problem
    from pymoo.core.repair import Repair
    from pymoo.core.termination import NoTermination
    from pymoo.problems.static import StaticProblem

    class Project(Repair):  # type: ignore[misc]
        def _do(self, problem: Any, X: Any, **kwargs: Any) -> Any:
            return space.project(torch.from_numpy(X.astype(float))).numpy()

    def measured(X: Tensor) -> Tensor:
        Y = evaluate(X)
        if not bool(torch.isfinite(Y).all()):
            raise SurrogateError(
                "a value of the function that is searched is NaN or infinite",
                hint="an evolutionary search needs a finite value at every point of the space",
            )
        return Y

    X = space.sample(population, generator=child(generator, "population"))
    first = measured(X)  # its width tells the number of metrics
    problem = Problem(
        n_var=space.d, n_obj=first.shape[-1], xl=np.array(space.lower), xu=np.array(space.upper)
    )
    engine = _engine(algorithm, population, first.shape[-1], X, eta, Project())
    engine.setup(
        problem,
        termination=NoTermination(),
        seed=child_seed(generator, algorithm),
        verbose=False,
    )
    left = evaluations
    while left > 0:
        offspring = engine.ask()
        if offspring is None or len(offspring) == 0:
            break
        bred = torch.from_numpy(offspring.get("X").astype(float))[:left]
        Y = first if left == evaluations and torch.equal(bred, X) else measured(bred)
        left -= len(bred)
        yield bred, Y
        # The last generation may be cut short; the engine then sees only what was evaluated.
        offspring = offspring[: len(bred)]
        Evaluator().eval(StaticProblem(problem, F=-Y.numpy()), offspring)
        engine.tell(infills=offspring)
    if last is not None:
        last.append(torch.from_numpy(engine.pop.get("X").astype(float)))


def _engine(algorithm: str, population: int, m: int, X: Tensor, eta: float, repair: Any) -> Any:
    from pymoo.algorithms.moo.nsga2 import NSGA2 as PymooNSGA2
    from pymoo.algorithms.moo.nsga3 import NSGA3 as PymooNSGA3
    from pymoo.operators.crossover.sbx import SBX
    from pymoo.operators.mutation.pm import PM

    operators = {
        "sampling": X.numpy(),
        "crossover": SBX(eta=eta, prob=0.9),
        "mutation": PM(eta=eta),
        "repair": repair,
        "pop_size": population,
    }
    # pymoo prints a notice when its compiled part is missing; it changes nothing but speed.
    with contextlib.redirect_stdout(io.StringIO()):
        if algorithm == "nsga3":
            return PymooNSGA3(reference_directions(m, population).numpy(), **operators)
        return PymooNSGA2(**operators)
