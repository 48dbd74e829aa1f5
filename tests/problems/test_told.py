from __future__ import annotations

from typing import Any

import pytest
import torch

from map_bo.errors import ConfigError, DataError, MapBoError
from map_bo.loop.run import Run
from map_bo.problems.told import ToldProblem, told_problem
from map_bo.tracking.jsonl import MemoryStore
from tests.loop.bowls import Bowls, quick


def test_names_alone_make_a_problem() -> None:
    problem = told_problem(["math", "code"], ["gsm8k"], upper=1.5, sum_at_most=2)
    assert problem.space.names == ("math", "code")
    assert problem.space.upper == (1.5, 1.5)
    [metric] = problem.metrics
    assert (metric.name, metric.direction, metric.kind) == ("gsm8k", "max", "proportion")
    loss = {"loss": {"direction": "min", "kind": "loss"}, "acc": None}
    assert [m.direction for m in told_problem(["a"], loss).metrics] == ["min", "max"]


@pytest.mark.parametrize(
    ("experts", "metrics", "message"),
    [
        ([], ["m"], r"problem\.experts must be a list of names, got \[\]"),
        ("math", ["m"], "must be a list of names, got 'math'"),
        (["a"], "m", r"problem\.metrics must be a list of names, got 'm'"),
        (["a"], ["m", "m", "n"], None),
        (["a"], {"m": {"directon": "min"}}, "metric 'm' has no field 'directon'"),
        (["a"], {"m": "min"}, r"problem\.metrics\.m must be a mapping"),
        (["a"], {"m": {"direction": "low"}}, "must be 'max' or 'min'"),
    ],
)
def test_what_is_no_problem_is_refused(experts: Any, metrics: Any, message: str | None) -> None:
    if message is None:
        assert len(told_problem(experts, metrics).metrics) == 2
        return
    with pytest.raises((ConfigError, DataError), match=message):
        told_problem(experts, metrics)


def test_it_says_what_to_do_where_it_is_asked_to_evaluate() -> None:
    bowls = Bowls()
    problem = ToldProblem(bowls.space, bowls.metrics)
    with pytest.raises(MapBoError, match="evaluated elsewhere") as caught:
        problem.evaluate(torch.zeros(1, 2), generator=torch.Generator())
    assert "map-bo ask" in str(caught.value.hint)
    with pytest.raises(MapBoError, match="evaluated elsewhere"):
        Run(problem, quick(8, verify=0), MemoryStore()).drive()


def test_a_run_that_is_told_everything_equals_one_that_evaluates_itself() -> None:
    bowls = Bowls()
    driven = Run(bowls, quick(8, verify=0, batch=2), MemoryStore()).drive()
    run = Run(ToldProblem(bowls.space, bowls.metrics), quick(8, verify=0), MemoryStore())
    while len(run.state.X) < 8:
        for index in run.ask(2):
            values = bowls.true_values(run.state.X[index : index + 1])[0].tolist()
            run.tell(index, dict(zip(("near a", "far from b"), values, strict=True)))
    found = run.drive()
    assert torch.equal(found.seen.X, driven.seen.X)
    assert torch.equal(found.front.mean, driven.front.mean)


def test_what_is_known_of_it_tells_it_from_another() -> None:
    bowls, store = Bowls(), MemoryStore()
    Run(ToldProblem(bowls.space, bowls.metrics, {"models": "a"}), quick(8), store)
    with pytest.raises(MapBoError, match=r"problem\.models was 'a' and is 'b'"):
        Run(ToldProblem(bowls.space, bowls.metrics, {"models": "b"}), quick(8), store)
