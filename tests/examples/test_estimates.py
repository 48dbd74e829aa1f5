"""Estimates of metrics on whole sets of examples, as observations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import DataError
from map_bo.evaluators.evaluator import binomial_variance
from map_bo.examples.estimates import Method, estimated
from map_bo.examples.sets import ExampleOutcomes
from map_bo.examples.sharing import DIFFERS, differing_share
from map_bo.rng import make_generator

ACCURACY = Metric("task", resampling="same")
M = 60


def population(r: int, seed: int = 0, size: int = M) -> Tensor:
    """Outcomes of 0 and 1, ``r x size``, that rows have largely in common."""
    generator = make_generator(seed)
    latent = torch.randn(size, generator=generator) + 0.5 * torch.randn(
        r, size, generator=generator
    )
    return (latent > -0.3).double()


def seen_of(
    outcomes: Tensor,
    counts: Sequence[int],
    metric: Metric = ACCURACY,
    *,
    means: bool = True,
    values: Sequence[float] | None = None,
    variances: Sequence[float] | None = None,
) -> Observations:
    """Rows of one metric with the first ``counts`` of their outcomes, in a shuffled numbering."""
    number = torch.randperm(outcomes.shape[-1], generator=make_generator(5))
    rows = [
        {"task": ExampleOutcomes(number[:n], row[:n], len(row), (means,))} if n else {}
        for row, n in zip(outcomes, counts, strict=True)
    ]
    pairs = list(zip(outcomes, counts, strict=True))
    found = [row[:n].nanmean() if n else row.nanmean() for row, n in pairs]
    Y = torch.tensor([float(y) for y in found] if values is None else values).double()
    if variances is None and metric.kind == "proportion":
        sizes = [n or outcomes.shape[-1] for n in counts]
        variances = [binomial_variance(y, n) for y, n in zip(Y.tolist(), sizes, strict=True)]
    elif variances is None:
        variances = [math.nan] * len(Y)
    return Observations(
        torch.linspace(0, 1, len(Y)).unsqueeze(-1),
        Y.unsqueeze(-1),
        (metric,),
        Yvar=torch.tensor(variances).double().unsqueeze(-1),
        examples=tuple(rows),
    )


@pytest.mark.parametrize("counts", [[M, M, M], [0, M, 0], [0, 0, 0]])
def test_observations_on_whole_sets_are_returned_as_they_are(counts: list[int]) -> None:
    seen = seen_of(population(3), counts)
    assert estimated(seen) is seen


def test_complete_rows_keep_their_values_and_what_is_rough_of_their_noise() -> None:
    seen = seen_of(population(5), [M, M, M, 20, 20])
    found = estimated(seen)
    assert torch.equal(found.Y[:3], seen.Y[:3])
    assert found.covariance is not None
    share = float(differing_share(seen)[0])
    torch.testing.assert_close(found.Yvar[:3], share * seen.Yvar[:3])
    torch.testing.assert_close(found.covariance[0].diagonal(), found.Yvar[:, 0])
    apart = found.covariance[0][:3, :3] - torch.diag(found.Yvar[:3, 0])
    assert bool((apart == 0).all())
    assert float(found.covariance[0][3, 4]) > 0
    assert not torch.equal(found.Y[3:], seen.Y[3:])
    exact = estimated(seen, roughness=False)
    assert bool((exact.Yvar[:3] == 0).all())
    assert torch.equal(exact.Y, found.Y)


def test_plain_values_are_those_measured_with_what_they_share() -> None:
    seen = seen_of(population(5), [M, M, M, 20, 20])
    found = estimated(seen, method="plain", roughness=False)
    better = estimated(seen, roughness=False)
    assert torch.equal(found.Y, seen.Y)
    assert found.covariance is not None
    # (1/n - 1/M) / (1/n) of the binomial variance, but for shrinkage
    assert float(found.Yvar[3]) == pytest.approx(float(seen.Yvar[3]) * (1 - 20 / M), rel=0.4)
    assert float(found.covariance[0][3, 4]) > 0.3 * float(found.Yvar[3])
    assert float(better.Yvar[3]) < float(found.Yvar[3])


def test_a_row_short_of_one_example_is_nearly_complete() -> None:
    outcomes = population(4)
    short = estimated(seen_of(outcomes, [M, M, M - 1, 20]))
    whole = estimated(seen_of(outcomes, [M, M, M, 20]))
    assert float((short.Y - whole.Y)[2].abs()) < 1 / M
    assert float(short.Yvar[2] / whole.Yvar[2]) == pytest.approx(1.0, abs=0.15)


def test_all_right_is_not_certain() -> None:
    seen = seen_of(torch.ones(3, M).double(), [M, 20, 10])
    found = estimated(seen, roughness=False)
    assert found.Yvar[1:, 0].tolist() == pytest.approx(
        [binomial_variance(1.0, n) * (1 - n / M) for n in (20, 10)], rel=0.7
    )
    assert found.Y[:, 0].tolist() == [1.0, 1.0, 1.0]


def test_estimates_stay_where_the_other_examples_can_take_them() -> None:
    outcomes = population(4, seed=1)
    outcomes[:2, :10], outcomes[:2, 10:] = 0.0, 1.0  # the anchors have all of their errors first
    outcomes[2:] = 1.0
    seen = seen_of(outcomes, [M, M, 20, 20])
    found = estimated(seen)
    assert bool((found.Y <= 1).all())
    losses = seen_of(3 * (1 - outcomes), [M, M, 20, 20], Metric("task", "min", "loss"))
    assert bool((estimated(losses).Y >= 0).all())


def test_outcomes_may_lie_beyond_the_bounds_of_their_mean() -> None:
    outcomes = 4 * population(4, seed=2) - 1.5  # -1.5 and 2.5, with a mean between 0 and 1
    outcomes[:, ::2] = 0.0
    inside = Metric("task", resampling="same")
    found = estimated(seen_of(outcomes, [M, M, 20, 20], inside), roughness=False)
    free = Metric("task", kind="unbounded", resampling="same")
    other = estimated(seen_of(outcomes, [M, M, 20, 20], free), roughness=False)
    torch.testing.assert_close(found.Yvar, other.Yvar)
    torch.testing.assert_close(found.Y, other.Y.clamp(0, 1))


def test_losses_with_heavy_tails_have_estimates_in_their_unit() -> None:
    generator = make_generator(3)
    common = torch.randn(M, generator=generator, dtype=torch.float64)
    outcomes = (common + 0.3 * torch.randn(5, M, generator=generator, dtype=torch.float64)).exp()
    metric = Metric("task", "min", "loss", resampling="same")
    found = estimated(seen_of(outcomes, [M, M, M, 15, 15], metric))
    milli = estimated(seen_of(1000 * outcomes, [M, M, M, 15, 15], metric))
    torch.testing.assert_close(milli.Y, 1000 * found.Y)
    assert milli.covariance is not None
    assert found.covariance is not None
    torch.testing.assert_close(milli.covariance, 1e6 * found.covariance)
    truth = outcomes.mean(-1)
    raw = outcomes[3:, :15].mean(-1)
    assert float((found.Y[3:, 0] - truth[3:]).abs().max()) < float((raw - truth[3:]).abs().max())


def test_failed_examples_are_left_out() -> None:
    outcomes = population(4)
    outcomes[3, [2, 5]] = torch.nan
    outcomes[0, 50] = torch.nan
    seen = seen_of(outcomes, [M, M, 20, 20])
    found = estimated(seen)
    assert bool(found.Y.isfinite().all())
    assert torch.equal(found.Y[:2], seen.Y[:2])  # complete, though one of its examples failed
    assert float(found.Yvar[3]) > 0


def test_values_without_outcomes_stay_and_are_independent() -> None:
    seen = seen_of(population(4), [M, 20, 20, 0])
    found = estimated(seen)
    assert float(found.Y[3]) == float(seen.Y[3])
    assert found.covariance is not None
    assert found.covariance[0][3, :3].tolist() == [0.0] * 3
    share = float(differing_share(seen)[0])
    assert float(found.Yvar[3]) == pytest.approx(share * float(seen.Yvar[3]))


def both(
    metrics: tuple[Metric, ...], rows: Sequence[Mapping[str, ExampleOutcomes]], Y: Tensor
) -> Observations:
    return Observations(
        torch.rand(len(Y), 1, generator=make_generator(1)), Y, metrics, examples=tuple(rows)
    )


def test_each_metric_finds_its_column() -> None:
    outcomes = torch.stack([population(4, 1), 1 - population(4, 2)], -1)
    order = torch.randperm(M, generator=make_generator(2))
    counts = [M, M, 20, 20]
    rows = [
        {"task": ExampleOutcomes(order[:n], one[order[:n]], M, (True, True), ("task_a", "task_b"))}
        for one, n in zip(outcomes, counts, strict=True)
    ]
    Y = torch.stack([one[order[:n]].mean(0) for one, n in zip(outcomes, counts, strict=True)])
    names = (Metric("task_a"), Metric("task_b"))
    found = estimated(both(names, rows, Y))
    turned = estimated(both(names[::-1], rows, Y.flip(-1)))
    alone = estimated(both(names[1:], rows, Y[:, 1:]))
    torch.testing.assert_close(turned.Y, found.Y.flip(-1))
    torch.testing.assert_close(alone.Y, found.Y[:, 1:])
    assert not torch.allclose(found.Y[2:], Y[2:], atol=1e-4)


def test_a_metric_that_is_no_mean_keeps_its_value_and_correlates_as_outcomes_do() -> None:
    variances = [0.002, 0.002, 0.006, 0.006]
    seen = seen_of(
        population(4),
        [M, M, 20, 20],
        means=False,
        values=[0.6, 0.7, 0.5, 0.4],
        variances=variances,
    )
    found = estimated(seen, roughness=False)
    assert torch.equal(found.Y, seen.Y)
    assert found.Yvar[:, 0].tolist() == pytest.approx([0, 0, 0.004, 0.004])
    assert found.covariance is not None
    correlation = float(found.covariance[0][2, 3] / 0.004)
    assert 0.3 < correlation < 1
    rough = estimated(seen)
    assert rough.Yvar[:2, 0].tolist() == pytest.approx([DIFFERS * 0.002] * 2)
    unknown = seen_of(population(4), [M, M, 20, 20], means=False, variances=[math.nan] * 4)
    assert bool((estimated(unknown).Yvar > 0).all())


def test_with_a_holdout_the_search_covers_all_that_counts() -> None:
    seen = seen_of(population(3), [40, 40, 40])
    assert estimated(seen, sizes={"task": 40}) is seen
    some = seen_of(population(3), [40, 40, 20])
    found, wider = estimated(some, sizes={"task": 40}), estimated(some)
    assert torch.equal(found.Y[:2], some.Y[:2])
    assert float(found.Yvar[2]) < float(wider.Yvar[2])


def test_failed_rows_and_evaluators_that_are_called_as_a_whole() -> None:
    seen = seen_of(population(4), [M, 20, 20, 20])
    whole = ExampleOutcomes(torch.tensor([0]), torch.tensor([0.4]), 1, (False,))
    both_metrics = Observations(
        seen.X,
        torch.cat([seen.Y, torch.tensor([[0.1], [0.2], [0.3], [0.4]]).double()], -1),
        (ACCURACY, Metric("whole", resampling="same")),
        Yvar=torch.cat([seen.Yvar, torch.full((4, 1), torch.nan).double()], -1),
        failures=(None, None, None, "out of memory"),
        examples=tuple({**row, "whole": whole} for row in seen.examples),
    )
    found = estimated(both_metrics)
    assert torch.equal(found.Y[:, 1], both_metrics.Y[:, 1])
    assert bool(found.Yvar[:, 1].isnan().all())  # not known, and not 0
    assert found.covariance is not None
    assert bool((found.covariance[1] == 0).all())
    # A row that its reason takes back counts for nothing.
    assert bool((found.covariance[0][3] == 0).all())
    rest = estimated(both_metrics.select([0, 1, 2]))
    torch.testing.assert_close(found.Y[:3], rest.Y)


def test_counts_stand_in_for_variances_and_fresh_values_keep_theirs() -> None:
    seen = seen_of(population(3), [M, 20, 20])
    told = Observations(
        seen.X,
        torch.cat([seen.Y, seen.Y.new_full((3, 2), 0.5)], -1),
        (ACCURACY, Metric("counted", resampling="same"), Metric("fresh", resampling="fresh")),
        Yvar=torch.tensor([[0.01, math.nan, 0.003]] * 3).double(),
        counts=torch.tensor([[math.nan, 100.0, math.nan]] * 3).double(),
        examples=seen.examples,
    )
    found = estimated(told)
    torch.testing.assert_close(
        found.Yvar[:, 1], torch.full((3,), DIFFERS * binomial_variance(0.5, 100)).double()
    )
    torch.testing.assert_close(found.Yvar[:, 2], told.Yvar[:, 2])


@pytest.mark.parametrize("method", ["auto", "plain"])
def test_bad_input_is_refused(method: Method) -> None:
    seen = seen_of(population(2), [M, 20])
    rows: tuple[Mapping[str, ExampleOutcomes], ...] = (
        seen.examples[0],
        {"task": ExampleOutcomes(torch.arange(20), torch.ones(20), 50, (True,))},
    )
    other = Observations(seen.X, seen.Y, seen.metrics, examples=rows)
    with pytest.raises(DataError, match="'task' are of different sets: 50 examples of 'task', 60"):
        estimated(other, method=method)
    with pytest.raises(DataError, match="got 'guess'"):
        estimated(seen, method="guess")  # type: ignore[arg-type]
