"""Verdicts on simulated runs of examples: plateaus, differences of known size, and their words."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import StoreError
from map_bo.examples.sets import ExampleOutcomes
from map_bo.loop.verdict.verdict import (
    BLEND,
    OVERALL,
    Comparison,
    Merge,
    Verdict,
    judge,
)
from map_bo.pareto.preferences import Preference
from map_bo.rng import child, make_generator
from map_bo.scale import Scale
from map_bo.space import CoefficientSpace
from map_bo.surrogates.prediction import predicted_mean
from map_bo.surrogates.quadratic import Quadratic

SPACE = CoefficientSpace.box(("a", "b"))
METRICS = (Metric("trec", resampling="same"), Metric("sst2", resampling="same"))
SCALE = Scale(METRICS, torch.tensor([0.2, 0.2]), torch.tensor([0.9, 0.9]), "test")
SIZE = 240


def right(levels: Tensor, source: torch.Generator, *, common: float = 0.8) -> Tensor:
    """Return ``n x m x SIZE`` outcomes with these levels (``n x m``) that correlate over rows."""
    n, m = levels.shape
    shared = torch.randn(1, m, SIZE, generator=source)
    own = torch.randn(n, m, SIZE, generator=source)
    score = math.sqrt(common) * shared + math.sqrt(1 - common) * own
    below: Tensor = torch.special.ndtr(score) < levels.unsqueeze(-1)
    return below.double()


def observed(X: Tensor, outcomes: Tensor, metrics: tuple[Metric, ...] = METRICS) -> Observations:
    """Return rows with the outcomes of every example."""
    items = torch.arange(outcomes.shape[-1])
    rows = tuple(
        {
            metric.name: ExampleOutcomes(items, own[j], len(items), (True,), (metric.name,))
            for j, metric in enumerate(metrics)
        }
        for own in outcomes
    )
    Y = outcomes.mean(-1)
    return Observations(X, Y, metrics, Y * (1 - Y) / len(items), examples=rows)


def run_of(seed: int, gain: float = 0.0, n: int = 12) -> tuple[Observations, Tensor]:
    """Return a run whose merges all are as good as the blend but for one, and the best of it."""
    source = child(make_generator(seed), "run")
    anchors = SPACE.anchors().X
    X = torch.cat([anchors, torch.rand(n, 2, generator=source).double()])
    levels = torch.full((len(X), 2), 0.8)
    levels[0] = 0.2  # the base
    levels[1, 1] = levels[2, 0] = 0.4  # experts on the other's task
    levels[len(anchors), :] += gain
    seen = observed(X, right(levels, source))
    best = len(anchors) + int(seen.Y[len(anchors) :].mean(-1).argmax())
    return seen, X[best]


def judged(seen: Observations, x: Tensor, seed: int = 0, **options: object) -> Verdict:
    source = make_generator(seed)
    merge = Merge("the chosen merge", x)
    return judge([merge], seen, SPACE, SCALE, Preference(), generator=source, **options)  # type: ignore[arg-type]


def test_on_a_plateau_it_says_to_keep_the_blend() -> None:
    against = (BLEND,)
    for seed in range(8):
        seen, x = run_of(seed)
        merge = Merge("the chosen merge", x, against)
        found = judge([merge], seen, SPACE, SCALE, Preference(), generator=make_generator(seed))
        assert found.advice == "keep the uniform blend: nothing here is distinguishable from it"


@pytest.mark.slow
def test_on_a_plateau_it_says_to_keep_the_blend_in_95_of_100_runs() -> None:
    kept = alarms = 0
    for seed in range(100):
        found = judged(*run_of(seed), seed=seed)
        kept += found.advice == "keep the uniform blend: nothing here is distinguishable from it"
        alarms += any(one.judged != "same" for one in found.against(BLEND))
    assert kept >= 95
    assert alarms <= 5


@pytest.mark.slow
def test_it_finds_differences_the_more_the_larger_they_are() -> None:
    found = []
    for gain in (0.0, 0.06, 0.12):
        verdicts = [judged(*run_of(seed, gain), seed=seed) for seed in range(100, 125)]
        found.append(sum(one.advice.startswith("take") for one in verdicts))
    assert found[0] <= 1
    assert found[0] < found[1] < found[2]
    assert found[2] >= 24


def test_on_held_out_examples_nothing_is_corrected_for_the_choice() -> None:
    seen, x = run_of(3, 0.05)
    here, fresh = judged(seen, x), judged(seen, x, chosen_here=False)
    assert (here.candidates, fresh.candidates) == (12, 1)
    for ours, theirs in zip(here.against(BLEND), fresh.against(BLEND), strict=True):
        assert ours.gain == theirs.gain
        assert ours.upper - ours.lower > theirs.upper - theirs.lower
        assert "largest of several" in ours.test
        assert "largest" not in theirs.test


def test_the_words_name_tasks_amounts_and_intervals() -> None:
    seen, x = run_of(5, 0.15)
    found = judged(seen, x)
    own = {one.metric: one for one in found.against(BLEND)}
    assert set(own) == {"trec", "sst2", OVERALL}
    one = own["trec"]
    assert one.n == SIZE
    assert one.ground == "examples"
    row = int((seen.X == x).all(-1).nonzero()[0])
    blend = int((seen.X == 0.5).all(-1).nonzero()[0])
    assert one.gain == pytest.approx(float(seen.Y[row, 0] - seen.Y[blend, 0]))
    assert one.lower < one.gain < one.upper
    assert found.advice.startswith(
        "take the chosen merge: better than the uniform blend on trec (+."
    )
    lines = found.lines()
    assert any("better than the base on trec (+." in line for line in lines)
    assert any("expert a on" in line for line in lines)


def test_numbers_are_short_and_signed() -> None:
    about = ("the chosen merge", BLEND)
    one = Comparison(*about, "trec", 0.031, 0.01, 0.052, 0.01, "examples", "McNemar, exact", 500)
    loss = Comparison(*about, "loss", -10.25, -20.0, -0.5, 0.01, "examples", "paired t", 500)
    tiny = replace(one, metric="mse", gain=2e-5, lower=-1e-5, p=0.2)
    assert str(one) == "trec (+.031 [.010, .052])"
    assert str(loss) == "loss (-10.250 [-20.000, -.500])"
    assert "2.0e-05" in str(tiny)
    verdict = Verdict((one, loss, tiny))
    assert verdict.advice == (
        "take the chosen merge: better than the uniform blend on trec (+.031 [.010, .052]), worse "
        "than the uniform blend on loss (-10.250 [-20.000, -.500]), not distinguishable on mse"
    )


def test_a_trade_off_is_called_one_and_a_worse_merge_too() -> None:
    about = ("the chosen merge", BLEND)
    up = Comparison(*about, "a", 0.1, 0.05, 0.15, 0.01, "examples", "t", 9)
    down = replace(up, metric="b", gain=-0.1, lower=-0.15, upper=-0.05)
    even = replace(up, metric=OVERALL, gain=0.0, lower=-0.1, upper=0.1, p=1.0)
    assert "unless these tasks matter more" in Verdict((up, down, even)).advice
    worse = replace(even, gain=-0.2, p=0.01)
    assert Verdict((down, worse)).advice.startswith(
        "keep the uniform blend: the chosen merge is worse than the uniform blend on b"
    )
    assert "was not measured" in Verdict(()).advice
    unsure = replace(even, gain=0.02)
    assert Verdict((unsure,)).advice.startswith("keep the uniform blend: nothing")
    assert "measure it, or keep the blend" in Verdict((unsure,), expected=True).advice


def test_metrics_to_be_minimised_gain_when_they_fall() -> None:
    metrics = (Metric("trec", resampling="same"), Metric("error", "min", resampling="same"))
    seen, x = run_of(7, 0.15)
    outcomes = torch.stack([
        torch.stack([row["trec"].values[:, 0], 1 - row["sst2"].values[:, 0]])
        for row in seen.examples
    ])  # fmt: skip
    scale = Scale(metrics, torch.tensor([0.2, 0.8]), torch.tensor([0.9, 0.1]), "test")
    turned = judge(
        [Merge("the chosen merge", x)],
        observed(seen.X, outcomes, metrics),
        SPACE,
        scale,
        Preference(),
        generator=make_generator(0),
    )
    plain = judged(seen, x)
    for ours, theirs in zip(turned.against(BLEND), plain.against(BLEND), strict=True):
        assert ours.gain == pytest.approx(theirs.gain)
        assert ours.lower == pytest.approx(theirs.lower, abs=5e-3)
        assert ours.p == pytest.approx(theirs.p, abs=0.02)


def test_rows_without_examples_are_compared_by_their_values() -> None:
    seen, x = run_of(5, 0.15)
    bare = replace(seen, examples=({},) * len(seen))
    found = {one.metric: one for one in judged(bare, x).against(BLEND)}
    row = int((seen.X == x).all(-1).nonzero()[0])
    blend = int((seen.X == 0.5).all(-1).nonzero()[0])
    error = math.sqrt(float(seen.Yvar[row, 0] + seen.Yvar[blend, 0]))
    one = found["trec"]
    assert one.ground == "values"
    assert (one.upper - one.lower) / 2 > 1.96 * error * 1.3  # one of 12
    assert OVERALL in found
    unknown = replace(bare, Yvar=torch.full_like(bare.Y, math.nan))
    lost = judged(unknown, x).against(BLEND)
    assert all(one.judged == "same" and math.isinf(one.upper) for one in lost)
    exact = judged(replace(bare, Yvar=torch.zeros_like(bare.Y)), x, chosen_here=False)
    assert all(one.p == 0 for one in exact.against(BLEND) if one.gain != 0)


def test_common_examples_alone_are_compared() -> None:
    seen, x = run_of(5, 0.15)
    row = int((seen.X == x).all(-1).nonzero()[0])
    some = torch.arange(0, SIZE, 3)
    examples = list(seen.examples)
    examples[row] = {
        name: ExampleOutcomes(some, one.values[some], SIZE, (True,), (name,))
        for name, one in seen.examples[row].items()
    }
    found = judged(replace(seen, examples=tuple(examples)), x, chosen_here=False)
    assert {one.n for one in found.against(BLEND) if one.metric != OVERALL} == {80}


def test_what_a_surrogate_promises_counts_for_no_more_than_was_measured() -> None:
    inside = torch.rand(12, 2, generator=make_generator(3)).double() / 2
    X = torch.cat([SPACE.anchors().X, inside])
    Y = torch.special.expit(2 * X.sum(-1) - 1).unsqueeze(-1).expand(-1, 2)  # it goes on rising
    seen = Observations(X, Y, METRICS, torch.full_like(Y, 1e-6))
    model = Quadratic().fit(seen, SPACE)
    far = torch.tensor([0.9, 0.9]).double()
    assert float(predicted_mean(model)(far[None]).min()) > float(Y.max()) + 0.05
    found = judged(seen, far, model=model, fitted=seen)
    assert {one.ground for one in found.comparisons} == {"posterior"}
    assert found.advice == "keep the uniform blend: nothing here is distinguishable from it"
    assert {one.judged for one in found.against("base")} == {"better"}


def test_an_unmeasured_blend_is_told() -> None:
    seen, x = run_of(5)
    rows = ~(seen.X == 0.5).all(-1)
    assert "was not measured" in judged(seen.select(rows), x).advice


def test_the_blend_itself_is_not_compared_with_itself() -> None:
    seen, _ = run_of(5)
    found = judged(seen, torch.tensor([0.5, 0.5]).double())
    assert {one.competitor for one in found.comparisons} == {"base", "a", "b"}


def test_a_verdict_survives_the_record() -> None:
    found = judged(*run_of(5, 0.1))
    again = Verdict.read(found.describe())
    assert again == found
    unknown = replace(found.comparisons[0], lower=-math.inf, upper=math.inf)
    odd = Verdict((unknown,), 3, "held-out examples", True, True)
    assert Verdict.read(odd.describe()) == odd
    with pytest.raises(StoreError, match="a recorded verdict cannot be read"):
        Verdict.read({"comparisons": [{}], "candidates": 1, "where": "", "kept": False})


def test_what_the_advice_has_said_is_not_said_again() -> None:
    up = Comparison("the merge", BLEND, OVERALL, 0.1, 0.05, 0.15, 0.001, "examples", "t", 99)
    base = replace(up, competitor="base")
    said = Verdict((up, base)).lines()
    assert len(said) == 2
    assert str(Verdict((up, base))) == "\n".join(said)
    by_model = Verdict((replace(up, ground="posterior"),)).lines()
    assert by_model[1].endswith("by the surrogate's posterior")
