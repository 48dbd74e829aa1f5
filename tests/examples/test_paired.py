"""Tests of two models on the same examples: known values, laws, and levels by simulation."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import optimize, stats
from torch import Generator, Tensor

from map_bo.errors import DataError
from map_bo.examples.paired import (
    compare,
    compare_sums,
    detectable,
    holm,
    largest_of,
    mcnemar,
    p_of_largest,
    paired_t,
    power,
    sign_flips,
    tango,
)
from map_bo.rng import make_generator


def pairs(n: int, runs: int, gain: float, loss: float, source: Generator) -> tuple[Tensor, Tensor]:
    """Return ``runs x n`` outcomes of two models: one alone is right with the given shares."""
    u = torch.rand(runs, n, generator=source)
    first = (u < gain) | (u > 0.6)
    second = (u > 0.6) | ((u >= gain) & (u < gain + loss))
    return first.double(), second.double()


def test_mcnemar_is_the_binomial_test_of_the_discordant() -> None:
    for gained, lost in ((8, 2), (2, 8), (5, 5), (0, 7), (1, 0)):
        expected = stats.binomtest(gained, gained + lost, 0.5).pvalue
        assert mcnemar(gained, lost) == pytest.approx(expected, abs=1e-12)


def test_mid_p_is_smaller_by_half_of_the_observed_table() -> None:
    # Fagerland, Lydersen and Laake 2013, table 1: 1 and 7 discordant pairs, .070 and .039.
    assert mcnemar(1, 7) == pytest.approx(0.0703, abs=1e-4)
    assert mcnemar(1, 7, mid_p=True) == pytest.approx(0.0391, abs=1e-4)
    assert mcnemar(3, 3, mid_p=True) < 1.0
    assert mcnemar(0, 0) == 1.0
    with pytest.raises(DataError, match="must not be negative, got -1 and 2"):
        mcnemar(-1, 2)


def test_interval_ends_where_the_score_statistic_reaches_its_quantile() -> None:
    """The constrained likelihood is maximised by search, not by Tango's closed form."""
    n = 44

    def statistic(gained: int, lost: int, delta: float) -> float:
        def deviance(only_second: float) -> float:
            only_first = only_second + delta
            rest = 1 - only_first - only_second
            if min(only_first, only_second, rest) <= 0:
                return math.inf
            counts, shares = (gained, lost, n - gained - lost), (only_first, only_second, rest)
            terms = zip(counts, shares, strict=True)
            return -sum(count * math.log(share) for count, share in terms)

        low, high = max(0.0, -delta), (1 - delta) / 2
        best = optimize.minimize_scalar(
            deviance, bounds=(low, high), method="bounded", options={"xatol": 1e-10}
        ).x
        variance = n * (2 * best + delta * (1 - delta))
        return float((gained - lost - n * delta) / math.sqrt(variance))

    for gained, lost in ((12, 3), (2, 9), (5, 5)):
        low, high = tango(gained, lost, n)
        assert statistic(gained, lost, low) == pytest.approx(1.959964, abs=1e-4)
        assert statistic(gained, lost, high) == pytest.approx(-1.959964, abs=1e-4)
        mirrored = tango(lost, gained, n)
        assert list(mirrored) == pytest.approx([-high, -low])


@pytest.mark.parametrize(("gained", "lost", "n"), [(0, 0, 50), (3, 0, 3), (9, 4, 200), (0, 1, 1)])
def test_interval_holds_the_difference_and_stays_in_range(gained: int, lost: int, n: int) -> None:
    low, high = tango(gained, lost, n)
    assert -1 <= low <= (gained - lost) / n <= high <= 1
    assert low < high
    wide = tango(gained, lost, n, z=3.0)
    assert wide[0] <= low
    assert wide[1] >= high


def test_interval_leaves_out_zero_where_the_score_test_does() -> None:
    for gained, lost in ((10, 2), (9, 3), (20, 8), (7, 7)):
        low, high = tango(gained, lost, 100)
        beyond = abs(gained - lost) / math.sqrt(gained + lost) > 1.959964
        assert (low > 0 or high < 0) == beyond


def test_interval_of_a_whole_population_is_the_difference_itself() -> None:
    assert tango(9, 4, 200, population=200) == (0.025, 0.025)
    half, whole = tango(9, 4, 200, population=400), tango(9, 4, 200)
    assert half[1] - half[0] == pytest.approx((whole[1] - whole[0]) / math.sqrt(2), rel=0.05)
    with pytest.raises(DataError, match="200 examples are not some of 100"):
        tango(9, 4, 200, population=100)
    with pytest.raises(DataError, match="9 and 4 of 12 examples"):
        tango(9, 4, 12)


def test_intervals_cover_and_false_alarms_stay_within_five_percent() -> None:
    source, runs = make_generator(0), 2000
    for n, share in ((40, 0.1), (200, 0.05), (300, 0.15)):
        first, second = pairs(n, runs, share, share, source)
        found = [compare(a, b) for a, b in zip(first, second, strict=True)]
        alarms = sum(one.p <= 0.05 for one in found) / runs
        covered = sum(one.lower <= 0 <= one.upper for one in found) / runs
        assert alarms <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / runs)
        assert covered >= 0.93


def test_intervals_on_part_of_a_population_cover_its_difference() -> None:
    source, covered, runs = make_generator(1), 0, 1000
    first, second = pairs(300, 1, 0.15, 0.05, source)
    truth = float((first - second).mean())
    for _ in range(runs):
        some = torch.randperm(300, generator=source)[:150]
        one = compare(first[0, some], second[0, some], population=300)
        covered += one.lower <= truth <= one.upper
    assert 0.93 <= covered / runs <= 0.98  # without the correction it is .99


def test_losses_are_compared_by_flips_or_by_t() -> None:
    few = torch.tensor([0.0] * 20 + [0.3, 0.1, 0.2, 0.4, 0.5])
    found = compare(few, torch.zeros(25))
    assert found.test == "sign flips"
    assert found.p == pytest.approx(2 / 2**5)  # t would say .007
    source = make_generator(2)
    many = torch.randn(50, generator=source).double() + 0.3
    found = compare(many, torch.zeros(50).double())
    assert found.test == "paired t"
    expected = stats.ttest_1samp(many.numpy(), 0.0)
    assert found.p == pytest.approx(float(expected.pvalue))
    interval = expected.confidence_interval(0.95)
    assert [found.lower, found.upper] == pytest.approx([interval.low, interval.high])
    assert paired_t(torch.zeros(5)) == 1.0
    with pytest.raises(DataError, match="2\\^50 combinations"):
        sign_flips(many)


def test_false_alarms_of_skewed_losses_stay_within_five_percent() -> None:
    source, runs, alarms = make_generator(3), 2000, 0
    for _ in range(runs):
        losses = -torch.rand(2, 120, generator=source).log().double()
        alarms += compare(losses[0], losses[1]).p <= 0.05
    assert alarms / runs <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / runs)


def test_examples_that_failed_are_left_out() -> None:
    nan = math.nan
    found = compare(torch.tensor([1.0, nan, 0.0, 1.0]), torch.tensor([0.0, 1.0, nan, 1.0]))
    assert (found.n, found.difference, found.discordant) == (2, 0.5, 1)
    with pytest.raises(DataError, match="no example in common"):
        compare(torch.tensor([nan]), torch.tensor([1.0]))
    with pytest.raises(DataError, match="not in pairs"):
        compare(torch.zeros(3), torch.zeros(4))


def test_holm_steps_down_and_keeps_the_order() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    assert holm([0.9, 0.6]) == [1.0, 1.0]


def test_largest_of_one_candidate_is_mcnemars_test() -> None:
    d = torch.tensor([1.0] * 12 + [-1.0] * 4 + [0.0] * 60).double()
    largest = largest_of([d[:, None]], draws=20_000, generator=make_generator(4))
    assert p_of_largest([d], largest) == pytest.approx(mcnemar(12, 4), abs=0.01)


def test_candidates_that_answer_alike_count_once() -> None:
    source = make_generator(5)
    d = torch.randint(-1, 2, (80, 1), generator=source).double()
    one = largest_of([d], draws=2000, generator=make_generator(6))
    same = largest_of([d.expand(80, 30)], draws=2000, generator=make_generator(6))
    assert torch.equal(one, same)
    other = torch.randint(-1, 2, (80, 30), generator=source).double()
    many = largest_of([other], draws=2000, generator=make_generator(6))
    assert float(many.quantile(0.95)) > float(one.quantile(0.95)) + 0.5
    assert not largest_of([torch.zeros(5, 3)], draws=7, generator=source).any()
    with pytest.raises(DataError, match="not of the same candidates"):
        largest_of([torch.zeros(5, 3), torch.zeros(5, 2)], generator=source)


def test_the_best_of_many_makes_no_more_false_alarms() -> None:
    source, runs, n, k = make_generator(7), 400, 150, 12
    naive = corrected = 0
    for _ in range(runs):
        shared = torch.rand(n, 1, generator=source)
        own = torch.rand(n, k + 1, generator=source)
        right = ((0.7 * shared + 0.3 * own) < 0.6).double()
        d = right[:, 1:] - right[:, :1]
        best = int(d.mean(0).argmax())
        naive += compare(right[:, 1 + best], right[:, 0]).p <= 0.05
        largest = largest_of([d], draws=300, generator=source)
        corrected += p_of_largest([d[:, best]], largest) <= 0.05
    assert naive / runs > 0.08  # what the correction is for
    assert corrected / runs <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / runs)


def test_sums_of_metrics_add_up_their_sets_of_examples() -> None:
    source = make_generator(8)
    parts = [torch.randn(40, generator=source).double(), torch.randn(90, generator=source).double()]
    found = compare_sums(parts)
    assert found.difference == pytest.approx(float(parts[0].mean() + parts[1].mean()))
    welch = stats.ttest_ind(parts[0].numpy(), -parts[1].numpy(), equal_var=False)
    assert found.p == pytest.approx(float(welch.pvalue))
    single = compare_sums(parts[:1])
    assert single.p == pytest.approx(paired_t(parts[0]))
    assert compare_sums([torch.zeros(5)]).p == 1.0
    assert math.isinf(compare_sums([torch.ones(1)]).upper)


def test_power_is_the_share_of_simulated_findings_and_grows() -> None:
    source, runs, n = make_generator(9), 1500, 200
    before = 0.0
    for difference in (0.0, 0.03, 0.06, 0.09):
        gain, loss = (0.12 + difference) / 2, (0.12 - difference) / 2
        first, second = pairs(n, runs, gain, loss, source)
        gained = (first > second).sum(-1).tolist()
        lost = (second > first).sum(-1).tolist()
        hits = sum(a > b and mcnemar(a, b) <= 0.05 for a, b in zip(gained, lost, strict=True))
        predicted = power(difference, 0.12, n)
        assert hits / runs == pytest.approx(predicted, abs=3 * math.sqrt(0.25 / runs))
        assert predicted > before
        before = predicted
    assert power(0.0, 0.0, n) == 0.0
    with pytest.raises(DataError, match=r"cannot differ by 0\.2"):
        power(0.2, 0.1, n)


def test_detectable_difference_has_the_power_wanted() -> None:
    found = detectable(0.15, 300)
    assert power(found, 0.15, 300) == pytest.approx(0.8, abs=1e-3)
    assert detectable(0.15, 300, level=0.005) > found
    assert math.isinf(detectable(0.5, 4))
