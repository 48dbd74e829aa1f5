from __future__ import annotations

import pytest
import torch

from map_bo.data import Metric, Observations
from map_bo.space import CoefficientSpace
from map_bo.surrogates.auto import Auto
from map_bo.surrogates.links import DIFFERS, as_fitted
from map_bo.surrogates.prediction import observation_variance
from map_bo.surrogates.processes.gp import GP
from map_bo.surrogates.processes.hybrid import Hybrid
from map_bo.surrogates.quadratic import Quadratic
from map_bo.surrogates.surrogate import Surrogate, SurrogateModel

SAME, FRESH, SILENT = (
    Metric("same", resampling="same"),
    Metric("fresh", resampling="fresh"),
    Metric("silent"),
)


def seen(*metrics: Metric) -> Observations:
    X = torch.linspace(0, 1, 12, dtype=torch.float64).unsqueeze(-1)
    Y = torch.sigmoid(3 * X - 1).expand(-1, len(metrics))
    return Observations(
        X,
        Y,
        metrics,
        Yvar=Y * (1 - Y) / 100,
        counts=torch.full_like(Y, 100),
    )


def test_only_the_noise_that_differs_is_left_on_the_same_examples() -> None:
    before = seen(SAME, FRESH, SILENT)
    after = as_fitted(before)
    assert torch.allclose(after.Yvar[:, 0], DIFFERS * before.Yvar[:, 0])
    assert torch.allclose(after.counts[:, 0], before.counts[:, 0] / DIFFERS)
    for column in (1, 2):
        assert torch.equal(after.Yvar[:, column], before.Yvar[:, column])
        assert torch.equal(after.counts[:, column], before.counts[:, column])
    assert torch.equal(after.Y, before.Y)


def test_the_variance_of_scaled_counts_is_the_scaled_variance() -> None:
    """Both ways of stating the noise agree: p (1 - p) / n with n / share is the share of it."""
    after = as_fitted(seen(SAME))
    assert torch.allclose(after.Yvar, after.Y * (1 - after.Y) / after.counts)


def test_failed_rows_are_left_out_and_what_is_unknown_stays_unknown() -> None:
    nan = torch.nan
    given = Observations(
        torch.tensor([[0.0], [1.0]]),
        torch.tensor([[0.5], [nan]]),
        (SAME,),
        failures=(None, "out of memory"),
    )
    after = as_fitted(given)
    assert len(after) == 1
    assert bool(after.Yvar.isnan().all())
    assert bool(after.counts.isnan().all())


@pytest.mark.parametrize(
    "surrogate", [Quadratic(), Quadratic(likelihood="gaussian"), GP(), Hybrid(), Auto()], ids=repr
)
def test_surrogates_are_surer_of_what_is_measured_on_the_same_examples(
    surrogate: Surrogate,
) -> None:
    space = CoefficientSpace.box(("a",))

    def spread(model: SurrogateModel) -> float:
        return float(observation_variance(model))

    same = spread(surrogate.fit(seen(SAME), space))
    fresh = spread(surrogate.fit(seen(FRESH), space))
    assert same < 0.9 * fresh


def test_a_metric_says_only_what_examples_can_be() -> None:
    from map_bo.errors import DataError

    with pytest.raises(DataError, match="must be 'same' or 'fresh', got 'few'"):
        Metric("a", resampling="few")  # type: ignore[arg-type]
