"""Runs that are called from an unusual world, and runs beside each other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from map_bo.data import Metric, Observations
from map_bo.loop.optimize import optimize
from map_bo.loop.result import Choice, Result
from map_bo.loop.run import Run
from map_bo.loop.settings import Settings
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.space import CoefficientSpace
from map_bo.surrogates.processes.gp import GP
from map_bo.surrogates.surrogate import Surrogate
from map_bo.tracking.jsonl import MemoryStore
from tests.evaluators.surroundings import surroundings

METRICS = (Metric("x", kind="unbounded"), Metric("y", kind="unbounded"))
CENTRES = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
BASE = {"weight": torch.linspace(-1, 1, 8).reshape(2, 4), "bias": torch.zeros(2)}
EXPERTS = {
    "u": {name: value + 0.3 for name, value in BASE.items()},
    "v": {name: value - 0.2 for name, value in BASE.items()},
}
INPUTS = torch.ones(1, 4)
MODEL = nn.Linear(4, 2)


class Bowl:
    """A problem of a user's own, which computes as its world has it."""

    def __init__(self, act: Callable[[], object] = lambda: None) -> None:
        self.space = CoefficientSpace.box(("a", "b"))
        self.metrics = METRICS
        self.act = act
        self.worlds: list[tuple[bool, bool, torch.dtype]] = []

    def evaluate(self, X: Tensor, *, generator: torch.Generator) -> Observations:
        state = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self.worlds.append((*state, torch.get_default_dtype()))
        self.act()
        Y = 1 - (X.unsqueeze(1) - CENTRES).square().sum(-1)
        return Observations(X=self.space.check(X), Y=Y, metrics=self.metrics)


def run_bowl(problem: Bowl | None = None, surrogate: Surrogate | None = None) -> Result:
    given: dict[str, Any] = {} if surrogate is None else {"surrogate": surrogate}
    return optimize(
        Bowl() if problem is None else problem,
        7,
        progress=False,
        tracking="none",
        verify=0,
        **given,
    )


def run_model(model: nn.Module | None = None) -> Result:
    def score(sign: float) -> Callable[[nn.Module], float]:
        return lambda model: float(torch.sigmoid(sign * model(INPUTS))[0, 0])

    problem = MergedModelProblem(
        MODEL if model is None else model,
        base=BASE,
        experts=EXPERTS,
        evaluators={"u": score(1), "v": score(-1)},
    )
    return optimize(problem, 7, progress=False, tracking="none", verify=0)


def run_gp() -> Result:
    return run_bowl(surrogate=GP())


@contextmanager
def setting(put: Callable[[Any], object], there: Any, back: Any) -> Iterator[None]:
    put(there)
    try:
        yield
    finally:
        put(back)


def dtype(kind: torch.dtype) -> AbstractContextManager[None]:
    return setting(torch.set_default_dtype, kind, torch.float32)  # noqa: TID251


WORLDS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no gradients": torch.no_grad,
    "inference mode": torch.inference_mode,
    "float64": lambda: dtype(torch.float64),
    "bfloat16": lambda: dtype(torch.bfloat16),
    "numpy's errors": lambda: np.errstate(all="raise"),
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
}
OF_BOWLS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "device meta": lambda: torch.device("meta"),
    "default device meta": lambda: setting(torch.set_default_device, "meta", None),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def slow(kind: str, world: str) -> Any:
    return pytest.param(kind, world, marks=pytest.mark.slow)


KINDS: dict[str, Callable[[], Result]] = {"bowl": run_bowl, "model": run_model, "gp": run_gp}


@cache
def ordinary(kind: str) -> tuple[Result, Choice]:
    result = KINDS[kind]()
    return result, result.choose()


def assert_same(result: Result, choice: Choice, expected: tuple[Result, Choice]) -> None:
    assert torch.equal(result.seen.X, expected[0].seen.X)
    assert torch.equal(result.seen.Y, expected[0].seen.Y)
    assert torch.equal(result.front.X, expected[0].front.X)
    assert torch.equal(choice.x, expected[1].x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "world"),
    [
        ("bowl", "no gradients"),
        ("bowl", "inference mode"),
        ("bowl", "float64"),
        ("bowl", "default device meta"),
        ("model", "float64"),
        *(slow("bowl", world) for world in (*WORLDS, *OF_BOWLS)),
        *(slow(kind, world) for kind in ("model", "gp") for world in WORLDS),
    ],
)
def test_a_run_does_not_depend_on_the_callers_world(kind: str, world: str) -> None:
    expected = ordinary(kind)
    with {**WORLDS, **OF_BOWLS}[world]():
        around = surroundings()
        result = KINDS[kind]()
        choice = result.choose()
        assert surroundings() == around
    assert_same(result, choice, expected)


@pytest.mark.slow
def test_a_problem_finds_the_callers_world() -> None:
    problem = Bowl()
    with torch.inference_mode(), dtype(torch.float64):
        run_bowl(problem)
    assert set(problem.worlds) == {(False, True, torch.float64)}
    problem = Bowl()
    run_bowl(problem)
    assert set(problem.worlds) == {(True, False, torch.float32)}


def test_the_callers_world_is_given_back_after_an_error() -> None:
    def interrupt() -> None:
        torch.set_grad_enabled(True)
        raise KeyboardInterrupt

    with torch.no_grad(), dtype(torch.float64):
        around = surroundings()
        with pytest.raises(KeyboardInterrupt):
            run_bowl(Bowl(interrupt))
        assert surroundings() == around


def test_a_model_of_inference_tensors_is_understood() -> None:
    with torch.inference_mode():
        model = nn.Linear(4, 2)
    before = [(id(p), p.data_ptr(), p.tolist()) for p in model.parameters()]
    result = run_model(model)
    assert_same(result, result.choose(), ordinary("model"))
    assert before == [(id(p), p.data_ptr(), p.tolist()) for p in model.parameters()]
    assert all(parameter.is_inference() for parameter in model.parameters())


def test_ask_and_tell_in_inference_mode() -> None:
    def drive() -> Tensor:
        problem = Bowl()
        run = Run(problem, Settings(budget=8, verify=0), MemoryStore())
        for _ in range(8):
            (index,) = run.ask(1)
            x = run.state.X[index : index + 1]
            run.tell(index, problem.evaluate(x, generator=torch.Generator()))
        return run.state.X

    expected = drive()
    with torch.inference_mode():
        found = drive()
    assert torch.equal(found, expected)
    assert not found.is_inference()


@pytest.mark.slow
def test_runs_in_threads_propose_what_each_proposes_alone() -> None:
    def draw() -> None:
        torch.manual_seed(5)  # noqa: TID251
        torch.rand(7)

    found: dict[int, Result] = {}

    def work(number: int) -> None:
        found[number] = run_bowl(Bowl(draw)) if number else run_bowl()

    expected, _ = ordinary("bowl")
    around = surroundings()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in found.values():
        assert torch.equal(result.seen.X, expected.seen.X)
    assert len(found) == 2
    assert surroundings() == around
