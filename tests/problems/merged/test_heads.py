from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import map_bo
from map_bo.errors import MergeError
from map_bo.evaluators.metrics import SeveralMetrics
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.rng import make_generator
from map_bo.surrogates.quadratic import Quadratic

C = torch.tensor([[0.5, 0.25]], dtype=torch.float64)


class Net(nn.Module):
    def __init__(self, width: int | None) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 3)
        self.num_labels = width
        if width is not None:
            self.head = nn.Linear(3, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))  # type: ignore[no-any-return]


BASE = {"trunk.weight": torch.ones(3, 4), "trunk.bias": torch.zeros(3)}


def expert(shift: float, width: int) -> dict[str, Tensor]:
    head = {"head.weight": torch.full((width, 3), shift), "head.bias": torch.zeros(width)}
    return {name: t + shift for name, t in BASE.items()} | head


EXPERTS = {"x": expert(1.0, 2), "y": expert(-2.0, 6)}


def evaluate(model: nn.Module, metrics: tuple[str, ...] = ("x", "y"), **settings: Any) -> dict:  # type: ignore[type-arg]
    seen: dict[str, tuple[int, float, int]] = {}

    def scoring(name: str) -> Any:
        def score(model: Any) -> float:
            out = model.head(model.trunk(torch.ones(1, 4)))
            seen[name] = (
                out.shape[1],
                float(model.head.weight.detach()[0, 0]),
                model.head.out_features,
            )
            return 0.5

        return score

    problem = MergedModelProblem(
        model,
        base=BASE,
        experts=EXPERTS,
        evaluators={name: scoring(name) for name in metrics},
        **settings,
    )
    outcome = problem.evaluate(C, generator=make_generator(0))
    assert outcome.failures == (None,)
    return seen


@pytest.mark.parametrize("width", [2, 3, None])
def test_each_evaluator_has_the_head_of_its_task(width: int | None) -> None:
    model = Net(width)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert evaluate(model) == {"x": (2, 1.0, 2), "y": (6, -2.0, 6)}
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert hasattr(model, "head") == (width is not None)
    assert width is None or model.head.out_features == width


def test_heads_may_be_named_for_metrics_of_other_names(caplog: pytest.LogCaptureFixture) -> None:
    assert evaluate(Net(2), ("other",), heads={"other": "y"}) == {"other": (6, -2.0, 6)}
    with caplog.at_level(logging.WARNING, "map_bo"):
        evaluate(Net(2), ("x", "speed"))
    assert "'speed' are measured without a task head" in caplog.text
    with pytest.raises(MergeError, match="'z', and no evaluator is called so"):
        evaluate(Net(2), heads={"z": "x"})
    with pytest.raises(MergeError, match="the experts 'z' have no task head"):
        evaluate(Net(2), heads={"x": "z"})


def test_the_metrics_of_one_evaluator_have_one_head() -> None:
    def both(model: Any) -> dict[str, float]:
        return {"width": model.head.out_features / 10, "again": model.head.out_features / 10}

    def problem(heads: dict[str, str] | None) -> MergedModelProblem:
        return MergedModelProblem(
            Net(2),
            base=BASE,
            experts=EXPERTS,
            evaluators={"x": SeveralMetrics(both, ["width", "again"])},
            heads=heads,
        )

    for heads, width in ((None, 0.2), ({"x": "y"}, 0.6)):
        found = problem(heads).evaluate(C, generator=make_generator(0))
        assert found.Y[0].tolist() == [width, width]
        with problem(heads).load(C[0], metric="x_again") as model:
            assert model.get_parameter("head.weight").shape[0] / 10 == width
    with pytest.raises(MergeError, match="'x_width', and no evaluator is called so") as caught:
        problem({"x_width": "x"})
    assert "evaluators are x" in str(caught.value.hint)


def test_merging_is_of_the_base_alone() -> None:
    problem = MergedModelProblem(
        Net(2), base=BASE, experts=EXPERTS, evaluators={"x": lambda model: 0.5}
    )
    assert problem.merged(C[0]).keys() == BASE.keys()
    with problem.load(C[0], metric="x") as model:
        state = model.state_dict()
    assert torch.equal(state["trunk.weight"], torch.ones(3, 4))  # 1 + .5 * 1 - .25 * 2
    assert torch.equal(state["head.weight"], EXPERTS["x"]["head.weight"])
    told = problem.describe()["experts"]["y"]["fitting"]
    assert told["heads"] == ["head.bias", "head.weight"]


def test_gradients_flow_through_a_head() -> None:
    problem = MergedModelProblem(
        Net(3),
        base=BASE,
        experts=EXPERTS,
        evaluators={"x": lambda model: 0.5, "y": lambda model: 0.5},
    )
    with problem.load(C[0], metric="y") as model:
        model(torch.ones(2, 4)).sum().backward()
        reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {"trunk.weight", "trunk.bias", "head.weight", "head.bias"}


@pytest.mark.slow
@pytest.mark.parametrize("operator", [None, map_bo.Ties(density=0.5)])
def test_nodes_of_a_nested_run_measure_with_the_heads_of_their_tasks(operator: Any) -> None:
    pretraining = BASE | {"former.weight": torch.ones(7, 3)}  # which no task has
    experts = {name: expert(0.1 * k, k + 1) for k, name in enumerate("abcd", start=1)}
    widths: dict[str, set[int]] = {name: set() for name in experts}

    def scoring(name: str) -> Any:
        def score(model: Any) -> float:
            widths[name].add(len(model.head.weight))
            return float(torch.sigmoid(model(torch.ones(1, 4)).mean()).detach())

        return score

    problem = MergedModelProblem(
        Net(2),
        base=pretraining,
        experts=experts,
        evaluators={name: scoring(name) for name in experts},
        operator=operator,
        missing="base",
    )
    map_bo.optimize_nested(problem, 16, progress=False, surrogate=Quadratic())
    assert widths == {name: {k + 1} for k, name in enumerate("abcd", start=1)}


def test_the_snippet_of_the_guide_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[3] / "docs" / "checkpoints.md").read_text()
    (snippet,) = re.findall(r"<!-- snippet -->\n```python\n(.*?)```", text, flags=re.DOTALL)
    exec(snippet, {})
    assert "[0.2000, 0.5000]" in capsys.readouterr().out
