from __future__ import annotations

import pytest
import torch

from map_bo.data import Metric, Observations
from map_bo.errors import SurrogateError
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace
from map_bo.surrogates.features import quadratic_features
from map_bo.surrogates.processes.gp import GP
from map_bo.surrogates.processes.hybrid import Hybrid
from map_bo.surrogates.surrogate import Surrogate
from tests.contracts.surrogate_contract import LeaveOneOutContract, moments

METRIC = (Metric("score", kind="unbounded"),)


class TestHybrid(LeaveOneOutContract):
    @pytest.fixture
    def surrogate(self) -> Surrogate:
        return Hybrid()


def box(d: int) -> CoefficientSpace:
    return CoefficientSpace.box([f"e{i}" for i in range(d)])


def test_follows_a_quadratic_outside_its_data_and_a_gp_does_not() -> None:
    generator = make_generator(0)
    weights = torch.randn(6, 1, generator=generator, dtype=torch.float64)
    X = torch.rand(20, 2, generator=generator, dtype=torch.float64)
    near, far = 0.5 * X, 0.5 + 0.5 * X

    def truth(X: torch.Tensor) -> torch.Tensor:
        return quadratic_features(2 * X - 1) @ weights

    seen = Observations(X=near, Y=truth(near), metrics=METRIC)
    error = {}
    for name, surrogate in (("hybrid", Hybrid()), ("gp", GP())):
        with torch.no_grad():
            error[name] = float((surrogate.fit(seen, box(2)).link_mean(far) - truth(far)).norm())
    assert error["hybrid"] < 0.3 * error["gp"]
    assert error["hybrid"] < 0.1 * float(truth(far).norm())


def test_follows_what_is_not_a_quadratic() -> None:
    X = torch.rand(25, 1, generator=make_generator(1), dtype=torch.float64)
    Q = torch.linspace(0, 1, 50, dtype=torch.float64).unsqueeze(-1)
    seen = Observations(X=X, Y=torch.sin(12 * X), metrics=METRIC)
    with torch.no_grad():
        error = Hybrid().fit(seen, box(1)).link_mean(Q) - torch.sin(12 * Q)
    assert float(error.square().mean().sqrt()) < 0.15


def test_many_coefficients_and_few_points() -> None:
    generator = make_generator(2)
    X = torch.rand(10, 16, generator=generator, dtype=torch.float64)
    seen = Observations(X=X, Y=X[:, :1] - X[:, 1:2], metrics=METRIC)
    Q = torch.rand(30, 16, generator=generator, dtype=torch.float64)
    mean, variance = moments(Hybrid().fit(seen, box(16)), Q)
    truth = Q[:, :1] - Q[:, 1:2]
    # Far fewer points than the 153 coefficients: the prior keeps the fit sane, and unsure.
    assert float((mean - truth).square().mean()) < 2 * float(truth.var())
    assert float(((mean - truth).abs() < 2 * variance.sqrt()).double().mean()) > 0.8


def test_unknown_link_is_refused() -> None:
    with pytest.raises(SurrogateError, match="no link kind 'probit'"):
        Hybrid(link="probit")  # type: ignore[arg-type]
