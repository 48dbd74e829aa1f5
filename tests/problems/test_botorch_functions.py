from __future__ import annotations

import pytest
import torch

from map_bo.data import to_maximisation
from map_bo.errors import ConfigError, DataError
from map_bo.problems.botorch_functions import BotorchProblem, function_names
from map_bo.problems.problem import Problem
from map_bo.rng import make_generator
from tests.contracts.problem_contract import ProblemContract


class TestBraninCurrinContract(ProblemContract):
    @pytest.fixture
    def problem(self) -> Problem:
        return BotorchProblem("BraninCurrin")


class TestVehicleSafetyContract(ProblemContract):
    """Bounds other than 0 and 1."""

    @pytest.fixture
    def problem(self) -> Problem:
        return BotorchProblem("VehicleSafety")


class TestNoisyZDT1Contract(ProblemContract):
    noise_free = False

    @pytest.fixture
    def problem(self) -> Problem:
        return BotorchProblem("ZDT1", dim=4, noise_std=0.1)


def test_lists_functions_without_outcome_constraints() -> None:
    names = function_names()
    assert {"ZDT1", "ZDT2", "ZDT3", "DTLZ1", "DTLZ7", "BraninCurrin", "VehicleSafety"} <= {*names}
    assert not {"C2DTLZ2", "BNH", "MW7", "DTLZ", "ZDT", "Branin", "Tensor"} & {*names}


@pytest.mark.parametrize("name", function_names())
def test_every_listed_function_can_be_evaluated(name: str) -> None:
    problem = BotorchProblem(name)
    X = problem.space.sample(2, generator=make_generator(0))
    seen = problem.evaluate(X, generator=make_generator(0))
    assert seen.Y.shape == (2, len(problem.metrics))
    assert bool(seen.ok.all())
    assert problem.reference_point.shape == (len(problem.metrics),)
    assert problem.max_hv is None or problem.max_hv > 0


def test_values_are_minimised_and_not_negated() -> None:
    problem = BotorchProblem("ZDT1", dim=3)
    X = torch.tensor([[0.25, 0.0, 0.0], [0.25, 1.0, 1.0]])
    # ZDT1: f1 = x1 and, with g = 1 + 9 mean(x2..), f2 = g (1 - sqrt(x1 / g)).
    expected = torch.tensor([[0.25, 0.5], [0.25, 10 * (1 - 0.025**0.5)]], dtype=torch.float64)
    torch.testing.assert_close(problem.true_values(X), expected)
    assert {metric.direction for metric in problem.metrics} == {"min"}
    assert {metric.kind for metric in problem.metrics} == {"unbounded"}


def test_the_reference_point_is_in_the_metrics_own_direction() -> None:
    problem = BotorchProblem("DTLZ2", dim=5, num_objectives=3)
    best = torch.full((1, 5), 0.5, dtype=torch.float64)
    values = to_maximisation(problem.true_values(best), problem.metrics)
    worst = to_maximisation(problem.reference_point, problem.metrics)
    assert bool((values > worst).all())


def test_the_space_is_the_functions_own() -> None:
    space = BotorchProblem("VehicleSafety").space
    assert space.names == ("x1", "x2", "x3", "x4", "x5")
    assert set(space.lower) == {1.0}
    assert set(space.upper) == {3.0}


def test_points_on_the_rounded_border_are_evaluated() -> None:
    problem = BotorchProblem("ZDT1", dim=2)
    seen = problem.evaluate(torch.tensor([[-1e-9, 1 + 1e-9]]), generator=make_generator(0))
    assert seen.Y[0].tolist() == pytest.approx([0.0, 10.0])


@pytest.mark.parametrize(
    ("dim", "num_objectives", "expected"), [(None, None, 6), (None, 7, 9), (None, 3, 6), (4, 2, 4)]
)
def test_functions_of_any_size_have_a_default(
    dim: int | None, num_objectives: int | None, expected: int
) -> None:
    problem = BotorchProblem("DTLZ2", dim, num_objectives)
    assert problem.space.d == expected
    assert len(problem.metrics) == (num_objectives or 2)


def test_a_known_hypervolume_is_told() -> None:
    assert BotorchProblem("ZDT1").max_hv == pytest.approx(120 + 2 / 3)
    assert BotorchProblem("DTLZ7").max_hv is None


def test_noise_is_known_through_its_variance() -> None:
    problem = BotorchProblem("ZDT2", dim=2, noise_std=0.5)
    X = problem.space.sample(2000, generator=make_generator(0))
    seen = problem.evaluate(X, generator=make_generator(1))
    assert bool((seen.Yvar == 0.25).all())
    assert abs(float((seen.Y - problem.true_values(X)).std()) - 0.5) < 0.02


@pytest.mark.parametrize("name", ["ZDT9", "C2DTLZ2", "MultiObjectiveTestProblem", "torch"])
def test_unknown_names_list_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError, match="no unconstrained test function") as caught:
        BotorchProblem(name)
    assert caught.value.hint is not None
    assert "BraninCurrin, CarSideImpact" in caught.value.hint


def test_a_fixed_size_cannot_be_changed() -> None:
    with pytest.raises(DataError, match="BraninCurrin has dim 2, not 3"):
        BotorchProblem("BraninCurrin", dim=3)
    with pytest.raises(DataError, match="VehicleSafety has num_objectives 3, not 2"):
        BotorchProblem("VehicleSafety", num_objectives=2)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(DataError, match="DTLZ2 cannot be made with"):
        BotorchProblem("DTLZ2", dim=2, num_objectives=3)


@pytest.mark.parametrize("noise", [-0.1, float("nan"), float("inf")])
def test_impossible_noise_is_refused(noise: float) -> None:
    with pytest.raises(DataError, match="noise_std must"):
        BotorchProblem("ZDT1", noise_std=noise)
