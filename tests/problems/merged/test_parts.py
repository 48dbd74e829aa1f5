"""What is decided from the parts of a problem; abilities are those that an operator declares."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from map_bo.errors import MergeError
from map_bo.evaluators.evaluator import MeanProbability, mean_probability
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.vectors.linear_merge import LinearMerge, TaskArithmetic
from map_bo.merging.vectors.operator import Deltas, MergeOperator, PreparedMerge, Weights
from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.operators.averages import WeightedAverage
from map_bo.operators.sparse import Ties
from map_bo.operators.spectral.isotropic import IsoCTS
from map_bo.operators.spectral.tsv import TSVM
from map_bo.problems.merged.parts import (
    blocks_to_weigh,
    build_model,
    check_gradients,
    require_derivatives,
    ties_matter,
    weigh_space,
)
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace
from tests.merging.small_models import build, family, inputs

EXPERTS = ("e0", "e1", "e2")
BLOCKS = {"first": "^first", "rest": "*"}
X = torch.tensor([[0.1, 0.2, 0.15]], dtype=torch.float64)


class _Doubled:
    def __init__(self, inner: LinearMerge) -> None:
        self.inner = inner

    def write(self, c: Tensor, out: Tensor) -> None:
        self.inner.write(2 * c, out)


class _Differentiable(_Doubled):
    def directional(self, gradient: Tensor) -> Tensor:
        return 2 * self.inner.directional(gradient)


@dataclass(frozen=True)
class Doubled:
    """Linear in its coefficients, and no class of map_bo."""

    differentiable: bool = True

    def space(self, experts: tuple[str, ...], *, lower: float, upper: float) -> CoefficientSpace:
        return CoefficientSpace.box(experts, lower=lower, upper=upper)

    def prepare(self, deltas: Deltas) -> PreparedMerge:
        assert isinstance(deltas, TaskVectors)
        inner = TaskArithmetic().prepare(deltas)
        return _Differentiable(inner) if self.differentiable else _Doubled(inner)

    def weights(self, experts: tuple[str, ...], c: Tensor) -> Weights:
        return TaskArithmetic().weights(experts, 2 * c)


def probability() -> MeanProbability:
    x = torch.randn(40, 5, generator=make_generator(3))
    return mean_probability(x, torch.arange(40) % 3, batch_size=8)


def problem(operator: MergeOperator, **settings: Any) -> MergedModelProblem:
    base, experts = family("mlp")
    return MergedModelProblem(
        build("mlp", 5),
        **{
            "base": base,
            "experts": experts,
            "evaluators": {"p": probability()},
            "operator": operator,
            **settings,
        },
    )


class TestLinear:
    def test_the_operator_of_somebody_else_has_gradients(self) -> None:
        own = problem(Doubled(), gradients=True).evaluate(X, generator=make_generator(0))
        known = problem(TaskArithmetic(), gradients=True).evaluate(
            2 * X, generator=make_generator(0)
        )
        assert own.gradients is not None
        assert known.gradients is not None
        torch.testing.assert_close(own.Y, known.Y)
        torch.testing.assert_close(own.gradients, 2 * known.gradients)

    @pytest.mark.parametrize("operator", [TSVM(), IsoCTS()], ids=lambda o: o.name)
    def test_what_is_linear_once_it_is_ready_has_gradients(self, operator: MergeOperator) -> None:
        tested = problem(operator, gradients=True)
        found = tested.evaluate(X, generator=make_generator(0)).gradients
        assert found is not None
        step = 0.02
        around = torch.cat([X + step * torch.eye(3), X - step * torch.eye(3)])
        Y = tested.evaluate(around, generator=make_generator(0)).Y
        expected = (Y[:3] - Y[3:]).T / (2 * step)
        torch.testing.assert_close(found[0], expected, rtol=0.03, atol=1e-3)

    def test_its_merges_compose_and_are_written_from_the_files(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        merging = problem(Doubled())
        assert merging.composes
        wanted = merging.merged(X[0])
        monkeypatch.setattr(TaskVectors, "load", lambda *_, **__: pytest.fail("loaded"))
        out = problem(Doubled()).export(X[0], tmp_path / "m")
        for name, tensor in wanted.items():
            torch.testing.assert_close(open_checkpoint(out).load(name), tensor)

    @pytest.mark.parametrize("operator", [WeightedAverage(), Ties()], ids=lambda o: o.name)
    def test_others_have_no_gradients(self, operator: MergeOperator) -> None:
        with pytest.raises(MergeError, match="is not linear in its coefficients") as caught:
            check_gradients({"p": probability()}, operator, recalibrated=False)
        assert "use TaskArithmetic" in str(caught.value.hint)

    def test_derivatives_that_are_not_there_are_missed_before_anything_is_measured(self) -> None:
        def never(model: nn.Module) -> float:
            raise AssertionError("measured")

        evaluator = probability()
        evaluator.examples = never  # type: ignore[method-assign, assignment]
        tested = problem(Doubled(differentiable=False), gradients=True, evaluators={"p": evaluator})
        with pytest.raises(MergeError, match="what Doubled prepares has no derivatives") as caught:
            tested.prepare()
        assert "pass gradients=False" in str(caught.value.hint)

    def test_without_gradients_none_are_needed(self) -> None:
        tested = problem(Doubled(differentiable=False))
        assert tested.evaluate(X, generator=make_generator(0)).gradients is None


def test_derivatives_are_those_of_the_prepared_merge() -> None:
    base, experts = family("mlp")
    vectors = TaskVectors.load(
        open_checkpoint(base), {name: open_checkpoint(e) for name, e in experts.items()}
    )
    prepared = TaskArithmetic().prepare(vectors)
    assert require_derivatives(prepared, TaskArithmetic()) is prepared


class TestWeights:
    def test_blocks_that_nobody_weighed(self) -> None:
        operator = TaskArithmetic(BLOCKS)
        space = operator.space(EXPERTS, lower=0.0, upper=1.0)
        blocks = blocks_to_weigh(space, operator)
        assert blocks is not None
        assert blocks.names == ("first", "rest")
        assert blocks_to_weigh(replace(space, importance=(1.0,) * 6), operator) is None
        assert blocks_to_weigh(CoefficientSpace.box(EXPERTS), operator) is None  # other blocks
        assert blocks_to_weigh(CoefficientSpace.box(EXPERTS), TaskArithmetic()) is None
        assert blocks_to_weigh(CoefficientSpace.box(EXPERTS), Doubled()) is None

    def test_settings_weigh_as_much_as_a_coefficient_does_on_the_mean(self) -> None:
        operator = Ties(blocks=BLOCKS, search=["density"])
        space = operator.space(EXPERTS, lower=0.0, upper=1.0)
        blocks = blocks_to_weigh(space, operator)
        assert blocks is not None
        base, experts = family("mlp")
        opened = {name: open_checkpoint(model) for name, model in experts.items()}
        weighed = weigh_space(space, blocks, open_checkpoint(base), opened, {})
        assert weighed.importance[-1] == 1.0
        sizes = torch.tensor(weighed.importance[:-1])
        assert float(sizes.square().mean().sqrt()) == pytest.approx(1.0, rel=1e-3)
        assert len(set(weighed.importance)) > 2


class TestTiesMatter:
    def space(self, operator: MergeOperator) -> CoefficientSpace:
        return operator.space(("e",), lower=0.0, upper=1.0)

    @pytest.mark.parametrize(
        ("operator", "lacking", "matter"),
        [
            (TaskArithmetic(), False, False),
            (Doubled(), False, False),
            (TaskArithmetic(), True, True),
            (TaskArithmetic({"a": "^a", "rest": "*"}), False, True),
            (Ties(), False, True),
        ],
    )
    def test_where_a_merge_may_differ_by_them(
        self, operator: MergeOperator, lacking: bool, matter: bool
    ) -> None:
        base = open_checkpoint({"a": torch.ones(2), "b": torch.ones(2)})
        expert = open_checkpoint(
            {"a": torch.ones(2)} if lacking else {n: torch.ones(2) for n in "ab"}
        )
        assert ties_matter(base, {"e": expert}, operator, self.space(operator)) is matter


def test_a_given_model_is_not_moved_and_a_made_one_is() -> None:
    model = build("mlp")
    assert build_model(model, torch.device("meta")) is model
    assert next(build_model(lambda: build("mlp"), torch.device("meta")).parameters()).is_meta
    assert not next(model.parameters()).is_meta
    assert model(inputs("mlp")).shape == (2, 3)
