from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from map_bo.data import Metric
from map_bo.errors import ConfigError, EvaluationError
from map_bo.evaluators.loaders.set_metrics import declare, metric_from, outcomes_of, set_metrics
from map_bo.rng import make_generator


class Gathering:
    """A metric of all examples in the way of torchmetrics, without torchmetrics."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.function = function
        self.parts: list[tuple[Tensor, Tensor]] = []

    def update(self, preds: Tensor, target: Tensor) -> None:
        self.parts.append((preds, target))

    def compute(self) -> Tensor:
        return self.function(*(torch.cat(side) for side in zip(*self.parts, strict=True)))

    def reset(self) -> None:
        self.parts.clear()


def mean_error() -> Gathering:
    return Gathering(lambda p, t: (p - t).abs().mean())


def spread() -> Gathering:
    return Gathering(lambda p, t: p.var())


def drawn(n: int) -> tuple[Tensor, Tensor]:
    generator = make_generator(0)
    return torch.randn(n, generator=generator), torch.randn(n, generator=generator)


def test_of_a_mean_the_outcomes_are_those_of_the_examples() -> None:
    preds, targets = drawn(7)
    found = outcomes_of(mean_error(), preds, targets, "mae")
    torch.testing.assert_close(found, (preds - targets).abs().double())


def test_of_others_they_are_jackknife_pseudo_values() -> None:
    preds, targets = drawn(30)
    found = outcomes_of(spread(), preds, targets, "spread")
    n = len(preds)
    without = torch.stack([preds[torch.arange(n) != i].var() for i in range(n)]).double()
    jackknife = (n - 1) / n * (without - without.mean()).square().sum()
    torch.testing.assert_close(float(found.mean()), float(preds.var()), rtol=1e-5, atol=0)
    torch.testing.assert_close(float(found.var() / n), float(jackknife), rtol=1e-3, atol=0)


def test_groups_are_left_out_where_there_are_many() -> None:
    preds, targets = drawn(1000)
    counted: list[int] = []

    def variance(p: Tensor, t: Tensor) -> Tensor:
        counted.append(len(p))
        return p.var() if len(p) > 1 else torch.tensor(torch.nan)

    found = outcomes_of(Gathering(variance), preds, targets, "spread")
    assert counted == [1000, 1, *([995] * 200)]
    torch.testing.assert_close(float(found.mean()), float(preds.var()), rtol=1e-5, atol=0)
    # The variance of a variance of normal numbers is 2/(n - 1).
    assert float(found.var() / 1000) == pytest.approx(2 / 999, rel=0.25)


def test_one_example_has_the_value() -> None:
    assert outcomes_of(mean_error(), torch.tensor([3.0]), torch.tensor([1.0]), "a").tolist() == [2]


def test_warnings_of_metrics_stay_off_the_console() -> None:
    def loud(p: Tensor, t: Tensor) -> Tensor:
        warnings.warn("no positive samples", UserWarning, stacklevel=2)
        return p.mean()

    assert len(outcomes_of(Gathering(loud), *drawn(3), "loud")) == 3


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda p, t: p, "must be one number, got 3 values"),
        (lambda p, t: {"a": 1}, "must be one number, got a dict"),
        (lambda p, t: torch.tensor(torch.nan), "of 3 examples is nan"),
        (lambda p, t: p @ t[:2], "raised RuntimeError"),
    ],
)
def test_what_is_no_value_is_refused(
    function: Callable[[Tensor, Tensor], Tensor], message: str
) -> None:
    with pytest.raises(EvaluationError, match=message):
        outcomes_of(Gathering(function), *drawn(3), "odd")


def test_metrics_are_copied_and_named() -> None:
    given = mean_error()
    found = set_metrics(given)
    assert found is not None
    assert list(found) == ["Gathering"]
    assert found["Gathering"] is not given
    assert list(set_metrics({"a": given, "b": given}) or ()) == ["a", "b"]
    assert set_metrics(lambda outputs, targets: targets) is None
    with pytest.raises(ConfigError, match="'a' is a int"):
        set_metrics({"a": 3})
    with pytest.raises(ConfigError, match="no metrics"):
        set_metrics({})


def test_a_metric_that_says_nothing_must_be_described() -> None:
    with pytest.raises(ConfigError, match="does not say whether more is better"):
        declare({"mae": mean_error()}, None)
    told = declare({"mae": mean_error()}, [{"name": "error", "direction": "min", "kind": "loss"}])
    assert told == (Metric("error", "min", "loss"),)
    with pytest.raises(ConfigError, match="no metric 'man'") as found:
        declare({"mae": mean_error(), "other": mean_error()}, ["man"])
    assert "mae" in (found.value.hint or "")


def test_metrics_from_plain_data() -> None:
    assert metric_from("a") == metric_from(Metric("a")) == metric_from({"name": "a"})
    with pytest.raises(ConfigError, match="cannot be made"):
        metric_from({"title": "a"})


def test_metrics_of_torchmetrics_say_what_they_are() -> None:
    torchmetrics = pytest.importorskip("torchmetrics", exc_type=ImportError)
    classes = {"task": "multiclass", "num_classes": 3}
    sets = {
        "f1": torchmetrics.F1Score(**classes),
        "mcc": torchmetrics.MatthewsCorrCoef(**classes),
        "error": torchmetrics.MeanSquaredError(),
        "r2": torchmetrics.R2Score(),
    }
    assert declare(sets, None) == (
        Metric("f1"),
        Metric("mcc", lower=-1.0),
        Metric("error", "min", "loss"),
        Metric("r2", "max", "unbounded"),
    )


def test_torchmetrics_keeps_its_value_and_gets_a_variance() -> None:
    torchmetrics = pytest.importorskip("torchmetrics", exc_type=ImportError)
    generator = make_generator(0)
    preds, targets = torch.randn(60, 3, generator=generator), torch.arange(60) % 3
    accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=3)
    right = outcomes_of(accuracy, preds, targets, "accuracy")
    assert right.tolist() == (preds.argmax(-1) == targets).double().tolist()
    f1 = torchmetrics.F1Score(task="multiclass", num_classes=3, average="macro")
    found = outcomes_of(f1, preds, targets, "f1")
    assert float(found.mean()) == pytest.approx(float(f1(preds, targets)), abs=1e-6)
    assert 0.02 < float((found.var() / 60).sqrt()) < 0.12  # that of 60 examples is about .06
