from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from map_bo.data import Metric
from map_bo.errors import EvaluationError, MapBoError, MergeError
from map_bo.evaluators.differentiable import Differentiable
from map_bo.evaluators.evaluator import (
    Measurement,
    accuracy,
    mean_loss,
    mean_probability,
)
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.rng import make_generator
from tests.contracts.problem_contract import ProblemContract
from tests.merging.small_models import build, family
from tests.problems.merged.test_problem import Halving, plain

G = make_generator(0)
LOSS, SHARE = Metric("loss", "min", "loss"), Metric("share")


def images(kind: str, n: int = 40) -> tuple[Tensor, Tensor]:
    generator = make_generator(3)
    shape = {"mlp": (n, 5), "cnn": (n, 1, 6, 6)}.get(kind)
    x = torch.randint(0, 6, (n,), generator=generator) if shape is None else None
    inputs = torch.randn(shape, generator=generator) if shape is not None else x
    assert inputs is not None
    return inputs, torch.randint(0, 3, (n,), generator=generator)


def problem(kind: str = "mlp", *, model: nn.Module | None = None, **changes: Any) -> Any:
    base, experts = family(kind)
    inputs, labels = images(kind)
    settings: dict[str, Any] = {
        "base": base,
        "experts": experts,
        "evaluators": {
            "loss": mean_loss(inputs, labels, 8),
            "share": mean_probability(inputs, labels, 8),
        },
        "metrics": [LOSS, SHARE],
        "gradients": True,
        **changes,
    }
    return MergedModelProblem(build(kind, 5) if model is None else model, **settings)


BLOCKS = {"mlp": {"first": "first", "rest": "*"}, "cnn": {"conv": "conv", "rest": "*"}}


class TestContract(ProblemContract):
    @pytest.fixture
    def problem(self) -> MergedModelProblem:
        tested: MergedModelProblem = problem()
        return tested


@pytest.mark.parametrize("kind", ["mlp", "cnn", "tied"])
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_derivatives_are_those_of_the_merged_model(
    kind: str, blocks: bool, dtype: torch.dtype
) -> None:
    # A model in float64, so that differences of its metrics mean something.
    operator = TaskArithmetic(BLOCKS.get(kind, {"all": "*"})) if blocks else None
    tested = problem(kind, model=build(kind, 5).double(), operator=operator, dtype=dtype)
    for evaluator in tested._evaluators.values():
        if evaluator.inputs.is_floating_point():
            object.__setattr__(evaluator, "inputs", evaluator.inputs.double())
    d = tested.space.d
    # Within the simplex, where no merged variance meets its floor.
    x = torch.linspace(0.1, 0.5, d, dtype=torch.float64) / d
    h = 1e-3
    steps = h * torch.eye(d, dtype=torch.float64)
    rows = tested.evaluate(torch.cat([x[None], x + steps, x - steps]), generator=G)
    slopes, _ = rows.filled_gradients()
    by_hand = (rows.Y[1 : 1 + d] - rows.Y[1 + d :]) / (2 * h)
    torch.testing.assert_close(slopes[0], by_hand.T, rtol=2e-3, atol=1e-3)
    assert float(slopes[0].abs().max()) > 1e-2


def test_values_are_those_without_gradients() -> None:
    X = problem().space.sample(3, generator=G)
    with_them = problem().evaluate(X, generator=G)
    without = problem(gradients=False).evaluate(X, generator=G)
    assert without.gradients is None
    torch.testing.assert_close(with_them.Y, without.Y, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(with_them.Yvar, without.Yvar, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kind", ["mlp", "cnn", "tied"])
def test_the_model_is_left_as_it_was(kind: str) -> None:
    model = build(kind, 5).train()
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    kept = [parameter for parameter in model.parameters() if parameter is not frozen]
    kept[0].grad = torch.ones_like(kept[0])
    before = plain(model)
    problem(kind, model=model).evaluate(torch.full((2, 3), 0.2), generator=G)
    assert plain(model) == before
    assert not frozen.requires_grad
    assert all(parameter.requires_grad for parameter in kept)
    assert [parameter.grad is None for parameter in kept] == [False] + [True] * (len(kept) - 1)
    assert not any(buffer.requires_grad for buffer in model.buffers())
    assert not any(module._forward_hooks for module in model.modules())


def test_grad_mode_of_the_caller_does_not_matter() -> None:
    X = torch.full((1, 3), 0.3)
    expected = problem().evaluate(X, generator=G).filled_gradients()[0]
    for mode in (torch.no_grad(), torch.inference_mode()):
        tested = problem()
        with mode:
            found = tested.evaluate(X, generator=G).filled_gradients()[0]
        torch.testing.assert_close(found, expected)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_noise_is_that_of_the_batches() -> None:
    X = torch.full((1, 3), 0.3)
    inputs, labels = images("mlp", 42)
    slopes, noise = problem(
        evaluators={"loss": mean_loss(inputs, labels, 10)}, metrics=[LOSS]
    ).evaluate(X, generator=G).filled_gradients()  # fmt: skip
    parts, sizes = [], []
    for start in range(0, 42, 10):
        piece = slice(start, start + 10)
        one = problem(
            evaluators={"loss": mean_loss(inputs[piece], labels[piece])}, metrics=[LOSS]
        ).evaluate(X, generator=G)
        part, unknown = one.filled_gradients()
        assert bool(unknown.isnan().all())
        parts.append(part[0, 0])
        sizes.append(len(labels[piece]))
    share = torch.tensor(sizes).double().unsqueeze(-1) / 42
    mean = (share * torch.stack(parts)).sum(0)
    torch.testing.assert_close(slopes[0, 0], mean, rtol=1e-5, atol=1e-6)
    variance = (share * (torch.stack(parts) - mean)).square().sum(0) * 5 / 4
    torch.testing.assert_close(noise[0, 0], variance, rtol=1e-4, atol=1e-8)


class Scalar:
    """A user's own metric: the squared norm of the outputs, as one scalar."""

    def __call__(self, model: nn.Module) -> Measurement:
        with torch.no_grad():
            return self.summary(torch.cat([*self.examples(model)]).double())

    def examples(self, model: nn.Module) -> Iterator[Tensor]:
        yield model(images("mlp")[0]).square().mean()[None]

    def summary(self, values: Tensor) -> Measurement:
        return Measurement(float(values.mean()))


class Detached(Scalar):
    def examples(self, model: nn.Module) -> Iterator[Tensor]:
        for values in super().examples(model):
            yield values.detach()


class Steep(Scalar):
    def examples(self, model: nn.Module) -> Iterator[Tensor]:
        for values in super().examples(model):
            yield (values - values.detach()).abs().sqrt() + 0.5  # finite, with an infinite slope


def test_own_evaluators() -> None:
    assert isinstance(Scalar(), Differentiable)
    assert not isinstance(accuracy(*images("mlp")), Differentiable)
    X = torch.full((1, 3), 0.2)
    seen = problem(evaluators={"loss": Scalar()}, metrics=[LOSS]).evaluate(X, generator=G)
    slopes, noise = seen.filled_gradients()
    assert bool(torch.isfinite(slopes).all())
    assert bool(noise.isnan().all())
    failed = problem(evaluators={"loss": Detached()}, metrics=[LOSS]).evaluate(X, generator=G)
    assert "do not depend on the model's weights" in str(failed.failures[0])
    assert failed.gradients is None
    steep = problem(evaluators={"loss": Steep()}, metrics=[LOSS]).evaluate(X, generator=G)
    assert steep.failures == (None,)
    assert steep.gradients is None


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        (
            {"evaluators": {"share": accuracy(*images("mlp"))}, "metrics": [SHARE]},
            EvaluationError,
            r"evaluator 'share' \(Accuracy\) has none\nhint: mean_loss .* gradients=False",
        ),
        (
            {"evaluators": {"share": lambda model: 0.5}, "metrics": [SHARE]},
            EvaluationError,
            r"evaluator 'share' \(<lambda>\) has none",
        ),
        (
            {"operator": Halving()},
            MergeError,
            r"Halving is not linear in its coefficients\nhint: use TaskArithmetic.*=False",
        ),
    ],
)
def test_gradients_that_cannot_be_had_are_refused_early(
    changes: Mapping[str, Any], kind: type[MapBoError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        problem(**changes)


def test_description_tells_gradients() -> None:
    described = problem(gradients=False).describe()
    assert "gradients" not in described
    assert problem().describe() == {**described, "gradients": True}


@pytest.mark.gpu
def test_derivatives_on_a_gpu_are_those_on_the_cpu() -> None:
    X = torch.full((1, 3), 0.3)
    for kind in ("mlp", "cnn", "tied"):
        expected = problem(kind).evaluate(X, generator=G).filled_gradients()[0]
        moved = problem(kind, model=build(kind, 5).cuda(), device="cuda:0")
        torch.testing.assert_close(
            moved.evaluate(X, generator=G).filled_gradients()[0], expected, rtol=1e-3, atol=1e-4
        )
