from __future__ import annotations

import pytest
import torch
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.loop.posterior.expected_gain import (
    _conditioned,
    _missing_volume,
    _regret,
    check_stopping,
    expected_gain,
)
from map_bo.loop.posterior.joint_posterior import JointPosterior
from map_bo.loop.run import Run
from map_bo.loop.stopping import Criterion, Stop
from map_bo.pareto.indicators import preference_weights
from map_bo.problems.synthetic import SigmoidQuadratics
from map_bo.rng import make_generator
from map_bo.samplers.designs.space_filling import Sobol
from map_bo.scale import Scale
from map_bo.space import CoefficientSpace
from map_bo.surrogates.quadratic import Quadratic
from map_bo.surrogates.surrogate import Surrogate
from map_bo.tracking.jsonl import MemoryStore
from tests.loop.bowls import Bowls, quick


def measured(
    n: int, *, count: int | None = 400, seed: int = 0, d: int = 2
) -> tuple[Observations, CoefficientSpace]:
    problem = SigmoidQuadratics(d=d, m=d, seed=seed, count=count)
    empty = Observations.empty(d, problem.metrics)
    X = Sobol().propose(empty, problem.space, n, generator=make_generator(seed))
    return problem.evaluate(X, generator=make_generator(seed)), problem.space


def gain(
    n: int,
    criterion: Criterion = "regret",
    *,
    count: int | None = 400,
    further: int = 0,
    seed: int = 0,
    surrogate: Surrogate | None = None,
    d: int = 2,
) -> tuple[float, float | None]:
    seen, space = measured(n, count=count, seed=seed, d=d)
    found = expected_gain(
        (surrogate or Quadratic()).fit(seen, space),
        seen,
        space,
        Scale.of(seen, space),
        criterion,
        guarded=True,
        generator=make_generator(seed),
        further=further,
    )
    return found.gain, found.floor


def values(s: int, q: int, m: int) -> Tensor:
    return torch.rand(s, q, m, generator=make_generator(3), dtype=torch.float64)


def regrets_of(predicted: Tensor, real: Tensor, weights: Tensor) -> Tensor:
    """What the points with the best predicted utility fall short of the really best."""
    rows = [int((predicted @ w).argmax()) for w in weights]
    return torch.stack(
        [(real @ w).max() - real[row] @ w for w, row in zip(weights, rows, strict=True)]
    )


def test_the_regret_is_that_of_the_choice_by_the_mean() -> None:
    draws, mean = values(5, 9, 3), values(1, 9, 3)[0]
    weights = preference_weights(20, 3, generator=make_generator(0))
    expected = [regrets_of(mean, draw, weights).mean() for draw in draws]
    assert _regret(mean, draws, weights) == pytest.approx(float(sum(expected)) / 5)


def test_there_is_nothing_to_gain_where_nothing_is_uncertain() -> None:
    mean = values(1, 30, 3)[0]
    draws = mean.expand(4, -1, -1)
    weights = preference_weights(20, 3, generator=make_generator(0))
    assert _regret(mean, draws, weights) == 0.0
    assert _missing_volume(mean, draws, generator=make_generator(0)) == 0.0


def test_a_point_that_only_the_draws_like_is_volume_to_gain() -> None:
    mean = torch.tensor([[0.5, 0.5], [0.4, 0.4]], dtype=torch.float64)
    draws = torch.tensor([[[0.5, 0.5], [1.0, 0.5]]], dtype=torch.float64)
    found = _missing_volume(mean, draws, generator=make_generator(0))
    assert found == pytest.approx(1.0, rel=0.1)
    behind = _missing_volume(mean - 1, draws - 2, generator=make_generator(0))
    assert behind == 1.0, "where nothing beats the reference, all is still to be gained"


@pytest.mark.parametrize("criterion", ["regret", "hypervolume"])
def test_evaluations_leave_less_to_gain_and_noise_more(criterion: Criterion) -> None:
    few, many = gain(8, criterion)[0], gain(40, criterion)[0]
    noisy, clean = gain(14, criterion, count=30)[0], gain(14, criterion, count=5000)[0]
    assert few > 2 * many > 0
    assert noisy > 2 * clean > 0


def test_a_metric_without_a_range_hides_no_gain() -> None:
    seen, space = measured(8)
    flat = Metric("safe", kind="unbounded")
    Y = torch.cat([seen.Y, torch.ones(len(seen), 1)], -1)
    more = Observations(seen.X, Y, (*seen.metrics, flat))
    fewer = Observations(seen.X, seen.Y, seen.metrics)
    found = [
        expected_gain(
            Quadratic().fit(data, space), data, space, Scale.of(data, space), "regret",
            guarded=True, generator=make_generator(0),
        ).gain
        for data in (fewer, more)
    ]  # fmt: skip
    assert found[1] == pytest.approx(found[0], rel=0.5)
    assert found[1] > 0.7 * found[0], "a third of all weights would be on the metric"


def test_the_expected_regret_is_near_the_real_one_where_the_surrogate_is_right() -> None:
    expected, real = 0.0, 0.0
    for seed in range(8):
        problem = SigmoidQuadratics(d=2, m=2, seed=seed, count=100)
        seen, space = measured(12, count=100, seed=seed)
        scale = Scale.of(seen, space)
        expected += gain(12, count=100, seed=seed)[0] / 8
        anywhere = space.sample(3000, generator=make_generator(4))
        best = problem.pareto_set(300, generator=make_generator(1))
        grid = torch.cat([anywhere, best, seen.X])
        model = Quadratic().fit(seen, space)
        predicted = torch.sigmoid(model.link_mean(grid))
        weights = preference_weights(64, 2, generator=make_generator(2))
        regrets = regrets_of(
            scale.gains(predicted), scale.gains(problem.true_values(grid)), weights
        )
        real += float(regrets.mean()) / 8
    assert real / 4 < expected < 4 * real


def test_conditioning_is_that_of_the_model() -> None:
    seen, space = measured(14)
    model = Quadratic().fit(seen, space)
    pool = space.sample(20, generator=make_generator(5))
    joint = JointPosterior.of(model, pool)
    rows = torch.tensor([3, 7])
    noise = torch.tensor([0.02, 0.05], dtype=torch.float64)
    mean = model.link_mean(pool[rows])
    more = model.condition_on_observations(pool[rows], mean, noise=noise.expand(2, 2))
    found = _conditioned(joint, rows, noise)
    expected = JointPosterior.of(more, pool)
    assert torch.allclose(found.covariance, expected.covariance, atol=1e-6)
    assert torch.allclose(found.mean, expected.mean, atol=1e-6)


def test_the_floor_falls_with_the_budget_and_rises_with_the_noise() -> None:
    assert gain(12)[1] is None
    (now, short), (_, long) = gain(12, further=2), gain(12, further=60)
    assert short is not None
    assert long is not None
    assert 0 < long < short < now
    noisy = gain(12, count=30, further=20)[1]
    clean = gain(12, count=5000, further=20)[1]
    assert noisy is not None
    assert clean is not None
    assert noisy > 2 * clean


def test_a_check_is_plain_data_and_the_same_every_time() -> None:
    seen, space = measured(12)
    settings = quick(40, stop=Stop(tolerance=0.9, patience=2))
    first = check_stopping(seen, [], space, settings, generator=make_generator(0))
    again = check_stopping(seen, [], space, settings, generator=make_generator(0))
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    assert first["evaluations"] == 12
    assert first["stop"] is None, "one round is not two"
    assert first["floor"] is not None
    second = check_stopping(seen, [first], space, settings, generator=make_generator(0))
    assert second["stop"].startswith("expected regret still to be gained at most 0.9 for 2 rounds")
    assert second["floor"] is None


def test_a_search_that_has_found_it_stops_and_still_verifies(bowls: Bowls) -> None:
    rule = Stop(tolerance=0.05, patience=2, least=6)
    result = Run(bowls, quick(40, verify=2, stop=rule), MemoryStore()).drive()
    told = result.summary["stop"]
    assert told["reason"].startswith("expected regret still to be gained at most 0.05")
    assert len(result.seen) == 38 - told["unused"] < 20
    assert len(result.verification) == 2
    assert len(bowls.calls) == len(result.seen) + 2
    assert [n for n, _ in told["series"]] == list(range(6, len(result.seen) + 1))
    gains = [value for _, value in told["series"]]
    assert all(value <= 0.05 for value in gains[-2:])
    assert result.summary["seconds"]["stop"] > 0


def test_a_search_that_never_gets_there_spends_its_budget_and_says_so() -> None:
    rule = Stop(tolerance=1e-7, patience=1, least=6)
    result = Run(Bowls(noise=0.4), quick(12, stop=rule), MemoryStore()).drive()
    told = result.summary["stop"]
    assert (told["reason"], told["unused"]) == (None, 0)
    assert len(result.seen) == 10
    notes = " ".join(result.summary["notes"])
    assert f"gained was at least {told['least_gain']:.2g}" in notes
    assert "below" in notes
    assert told["floor"] > 1e-7
