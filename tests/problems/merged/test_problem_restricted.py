from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from map_bo.data import Metric
from map_bo.errors import CheckpointError, DataError, MergeError
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.nested.materialised import Mergeable, composes
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.problems.problem import Divisible, Problem
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace
from tests.contracts.problem_contract import ProblemContract
from tests.merging.small_models import build, family, inputs
from tests.nested.hills import Hills
from tests.problems.merged.test_problem import Halving, mean_output

G = make_generator(0)
X = torch.tensor([[0.0, 0.0, 0.0], [0.2, 0.5, 0.9]], dtype=torch.float64)
NAMES = ("third", "first", "second")


def problem(
    calls: list[str] | None = None, kind: str = "mlp", **changes: Any
) -> MergedModelProblem:
    base, experts = family(kind)
    outputs = [0.1, 0.2, 0.3]

    def evaluator(name: str, part: float) -> Any:
        def measured(model: nn.Module) -> float:
            if calls is not None:
                calls.append(name)
            return part + 0.5 * mean_output(kind)(model)

        return measured

    settings: dict[str, Any] = {
        "base": base,
        "experts": experts,
        "evaluators": {n: evaluator(n, o) for n, o in zip(NAMES, outputs, strict=True)},
        **changes,
    }
    return MergedModelProblem(build(kind, 5), **settings)


class TestRestricted(ProblemContract):
    @pytest.fixture
    def problem(self) -> Problem:
        return problem().restricted(("first",))


def test_only_the_evaluators_of_the_part_are_called() -> None:
    calls: list[str] = []
    whole = problem(calls)
    assert isinstance(whole, Divisible)
    part = whole.restricted(("second", "third"))
    assert [metric.name for metric in part.metrics] == ["second", "third"]
    assert part.space == whole.space
    assert not calls
    seen = part.evaluate(X, generator=G)
    assert calls == ["second", "third"] * 2
    # The whole is as it was, and measures the same.
    both = whole.evaluate(X, generator=G)
    assert calls[4:] == list(NAMES) * 2
    assert torch.equal(seen.Y, both.Y[:, [2, 0]])
    assert [metric.name for metric in whole.metrics] == list(NAMES)
    again = part.restricted(("third",)).evaluate(X, generator=G)
    assert torch.equal(again.Y, seen.Y[:, 1:])


def test_parts_share_what_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, loads = problem(), []
    load = TaskVectors.load

    def counted(*args: Any, **settings: Any) -> TaskVectors:
        loads.append(1)
        return load(*args, **settings)

    monkeypatch.setattr(TaskVectors, "load", counted)
    for name in NAMES:
        whole.restricted((name,)).evaluate(X, generator=G)
    whole.evaluate(X, generator=G)
    assert len(loads) == 1


def test_metrics_of_a_part_keep_their_kind_and_bounds() -> None:
    metrics = [Metric(name, kind="loss", direction="min") for name in NAMES]
    [metric] = problem(metrics=metrics).restricted(("first",)).metrics
    assert (metric.kind, metric.direction, metric.resampling) == ("loss", "min", "same")


def test_a_metric_that_there_is_not_is_refused() -> None:
    part = problem().restricted(("first",))
    for tested in (problem(), part):
        with pytest.raises(DataError, match="there is no metric 'fourth'"):
            tested.restricted(("first", "fourth"))
    with pytest.raises(DataError, match="there is no metric 'second'") as caught:
        part.restricted(("second",))
    assert caught.value.hint == "choose from first"


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def close(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(
        torch.allclose(one[name].double(), tensor.double(), atol=1e-5)
        for name, tensor in other.items()
    )


@pytest.mark.parametrize("kind", ["mlp", "tied", "cnn"])
def test_other_experts_are_merged_into_the_same_model(kind: str) -> None:
    calls: list[str] = []
    whole = problem(calls, kind)
    first = whole.merged(torch.tensor([0.4, 0.6, 0.0]))
    part = whole.with_experts({"both": first, "e2": "e2"}, ("second", "first"))
    assert isinstance(whole, Mergeable)
    assert part.space == CoefficientSpace.box(("both", "e2"))
    assert [metric.name for metric in part.metrics] == ["second", "first"]
    u = torch.tensor([[0.5, 0.7]], dtype=torch.float64)
    c = torch.tensor([[0.2, 0.3, 0.7]], dtype=torch.float64)
    assert close(part.merged(u[0]), whole.merged(c[0]))
    seen = part.evaluate(u, generator=G)
    assert calls == ["second", "first"]
    torch.testing.assert_close(
        seen.Y, whole.evaluate(c, generator=G).Y[:, [2, 1]], atol=1e-5, rtol=1e-5
    )
    with part.load(u[0]) as model:
        assert bool(model(inputs(kind)).isfinite().all())


def test_settings_are_those_of_the_whole() -> None:
    operator = TaskArithmetic({"first": "^first", "rest": "*"})
    whole = problem(operator=operator, lower=-0.5, upper=2.0, dtype=torch.bfloat16)
    part = whole.with_experts({"e0": "e0", "e2": "e2"}, ("first",))
    assert part.space.names == ("e0/first", "e0/rest", "e2/first", "e2/rest")
    assert (min(part.space.lower), max(part.space.upper)) == (-0.5, 2.0)
    described, own = part.describe(), whole.describe()
    for name in ("operator", "dtype", "base"):
        assert described[name] == own[name]
    assert described["experts"] == {name: own["experts"][name] for name in ("e0", "e2")}


def test_a_merge_may_have_the_name_of_an_expert() -> None:
    whole = problem()
    merge = whole.merged(torch.tensor([0.3, 0.0, 0.8]))
    part = whole.with_experts({"e0": merge, "e1": "e1"}, ("first",))
    assert close(part.merged(torch.tensor([1.0, 0.0])), merge)
    swapped = whole.with_experts({"e0": "e1", "e1": "e0"}, ("first",))
    assert close(swapped.merged(torch.tensor([1.0, 0.0])), state(family("mlp")[1]["e1"]))


def test_experts_and_metrics_that_there_are_not_are_refused() -> None:
    with pytest.raises(CheckpointError, match="e9"):
        problem().with_experts({"e9": "e9"}, ("first",))
    with pytest.raises(DataError, match="there is no metric 'fourth'"):
        problem().with_experts({"e0": "e0"}, ("fourth",))
    with pytest.raises(MergeError, match="a space of your own says nothing"):
        problem(space=CoefficientSpace.box(("e0", "e1", "e2"), sum_at_most=1.0)).with_experts(
            {"e0": "e0"}, ("first",)
        )


def test_linear_operators_compose_and_others_do_not() -> None:
    assert problem().composes
    assert problem(operator=TaskArithmetic({"all": "*"})).composes
    assert not problem(operator=Halving()).composes
    assert not problem(operator=Halving()).restricted(("first",)).composes
    assert composes(problem())
    assert not composes(problem(operator=Halving()))
    assert composes(Hills())  # knows no other merge than that of its coefficients
