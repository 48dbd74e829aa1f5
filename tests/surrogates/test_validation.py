from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from map_bo.data import Metric
from map_bo.errors import SurrogateError
from map_bo.rng import make_generator
from map_bo.surrogates.links import IdentityLink
from map_bo.surrogates.processes.gp import GP
from map_bo.surrogates.quadratic import Quadratic
from map_bo.surrogates.surrogate import SurrogateModel
from map_bo.surrogates.validation import (
    LeavesOneOut,
    count_log_densities,
    log_densities,
    validate,
)
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
    assert set(described["metrics"]["loss"]) == {"log_density", "coverage", "rmse", "pit"}
    assert [sum(each["pit"]) for each in described["metrics"].values()] == [9, 9, 9]


def test_pit_counts_evaluations_by_the_probability_of_less() -> None:
    # One deviation above and below the mean, then at the mean and four deviations above.
    first, second = validate(Told()).pit
    assert first == (0, 1, 0, 0, 0, 0, 0, 0, 1, 0)
    assert second == (0, 0, 0, 0, 0, 1, 0, 0, 0, 1)


def test_pit_of_a_calibrated_model_is_level_and_of_a_sure_one_is_not() -> None:
    class Drawn(Told):
        def __init__(self, deviation: float) -> None:
            super().__init__()
            noise = torch.randn(2000, 2, generator=make_generator(0), dtype=torch.float64)
            self._targets = deviation * noise

        def leave_one_out(self) -> tuple[Tensor, Tensor]:
            return torch.zeros_like(self._targets), torch.full_like(self._targets, 0.75)

        def training_targets(self) -> tuple[Tensor, Tensor]:
            return self._targets, torch.full_like(self._targets, 0.25)

    level = torch.tensor(validate(Drawn(1.0)).pit)
    assert int(level.min()) > 150
    assert int(level.max()) < 250
    sure = torch.tensor(validate(Drawn(3.0)).pit)
    assert bool((sure[:, [0, -1]] > 500).all())
    assert bool((sure[:, 4:6] < 150).all())


def test_what_is_not_finite_is_none_in_the_record() -> None:
    class Sure(Told):
        def leave_one_out(self) -> tuple[Tensor, Tensor]:
            mean, _ = super().leave_one_out()
            return mean, torch.full_like(mean, torch.inf)

    described = validate(Sure()).describe()["metrics"]["a"]
    assert described["log_density"] is None
    assert described["coverage"] == 1.0


def test_probabilities_of_all_counts_add_up_to_one() -> None:
    seen, space = mixed_observations()
    part = Quadratic().fit(seen, space).for_metrics([0])
    n = torch.full((len(seen), 1), 12.0, dtype=torch.float64)
    misfit = torch.tensor([0.3], dtype=torch.float64)
    total = sum(
        count_log_densities(part, torch.full_like(n, k), n, misfit).exp() for k in range(13)
    )
    torch.testing.assert_close(torch.as_tensor(total), torch.ones_like(n), rtol=1e-6, atol=1e-6)


def test_certain_logits_give_the_binomial() -> None:
    seen, space = mixed_observations()
    part = Quadratic().fit(seen, space).for_metrics([0])
    part._loo_variance.zero_()
    mean, _ = part.leave_one_out()
    n = torch.full_like(mean, 20.0)
    k = torch.full_like(mean, 7.0)
    found = count_log_densities(part, k, n, torch.zeros(1, dtype=torch.float64))
    exact = torch.distributions.Binomial(20, logits=mean).log_prob(k)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)
