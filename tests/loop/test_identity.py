"""What makes two runs the same run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from map_bo.data import Metric, Observations
from map_bo.errors import AnotherRunError
from map_bo.examples.sets import ExampleOutcomes
from map_bo.loop.identity import difference, problem_identity, refuse_another, run_identity
from map_bo.loop.run import Run
from map_bo.loop.settings import Settings
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.problems.synthetic import ConcaveQuadratics
from map_bo.samplers.designs.space_filling import Sobol
from map_bo.space import CoefficientSpace
from map_bo.surrogates.processes.gp import GP
from map_bo.surrogates.quadratic import Quadratic
from map_bo.tracking.jsonl import JsonlStore, MemoryStore
from tests.evaluators.test_examples import Signs

PROBLEM = ConcaveQuadratics(d=2, m=2)


@dataclass(frozen=True)
class Frozen:
    """A problem of settings alone."""

    scale: Any = 1.0
    space = CoefficientSpace.box(("a",))
    metrics = (Metric("a"),)
    evaluate = ConcaveQuadratics.evaluate


@dataclass
class Counting:
    """A problem that changes while it is evaluated."""

    calls: int = 0
    space = Frozen.space
    metrics = Frozen.metrics
    evaluate = ConcaveQuadratics.evaluate


class Sampling:
    """A sampler that is not a dataclass."""

    propose = Sobol.propose


def identity(**settings: Any) -> dict[str, Any]:
    return run_identity(PROBLEM, Settings(budget=12, **settings))


def test_a_problem_is_recognised_by_its_settings_where_it_has_some() -> None:
    assert problem_identity(Frozen(2.0)) != problem_identity(Frozen())
    function: Callable[[], float] = lambda: 1.0  # noqa: E731
    assert problem_identity(Frozen(function)) == {"type": "Frozen"}
    assert problem_identity(Counting(3)) == {"type": "Counting"}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"batch": 2}, "settings.batch was 1 and is 2"),
        ({"surrogate": GP()}, "settings.surrogate was '.*:Auto' and is '.*:GP'"),
        ({"sampler": Sobol(anchors=False)}, "settings.sampler was '.*:Adaptive' and is '.*:Sobol'"),
        ({"sampler": Sampling()}, "and is 'tests.loop.test_identity.Sampling'"),
        ({"stop": {"criterion": "regret"}}, "settings.stop was None and is '.*:Stop' and 3 more"),
        ({"reference": {"f1": 0.0}}, "settings.reference was None|settings.reference.f1 was None"),
    ],
)
def test_the_first_difference_is_told(settings: dict[str, Any], told: str) -> None:
    assert difference(identity(), identity(**settings)) is not None
    with pytest.raises(AnotherRunError, match=told):
        refuse_another(identity(), identity(**settings))
    assert difference(identity(**settings), identity(**settings)) is None


def test_a_setting_within_another_is_told_by_its_way_there() -> None:
    before, now = identity(surrogate=Quadratic()), identity(surrogate=Quadratic(misfit=False))
    assert difference(before, now) == "settings.surrogate.misfit was True and is False"


def test_files_may_move_and_what_is_empty_is_nothing() -> None:
    before = {"problem": {"base": {"source": "/a", "digest": "x"}, "more": {}}}
    now = {"problem": {"base": {"source": "/b", "digest": "x"}}}
    assert difference(before, now) is None
    now["problem"]["base"]["digest"] = "y"
    assert difference(before, now) == "problem.base.digest was 'x' and is 'y'"


def test_descriptions_of_version_0_1_left_out_on_which_examples_metrics_are_measured() -> None:
    now = {"problem": {"metrics": [{"name": "a", "kind": "loss", "resampling": "same"}]}}
    assert difference({"problem": {"metrics": [{"name": "a", "kind": "loss"}]}}, now) is None
    assert difference({"problem": {"metrics": [{"name": "b", "kind": "loss"}]}}, now) is not None
    fresh = {"problem": {"metrics": [{"name": "a", "kind": "loss", "resampling": "fresh"}]}}
    assert difference(fresh, now) is not None


class Moved(Signs):
    """Scores examples that may have changed since the run was begun."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by, self.prepared = by, 0

    def prepare(self, model: nn.Module) -> None:
        super().prepare(model)
        assert self.inputs is not None
        self.inputs, self.prepared = self.inputs + self.by, self.prepared + 1


def of_examples(by: float) -> tuple[MergedModelProblem, Moved]:
    evaluator, weight = Moved(by), torch.zeros(1, 3)
    experts = {"a": {"weight": weight + 1}, "b": {"weight": weight - 1}}
    model = nn.Linear(3, 1, bias=False)
    made = MergedModelProblem(
        model, base={"weight": weight}, experts=experts, evaluators={"signs": evaluator}
    )
    return made, evaluator


def test_a_run_does_not_go_on_with_other_examples() -> None:
    settings = Settings(budget=8, verify=1, sampler=Sobol(), surrogate=Quadratic())
    store = MemoryStore()
    Run(of_examples(0.0)[0], settings, store)
    Run(of_examples(0.0)[0], settings, store)
    with pytest.raises(AnotherRunError, match=r"examples\.signs was"):
        Run(of_examples(0.1)[0], settings, store)
    result = Run(of_examples(0.0)[0], settings, store).drive()
    later, unread = of_examples(0.1)
    again = Run(later, settings, store).drive()  # nothing is left to measure
    assert torch.equal(again.front.X, result.front.X)
    assert not unread.prepared


def test_a_finished_run_does_not_grow_with_other_examples() -> None:
    settings, store = Settings(budget=4, sampler=Sobol(), surrogate=Quadratic()), MemoryStore()
    Run(of_examples(0.0)[0], settings, store).drive()
    other = Run(of_examples(0.1)[0], settings, store)  # as nothing is left to measure
    with pytest.raises(AnotherRunError, match=r"examples\.signs was"):
        other.extend(budget=5)
    same = Run(of_examples(0.0)[0], settings, store)
    same.extend(budget=5)
    assert same.settings.budget == 5


def test_a_recorded_run_is_not_resumed_on_other_examples(tmp_path: Path) -> None:
    settings = Settings(budget=8, verify=1, sampler=Sobol(), surrogate=Quadratic())
    first = Run(of_examples(0.0)[0], settings, JsonlStore.create(tmp_path))
    [index] = first.ask(1)
    outcome = ExampleOutcomes(torch.arange(3), torch.rand(3, 2), 3, (True, True))
    X, Y = first.state.X[[index]], torch.tensor([[0.5, 0.1]])
    first.tell(index, Observations(X, Y, first.problem.metrics, examples=({"signs": outcome},)))
    before = (tmp_path / "events.jsonl").read_bytes()
    with pytest.raises(AnotherRunError, match=r"examples\.signs was") as caught:
        Run(of_examples(0.1)[0], settings, JsonlStore.open(tmp_path))
    assert "use another run directory" in str(caught.value.hint)
    assert (tmp_path / "events.jsonl").read_bytes() == before
    again = Run(of_examples(0.0)[0], settings, JsonlStore.open(tmp_path))
    assert len(again.state.seen.examples[0]["signs"]) == 3


def test_a_record_that_does_not_tell_its_examples_is_taken_as_it_is() -> None:
    now = {"examples": {"signs": "x"}}
    assert difference({}, now) is None
    assert difference({"examples": {"signs": "y"}}, now) is not None
