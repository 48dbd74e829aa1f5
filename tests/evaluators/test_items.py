from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import map_bo
from map_bo.data import Metric
from map_bo.errors import ConfigError, DataError, EvaluationError
from map_bo.evaluators.evaluator import Measurement, measure
from map_bo.evaluators.examples import ExampleEvaluator
from map_bo.evaluators.items import Items, callable_evaluators, read_outcomes
from map_bo.evaluators.kinds import code_in, evaluator_from, settings_of
from map_bo.rng import make_generator
from tests.contracts.example_evaluator_contract import ExampleEvaluatorContract

INPUTS = torch.randn(11, 3, generator=make_generator(0))
MODEL = nn.Identity()


def layer() -> nn.Linear:
    made = nn.Linear(3, 1)
    with torch.no_grad():
        made.weight.copy_(torch.tensor([[1.0, -2.0, 0.5]]))
        made.bias.zero_()
    return made


def positive(model: nn.Module, items: Tensor) -> Tensor:
    found: Tensor = model(INPUTS[items]).squeeze(-1) > 0
    return found


def both(model: nn.Module, items: Tensor) -> Tensor:
    output: Tensor = model(INPUTS[items]).squeeze(-1)
    return torch.stack([(output > 0).float(), output.abs()], -1)


class TestOneMetric(ExampleEvaluatorContract):
    @pytest.fixture
    def evaluator(self) -> ExampleEvaluator:
        return Items(positive, size=lambda: len(INPUTS), batch_size=4)

    @pytest.fixture
    def model(self) -> nn.Module:
        return layer()


class TestSeveralMetrics(ExampleEvaluatorContract):
    @pytest.fixture
    def evaluator(self) -> ExampleEvaluator:
        metrics: list[str | Metric] = ["positive", Metric("level", "min", "loss")]
        return Items(both, size=lambda: len(INPUTS), metrics=metrics, digest="eleven")

    @pytest.fixture
    def model(self) -> nn.Module:
        return layer()


def test_it_is_one_name_and_needs_no_more_than_a_function_and_a_number() -> None:
    items = map_bo.Items(positive, size=11)
    assert items.size == 11
    assert items.metrics == (Metric("score"),)
    assert items.means == (True,)
    assert items.divisible
    assert items.strata is None
    right = int(positive(layer(), torch.arange(11)).sum())
    assert items(layer()) == {"score": Measurement(right / 11, count=11)}


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x,
        lambda x: x.float().tolist(),
        lambda x: [bool(one) for one in x],
        lambda x: tuple(x.int().tolist()),
        lambda x: x.numpy(),
        lambda x: x.int().numpy(),
        lambda x: x.to(torch.bfloat16),
        lambda x: x.to(torch.uint8).unsqueeze(-1),
        lambda x: list(x.double()),
        lambda x: [np.float32(one) for one in x],
        lambda x: x.double().requires_grad_(),
        lambda x: {"score": x.tolist()},
    ],
)
def test_outcomes_come_in_any_sensible_form(form: Callable[[Tensor], Any]) -> None:
    """Each of them is the same outcomes, and none is left with a graph or another dtype."""
    plain = positive(layer(), torch.arange(11)).double()
    with torch.enable_grad():
        found = Items(lambda _, items: form(plain[items] > 0.5), 11).score(MODEL, torch.arange(11))
    assert torch.equal(found, plain)
    assert found.dtype == torch.float64
    assert not found.requires_grad
    assert not found.is_inference()


@pytest.mark.parametrize(
    ("returned", "verdict"),
    [
        (torch.zeros(4), "4 outcomes came back for 5 examples"),
        (torch.zeros(5, 2), r"shape \(5, 2\) came back for 5 examples"),
        (torch.tensor(0.5), r"shape \(\) came back"),
        (0.5, "must be numbers, one per example, got a float: 0.5"),
        (None, "got a NoneType"),
        ([None] * 5, "got a list of others"),
        (["right"] * 5, "got a list of others"),
        ([[1.0], [1.0, 2.0]], "do not go together"),
        ([torch.zeros(1), torch.zeros(2)], "do not go together"),
        (torch.zeros(5, dtype=torch.complex64), "complex"),
        (np.zeros(5, dtype=complex), "complex"),
        (torch.tensor([0.0, torch.inf, 0, -torch.inf, 0]), "outcomes of 2 of 5 examples are inf"),
        ({"other": [0.0] * 5}, "there are no outcomes of 'score'"),
    ],
)
def test_what_is_no_outcome_per_example_is_refused(returned: object, verdict: str) -> None:
    with pytest.raises(EvaluationError, match=verdict):
        Items(lambda model, items: returned, 5)(MODEL)


def test_outcomes_of_several_metrics_have_their_columns() -> None:
    table = read_outcomes({"b": [1, 2], "a": [3, 4]}, 2, ["a", "b"])
    assert table.tolist() == [[3.0, 1.0], [4.0, 2.0]]
    assert read_outcomes([[1, 2], [3, 4]], 2, ["a", "b"]).tolist() == [[1.0, 2.0], [3.0, 4.0]]
    with pytest.raises(EvaluationError, match="2 outcomes came back for 2") as caught:
        read_outcomes([1, 2], 2, ["a", "b"])
    assert caught.value.hint == "return 2 x 2 outcomes, in the order of the items"


def test_the_function_is_called_with_at_most_a_batch() -> None:
    calls: list[int] = []

    def score(model: nn.Module, items: Tensor) -> Tensor:
        calls.append(len(items))
        assert not model.training
        assert not torch.is_grad_enabled()
        return torch.ones(len(items))

    Items(score, 70)(nn.Linear(1, 1))
    Items(score, 7, batch_size=3)(nn.Linear(1, 1))
    Items(score, 70, batch_size=None)(nn.Linear(1, 1))
    assert calls == [32, 32, 6, 3, 3, 1, 70]


def test_what_the_function_does_to_its_items_stays_with_it() -> None:
    def score(model: nn.Module, items: Tensor) -> Tensor:
        return items.zero_()

    wanted = torch.arange(5)
    Items(score, 5, metric=Metric("a", kind="unbounded")).score(MODEL, wanted)
    assert wanted.tolist() == [0, 1, 2, 3, 4]


class TestMetrics:
    def test_kind_and_direction_are_those_of_names(self) -> None:
        assert Items(positive, 1, kind="loss").metrics == (Metric("score", "min", "loss"),)
        found = Items(positive, 1, metrics=["a", "b"], kind="unbounded", direction="min")
        assert found.metrics == tuple(Metric(name, "min", "unbounded") for name in "ab")
        assert Items(positive, 1, metric="grade").metrics == (Metric("grade"),)

    def test_a_mapping_is_the_fields_of_a_metric(self) -> None:
        found = Items(positive, 1, metric={"direction": "min", "kind": "loss"})
        assert found.metrics == (Metric("score", "min", "loss"),)
        assert Items(positive, 1, metrics={"name": "a"}).metrics == (Metric("a"),)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("settings", "verdict"),
        [
            ({"metric": "a", "metrics": ["b"]}, "both metric and metrics"),
            ({"metric": Metric("a"), "kind": "loss"}, "of metrics given by name"),
            ({"metrics": ["a", "a"]}, "metric names appear twice: a"),
            ({"metrics": []}, "there are no metrics"),
            ({"kind": "los"}, "unknown kind 'los'"),
            ({"direction": "down"}, "must be 'max' or 'min'"),
            ({"size": 0}, "size must be a whole number of at least 1, got 0"),
            ({"size": 2.5}, "size must be"),
            ({"size": None}, "the number of examples is not known"),
            ({"digest": ""}, "digest must be text"),
            ({"batch_size": 0}, "batch_size must be"),
            ({"labels": [1, 2]}, "there are 2 labels of 5 examples"),
            ({"labels": "abcde"}, "labels must be one per example"),
            ({"labels": [[1]] * 5}, "labels cannot be compared"),
        ],
    )
    def test_settings_that_are_not_possible(self, settings: dict[str, Any], verdict: str) -> None:
        with pytest.raises((ConfigError, DataError), match=verdict):
            Items(positive, **{"size": 5, **settings})

    @pytest.mark.parametrize("score", [3, "my_task:right", None])
    def test_what_cannot_score_is_refused(self, score: Any) -> None:
        with pytest.raises(ConfigError, match="score must be a function"):
            Items(score, 5)


class TestFailedExamples:
    def failing(self, failed: int, size: int = 10, **settings: Any) -> Items:
        def score(model: nn.Module, items: Tensor) -> Tensor:
            return torch.where(items < failed, torch.nan, (items % 2).double())

        return Items(score, size, **settings)

    def test_the_metric_is_the_mean_of_the_others_and_it_is_told_once(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        items = self.failing(3)
        with caplog.at_level(logging.WARNING):
            assert items(MODEL) == {"score": Measurement(4 / 7, count=7)}
            items(MODEL)
        assert [record.getMessage() for record in caplog.records] == [
            "evaluator 'score': 3 of 10 examples failed (NaN), and the metric is the mean of the "
            "others; further ones are not told"
        ]
        assert int(items.score(MODEL, torch.arange(10)).isnan().sum()) == 3

    def test_half_may_fail_and_no_more(self) -> None:
        assert self.failing(5)(MODEL)["score"].count == 5
        with pytest.raises(EvaluationError, match="6 of 10 examples failed: their outcomes are"):
            self.failing(6)(MODEL)

    def test_each_metric_is_told_by_its_name(self, caplog: pytest.LogCaptureFixture) -> None:
        def score(model: nn.Module, items: Tensor) -> Tensor:
            good = (items % 2).double()
            return torch.stack([good, torch.where(items == 4, torch.nan, good)], -1)

        with caplog.at_level(logging.WARNING):
            found = Items(score, 10, metrics=["a", "b"])(MODEL)
        assert (found["a"].count, found["b"].count) == (10, 9)
        assert ["in 'b'" in one.getMessage() for one in caplog.records] == [True]


class TestSize:
    def test_it_may_be_known_only_when_it_is_prepared(self) -> None:
        items = Items(lambda model, items: items * 0, lambda: 6, labels=lambda: list("aabbab"))
        with pytest.raises(EvaluationError, match="number of examples is not known yet"):
            _ = items.size
        items.prepare(MODEL)
        assert items.size == 6
        assert items.strata is not None
        assert items.strata.tolist() == [0, 0, 1, 1, 0, 1]

    def test_it_must_stay_the_same(self) -> None:
        data = [0] * 6
        items = Items(lambda model, items: items * 0, lambda: len(data))
        items.prepare(MODEL)
        items(MODEL)
        data.append(0)
        for again in (items, items.prepare):
            with pytest.raises(EvaluationError, match="there were 6 examples, and now there are 7"):
                again(MODEL)
        data.pop()
        items.prepare(MODEL)
        items(MODEL)

    @pytest.mark.parametrize("size", [0, "six", 2.5, None])
    def test_what_is_no_size_is_refused(self, size: object) -> None:
        with pytest.raises(EvaluationError, match="size must be a whole number of at least 1"):
            Items(positive, lambda: size).prepare(MODEL)  # type: ignore[arg-type, return-value]

    def test_labels_are_counted_when_the_size_is_known(self) -> None:
        with pytest.raises(EvaluationError, match="there are 5 labels of 6 examples"):
            Items(positive, lambda: 6, labels=torch.zeros(5)).prepare(MODEL)


def test_a_function_of_items_alone_is_told_what_makes_it_an_evaluator() -> None:
    with pytest.raises(EvaluationError, match="missing 1 required positional") as caught:
        measure("a", positive, MODEL)  # type: ignore[arg-type]
    assert "map_bo.Items(score, size=len(data))" in (caught.value.hint or "")


class Bench:
    """An object by example; its size is not known before it is prepared."""

    metrics = (Metric("a"), Metric("b"))
    digest = "bench"
    repeats = False
    reads_head = True
    strata = torch.tensor([5, 5, 7])

    def __init__(self) -> None:
        self.data: list[float] | None = None

    @property
    def size(self) -> int:
        if self.data is None:
            raise ValueError("not read")
        return len(self.data)

    def prepare(self, model: nn.Module) -> None:
        self.data = [0.0, 1.0, 1.0]

    def score(self, model: nn.Module, items: Tensor) -> list[list[float]]:
        assert self.data is not None
        return [[self.data[i], 0.0] for i in items.tolist()]


class Summing(Bench):
    def summary(self, outcomes: Tensor, items: Tensor | None = None) -> dict[str, float]:
        return {"a": float(outcomes[:, 0].max()), "b": 0.25}


class TestObjects:
    def test_what_an_object_says_of_itself_is_used(self) -> None:
        [items] = callable_evaluators({"bench": Bench()}).values()  # type: ignore[dict-item]
        assert isinstance(items, Items)
        items.prepare(MODEL)
        assert (items.size, items.digest, items.repeats, items.reads_head) == (
            *(3, "bench", False, True),
        )
        assert items.metrics == Bench.metrics
        assert items.means == (True, True)
        assert items.strata is not None
        assert items.strata.tolist() == [0, 0, 1]
        assert items(MODEL)["a"] == Measurement(2 / 3, count=3)

    def test_an_object_may_summarise_itself(self) -> None:
        items = Items(Summing())  # type: ignore[arg-type]
        items.prepare(MODEL)
        assert items.means == (False, False)
        assert items(MODEL) == {"a": Measurement(1.0), "b": Measurement(0.25)}

    def test_a_class_is_made(self) -> None:
        items = Items(Bench)  # type: ignore[arg-type]
        items.prepare(MODEL)
        assert items.size == 3

        class Needy:
            def __init__(self, needed: int) -> None: ...

        with pytest.raises(ConfigError, match="score is the class Needy, which cannot be made"):
            Items(Needy, 3)  # type: ignore[arg-type]


class TestInAConfiguration:
    NAME = "tests.evaluators.test_items"

    def test_a_function_and_its_data_by_name(self) -> None:
        settings = {
            "kind": "items",
            "score": f"{self.NAME}:positive",
            "size": f"{self.NAME}:size",
            "metric": {"name": "error", "direction": "min"},
            "labels": f"{self.NAME}:labels",
            "digest": "data:v2",
        }
        made = evaluator_from("problem.tasks.mine", settings)
        assert isinstance(made, Items)
        made.prepare(MODEL)
        assert (made.size, made.digest) == (11, "data:v2")
        assert made.metrics == (Metric("error", "min"),)
        assert made.strata is not None
        assert made.strata.tolist()[:3] == [0, 1, 0]
        assert [key for key, _ in code_in("t", settings)] == ["t.score", "t.size", "t.labels"]
        assert settings_of("items")[0] == "score"

    def test_an_object_that_only_scores_is_a_kind_of_its_own(self) -> None:
        made = evaluator_from("t", {"kind": f"{self.NAME}:bench"} | {"number": 1})
        assert isinstance(made, Items)

    def test_what_is_wrong_is_told_with_its_key(self) -> None:
        with pytest.raises(ConfigError, match=r"problem\.tasks\.mine lacks 'score'"):
            evaluator_from("problem.tasks.mine", {"kind": "items", "size": 3})
        with pytest.raises(ConfigError, match="t: the number of examples is not known"):
            evaluator_from("t", {"kind": "items", "score": f"{self.NAME}:positive"})


def size() -> int:
    return len(INPUTS)


def labels() -> list[str]:
    return ["even" if i % 2 == 0 else "odd" for i in range(len(INPUTS))]


def bench(number: int) -> Bench:
    return Bench()
