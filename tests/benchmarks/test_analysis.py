"""Statistics that can be checked by hand or by their laws."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.quality.analysis import (
    Difference,
    bootstrap,
    holm,
    needed,
    needed_interval,
    paired,
    ranking,
    reach,
)
from benchmarks.quality.claims import claims, step_seconds, told
from benchmarks.quality.tables import (
    ablations_by_noise,
    against_default,
    evaluations_needed,
    matrix,
    worth,
)
from benchmarks.quality.tidy import COLUMNS


def row(case: str, method: str, seed: int, n: int, **measures: Any) -> dict[str, Any]:
    plain: dict[str, Any] = dict.fromkeys(COLUMNS)
    plain |= {"case": case, "method": method, "seed": seed, "evaluations": n, "failure": ""}
    plain |= {"family": "digits", "real_models": 1, "d": 4, "m": 4, "digest": "x", "version": "1"}
    return plain | measures


def study(offset: float, seeds: int = 10) -> list[dict[str, Any]]:
    """Two cases; the default's regret is ``offset`` below that of random, with noise in common."""
    noise = np.random.default_rng(0).normal(0, 0.01, (2, seeds))
    return [
        row(case, method, seed, n, regret=0.2 + noise[c, seed] - gain, share=0.5 + 40 * gain / n)
        for c, case in enumerate(("one", "two"))
        for method, gain in (("default", offset), ("random", 0.0))
        for seed in range(seeds)
        for n in (6, 12, 24, 48)
    ]


def test_a_bootstrap_interval_holds_the_mean_as_often_as_it_says() -> None:
    source = np.random.default_rng(1)
    inside = 0
    for trial in range(200):
        sample = source.normal(1.0, 2.0, size=(2, 20))
        low, high = bootstrap(sample.tolist(), resamples=500, seed=trial)
        inside += low <= 1.0 <= high
    assert 0.87 <= inside / 200 <= 0.99


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12), st.floats(-3, 3))
def test_a_bootstrap_interval_moves_with_the_values(values: list[float], shift: float) -> None:
    low, high = bootstrap([values], resamples=200)
    moved = bootstrap([[value + shift for value in values]], resamples=200)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert moved == pytest.approx((low + shift, high + shift), abs=1e-9)


def test_every_case_weighs_the_same() -> None:
    low, high = bootstrap([[1.0] * 50, [0.0]])
    assert (low, high) == (0.5, 0.5)


def test_a_paired_difference_ignores_what_seeds_share() -> None:
    found = paired(study(0.02), "default", "random", "regret", evaluations=24)
    assert found is not None
    assert found.mean == pytest.approx(-0.02)
    assert (found.low, found.high) == pytest.approx((-0.02, -0.02))
    assert (found.pairs, found.cases) == (20, 2)
    assert found.verdict(larger_is_better=False) == "better"
    assert found.verdict(larger_is_better=True) == "worse"
    assert paired(study(0.02), "default", "ax", "regret", evaluations=24) is None


def test_only_common_seeds_are_paired() -> None:
    rows = [r for r in study(0.0) if not (r["method"] == "random" and r["seed"] > 4)]
    found = paired(rows, "default", "random", "regret", evaluations=(12, 24))
    assert found is not None
    assert (found.pairs, found.seeds) == (10, 5)
    assert found.verdict(larger_is_better=False) == "no clear difference"


def test_the_first_checkpoint_that_reaches_the_target_counts() -> None:
    shares = {6: 0.2, 8: 0.96, 12: 0.94, 16: 0.99}
    rows = [row("one", "default", 0, n, share=s) for n, s in reversed(shares.items())]
    rows += [row("one", "default", 1, n, share=0.5) for n in shares]
    assert needed(rows)["one", "default"] == {0: 8.0, 1: math.inf}


def test_medians_keep_what_was_never_reached() -> None:
    assert needed_interval([8, 8, 12, math.inf, math.inf])[0] == 12
    middle, low, high = needed_interval([8.0, math.inf, math.inf])
    assert (middle, low, high) == (math.inf, 8.0, math.inf)
    assert needed_interval([16.0] * 5) == (16.0, 16.0, 16.0)


def test_holm_by_hand() -> None:
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert found == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}


def test_ranks_count_each_case_once() -> None:
    rows = []
    for case, order in (("one", "abc"), ("two", "acb"), ("three", "abc")):
        for rank, name in enumerate(order):
            rows += [row(case, name, seed, 12, regret=rank + 0.1 * seed) for seed in range(3)]
    found = ranking(rows, ["a", "b", "c"], "regret", evaluations=12)
    assert found is not None
    assert found.ranks == pytest.approx({"a": 1.0, "b": 7 / 3, "c": 8 / 3})
    assert found.wins["b", "c"] == 2
    assert found.wins["a", "b"] == 3
    assert ranking(rows, ["a", "nobody"], "regret", evaluations=12) is None


def test_verdicts_follow_the_interval() -> None:
    unclear, clear = Difference(0.1, -0.1, 0.3, 5, 1, 5), Difference(0.1, 0.05, 0.3, 5, 1, 5)
    assert unclear.verdict(larger_is_better=True) == "no clear difference"
    assert clear.verdict(larger_is_better=True) == "better"
    assert clear.verdict(larger_is_better=False) == "worse"


def test_few_seeds_give_no_verdict() -> None:
    found = paired(study(0.05, seeds=4), "default", "random", "regret", evaluations=24)
    assert found is not None
    assert found.verdict(larger_is_better=False) == "too few seeds"
    assert verdict_of(study(-0.05, seeds=4), "never worse") is None


def verdict_of(rows: list[dict[str, Any]], word: str) -> bool | None:
    (found,) = [claim for claim in claims(rows) if word in claim.statement]
    return found.met


def test_claims_turn_with_the_data() -> None:
    assert {claim.met for claim in claims([])} == {None}
    assert verdict_of(study(0.05), "never worse") is True
    assert verdict_of(study(-0.05), "never worse") is False
    lines = told(claims(study(-0.05)))
    assert any(line.startswith("- **not met**: never worse") for line in lines)


@pytest.mark.parametrize(
    ("own", "reference", "ax", "met"),
    [
        (12, 48, 24, True),
        (12, 24, 24, False),
        (12, 48, 16, False),
        (24, None, None, True),  # neither was reached in 96 evaluations
        (48, None, 96, False),
        (None, None, None, False),
    ],
)
def test_the_claim_on_evaluations(
    own: int | None, reference: int | None, ax: int | None, met: bool
) -> None:
    rows = [
        row("one", name, 0, n, share=1.0 if reached and n >= reached else 0.1)
        for name, reached in (("default", own), ("reference", reference), ("ax", ax))
        for n in (12, 16, 24, 48, 96)
    ]
    assert verdict_of(rows, "a quarter") is met


def test_coverage_outside_its_band_is_not_met() -> None:
    good = [row("one", "default", s, 24, coverage=0.95) for s in range(3)]
    bad = [row("two", "default", s, 24, coverage=0.85) for s in range(3)]
    assert verdict_of(good, "cover") is True
    assert verdict_of([*good, *bad], "cover") is False


def test_step_times_are_read_where_they_are_recorded(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    rows: Any = [{"experts": 4}]
    path.write_text(json.dumps({"data": {"rows": rows}}))
    assert step_seconds(path) == {}
    rows = {"propose 4: sobol": {f"{n} 25": 0.5 for n in (2, 4, 8, 16)}, "fit and front: gp": {}}
    path.write_text(json.dumps({"data": {"rows": rows}}))
    assert list(step_seconds(path)) == ["sobol"]
    assert claims([], path)[-1].met is True
    rows["propose 4: ax"] = {"2 25": "no", "4 25": 3.0}
    path.write_text(json.dumps({"data": {"rows": rows}}))
    claim = claims([], path)[-1]
    assert claim.met is False
    assert claim.figures[1] == "ax: 1 of 2 sizes, median 3.00 s, longest 3.00 s"


def test_tables_show_what_was_not_reached() -> None:
    rows = [row("one", "default", s, n, share=n / 100, regret=0.1) for s in (0, 1) for n in (6, 96)]
    rows += [row("one", "random", s, n, share=0.1, regret=0.2) for s in (0, 1) for n in (6, 48)]
    assert evaluations_needed(rows)[-1] == "| one | 96 [96, 96] | > 48 [> 48, > 48] |"
    assert matrix(rows, "regret", 6)[-1] == "| one | 0.100 (0.100) | 0.200 (0.200) |"
    assert matrix([], "regret", 6) == ["Not measured yet."]
    assert against_default(study(0.02), ["core"])[-1].startswith("| random | +0.0200 [+0.0200")


def test_a_seed_that_went_on_alone_does_not_raise_the_bound() -> None:
    rows = [row("one", "default", seed, 24, share=0.5) for seed in range(3)]
    rows.append(row("one", "default", 0, 48, share=0.99))
    assert reach(rows) == {("one", "default"): 24}
    assert set(needed(rows)["one", "default"].values()) == {math.inf}


def ablated(
    regret: float,
    share: float,
    optimism: tuple[float, float],
    coverage: tuple[float, float] = (0.95, 0.95),
) -> list[dict[str, Any]]:
    """The default and an ablation whose measures differ by so much, with noise in common."""
    noise = np.random.default_rng(1).normal(0, 0.01, 10)
    return [
        row(
            "one",
            method,
            seed,
            24,
            regret=0.1 + noise[seed] - gone * regret,
            share=0.8 + noise[seed] - gone * share,
            optimism=optimism[gone] + 1e-6 * noise[seed],
            coverage=coverage[gone] + 0.1 * noise[seed],
        )
        for gone, method in enumerate(("default", "default, without guard"))
        for seed in range(10)
    ]


def test_a_default_is_worth_what_goes_away_with_it() -> None:
    (found,) = worth(ablated(regret=-0.02, share=0.1, optimism=(0.01, 0.03)))
    assert found.name == "without guard"
    assert found.verdicts == ("helps", "helps", "helps", "no clear difference")
    assert found.regret.mean == pytest.approx(-0.02)
    assert found.share.mean == pytest.approx(0.1)
    assert found.optimism.mean == pytest.approx(-0.02)


def test_pessimism_is_no_better_than_optimism() -> None:
    (found,) = worth(ablated(regret=0.02, share=0.0, optimism=(0.01, -0.03)))
    assert found.verdicts == ("hurts", "no clear difference", "helps", "no clear difference")


@pytest.mark.parametrize(
    ("coverage", "verdict", "difference"),
    [
        ((0.94, 1.0), "helps", -0.02),  # all intervals much too wide without it
        ((0.94, 0.7), "helps", -0.2),
        ((0.8, 0.94), "hurts", 0.1),
        ((0.92, 0.96), "no clear difference", 0.0),  # both are where they should be
    ],
)
def test_intervals_may_be_too_wide_as_well_as_too_narrow(
    coverage: tuple[float, float], verdict: str, difference: float
) -> None:
    (found,) = worth(ablated(regret=0.0, share=0.0, optimism=(0.01, 0.01), coverage=coverage))
    assert found.verdicts[3] == verdict
    assert found.coverage.mean == pytest.approx(difference, abs=2e-3)


def test_exact_and_noisy_cases_are_told_apart() -> None:
    exact = ablated(regret=0.02, share=0.0, optimism=(0.01, 0.01))
    noisy = [
        {**each, "case": "one-noisy"}
        for each in ablated(regret=-0.02, share=0.0, optimism=(0.01, 0.01))
    ]
    cells = ablations_by_noise([*exact, *noisy])[-1].split(" | ")
    assert cells[0] == "| without guard"
    assert cells[2] == "hurts"
    assert cells[7] == "helps"
    assert ablations_by_noise(exact) == ["Not measured yet."]


def test_a_default_that_only_hurts_does_not_earn_its_place() -> None:
    def verdict(rows: list[dict[str, Any]]) -> bool | None:
        (claim,) = (each for each in claims(rows) if "earns its place" in each.statement)
        return claim.met

    assert verdict(ablated(regret=-0.02, share=0.0, optimism=(0.01, 0.01))) is True
    assert verdict(ablated(regret=0.0, share=0.0, optimism=(-0.01, 0.03))) is True
    assert verdict(ablated(0.0, 0.0, optimism=(0.01, 0.01), coverage=(0.95, 1.0))) is True
    assert verdict(ablated(regret=0.02, share=-0.1, optimism=(0.03, 0.01))) is False
    assert verdict([]) is None
