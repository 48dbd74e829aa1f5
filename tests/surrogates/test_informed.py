from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import SurrogateError
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace
from map_bo.surrogates.auto import Auto
from map_bo.surrogates.informed import Informed, InformedLeavingOut, InformedModel
from map_bo.surrogates.prediction import predict
from map_bo.surrogates.processes.gp import GP
from map_bo.surrogates.quadratic import Quadratic
from map_bo.surrogates.surrogate import Surrogate
from map_bo.surrogates.validation import LeavesOneOut, promises_leave_one_out, validate
from tests.contracts.smallest_surrogate import Plain
from tests.contracts.surrogate_contract import (
    METRICS,
    LeaveOneOutContract,
    mixed_observations,
    moments,
)


def part_of(seen: Observations, j: int, rows: slice = slice(None)) -> Observations:
    """Return one metric of some rows."""
    some = seen.select(range(len(seen))[rows])
    return Observations(
        some.X, some.Y[:, [j]], (some.metrics[j],), some.Yvar[:, [j]], some.counts[:, [j]]
    )


IDENTITY = torch.eye(2, dtype=torch.float64)


class TestInformedOfNothing(LeaveOneOutContract):
    """The larger space is the run's own, and nothing is known besides."""

    takes_fixed = False

    @pytest.fixture
    def surrogate(self) -> Surrogate:
        return Informed(Quadratic(), mixed_observations()[1], IDENTITY)


class TestInformedMetricByMetric(LeaveOneOutContract):
    """Two metrics were measured elsewhere too, at different points."""

    takes_fixed = False
    beside_covariance = 0.02  # what was counted elsewhere is smoothed by counts without one alone

    @pytest.fixture
    def surrogate(self) -> Surrogate:
        other, space = mixed_observations(9, seed=5)
        known = {"accuracy": part_of(other, 0), "score": part_of(other, 2, slice(0, 5))}
        return Informed(Quadratic(), space, IDENTITY, known)

    def test_nothing_succeeded_is_an_error(
        self, surrogate: Surrogate, space: CoefficientSpace, X: Tensor
    ) -> None:
        # The loss was measured nowhere.
        with pytest.raises(SurrogateError, match="succeeded"):
            surrogate.fit(Observations.empty(2, METRICS), space)


SCORES = (Metric("one", kind="unbounded"), Metric("two", direction="min", kind="unbounded"))
WHOLE = CoefficientSpace.box(("a", "b", "c", "d"))
SMALL = CoefficientSpace.box(("a+b", "c"))
DIRECTIONS = torch.tensor([[0.7, 0.4, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]], dtype=torch.float64)


def truth(X: Tensor) -> Tensor:
    slope = torch.tensor([[1.0, 2.0, -1.0, 0.5], [0.5, -1.0, 1.0, 3.0]]).double()
    bend = torch.tensor([[0.8, 0.2, 1.4, 0.3], [0.1, 0.9, 0.2, 0.6]]).double()
    return X @ slope.T + X.square() @ bend.T - 0.7 * (X[:, 0] * X[:, 2]).unsqueeze(-1)


def measured(X: Tensor, metrics: tuple[Metric, ...] = SCORES) -> Observations:
    Y = truth(X)[:, [SCORES.index(metric) for metric in metrics]]
    return Observations(X, Y, metrics, torch.zeros_like(Y))


def own(rows: int, seed: int = 0) -> Observations:
    """What the run measured: points of the small space."""
    U = SMALL.sample(rows, generator=make_generator(seed))
    seen = measured(U @ DIRECTIONS)
    return Observations(U, seen.Y, seen.metrics, seen.Yvar)


def elsewhere(rows: int, seed: int = 1) -> Tensor:
    return WHOLE.sample(rows, generator=make_generator(seed))


U = SMALL.sample(7, generator=make_generator(9))


@pytest.mark.parametrize("surrogate", [Quadratic(), GP(), Auto()], ids=["quadratic", "gp", "auto"])
def test_the_posterior_is_that_of_the_larger_space_along_the_directions(
    surrogate: Surrogate,
) -> None:
    seen, X = own(8), elsewhere(9)
    known = {metric.name: measured(X, (metric,)) for metric in SCORES}
    model = Informed(surrogate, WHOLE, DIRECTIONS, known).fit(seen, SMALL)
    whole = surrogate.fit(measured(torch.cat([X, seen.X @ DIRECTIONS])), WHOLE)
    for one, other in zip(moments(model, U), moments(whole, U @ DIRECTIONS), strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(model.link_mean(U), whole.link_mean(U @ DIRECTIONS))
    noisy: Any = model.posterior(U, observation_noise=True)
    expected: Any = whole.posterior(U @ DIRECTIONS, observation_noise=True)
    torch.testing.assert_close(noisy.variance, expected.variance)
    assert model.metrics == SCORES
    assert isinstance(model, LeavesOneOut)


def error(model: InformedModel) -> float:
    return float((predict(model, U).mean - truth(U @ DIRECTIONS)).square().mean())


def test_what_is_known_from_elsewhere_improves_the_prediction() -> None:
    seen = own(4)
    blind = Informed(Quadratic(), WHOLE, DIRECTIONS).fit(seen, SMALL)
    known = {metric.name: measured(elsewhere(20), (metric,)) for metric in SCORES}
    told = Informed(Quadratic(), WHOLE, DIRECTIONS, known).fit(seen, SMALL)
    assert error(told) < 0.1 * error(blind)
    variance = [moments(model, U)[1].mean() for model in (blind, told)]
    assert float(variance[1]) < float(variance[0])


def test_own_rows_are_not_counted_twice() -> None:
    seen, X = own(8), elsewhere(5)
    again = torch.cat([seen.X[:3] @ DIRECTIONS + 1e-12, X])
    known = {metric.name: measured(X, (metric,)) for metric in SCORES}
    twice = {metric.name: measured(again, (metric,)) for metric in SCORES}
    once, other = (
        Informed(Quadratic(), WHOLE, DIRECTIONS, rows).fit(seen, SMALL) for rows in (known, twice)
    )
    for one, two in zip(moments(once, U), moments(other, U), strict=True):
        assert torch.equal(one, two)
    # With nothing but its own rows it is the fit without any.
    mine = {"one": measured(seen.X @ DIRECTIONS, SCORES[:1])}
    alone = Informed(Quadratic(), WHOLE, DIRECTIONS, mine).fit(seen, SMALL)
    plain = Informed(Quadratic(), WHOLE, DIRECTIONS).fit(seen, SMALL)
    assert torch.equal(moments(alone, U)[0], moments(plain, U)[0])


def test_metrics_may_have_been_measured_at_different_points() -> None:
    seen = own(7)
    known = {"two": measured(elsewhere(12), SCORES[1:])}
    model = Informed(Quadratic(), WHOLE, DIRECTIONS, known).fit(seen, SMALL)
    full = seen.X @ DIRECTIONS
    first = Quadratic().fit(measured(full, SCORES[:1]), WHOLE)
    second = Quadratic().fit(measured(torch.cat([elsewhere(12), full]), SCORES[1:]), WHOLE)
    mean, variance = moments(model, U)
    for j, whole in enumerate((first, second)):
        own_mean, own_variance = moments(whole, U @ DIRECTIONS)
        torch.testing.assert_close(mean[:, [j]], own_mean)
        torch.testing.assert_close(variance[:, [j]], own_variance)
    # Metrics keep their order, whichever have more rows.
    turned = Observations(seen.X, seen.Y.flip(-1), SCORES[::-1], seen.Yvar)
    other = Informed(Quadratic(), WHOLE, DIRECTIONS, known).fit(turned, SMALL)
    torch.testing.assert_close(moments(other, U)[0], mean.flip(-1))


@pytest.mark.parametrize(
    "known",
    [
        {},
        {"one": measured(elsewhere(6), SCORES[:1])},
        {"one": measured(elsewhere(6), SCORES[:1]), "two": measured(elsewhere(9, 4), SCORES[1:])},
    ],
    ids=["nothing", "one", "both"],
)
def test_leaving_out_has_one_row_for_each_of_the_runs_own(
    known: Mapping[str, Observations],
) -> None:
    seen = own(8)
    failed = Observations.failed(seen.X[:2] * 0.5, SCORES, "no luck")
    model = Informed(Quadratic(), WHOLE, DIRECTIONS, known).fit(failed.append(seen), SMALL)
    assert isinstance(model, LeavesOneOut)
    mean, variance = model.leave_one_out()
    targets, noise = model.training_targets()
    assert mean.shape == variance.shape == targets.shape == noise.shape == (8, 2)
    torch.testing.assert_close(targets, seen.Y)
    assert bool((variance > 0).all())
    assert validate(model).describe()
    assert model.misfit_variance().shape == (2,)


def test_leaving_a_row_out_is_fitting_without_it() -> None:
    seen, X = own(8), elsewhere(9)
    known = {metric.name: measured(X, (metric,)) for metric in SCORES}
    surrogate = Informed(Quadratic(), WHOLE, DIRECTIONS, known)
    model = surrogate.fit(seen, SMALL)
    assert isinstance(model, LeavesOneOut)
    mean, _ = model.leave_one_out()
    whole = Quadratic().fit(measured(torch.cat([X, seen.X @ DIRECTIONS])), WHOLE)
    torch.testing.assert_close(mean, whole.leave_one_out()[0][9:])


def test_it_learns_on_from_points_of_the_small_space() -> None:
    seen, X = own(8), elsewhere(9)
    known = {metric.name: measured(X, (metric,)) for metric in SCORES}
    model = Informed(Quadratic(), WHOLE, DIRECTIONS, known).fit(seen, SMALL)
    whole = Quadratic().fit(measured(torch.cat([X, seen.X @ DIRECTIONS])), WHOLE)
    Z = truth(U[:2] @ DIRECTIONS) + 1.0
    noise = torch.full_like(Z, 1e-6)
    more = model.condition_on_observations(U[:2], Z, noise=noise)
    expected = whole.condition_on_observations(U[:2] @ DIRECTIONS, Z, noise=noise)
    torch.testing.assert_close(more.link_mean(U), expected.link_mean(U @ DIRECTIONS))
    assert not torch.allclose(more.link_mean(U), model.link_mean(U), atol=0.05)
    assert isinstance(more, InformedLeavingOut)
    assert more.own == 10
    part = model.for_metrics([1])
    assert part.metrics == SCORES[1:]
    torch.testing.assert_close(moments(part, U)[0], moments(model, U)[0][:, 1:])
    chosen: Any = model.describe_selection()
    assert [one["metric"] for one in chosen] == ["one", "two"]


def test_it_leaves_evaluations_out_only_where_its_surrogate_does() -> None:
    informed = Informed(Plain(), WHOLE, DIRECTIONS)
    model = informed.fit(own(8), SMALL)
    assert not isinstance(model, LeavesOneOut)
    assert not promises_leave_one_out(informed)
    assert promises_leave_one_out(Informed(Auto(), WHOLE, DIRECTIONS))
    assert [one["chosen"] for one in model.describe_selection()] == ["PlainModel"] * 2


def test_failed_measurements_elsewhere_teach_nothing() -> None:
    seen, X = own(8), elsewhere(4)
    failed = Observations.failed(X * 0.5, SCORES[:1], "no luck")
    known = measured(X, SCORES[:1])
    one, other = (
        Informed(Quadratic(), WHOLE, DIRECTIONS, {"one": rows}).fit(seen, SMALL)
        for rows in (known, failed.append(known))
    )
    assert torch.equal(moments(one, U)[0], moments(other, U)[0])
    nothing = Informed(Quadratic(), WHOLE, DIRECTIONS, {"one": failed}).fit(seen, SMALL)
    plain = Informed(Quadratic(), WHOLE, DIRECTIONS).fit(seen, SMALL)
    assert torch.equal(moments(nothing, U)[0], moments(plain, U)[0])


def test_the_selection_of_each_metric_is_told() -> None:
    known = {"two": measured(elsewhere(9), SCORES[1:])}
    model = Informed(Auto(), WHOLE, DIRECTIONS, known).fit(own(10), SMALL)
    assert [one["metric"] for one in model.describe_selection()] == ["one", "two"]
    assert model.describe_selection()[1]["scores"]
    plain = Informed(GP(), WHOLE, DIRECTIONS, known).fit(own(10), SMALL)
    assert [one["reason"] for one in plain.describe_selection()] == ["the only candidate"] * 2


def test_directions_that_do_not_fit_are_refused() -> None:
    for directions in (DIRECTIONS[:1], DIRECTIONS[:, :3], DIRECTIONS.T):
        with pytest.raises(SurrogateError, match=r"directions of shape .* do not take 2"):
            Informed(Quadratic(), WHOLE, directions).fit(own(8), SMALL)


def test_its_name_does_not_depend_on_what_is_known() -> None:
    known = {"two": measured(elsewhere(9), SCORES[1:])}
    names = {repr(Informed(GP(), WHOLE, DIRECTIONS, rows)) for rows in ({}, known)}
    assert names == {f"Informed({GP()!r})"}
