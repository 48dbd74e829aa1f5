"""Regression estimates of means over all examples, and the covariance of their errors."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from map_bo.examples.regression import ScoredExamples, errors_of_means, nested, regressed
from map_bo.rng import make_generator

SEEDS = st.integers(0, 10_000)


def scored(
    outcomes: Tensor, counts: list[int], X: Tensor | None = None, failed: Tensor | None = None
) -> ScoredExamples:
    """Rows that have the first ``counts`` of the examples (``r x M``), but for failed ones."""
    r, M = outcomes.shape
    mask = torch.arange(M) < torch.tensor(counts).unsqueeze(-1)
    there = mask if failed is None else mask & ~failed
    seen = torch.where(there, outcomes, torch.nan)
    n = there.sum(-1)
    squares = (seen - seen.nanmean(-1, keepdim=True)).square().nansum(-1)
    points = torch.linspace(0, 1, r, dtype=torch.float64).unsqueeze(-1) if X is None else X
    return ScoredExamples(points, seen, mask, (squares + 0.1) / (n + 1), M)


def population(r: int, M: int, seed: int, common: float = 0.8) -> Tensor:
    """Outcomes of 0 and 1, ``r x M``, of which rows have a part in common."""
    generator = make_generator(seed)
    shared = torch.randn(M, generator=generator, dtype=torch.float64)
    own = torch.randn(r, M, generator=generator, dtype=torch.float64)
    levels = torch.linspace(-0.5, 0.7, r, dtype=torch.float64).unsqueeze(-1)
    latent: Tensor = levels + common**0.5 * shared + (1 - common) ** 0.5 * own
    return (latent > 0).double()


def is_psd(matrix: Tensor) -> bool:
    values = torch.linalg.eigvalsh(matrix)
    return bool(values.min() >= -1e-10 * values.abs().max().clamp_min(1e-12))


@pytest.mark.parametrize(("first", "second"), [(4, 2), (3, 3), (5, 2), (1, 1)])
def test_the_covariance_of_nested_means_is_that_over_all_orders(first: int, second: int) -> None:
    y = torch.tensor([[1.0, 0.0, 2.0, 5.0, -1.0], [0.0, 3.0, 1.0, 1.0, 4.0]], dtype=torch.float64)
    orders = torch.tensor(list(permutations(range(5))))
    errors = torch.stack(
        [
            row[orders][:, :n].mean(-1) - row.mean()
            for row, n in zip(y, (first, second), strict=True)
        ]
    )
    brute = errors @ errors.mT / len(orders)
    parts = torch.arange(5) < torch.tensor([[first], [second]])
    torch.testing.assert_close(nested(torch.cov(y), parts, 5), brute)


def test_parts_that_do_not_nest_err_by_what_they_share() -> None:
    parts = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0]]).bool()
    # |s1 and s2| / (n1 n2) - 1/M, with 1 / 6 - 1 / 10
    assert float(nested(torch.ones(2, 2).double(), parts, 10)[0, 1]) == pytest.approx(1 / 6 - 0.1)


@given(SEEDS, st.lists(st.integers(1, 30), min_size=2, max_size=6))
def test_covariances_are_positive_semidefinite(seed: int, counts: list[int]) -> None:
    one = scored(population(len(counts), 30, seed), counts)
    means, errors, outcomes = regressed(one)
    assert bool(means.isfinite().all())
    assert is_psd(errors)
    assert is_psd(outcomes)
    assert is_psd(errors_of_means(one, outcomes))
    assert bool((errors.diagonal()[torch.tensor(counts) < 30] > 0).all())


@given(SEEDS, st.lists(st.sampled_from([5, 12, 20, 40]), min_size=3, max_size=7), SEEDS)
def test_the_order_of_rows_and_examples_does_not_matter(
    seed: int, counts: list[int], shuffle: int
) -> None:
    outcomes, generator = population(len(counts), 40, seed), make_generator(shuffle)
    X = torch.rand(len(counts), 2, generator=generator, dtype=torch.float64)
    one = scored(outcomes, counts, X)
    rows = torch.randperm(len(counts), generator=generator)
    items = torch.randperm(40, generator=generator)
    other = ScoredExamples(
        X[rows],
        one.outcomes[rows][:, items],
        one.scored[rows][:, items],
        one.variance[rows],
        40,
    )
    means, errors, outcomes = regressed(one)
    again, errors_again, outcomes_again = regressed(other)
    torch.testing.assert_close(again, means[rows])
    torch.testing.assert_close(errors_again, errors[rows][:, rows])
    torch.testing.assert_close(outcomes_again, outcomes[rows][:, rows])


@given(SEEDS, st.floats(0.01, 100), st.floats(-5, 5))
def test_estimates_have_the_unit_of_the_outcomes(seed: int, unit: float, shift: float) -> None:
    one = scored(population(4, 30, seed), [30, 30, 12, 6])
    other = ScoredExamples(
        one.X,
        unit * one.outcomes + shift,
        one.scored,
        unit**2 * one.variance,
        30,
    )
    means, errors, _ = regressed(one)
    scaled, errors_scaled, _ = regressed(other)
    torch.testing.assert_close(scaled, unit * means + shift, rtol=1e-6, atol=1e-6 * unit)
    torch.testing.assert_close(errors_scaled, unit**2 * errors, rtol=1e-6, atol=0.0)


def test_one_covariate_by_hand() -> None:
    z = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0]
    y = [1.0, 0.0, 1.0, 0.0, 0.0, 1.0, *([0.0] * 4)]
    one = scored(torch.tensor([z, y], dtype=torch.float64), [10, 6])
    means, errors, _ = regressed(one)
    # On the first six: means 4/6 and 3/6, z'z = 6 * 2/9, z'y = 3 - 2 = 1. The anchor's mean is .7.
    zz, zy = 4 / 3, 1.0
    s_z, s_y = (2.1 + 0.1) / 11, (1.5 + 0.1) / 7
    rho = (1.0 / 6) / (s_z * s_y) ** 0.5  # the one pair says all of the rule; z'y over 6 examples
    found = []
    for nu in (2.0, 5.0, 12.0, 30.0, 75.0, 180.0, 450.0):
        b = (zy + nu * rho * (s_z * s_y) ** 0.5) / (zz + nu * s_z)
        rest = s_y * (1 - rho**2)
        reach = [(z[t] - 4 / 6) ** 2 / (zz + nu * s_z) + 1 / 6 for t in range(6)]
        left = [(y[t] - 0.5 - b * (z[t] - 4 / 6)) / (1 - reach[t]) for t in range(6)]
        residual = (sum(x * x for x in left) + 10 * rest) / 16
        variance = residual * (1 / 6 - 1 / 10) * 7 / 4
        found.append((0.5 + b * (0.7 - 4 / 6), variance))
    assert any(
        float(means[1]) == pytest.approx(m, abs=1e-12)
        and float(errors[1, 1]) == pytest.approx(v, abs=1e-12)
        for m, v in found
    )
    assert float(means[0]) == pytest.approx(0.7)
    assert float(errors[0, 0]) == float(errors[0, 1]) == 0.0


def test_a_row_with_the_outcomes_of_a_complete_one_nearly_has_its_mean() -> None:
    outcomes = population(1, 200, 3).repeat(2, 1)
    one = scored(outcomes, [200, 40])
    means, errors, _ = regressed(one)
    plain = float((one.means[1] - one.means[0]).abs())
    assert float((means[1] - means[0]).abs()) < 0.1 * plain
    assert float(errors[1, 1]) < 0.1 * float(one.variance[1]) / 40


def test_estimates_are_unbiased_better_than_means_and_as_sure_as_they_say() -> None:
    outcomes, generator = population(9, 300, 1), make_generator(2)
    truth, parts = outcomes.mean(-1), [300, 300, 300, 120, 120, 120, 30, 30, 30]
    found, plain, held, contrasts = [], [], [], []
    for _ in range(120):
        order = torch.randperm(300, generator=generator)
        one = scored(outcomes[:, order], parts)
        means, errors, _ = regressed(one)
        found.append(means - truth)
        plain.append(one.means - truth)
        held.append((means - truth).abs()[3:] <= 1.96 * errors.diagonal()[3:].sqrt())
        apart = errors[7, 7] + errors[8, 8] - 2 * errors[7, 8]
        contrasts.append(bool((means - truth)[7:].diff().abs() <= 1.96 * apart.sqrt()))
    error, raw = torch.stack(found), torch.stack(plain)
    assert bool((error[:, :3].abs() < 1e-12).all())
    standard = error[:, 3:].std(0) / len(error) ** 0.5
    assert bool((error[:, 3:].mean(0).abs() < 4 * standard).all())
    gain = error[:, 3:].square().mean() / raw[:, 3:].square().mean()
    assert float(gain) < 0.7
    share = torch.stack(held).double().mean()
    assert 0.9 <= float(share) <= 0.99
    assert 0.9 <= sum(contrasts) / len(contrasts) <= 1.0


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_handful_of_examples_gives_a_wide_finite_answer(n: int) -> None:
    means, errors, _ = regressed(scored(population(5, 50, 4), [50, 50, 20, n, n]))
    assert bool(means.isfinite().all())
    assert bool((errors.diagonal()[3:] > 0.03 / n).all())


def test_the_last_example_closes_the_gap() -> None:
    outcomes = population(4, 60, 5)
    whole = outcomes.mean(-1)
    before = None
    for n in (15, 30, 58, 59, 60):
        means, errors, _ = regressed(scored(outcomes, [60, 60, n, n]))
        variance = float(errors[3, 3])
        assert before is None or variance < before
        before = variance
    assert float(means[3]) == pytest.approx(float(whole[3]), abs=1e-12)
    assert before == 0.0


def test_rows_on_other_examples_say_nothing() -> None:
    outcomes = population(2, 40, 6)
    one = scored(outcomes, [40, 40])
    parts = torch.stack([torch.arange(40) < 25, torch.arange(40) >= 30])
    seen = torch.where(parts, outcomes, torch.nan)
    apart = ScoredExamples(one.X, seen, parts, one.variance, 40)
    found, errors, _ = regressed(apart)
    torch.testing.assert_close(found, seen.nanmean(-1))
    assert float(errors[0, 1]) == 0.0


def test_failed_examples_are_left_out() -> None:
    outcomes = population(3, 60, 7)
    failed = torch.zeros(3, 60).bool()
    failed[2, [3, 11]] = True
    whole = scored(outcomes, [60, 60, 20])
    some = scored(outcomes, [60, 60, 20], failed=failed)
    means, errors, outcomes = regressed(some)
    full, errors_full, _ = regressed(whole)
    assert float((means - full)[2].abs()) < 0.1
    assert float(errors[2, 2]) != float(errors_full[2, 2])
    ratio = errors_of_means(some, outcomes)[2, 2] / nested(outcomes, some.scored, 60)[2, 2]
    assert float(ratio) == pytest.approx(20 / 18)
