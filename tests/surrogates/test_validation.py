from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from map_bo.data import Metric
from map_bo.errors import SurrogateError
from map_bo.surrogates.gp import GP
from map_bo.surrogates.links import IdentityLink
from map_bo.surrogates.surrogate import SurrogateModel
from map_bo.surrogates.validation import LeavesOneOut, log_densities, validate
from tests.contracts.surrogate_contract import METRICS, mixed_observations


class Mute(SurrogateModel):
    """A model with metrics and links, and nothing else."""

    metrics = (Metric("a"), Metric("b"))
    links = (IdentityLink(), IdentityLink())

    def link_mean(self, X: Tensor) -> Tensor:
        raise NotImplementedError

    def posterior(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class Told(Mute):
    """Leave-one-out results as given."""

    def leave_one_out(self) -> tuple[Tensor, Tensor]:
        mean = torch.tensor([[0.0, 5.0], [0.0, 5.0]], dtype=torch.float64)
        return mean, torch.full((2, 2), 0.75, dtype=torch.float64)

    def training_targets(self) -> tuple[Tensor, Tensor]:
        targets = torch.tensor([[1.0, 5.0], [-1.0, 9.0]], dtype=torch.float64)
        return targets, torch.full((2, 2), 0.25, dtype=torch.float64)


def test_densities_are_those_of_the_predictive_normal() -> None:
    normal = torch.distributions.Normal(torch.tensor([0.0, 5.0]).double(), 1.0)
    expected = normal.log_prob(Told().training_targets()[0])  # type: ignore[no-untyped-call]
    torch.testing.assert_close(log_densities(Told()), expected)


def test_validation_is_density_coverage_and_error_by_metric() -> None:
    validation = validate(Told())
    assert validation.metrics == ("a", "b")
    assert validation.n == 2
    torch.testing.assert_close(
        torch.tensor(validation.log_density).double(), log_densities(Told()).mean(0)
    )
    assert validation.coverage == (1.0, 0.5)  # 9 is four deviations from 5
    assert validation.rmse == pytest.approx((1.0, 8**0.5))


def test_other_targets_can_be_scored() -> None:
    exact = validate(Told(), Told().leave_one_out()[0])
    assert exact.rmse == (0.0, 0.0)
    assert exact.coverage == (1.0, 1.0)
    with pytest.raises(SurrogateError, match=r"shape \(3, 2\), the model's \(2, 2\)"):
        validate(Told(), torch.zeros(3, 2))


def test_a_model_that_cannot_leave_out_is_refused() -> None:
    assert not isinstance(Mute(), LeavesOneOut)
    with pytest.raises(SurrogateError, match="Mute cannot leave evaluations out") as caught:
        validate(Mute())
    assert caught.value.hint is not None


def test_description_is_plain_data() -> None:
    seen, space = mixed_observations(9)
    model = GP().fit(seen, space)
    assert isinstance(model, LeavesOneOut)
    described = json.loads(json.dumps(validate(model).describe()))
    assert described["n"] == 9
    assert list(described["metrics"]) == [metric.name for metric in METRICS]
    assert set(described["metrics"]["loss"]) == {"log_density", "coverage", "rmse"}
