from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from map_bo.data import to_maximisation
from map_bo.pareto.indicators import hypervolume
from map_bo.report.comparison.runs import MEASURES, columns_of, measure
from map_bo.surrogates.outliers import Outlier
from tests.report.fake_runs import record


def test_measures_are_those_of_the_values_on_the_common_scale() -> None:
    run = record({"seed": "0"}, m=2, loss=[1], evaluations=12, failures=[5])
    outcome = run.outcome
    assert outcome is not None
    metrics = outcome.seen.metrics
    found = measure(run, "v", outcome.scale)
    low, high = (to_maximisation(x, metrics) for x in (outcome.scale.point, outcome.scale.best))
    gains = (to_maximisation(outcome.seen.Y, metrics) - low) / (high - low)
    zero = torch.zeros(2, dtype=torch.float64)
    volume = hypervolume(gains[outcome.seen.ok], zero)
    assert found.values["observed_hypervolume_real"] == pytest.approx(volume)
    assert found.volumes[-1] == pytest.approx(volume)
    assert list(found.volumes) == sorted(found.volumes)
    assert found.volumes[5] == found.volumes[4]  # a failure adds nothing
    assert found.values["failures"] == 1
    assert found.values["evaluations"] == 15
    front = to_maximisation(outcome.front.mean, metrics)
    assert found.values["front_hypervolume_predicted"] == pytest.approx(
        hypervolume((front - low) / (high - low), zero)
    )
    assert found.values["optimism"] > 0  # the fake front is .012 too good, whatever the direction
    assert set(found.values) == {measure.name for measure in MEASURES}


def test_a_value_that_was_set_aside_earns_no_hypervolume() -> None:
    run = record({"seed": "0"}, m=2, evaluations=12)
    outcome = run.outcome
    assert outcome is not None
    clean = measure(run, "v", outcome.scale)
    name = outcome.seen.metrics[0].name
    Y = outcome.seen.Y.clone()
    Y[6, 0] = 50.0
    wild = replace(outcome, seen=replace(outcome.seen, Y=Y))
    aside = replace(wild, outliers=(Outlier(6, name, 50.0, 0.5, 0.1),))
    wrong, found = (measure(replace(run, outcome=o), "v", o.scale) for o in (wild, aside))
    assert wrong.volumes[-1] > 2 * clean.volumes[-1]
    assert found.volumes[-1] <= clean.volumes[-1]
    assert found.values["failures"] == 0


def test_without_verification_there_is_nothing_real_to_say_of_the_front() -> None:
    run = record({"seed": "0"}, verify=0)
    outcome = run.outcome
    assert outcome is not None
    found = measure(run, "v", outcome.scale).values
    assert "verified_hypervolume_real" not in found
    assert "optimism" not in found


def test_columns_are_found_by_name() -> None:
    outcome = record({}, m=3).outcome
    assert outcome is not None
    metrics = outcome.seen.metrics
    assert columns_of(metrics, metrics[1:]) == [1, 2]


def test_many_metrics_are_measured_at_fewer_places() -> None:
    run = record({"seed": "0"}, m=6, evaluations=40)
    outcome = run.outcome
    assert outcome is not None
    found = measure(run, "v", outcome.scale)
    assert len(found.places) <= 25
    assert found.places[-1] == len(outcome.seen)
