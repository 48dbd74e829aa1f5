from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor, nn

from map_bo.data import Metric
from map_bo.errors import ConfigError, EvaluationError
from map_bo.evaluators.evaluator import Measurement
from map_bo.evaluators.examples import ExampleEvaluator, mean_of, ratio_estimate
from map_bo.rng import make_generator
from tests.contracts.example_evaluator_contract import ExampleEvaluatorContract


class Signs(ExampleEvaluator):
    """The share of positive outputs, and the mean of the outputs."""

    def __init__(self, *, batch_size: int = 4) -> None:
        super().__init__(batch_size=batch_size)
        self.inputs: Tensor | None = None
        self.batches: list[int] = []

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return Metric("positive"), Metric("level", kind="unbounded")

    @property
    def _known(self) -> Tensor:
        if self.inputs is None:
            raise EvaluationError("not prepared", hint="prepare it")
        return self.inputs

    @property
    def size(self) -> int:
        return len(self._known)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self._known.numpy().tobytes()).hexdigest()

    def prepare(self, model: nn.Module) -> None:
        self.inputs = torch.randn(11, 3, generator=make_generator(0))

    def outcomes(self, model: nn.Module, items: Tensor) -> Tensor:
        self.batches.append(len(items))
        output = model(self._known[items]).squeeze(-1)
        return torch.stack([(output > 0).double(), output.double()], -1)


class TestSigns(ExampleEvaluatorContract):
    @pytest.fixture
    def evaluator(self) -> ExampleEvaluator:
        return Signs()

    @pytest.fixture
    def model(self) -> nn.Module:
        layer = nn.Linear(3, 1)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([[1.0, -2.0, 0.5]]))
            layer.bias.zero_()
        return layer


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1] * torch.nan


def test_batches_have_the_size_that_was_asked_for() -> None:
    signs = Signs()
    signs.prepare(nn.Identity())
    signs(nn.Linear(3, 1))
    assert signs.batches == [4, 4, 3]


def test_outcomes_that_are_not_finite_are_refused() -> None:
    signs = Signs()
    signs.prepare(nn.Identity())
    with pytest.raises(EvaluationError, match="outcomes of 4 of 4 examples are NaN"):
        signs(Broken())


def test_outcomes_of_another_shape_are_refused() -> None:
    class Wrong(Signs):
        def outcomes(self, model: nn.Module, items: Tensor) -> Tensor:
            return torch.zeros(len(items))

    wrong = Wrong()
    wrong.prepare(nn.Identity())
    with pytest.raises(EvaluationError, match=r"of 4 examples have shape \(4,\)") as found:
        wrong(nn.Identity())
    assert "4 x 2" in (found.value.hint or "")


@pytest.mark.parametrize("size", [0, -1, 1.5, "8"])
def test_a_batch_size_that_is_not_possible_is_refused(size: object) -> None:
    with pytest.raises(ConfigError, match="batch_size must be"):
        Signs(batch_size=size)  # type: ignore[arg-type]


def test_means_say_how_sure_they_are() -> None:
    right = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    assert mean_of(right, Metric("a")) == Measurement(0.75, count=4)
    assert mean_of(right, Metric("a", kind="loss")) == Measurement(0.75, variance=0.0625, count=4)
    part = torch.tensor([0.25, 0.75], dtype=torch.float64)
    assert mean_of(part, Metric("a")) == Measurement(0.5, variance=0.0625)
    assert mean_of(part[:1], Metric("a", kind="loss")) == Measurement(0.25, count=1)


def test_the_variance_is_that_of_drawing_documents_anew() -> None:
    generator = make_generator(0)
    estimates, variances = [], []
    for _ in range(2000):
        sizes = torch.randint(5, 50, (40,), generator=generator).double()
        level = 2 + 0.3 * torch.randn(40, generator=generator, dtype=torch.float64)
        value, variance = ratio_estimate(level * sizes, sizes)
        assert variance is not None
        estimates.append(value)
        variances.append(variance)
    seen = torch.tensor(estimates).var()
    assert float(torch.tensor(variances).mean()) == pytest.approx(float(seen), rel=0.1)
    assert ratio_estimate(torch.tensor([6.0]), torch.tensor([3.0])) == (2.0, None)
