from __future__ import annotations

import pytest
import torch
from torch import nn

from map_bo.data import Metric
from map_bo.errors import DataError, EvaluationError
from map_bo.evaluators.evaluator import Evaluator, Measurement
from map_bo.evaluators.metrics import (
    SeveralMetrics,
    entries_of,
    evaluator_of,
    evaluators_of,
    measure_all,
    metric_names,
    metrics_of,
)

MODEL = nn.Identity()
HARNESS = SeveralMetrics(
    lambda model: {"loss": 0.5, "acc": Measurement(0.75, count=4)},
    ["acc", Metric("loss", direction="min", kind="loss")],
)


def one(model: nn.Module) -> float:
    return 0.25


def test_names_of_several_metrics_begin_with_the_evaluator() -> None:
    assert metric_names("lm", HARNESS) == {"acc": "lm_acc", "loss": "lm_loss"}
    assert metric_names("math", one) == {"math": "math"}
    assert metric_names("math", SeveralMetrics(lambda m: {"x": 1.0}, ["x"])) == {"x": "math"}


def test_declared_metrics_are_those_of_the_run() -> None:
    found = metrics_of({"math": one, "lm": HARNESS}, None)
    assert [(m.name, m.direction, m.kind, m.resampling) for m in found] == [
        ("math", "max", "proportion", "same"),
        ("lm_acc", "max", "proportion", "same"),
        ("lm_loss", "min", "loss", "same"),
    ]


def test_given_metrics_must_have_the_declared_names() -> None:
    with pytest.raises(DataError, match="evaluators are lm_acc, lm_loss"):
        metrics_of({"lm": HARNESS}, [Metric("lm")])


def test_two_metrics_of_one_name_are_refused() -> None:
    with pytest.raises(DataError, match="two evaluators measure a metric called 'lm_acc'"):
        metrics_of({"lm": HARNESS, "lm_acc": one}, None)


def test_each_metric_is_found_in_what_was_returned() -> None:
    assert measure_all("lm", HARNESS, MODEL) == {
        "lm_acc": Measurement(0.75, count=4),
        "lm_loss": Measurement(0.5),
    }
    assert measure_all("math", one, MODEL) == {"math": Measurement(0.25)}
    alone = SeveralMetrics(lambda m: {"x": 1.0, "y": 2.0}, ["x"])
    assert measure_all("math", alone, MODEL) == {"math": Measurement(1.0)}


def test_one_metric_that_fails_leaves_the_others() -> None:
    partial = SeveralMetrics(lambda m: {"a": 1.0, "b": float("nan"), "cc": 2.0}, ["a", "b", "c"])
    found = measure_all("lm", partial, MODEL)
    assert found["lm_a"] == Measurement(1.0)
    assert "returned nan" in str(found["lm_b"])
    assert "returned no 'c'" in str(found["lm_c"])
    assert "cc" in (found["lm_c"].hint or "") if isinstance(found["lm_c"], EvaluationError) else 0
    columns = {f"lm_{name}": (i, Metric(f"lm_{name}")) for i, name in enumerate("abc")}
    entries, reasons = entries_of(found, columns)
    assert list(entries) == ["lm_a"]
    assert len(reasons) == 2


def test_a_number_for_several_metrics_is_refused() -> None:
    wrong = SeveralMetrics(lambda m: 1.0, ["a", "b"])  # type: ignore[arg-type, return-value]
    with pytest.raises(EvaluationError, match="declares the metrics a, b and returned a float"):
        measure_all("lm", wrong, MODEL)


def test_a_mapping_of_an_evaluator_that_declares_nothing_is_refused() -> None:
    with pytest.raises(EvaluationError, match="returned a dict, not a number") as found:
        measure_all("lm", lambda m: {"a": 1.0, "b": 2.0}, MODEL)
    assert "SeveralMetrics" in (found.value.hint or "")


def test_evaluators_of_some_metrics() -> None:
    evaluators: dict[str, Evaluator] = {"lm": HARNESS, "math": one}
    metrics = metrics_of(evaluators, None)
    assert list(evaluators_of(evaluators, metrics[1:2])) == ["lm"]
    assert list(evaluators_of(evaluators, metrics[::-1])) == ["math", "lm"]
    assert evaluator_of("lm_loss", evaluators) == "lm"
    assert evaluator_of("math", evaluators) == "math"


def test_a_metric_outside_its_bounds_is_a_failure() -> None:
    columns = {"a": (0, Metric("a"))}
    entries, reasons = entries_of({"a": Measurement(1.5)}, columns)
    assert not entries
    assert "outside the metric's bounds" in reasons[0]
    assert torch.isnan(torch.tensor(entries_of({"a": Measurement(1.0)}, columns)[0]["a"][1]))
