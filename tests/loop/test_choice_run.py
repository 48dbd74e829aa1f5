"""A whole run that chooses the operator: one is better on one metric, another on the other."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from map_bo.data import Metric
from map_bo.errors import ConfigError, SpaceError
from map_bo.loop.optimize import optimize
from map_bo.loop.reading import load_result
from map_bo.loop.result import Result
from map_bo.loop.settings import Settings
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.nested.optimize import optimize_nested
from map_bo.nested.settings import Nested
from map_bo.operators.searchable import OperatorChoice
from map_bo.operators.sparse import Ties
from map_bo.pareto.gradient import GradientSolver
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.samplers.adaptive import Adaptive
from map_bo.samplers.baselines.cma import CMAES
from map_bo.samplers.designs.space_filling import Sobol
from map_bo.samplers.posterior.front_uncertainty import FrontUncertainty
from map_bo.samplers.sampler import Sampler
from map_bo.surrogates.processes.sparse import Sparse
from map_bo.surrogates.quadratic import Quadratic
from map_bo.tracking.jsonl import JsonlStore

OPERATOR = OperatorChoice({"sum": TaskArithmetic(), "ties": Ties(search={"density": (0.2, 0.9)})})
EXPERTS = {
    "math": [2.0, 1.0, 0.4, -0.3, 0.2, -0.1],
    "code": [-0.5, 1.5, -1.2, 0.6, 0.1, 0.3],
}


def merged_by(operator: str, math: float, code: float, density: float = 0.5) -> Tensor:
    """Return the weights that an operator merges the experts to."""
    problem = MergedModelProblem(
        nn.Linear(6, 1, bias=False),
        base={"weight": torch.zeros(1, 6)},
        experts={name: {"weight": torch.tensor([row])} for name, row in EXPERTS.items()},
        evaluators={"any": lambda model: 0.0},
        operator=TaskArithmetic() if operator == "sum" else Ties(density=density),
        check_base=False,
    )
    return problem.merged(torch.tensor([math, code]))["weight"]


def towards(weights: Tensor) -> Callable[[nn.Module], float]:
    def score(model: nn.Module) -> float:
        merged = model.get_parameter("weight")
        return 1.0 - float((merged.detach() - weights).square().mean())

    return score


def problem() -> MergedModelProblem:
    """The best of metric ``sum`` is a merge by task arithmetic, that of ``ties`` one by TIES."""
    targets = {"sum": merged_by("sum", 0.6, 0.5), "ties": merged_by("ties", 0.5, 0.9)}
    return MergedModelProblem(
        nn.Linear(6, 1, bias=False),
        base={"weight": torch.zeros(1, 6)},
        experts={name: {"weight": torch.tensor([row])} for name, row in EXPERTS.items()},
        evaluators={name: towards(target) for name, target in targets.items()},
        metrics=[Metric(name, kind="unbounded") for name in targets],
        operator=OPERATOR,
        check_base=False,
    )


def search(run_dir: Path | None = None, **changes: Any) -> Result:
    settings: dict[str, Any] = {
        "sampler": Sobol(),
        "surrogate": Quadratic(),
        "solver": GradientSolver(points=30, steps=30),
        "verify": 2,
        "progress": False,
        "tracking": "local" if run_dir else "none",
        **changes,
    }
    return optimize(problem(), 18, seed=3, run_dir=run_dir, **settings)


ADAPTIVE = Adaptive(FrontUncertainty(restarts=2, raw_samples=16, steps=8, preferences=8, draws=2))
SAMPLERS: dict[str, Sampler] = {"sobol": Sobol(), "adaptive": ADAPTIVE}


@pytest.fixture(scope="module", params=["sobol", pytest.param("adaptive", marks=pytest.mark.slow)])
def sampler(request: pytest.FixtureRequest) -> Sampler:
    return SAMPLERS[request.param]


@pytest.fixture(scope="module")
def run_dir(sampler: Sampler, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("choice") / "run"
    search(directory, sampler=sampler)
    return directory


def test_the_front_uses_the_operator_that_is_better_at_either_end(run_dir: Path) -> None:
    result = load_result(run_dir, problem=problem())
    result.space.check(result.front.X)
    best = [result.front.X[result.front.mean[:, j].argmax()] for j in (0, 1)]
    assert [float(x[2]) for x in best] == [0.0, 1.0]
    assert float(best[0][0]) == pytest.approx(0.6, abs=0.15)
    counts = result.summary["choice"]
    assert counts["name"] == "operator"
    assert sum(counts["front"].values()) == len(result.front)
    assert min(counts["front"].values()) > 0
    assert min(counts["search"].values()) > 2


def test_tables_and_page_name_the_operators(run_dir: Path) -> None:
    result = load_result(run_dir)
    with (run_dir / "front.csv").open() as file:
        rows = list(csv.DictReader(file))
    codes = {"sum": 0.0, "ties": 1.0}
    assert [codes[row["option:operator"]] for row in rows] == result.front.X[:, 2].tolist()
    with (run_dir / "evaluations.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["option:operator"] for row in rows} == {"sum", "ties"}
    page = (run_dir / "report.html").read_text()
    assert "<td>ties</td>" in page
    assert "ties.density" in page
    assert "uniform blend, ties" in page


def test_a_choice_is_made_and_exported_as_its_operator(run_dir: Path, tmp_path: Path) -> None:
    result = load_result(run_dir, problem=problem())
    for prefer, expected in (({"sum": 1}, "TaskArithmetic"), ({"ties": 1}, "Ties")):
        choice = result.choose(prefer)
        option = choice.coefficients["operator"]
        assert option == {"TaskArithmetic": "sum", "Ties": "ties"}[expected]
        assert ("ties.density" in choice.coefficients) == (option == "ties")
        assert json.loads(json.dumps(choice.describe()))["coefficients"]["operator"] == option
        out = choice.export(tmp_path / expected)
        assert f":{expected}\n" in (out / "recipe.yaml").read_text()
        written = open_checkpoint(out).load("weight")
        assert torch.equal(written, problem().merged(choice.x)["weight"])


def test_a_killed_run_resumes_as_if_it_had_never_been(
    run_dir: Path, sampler: Sampler, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    lines = (run_dir / "events.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) > 30
    (broken / "events.jsonl").write_text("".join(lines[:23]))
    search(broken, sampler=sampler)
    first, again = load_result(run_dir), load_result(broken)
    assert torch.equal(again.seen.X, first.seen.X)
    assert torch.equal(again.front.X, first.front.X)
    assert torch.equal(again.front.mean, first.front.mean)
    assert JsonlStore.open(broken).directory == broken
    assert again.space == first.space == problem().space


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surrogate": Sparse()}, "the surrogate is Sparse, which does not handle a choice"),
        ({"sampler": CMAES()}, "the sampler is CMAES, which does not handle a choice"),
        (
            {"sampler": FrontUncertainty(surrogate=Sparse())},
            "the sampler's surrogate is Sparse, which does not handle a choice",
        ),
    ],
)
def test_what_does_not_handle_a_choice_is_refused_before_anything_is_evaluated(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        search(**changes)
    assert "use s" in str(caught.value)


def test_a_nested_run_is_refused() -> None:
    with pytest.raises(SpaceError, match="nested merging needs one operator"):
        optimize_nested(problem(), 30, nested=Nested(), progress=False, sampler=Adaptive())


def test_an_option_that_is_fixed_is_searched_alone() -> None:
    settings = Settings(budget=8)
    space = problem().space.with_fixed({"operator": "ties"})
    settings.check_space(space)
    assert space.by_option == (space,)
