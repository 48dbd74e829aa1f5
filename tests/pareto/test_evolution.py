from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from map_bo.errors import ConfigError, SurrogateError
from map_bo.pareto.evolution import NSGA2, NSGA3, direct_search, reference_directions
from map_bo.pareto.indicators import hypervolume
from map_bo.pareto.solver import FrontSolver
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace
from tests.contracts.solver_contract import SPACES, SolverContract, peaks


class TestNSGA2(SolverContract):
    @pytest.fixture
    def solver(self) -> FrontSolver:
        return NSGA2(population=50, generations=30)

    @pytest.fixture
    def most(self) -> int:
        return 50


class TestNSGA3(SolverContract):
    @pytest.fixture
    def solver(self) -> FrontSolver:
        return NSGA3(population=50, generations=30)

    @pytest.fixture
    def most(self) -> int:
        return 50


@pytest.mark.parametrize("kind", [NSGA2, NSGA3])
@pytest.mark.parametrize("wrong", [{"population": 0}, {"generations": 0}, {"eta": 0.0}])
def test_settings_must_be_positive(kind: type[NSGA2], wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be positive, got"):
        kind(**wrong)


def test_the_reference_settings_are_the_defaults() -> None:
    assert NSGA3() == NSGA3(population=100, generations=25, eta=20.0)


@pytest.mark.parametrize("algorithm", ["nsga2", "nsga3"])
@pytest.mark.parametrize("name", ["box", "simplex"])
def test_direct_search_spends_exactly_its_budget(algorithm: Any, name: str) -> None:
    space = SPACES[name]
    asked: list[Tensor] = []

    def evaluate(X: Tensor) -> Tensor:
        asked.append(X)
        return peaks(space, 3)(X)

    X, Y = direct_search(
        evaluate,
        space,
        evaluations=130,
        population=40,
        generator=make_generator(0),
        algorithm=algorithm,
    )
    assert len(X) == len(Y) == 130
    assert torch.equal(torch.cat(asked), X)
    assert torch.allclose(peaks(space, 3)(X), Y, rtol=0, atol=1e-12)
    assert space.contains(X).all()


def test_each_algorithm_searches_in_its_own_way() -> None:
    space = SPACES["box"]

    def found(algorithm: Any) -> Tensor:
        return direct_search(
            peaks(space, 3),
            space,
            evaluations=120,
            population=40,
            generator=make_generator(0),
            algorithm=algorithm,
        )[0]

    assert torch.equal(found("nsga2")[:40], found("nsga3")[:40])
    assert not torch.equal(found("nsga2"), found("nsga3"))


def test_direct_search_with_less_than_one_population() -> None:
    space = SPACES["box"]
    X, Y = direct_search(peaks(space, 2), space, evaluations=7, generator=make_generator(0))
    assert X.shape == (7, 3)
    assert Y.shape == (7, 2)


def test_direct_search_beats_random_search() -> None:
    space = CoefficientSpace.box("abcdef")
    mean = peaks(space, 2)
    _, Y = direct_search(mean, space, evaluations=1500, population=50, generator=make_generator(0))
    random = mean(space.sample(1500, generator=make_generator(0)))
    reference = torch.full((2,), -2.0, dtype=torch.float64)
    assert hypervolume(Y, reference) > 1.2 * hypervolume(random, reference)


def test_direct_search_is_reproducible() -> None:
    space = SPACES["box"]
    first, again, other = (
        direct_search(
            peaks(space, 2), space, evaluations=90, population=30, generator=make_generator(seed)
        )[0]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_direct_search_refuses_nonsense() -> None:
    space = SPACES["box"]
    with pytest.raises(ConfigError, match="no algorithm 'nsga9'"):
        direct_search(
            peaks(space, 2),
            space,
            evaluations=9,
            generator=make_generator(0),
            algorithm="nsga9",  # type: ignore[arg-type]
        )
    with pytest.raises(ConfigError, match="must be positive, got"):
        direct_search(peaks(space, 2), space, evaluations=0, generator=make_generator(0))

    def broken(X: Tensor) -> Tensor:
        return peaks(space, 2)(X).masked_fill(X[:, :1] > 0.5, torch.inf)

    with pytest.raises(SurrogateError, match="NaN or infinite"):
        direct_search(broken, space, evaluations=50, generator=make_generator(0))


@pytest.mark.parametrize("m", [1, 2, 3, 4, 8, 12])
@pytest.mark.parametrize("population", [1, 5, 100, 500])
def test_reference_directions_fill_the_simplex(m: int, population: int) -> None:
    D = reference_directions(m, population)
    assert 1 <= len(D) <= population
    assert (D >= 0).all()
    assert torch.allclose(D.sum(-1), torch.ones(len(D), dtype=torch.float64))
    if m > 1 and population >= 100:
        assert len(D) > population // 3
        assert D.amin(-1).max() > 0  # some lie inside
