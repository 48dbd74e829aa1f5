from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from map_bo.data import Metric
from map_bo.errors import DataError
from map_bo.evaluators.evaluator import Measurement, binomial_variance
from map_bo.loop.outcomes import outcome_of
from map_bo.loop.run import Run
from map_bo.tracking.jsonl import MemoryStore
from tests.loop.bowls import Bowls, quick

METRICS = (Metric("acc"), Metric("loss", "min", "loss"))
X = torch.tensor([0.25, 0.5], dtype=torch.float64)


def test_values_are_told_by_the_names_of_the_metrics() -> None:
    told = {"loss": {"value": 2.5, "variance": 0.01}, "acc": {"value": 0.75, "n": 200}}
    seen = outcome_of({**told, "seconds": 12}, X, METRICS)
    assert seen.X.tolist() == [[0.25, 0.5]]
    assert seen.Y.tolist() == [[0.75, 2.5]], "by name, whatever their order"
    assert seen.Yvar.tolist() == [[binomial_variance(0.75, 200), 0.01]]
    assert seen.counts[0, 0] == 200
    assert seen.counts[0, 1].isnan()
    assert seen.cost.tolist() == [12]
    assert seen.failures == (None,)


def test_a_measurement_is_what_an_evaluator_would_have_returned() -> None:
    seen = outcome_of({"acc": Measurement(0.5, count=10), "loss": 1}, X, METRICS)
    assert seen.counts[0, 0] == 10
    assert seen.Yvar[0, 1].isnan()


def test_a_failure_keeps_what_was_measured_before_it() -> None:
    seen = outcome_of({"failed": "out of memory"}, X, METRICS)
    assert seen.failures == ("out of memory",)
    assert bool(seen.Y.isnan().all())
    partly = outcome_of({"failed": "the second harness broke", "acc": 0.5}, X, METRICS)
    assert bool(partly.partial[0])
    assert partly.measured.tolist() == [[True, False]]


def test_a_metric_may_be_called_as_the_words_beside_it() -> None:
    seen = outcome_of({"failed": 3.0}, X, (Metric("failed", "min", "loss"),))
    assert seen.Y.tolist() == [[3.0]]
    assert seen.failures == (None,)


@pytest.mark.parametrize(
    ("told", "message", "hint"),
    [
        ({"acc": 0.5}, "lacks 'loss'", "tell every metric: acc, loss"),
        ({"ac": 0.5, "loss": 1}, "no metric 'ac'", "did you mean 'acc'"),
        ({"acc": math.nan, "loss": 1}, "metric 'acc': .* must be finite, got nan", "failed"),
        ({"acc": math.inf, "loss": 1}, "must be finite, got inf", "failed"),
        ({"acc": 1.5, "loss": 1}, r"'acc' cannot be 1\.5 \(it lies in \[0, 1\]\)", "own unit"),
        ({"acc": 0.5, "loss": {"value": -2}}, r"'loss' cannot be -2 .*\[0, inf\]", "own unit"),
        ({"acc": "0.5", "loss": 1}, "'acc' must be a number, got '0.5'", "failed"),
        ({"acc": True, "loss": 1}, "'acc' must be a number, got True", "failed"),
        ({"acc": None, "loss": 1}, "'acc' must be a number, got None", "failed"),
        ({"acc": {"n": 3}, "loss": 1}, "'acc' has no value", "value"),
        ({"acc": {"value": 0.5, "var": 1}, "loss": 1}, "no part 'var'", "variance"),
        ({"acc": {"value": 0.5, "n": 0}, "loss": 1}, "whole number from 1, got 0", "own unit"),
        ({"acc": {"value": 0.5, "n": 1.5}, "loss": 1}, "whole number from 1, got 1.5", "own unit"),
        ({"acc": {"value": 0.5, "n": 1, "count": 1}, "loss": 1}, "both n and count", "one"),
        ({"acc": {"value": 0.5, "variance": -1}, "loss": 1}, "must not be negative", "own unit"),
        ({"acc": 0.5, "loss": 1, "seconds": -1}, "seconds must be .* got -1", ""),
        ({"failed": " "}, "reason of a failure must be text", "failed"),
        ({"failed": 1}, "reason of a failure must be text, got 1", "failed"),
        ({}, "lacks 'acc', 'loss'", "tell every metric"),
    ],
)
def test_what_cannot_be_an_outcome_is_refused(
    told: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        outcome_of(told, X, METRICS)
    assert hint in str(caught.value.hint)


@given(st.floats(0, 1), st.floats(0, 1e6))
def test_numbers_are_kept_exactly(acc: float, loss: float) -> None:
    assert outcome_of({"acc": acc, "loss": loss}, X, METRICS).Y.tolist() == [[acc, loss]]


def test_a_run_is_told_by_name() -> None:
    run = Run(Bowls(), quick(8), MemoryStore())
    run.ask(2)
    with pytest.raises(DataError, match="lacks 'far from b'"):
        run.tell(1, {"near a": 0.1})
    assert run.state.pending == [0, 1]
    run.tell(1, {"near a": 0.1, "far from b": 0.2})
    run.tell(0, {"failed": "the node was taken away"})
    assert run.state.seen.failures == ("the node was taken away", None)
    assert run.state.outcomes[1].Y.tolist() == [[0.1, 0.2]]
