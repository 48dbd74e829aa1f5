from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import map_bo
from map_bo.data import Metric, Observations
from map_bo.errors import ConfigError, WorkersError
from map_bo.problems.botorch_functions import BotorchProblem
from map_bo.problems.problem import Problem
from map_bo.problems.synthetic import ConcaveQuadratics, MultiBump
from map_bo.rng import make_generator
from map_bo.workers import recipe as recipes
from map_bo.workers.recipe import Recipe


class Small:
    """A problem of a value and a function that it holds."""

    space = map_bo.CoefficientSpace(("a", "b"), (0.0, 0.0), (1.0, 1.0))
    metrics = (Metric("m"),)

    def __init__(self, held: object) -> None:
        self.held = held

    def evaluate(self, X: Tensor, *, generator: torch.Generator) -> Observations:
        return Observations(X, X.sum(-1, keepdim=True) / 2, self.metrics)


def make() -> Problem:
    return Small("made")


def make_nothing() -> int:
    return 3


def make_trouble() -> Problem:
    raise RuntimeError("no such thing")


def module_function(model: nn.Module) -> float:
    return 0.5


@pytest.mark.parametrize(
    "problem",
    [ConcaveQuadratics(), MultiBump(), BotorchProblem("BraninCurrin"), Small(module_function)],
    ids=lambda problem: type(problem).__name__,
)
def test_problems_come_back_from_their_recipes(problem: Problem) -> None:
    recipe = pickle.loads(pickle.dumps(Recipe.of(problem)))
    found = recipe.build()
    assert type(found) is type(problem)
    assert found.metrics == problem.metrics
    x = torch.full((2, problem.space.d), 0.25).double()
    one, two = (p.evaluate(x, generator=make_generator(2)) for p in (found, problem))
    assert torch.equal(one.Y, two.Y)


def test_a_table_comes_back() -> None:
    seen = Observations(torch.tensor([[0.5, 0.5]]).double(), torch.ones(1, 1), (Metric("m"),))
    table = map_bo.TableProblem(seen, map_bo.CoefficientSpace(("a", "b"), (0.0, 0.0), (1.0, 1.0)))
    found = Recipe.of(table).build()
    assert isinstance(found, map_bo.TableProblem)
    assert torch.equal(found.observations.Y, seen.Y)


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (lambda: 0.5, "it holds a lambda"),
        (torch, "it holds the module torch"),
        (torch.zeros(5_000_000), r"more than 16 MB .*: it holds a tensor of \[5000000\]"),
        (b"x" * 17_000_000, "more than 16 MB"),
    ],
    ids=["lambda", "module", "tensor", "bytes"],
)
def test_what_cannot_travel_is_refused_with_the_fix(held: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        Recipe.of(Small(held))
    assert "factory=make_problem" in str(caught.value)


def test_many_small_tensors_are_too_much_as_well() -> None:
    with pytest.raises(ConfigError, match="more than 16 MB"):
        Recipe.of(Small([torch.zeros(1_000_000) for _ in range(5)]))


def test_a_slice_of_a_large_tensor_travels_alone() -> None:
    found = Recipe.of(Small(torch.arange(5_000_000.0)[:3])).build()
    assert isinstance(found, Small)
    assert torch.equal(found.held, torch.arange(3.0))  # type: ignore[arg-type]


def test_local_functions_and_classes_are_refused() -> None:
    def local() -> None: ...

    class Local: ...

    for held, words in ((local, "local function"), (Local, "local class")):
        with pytest.raises(ConfigError, match=f"it holds the {words}"):
            Recipe.of(Small(held))


def of_main(monkeypatch: pytest.MonkeyPatch, file: str | None) -> Callable[[], float]:
    def score() -> float:
        return 0.5

    score.__module__, score.__qualname__ = "__main__", "score"
    main = ModuleType("__main__")
    main.score = score  # type: ignore[attr-defined]
    if file is not None:
        main.__file__ = file
    monkeypatch.setitem(sys.modules, "__main__", main)
    return score


def test_functions_of_an_interactive_session_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    score = of_main(monkeypatch, None)
    with pytest.raises(ConfigError, match="score is defined in an interactive session"):
        Recipe.of(Small(score), script=True)


def test_functions_of_a_script_travel_to_workers_that_import_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    score = of_main(monkeypatch, __file__)
    assert Recipe.of(Small(score), script=True).main
    assert not Recipe.of(Small(module_function), script=True).main
    with pytest.raises(ConfigError, match="score is defined in this script"):
        Recipe.of(Small(score))


@pytest.mark.parametrize("factory", [make, f"{__name__}:make"])
def test_a_factory_makes_it(factory: str | Callable[[], Problem]) -> None:
    found = pickle.loads(pickle.dumps(Recipe.calling(factory))).build()
    assert isinstance(found, Small)
    assert found.held == "made"


def test_a_factory_that_is_not_there_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="'nowhere:make' cannot be imported"):
        Recipe.calling("nowhere:make")
    with pytest.raises(ConfigError, match="the factory must be a function, got 3"):
        Recipe.calling(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (make_nothing, "returned a int and no problem"),
        (make_trouble, "cannot be built in a worker: RuntimeError: no such thing"),
    ],
)
def test_what_goes_wrong_in_the_worker_is_told(factory: Callable[[], Problem], words: str) -> None:
    with pytest.raises(WorkersError, match=words):
        Recipe.calling(factory).build()


def test_modules_of_the_users_own_are_found_where_the_driver_finds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.of(Small(1))
    assert str(tmp_path.resolve()) in recipe.paths
    assert recipe.directory == os.getcwd()
    assert not [path for path in recipe.paths if "site-packages" in path]


def test_a_digits_problem_travels_as_its_settings() -> None:
    problem = map_bo.digits_problem(2, size=50)
    recipe = Recipe.of(problem)
    assert sum(map(len, recipe.args)) < 1000
    found = recipe.build()
    assert found.space == problem.space
    x = torch.tensor([[0.4, 0.6]], dtype=torch.float64)
    one, two = (p.evaluate(x, generator=make_generator(2)) for p in (found, problem))
    assert torch.equal(one.Y, two.Y)


def test_the_limit_is_the_one_of_the_documentation() -> None:
    assert recipes.LARGEST == 16 * 2**20
