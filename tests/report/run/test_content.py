from __future__ import annotations

import dataclasses

import torch

from map_bo.constraints import AtLeast
from map_bo.report.run.content import (
    facts,
    failure_rows,
    hypervolume_rows,
    hypervolume_scale,
    metric_rows,
    notes,
)
from tests.report.fake_views import make_view


def test_facts_say_what_was_run() -> None:
    said = dict(facts(make_view(2, evaluations=20, verify=3, failures=(7,))))
    assert said["evaluations"] == (
        "23 (budget 23); 3 of them measured front points, inside the budget"
    )
    assert said["failed"] == "1"
    assert said["front"] == "120 predicted points, 3 of them also measured"
    assert said["surrogate"] == "Auto: quadratic for rot90; gp for invert"
    assert said["sampler"] == "Adaptive"
    assert said["time"] == "propose 1.9 s, evaluate 12.4 s, fit 0.07 s, solve 0.31 s"
    assert said["seed"] == "0"


def test_facts_say_which_examples_were_paid_for() -> None:
    view = make_view(2, evaluations=20, verify=3)
    math = {"scored": 1750, "full": 1210, "held_out": 90, "median": 140.0}
    spent = {"math": math, "code": {"scored": 12, "full": 1, "held_out": 0, "median": 1.0}}
    summary = {**view.summary, "full_evaluations": 7.96, "examples": spent}
    said = dict(facts(dataclasses.replace(view, summary=summary)))
    assert said["evaluations"].startswith("23, at the cost of 8 full ones (budget 23)")
    assert said["examples"] == (
        "math 1,750 (median 140 of 1,210 per merge, 90 held out); code 12 times as a whole"
    )


def test_a_surrogate_without_a_selection_is_named() -> None:
    view = dataclasses.replace(make_view(2), summary={"surrogate": {"settings": "Quadratic(a=1)"}})
    assert ("surrogate", "Quadratic") in facts(view)


def test_a_surrogate_of_the_samplers_own_is_named() -> None:
    summary = {"sampler": "Adaptive(x=1)", "sampler_surrogate": "Quadratic(a=1)"}
    view = dataclasses.replace(make_view(2), summary=summary)
    assert ("sampler", "Adaptive, through a surrogate of its own: Quadratic") in facts(view)


def test_a_view_without_a_summary_still_says_what_it_holds() -> None:
    view = dataclasses.replace(make_view(2, points=1, verify=0, failures=(7,)), summary={})
    assert facts(view) == [
        ("evaluations", "20"),
        ("failed", "1"),
        ("front", "1 predicted point, none of them also measured"),
    ]
    assert hypervolume_rows(view) == []
    assert notes(view) == []
    assert [row[4] for row in metric_rows(view)] == ["", ""]


def test_metric_rows_hold_both_ends_and_the_optimism() -> None:
    view = make_view(2, loss=(1,))
    name, direction, low, high, optimism = metric_rows(view)[1]
    assert (name, direction) == ("invert loss", "lower is better")
    assert float(low) > float(high)
    assert float(optimism) == round(view.summary["optimism"]["invert loss"], 3)
    assert optimism[0] in "+-"


def test_hypervolumes_are_told_to_be_predicted_or_real() -> None:
    rows = {name: kind for name, kind, _ in hypervolume_rows(make_view(2))}
    assert rows == {
        "predicted front": "predicted",
        "verified points": "real",
        "observed points": "real",
        "uniform blend": "real",
        "best expert": "real",
    }
    values = {name: value for name, _, value in hypervolume_rows(make_view(2, verify=0))}
    assert values["verified points"] is None


def test_the_scale_names_the_rule_of_the_reference_point() -> None:
    assert hypervolume_scale(make_view(2)).startswith("Reference point: worst of base and experts")


def test_the_scale_names_the_metrics_without_a_range() -> None:
    view = make_view(2)
    assert "range" not in hypervolume_scale(view)
    scale = dataclasses.replace(view.scale, ranged=torch.tensor([True, False]))
    without = dataclasses.replace(view, scale=scale)
    assert hypervolume_scale(without).endswith("Without a range, and not counted: invert.")


def test_constrained_metrics_are_told_with_their_bounds() -> None:
    view = make_view(2)
    scale = dataclasses.replace(view.scale, constraints=(AtLeast("invert", 0.5),))
    kept = dataclasses.replace(view, scale=scale)
    assert [row[1] for row in metric_rows(kept)] == ["higher is better", ">= 0.5"]
    assert hypervolume_scale(kept).endswith("Constraints, and not counted: invert.")


def test_failures_are_numbered_from_one() -> None:
    view = make_view(2, failures=(4, 9))
    assert failure_rows(view) == [(n, "RuntimeError: CUDA out of memory") for n in (5, 10)]


def test_it_is_said_how_busy_workers_were() -> None:
    told = {"kind": "processes", "count": 4, "utilisation": 0.934}
    view = dataclasses.replace(make_view(2), summary={"workers": told})
    assert ("workers", "4 processes, busy 93% of the time") in facts(view)
    view = dataclasses.replace(make_view(2), summary={"workers": {**told, "count": 1}})
    assert ("workers", "1 process, busy 93% of the time") in facts(view)
    view = dataclasses.replace(make_view(2), summary={"workers": {"count": 4, "utilisation": 1}})
    assert ("workers", "4, busy 100% of the time") in facts(view)
