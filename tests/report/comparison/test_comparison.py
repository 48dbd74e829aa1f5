from __future__ import annotations

import dataclasses

import pytest
import torch

from map_bo.data import Metric
from map_bo.errors import DataError
from map_bo.pareto.indicators import win_rate_dominance
from map_bo.report.comparison.comparison import compare
from map_bo.report.comparison.runs import RunRecord
from tests.report.fake_runs import comparison, failed, record, sweep


def test_runs_are_compared_by_what_varies_and_paired_by_seed() -> None:
    found = comparison()
    assert found.keys == ("surrogate",)
    assert found.variants == ("surrogate=gp", "surrogate=quadratic")
    assert [run.seed for run in found.of("surrogate=gp")] == [0, 1, 2, 3, 4]
    gap = found.difference("surrogate=quadratic", "evaluations")
    assert gap is not None
    assert (gap.mean, gap.low, gap.high, gap.count) == (-6.0, -6.0, -6.0, 5)
    own = found.by_seed("surrogate=quadratic", "observed_hypervolume_real")
    base = found.by_seed("surrogate=gp", "observed_hypervolume_real")
    gap = found.difference("surrogate=quadratic", "observed_hypervolume_real")
    assert gap is not None
    assert gap.mean == pytest.approx(sum(own[s] - base[s] for s in own) / 5)


def test_the_order_of_the_runs_changes_nothing() -> None:
    runs = sweep()
    one, other = (compare(each, title="x") for each in (runs, runs[::-1]))
    assert one.variants == other.variants
    assert torch.equal(one.scale.point, other.scale.point)
    for variant in one.variants:
        assert one.mean(variant, "observed_hypervolume_real") == other.mean(
            variant, "observed_hypervolume_real"
        )
        assert one.curve(variant) == other.curve(variant)


def test_the_scale_is_the_widest_of_the_runs_and_says_so() -> None:
    found = comparison(loss=[1])
    outcomes = [record.outcome for record in sweep(loss=[1])]
    points = torch.stack([o.scale.point for o in outcomes if o is not None])
    assert found.scale.point[0] == points[:, 0].min()
    assert found.scale.point[1] == points[:, 1].max()  # a loss: larger is worse
    assert found.scale.rule == "worst of base and experts, the worst over 10 runs"


def test_runs_that_measured_no_anchor_do_not_set_the_scale() -> None:
    runs = sweep(seeds=2)
    outcome = runs[0].outcome
    assert outcome is not None
    far = dataclasses.replace(
        outcome,
        scale=dataclasses.replace(
            outcome.scale,
            point=outcome.scale.point - 5.0,
            rule="worst observed (neither base nor experts were measured)",
        ),
    )
    found = compare([dataclasses.replace(runs[0], outcome=far), *runs[1:]], title="x")
    assert bool((found.scale.point > -1).all())


def test_a_metric_without_a_range_in_every_run_is_noted_and_counts_nowhere() -> None:
    flat, runs = torch.tensor([True, False]), []
    for one in sweep(seeds=2):
        assert one.outcome is not None
        scale = dataclasses.replace(one.outcome.scale, ranged=flat)
        outcome = dataclasses.replace(one.outcome, scale=scale)
        runs.append(dataclasses.replace(one, outcome=outcome))
    found = compare(runs, title="x")
    assert found.scale.rangeless == ("invert",)
    assert any("'invert'" in note for note in found.notes)
    run = found.runs[0]
    assert run.record.outcome is not None
    seen = run.record.outcome.seen.succeeded()
    assert run.volumes[-1] == pytest.approx(float(found.scale.gains(seen.Y)[:, 0].max()))
    assert not [note for note in comparison().notes if "invert" in note]


def test_a_run_wins_half_against_itself_and_the_two_win_rates_differ() -> None:
    found = comparison()
    gp, quadratic = found.variants
    assert found.win_rate(gp, gp, "per objective") == pytest.approx(0.5)
    assert found.win_rate(gp, gp, "dominance") == 0.0
    per = [found.win_rate(a, b, "per objective") for a, b in ((gp, quadratic), (quadratic, gp))]
    assert sum(rate for rate in per if rate is not None) == pytest.approx(1.0)
    rates = [
        win_rate_dominance(a.points, b.points)
        for a, b in zip(found.of(gp), found.of(quadratic), strict=True)
    ]
    assert found.win_rate(gp, quadratic, "dominance") == pytest.approx(sum(rates) / len(rates))


def test_without_a_shared_seed_there_is_no_pair() -> None:
    runs = [record({"a": "1", "seed": "0"}), record({"a": "2", "seed": "1"})]
    found = compare(runs, title="x")
    assert found.difference("a=2", "evaluations") is None
    assert found.win_rate("a=1", "a=2", "dominance") is None


def test_curves_rise_and_end_at_the_mean() -> None:
    found = comparison()
    curve = found.curve("surrogate=gp")
    assert list(curve.mean) == sorted(curve.mean)
    assert all(
        low <= mean <= high
        for low, mean, high in zip(curve.low, curve.mean, curve.high, strict=True)
    )
    end = found.mean("surrogate=gp", "observed_hypervolume_real")
    assert end is not None
    assert curve.mean[-1] == pytest.approx(end.mean)


def test_a_run_that_stopped_early_keeps_its_last_value() -> None:
    runs = [record({"seed": "0"}, evaluations=9), record({"seed": "1"}, evaluations=15)]
    found = compare(runs, title="x")
    curve = found.curve("all runs")
    assert curve.places[-1] == 18
    early, late = found.runs
    assert curve.mean[-1] == pytest.approx((early.volumes[-1] + late.volumes[-1]) / 2)


def test_different_metrics_are_compared_on_what_is_common() -> None:
    runs = [record({"problem.experts": str(m), "seed": "0"}, m=m) for m in (2, 3)]
    found = compare(runs, title="x")
    assert [metric.name for metric in found.metrics] == ["rot90", "invert"]
    assert "left out: flip" in found.notes[0]
    assert all(run.points.shape[-1] == 2 for run in found.runs)


def test_a_metric_of_the_other_direction_is_not_common() -> None:
    metrics = (Metric("rot90", "min", "loss"), Metric("invert"))
    runs = [record({"a": "1"}, m=2), record({"a": "2"}, m=2, metrics=metrics)]
    assert [metric.name for metric in compare(runs, title="x").metrics] == ["invert"]


def test_nothing_in_common_is_told() -> None:
    runs = [record({"a": "1"}, m=1), record({"a": "2"}, m=1, metrics=(Metric("other"),))]
    with pytest.raises(DataError, match="no metric in common: rot90; other"):
        compare(runs, title="x")


def test_what_did_not_finish_is_listed_and_counts_nowhere() -> None:
    found = comparison(seeds=2, more=[failed()])
    assert [record.reason for record in found.missing] == ["out of memory"]
    assert len(found.runs) == 4
    with pytest.raises(DataError, match=r"none of the 1 runs of x finished.*out of memory"):
        compare([failed()], title="x")


def test_the_baseline_can_be_chosen() -> None:
    found = compare(sweep(seeds=2), title="x", baseline="surrogate=quadratic")
    assert found.variants[0] == found.baseline == "surrogate=quadratic"
    with pytest.raises(DataError, match="no variant 'gp'") as caught:
        compare(sweep(seeds=2), title="x", baseline="gp")
    assert "surrogate=gp" in (caught.value.hint or "")


def test_sweeps_that_share_settings_are_kept_apart_and_others_are_joined() -> None:
    def runs(sweep: str, seeds: list[int]) -> list[RunRecord]:
        return [record({"seed": str(s)}, sweep=sweep, name=f"{sweep}/{s}") for s in seeds]

    apart = compare([*runs("one", [0, 1]), *runs("two", [0, 1])], title="x")
    assert apart.variants == ("sweep=one", "sweep=two")
    assert "separate variants by sweep" in apart.notes[0]
    joined = compare([*runs("one", [0, 1]), *runs("two", [2, 3])], title="x")
    assert joined.variants == ("all runs",)
    assert len(joined.runs) == 4


def test_a_repeated_run_and_a_missing_seed_are_noted() -> None:
    twice = [record({"seed": "0"}, name="a"), record({"seed": "0"}, name="b")]
    found = compare(twice, title="x")
    assert len(found.runs) == 1
    assert "b has the settings and the seed of another run" in found.notes[0]
    assert "no recorded seed" in compare([record({"a": "1"})], title="x").notes[0]


def test_a_run_without_a_seed_does_not_stand_beside_seed_0() -> None:
    found = compare([record({"seed": "0"}), record({}, name="made in Python")], title="x")
    assert len(found.runs) == 1
    assert any("made in Python has the settings" in note for note in found.notes)
