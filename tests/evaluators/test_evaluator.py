from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from map_bo.errors import DataError, EvaluationError
from map_bo.evaluators.evaluator import (
    Evaluator,
    HasDigest,
    Measurement,
    accuracy,
    binomial_variance,
    logits_of,
    mean_loss,
    measure,
    prepare_evaluators,
)
from map_bo.rng import make_generator

MODEL = nn.Identity()


def test_measurement_keeps_plain_numbers() -> None:
    seen = Measurement(torch.tensor(0.5), np.float32(0.25), np.int64(8))  # type: ignore[arg-type]
    assert (seen.value, seen.variance, seen.count) == (0.5, 0.25, 8)
    assert [type(x) for x in (seen.value, seen.variance, seen.count)] == [float, float, int]
    assert Measurement(1) == Measurement(1.0, None, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((float("nan"),), "value must .* got nan"),
        ((float("inf"),), "value must .* got inf"),
        (("0.5",), "value is a str, not a number"),
        ((True,), "value is a bool, not a number"),
        ((0.5, -1.0), "variance must .* got -1.0"),
        ((0.5, float("nan")), "variance must .* got nan"),
        ((0.5, None, 0), "count must .* got 0"),
        ((0.5, None, 2.5), "count must .* got 2.5"),
        ((0.5, None, float("inf")), "count must .* got inf"),
    ],
)
def test_measurements_that_cannot_be_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        Measurement(*arguments)


@pytest.mark.parametrize(
    "result",
    [0.5, np.float64(0.5), np.float32(0.5), np.array(0.5), torch.tensor(0.5), Measurement(0.5)],
)
def test_measure_takes_any_real_number(result: Any) -> None:
    assert measure("a", lambda model: result, MODEL) == Measurement(0.5)


def test_measure_takes_integers_and_gives_the_model() -> None:
    given_models: list[nn.Module] = []

    def evaluator(model: nn.Module) -> int:
        given_models.append(model)
        return 1

    assert measure("a", evaluator, MODEL).value == 1.0
    assert given_models == [MODEL]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "evaluator 'a' returned None, not a number"),
        ((0.5, 0.1), "evaluator 'a' returned a tuple, not a number"),
        ("0.5", "evaluator 'a' returned a str, not a number"),
        (True, "evaluator 'a' returned a bool, not a number"),
        ({"acc": 1.0}, "evaluator 'a' returned a dict, not a number"),
        (1j, "evaluator 'a' returned a complex, not a number"),
        (float("nan"), "evaluator 'a' returned nan"),
        (torch.tensor(float("inf")), "evaluator 'a' returned inf"),
        (torch.ones(3), r"evaluator 'a' returned tensor of shape \(3,\)"),
        (np.ones((1, 2)), r"evaluator 'a' returned array of shape \(1, 2\)"),
    ],
)
def test_measure_refuses_all_else(result: Any, message: str) -> None:
    with pytest.raises(EvaluationError, match=message) as caught:
        measure("a", lambda model: result, MODEL)
    assert caught.value.hint


def test_measure_says_what_an_evaluator_raised() -> None:
    def broken(error: BaseException) -> Any:
        raise error

    with pytest.raises(EvaluationError) as caught:
        measure("code", lambda model: broken(ValueError("no tests found")), MODEL)
    assert caught.value.message == "evaluator 'code' raised ValueError: no tests found"
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(EvaluationError) as caught:
        measure("code", lambda model: broken(RuntimeError()), MODEL)
    assert caught.value.message == "evaluator 'code' raised RuntimeError"
    with pytest.raises(EvaluationError) as caught:
        measure("code", lambda model: broken(DataError("odd", hint="fix it")), MODEL)
    assert caught.value.message == "evaluator 'code' raised DataError: odd"
    assert caught.value.hint == "fix it"
    with pytest.raises(EvaluationError) as caught:
        measure("code", lambda model: broken(SystemExit(1)), MODEL)
    assert caught.value.message == "evaluator 'code' raised SystemExit: 1"
    with pytest.raises(KeyboardInterrupt):
        measure("code", lambda model: broken(KeyboardInterrupt()), MODEL)


@given(st.integers(1, 10_000), st.floats(0, 1))
def test_binomial_variance_is_positive_and_symmetric(count: int, value: float) -> None:
    variance = binomial_variance(value, count)
    assert 0 < variance <= 0.25 / (count + 1)
    assert binomial_variance(1 - value, count) == pytest.approx(variance, rel=1e-6)
    scaled = binomial_variance(10 + 90 * value, count, lower=10, upper=100)
    assert scaled == pytest.approx(90**2 * variance, rel=1e-6)


def test_binomial_variance_by_hand() -> None:
    assert binomial_variance(1.0, 9) == pytest.approx(0.95 * 0.05 / 10)
    assert binomial_variance(0.5, 9) == pytest.approx(0.025)


class Classifier(nn.Module):
    """Logits are the inputs, with dropout that would show a wrong mode."""

    def __init__(self, wrapped: bool = False) -> None:
        super().__init__()
        self.noise = nn.Dropout(0.99)
        self.scale = nn.Parameter(torch.ones(()))
        self.wrapped = wrapped
        self.sizes: list[int] = []
        self.gradients: list[bool] = []

    def forward(self, x: Tensor) -> Any:
        self.sizes.append(len(x))
        logits = self.noise(x) * self.scale
        self.gradients.append(logits.requires_grad)
        return SimpleNamespace(logits=logits) if self.wrapped else logits


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.zeros(17)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
@pytest.mark.parametrize("wrapped", [False, True])
def test_accuracy_and_loss(batch_size: int, wrapped: bool) -> None:
    generator = make_generator(0)
    x = torch.randn(7, 3, generator=generator)
    y = torch.randint(0, 3, (7,), generator=generator)
    model = Classifier(wrapped).train()
    model.noise.eval()
    seen = accuracy(x, y, batch_size=batch_size)(model)
    assert seen.value == pytest.approx(float((x.argmax(-1) == y).double().mean()))
    assert seen.count == 7
    assert seen.variance is None
    loss = mean_loss(x, y, batch_size=batch_size)(model)
    each = -x.log_softmax(-1)[torch.arange(7), y].double()
    assert loss.value == pytest.approx(float(each.mean()), rel=1e-6)
    assert loss.variance == pytest.approx(float(each.var()) / 7, rel=1e-5)
    assert loss.count == 7
    assert max(model.sizes) == min(batch_size, 7)
    assert not any(model.gradients)
    assert model.training
    assert not model.noise.training


def test_modes_come_back_when_the_model_raises() -> None:
    model = Classifier().train()
    with pytest.raises(RuntimeError, match="must match the size"):
        accuracy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))(
            nn.Sequential(model, Broken()).train()
        )
    assert model.training
    x = torch.full((2, 3), torch.nan)
    with pytest.raises(EvaluationError, match="outputs hold NaN"):
        accuracy(x, torch.zeros(2, dtype=torch.long))(model)
    assert model.training
    assert model.noise.training


def test_loss_of_one_example_has_no_variance() -> None:
    assert mean_loss(torch.zeros(1, 2), torch.tensor([1]))(Classifier()).variance is None


@pytest.mark.parametrize("make", [accuracy, mean_loss])
def test_examples_that_do_not_fit_are_refused(make: Any) -> None:
    x = torch.zeros(3, 2)
    with pytest.raises(EvaluationError, match="3 inputs and 2 labels"):
        make(x, torch.zeros(2, dtype=torch.long))
    with pytest.raises(EvaluationError, match="0 inputs and 0 labels"):
        make(x[:0], torch.zeros(0, dtype=torch.long))
    with pytest.raises(EvaluationError, match=r"one integer per example, got torch.float32"):
        make(x, torch.zeros(3))
    with pytest.raises(EvaluationError, match=r"shape \(3, 1\)"):
        make(x, torch.zeros(3, 1, dtype=torch.long))
    with pytest.raises(EvaluationError, match=r"batch_size must .* got 0"):
        make(x, torch.zeros(3, dtype=torch.long), batch_size=0)


class Keyword(nn.Module):
    """A classifier that is called by keyword, as those of transformers are."""

    def forward(self, *, input_ids: Tensor, scale: Tensor) -> Any:
        return SimpleNamespace(logits=input_ids * scale)


def test_inputs_may_be_a_mapping() -> None:
    inputs = {"input_ids": torch.eye(3), "scale": torch.tensor([[1.0], [1.0], [-1.0]])}
    seen = accuracy(inputs, torch.tensor([0, 1, 2]), batch_size=2)(Keyword())
    assert (seen.value, seen.count) == (2 / 3, 3)


def test_inputs_of_a_mapping_must_have_one_row_per_example() -> None:
    with pytest.raises(EvaluationError, match="one row per example"):
        accuracy({"a": torch.eye(3), "b": torch.eye(2)}, torch.tensor([0, 1, 2]))


def test_an_output_without_logits_is_refused() -> None:
    class Texts(nn.Module):
        def forward(self, x: Tensor) -> str:
            return "text"

    with pytest.raises(EvaluationError, match="returned a str, which has no logits"):
        accuracy(torch.eye(3), torch.tensor([0, 1, 2]))(Texts())


def test_of_a_model_without_its_head_the_right_class_is_named() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    with pytest.raises(EvaluationError) as caught:
        logits_of(outputs.BaseModelOutputWithPooling(last_hidden_state=torch.zeros(1, 2, 3)))
    assert "AutoModelForSequenceClassification" in str(caught.value.hint)


class Ready:
    """An evaluator that prepares, or cannot."""

    def __init__(self, trouble: str | None = None) -> None:
        self.trouble, self.seen = trouble, 0

    def prepare(self, model: nn.Module) -> None:
        self.seen += 1
        if self.trouble is not None:
            raise EvaluationError(self.trouble, hint="a way out")

    def __call__(self, model: nn.Module) -> float:
        return 1.0


def test_evaluators_that_cannot_be_used_are_refused_together() -> None:
    last = Ready()
    evaluators: dict[str, Evaluator] = {
        "a": Ready("no column"),
        "b": Ready(),
        "c": Ready("no row"),
        "d": last,
    }
    with pytest.raises(EvaluationError, match="2 evaluators cannot be used") as found:
        prepare_evaluators(evaluators, lambda name: nullcontext(MODEL))
    said = "used:\n  - 'a': no column (a way out)\n  - 'c': no row (a way out)"
    assert said in found.value.message
    assert last.seen == 1
    with pytest.raises(EvaluationError, match="evaluator 'a' cannot be used: no column") as found:
        prepare_evaluators({"a": Ready("no column")}, lambda name: nullcontext(MODEL))
    assert found.value.hint == "a way out"


class Raises(Ready):
    """An evaluator whose preparing ends in an error of its own."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def prepare(self, model: nn.Module) -> None:
        raise self.error


def test_what_preparing_ends_with_is_a_refusal_among_the_others() -> None:
    evaluators: dict[str, Evaluator] = {
        "a": Raises(IndexError("no such row")),
        "b": Ready("no column"),
        "c": Raises(SystemExit(0)),
    }
    with pytest.raises(EvaluationError, match="3 evaluators cannot be used") as found:
        prepare_evaluators(evaluators, lambda name: nullcontext(MODEL))
    assert "'a': its prepare raised IndexError: no such row" in found.value.message
    assert "'b': no column" in found.value.message
    assert "'c': its prepare raised SystemExit: 0" in found.value.message
    assert isinstance(found.value.__cause__, IndexError)
    with pytest.raises(KeyboardInterrupt):
        prepare_evaluators({"a": Raises(KeyboardInterrupt())}, lambda name: nullcontext(MODEL))


def test_a_digest_changes_with_all_that_decides_the_outcome() -> None:
    inputs, labels = torch.rand(6, 3), torch.arange(6) % 2
    one = accuracy(inputs, labels)
    assert isinstance(one, HasDigest)
    assert one.digest == accuracy(inputs.clone(), labels.clone()).digest
    others = [
        accuracy(inputs + 1e-6, labels),
        accuracy(inputs, 1 - labels),
        accuracy(inputs, labels, batch_size=2),
        accuracy({"x": inputs}, labels),
        accuracy({"y": inputs}, labels),
    ]
    assert len({one.digest, *(other.digest for other in others)}) == 6


def test_the_digest_of_many_examples_is_taken_again_when_they_change() -> None:
    inputs, labels = torch.zeros(300_000), torch.zeros(300_000, dtype=torch.long)
    one = accuracy(inputs, labels)
    before = one.digest
    assert one.digest is before  # kept
    inputs[7] = 1
    assert one.digest != before
