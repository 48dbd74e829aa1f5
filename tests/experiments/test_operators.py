"""The comparison of operators on the zoos, at a tiny size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import map_bo
from experiments import operators
from experiments.operators import (
    ENTRIES,
    Entry,
    Halves,
    first_half,
    gap,
    main,
    normalised,
    second_half,
    weights_for,
    words,
)
from experiments.record_numbers import FIRST, LAST
from map_bo.data import Metric
from map_bo.pareto.preferences import Preference, utility
from map_bo.problems.zoo.images import ImagesProblem, images_problem
from map_bo.rng import make_generator
from map_bo.scale import Scale
from tests.problems.fake_images import write_images

ROOT = Path(__file__).parents[2]
STUDIES = ("text", "vision")
EXPERTS = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def _problem(root: Path, **settings: Any) -> ImagesProblem:
    return images_problem(root, sets=["mnist", "notmnist"], epochs=8, cache_dir=root, **settings)


@pytest.mark.parametrize("name", ENTRIES)
def test_every_row_of_every_grid_lies_in_its_space(name: str) -> None:
    entry = ENTRIES[name]
    space = entry.operator.space(EXPERTS, lower=0.0, upper=entry.upper)
    tried: list[tuple[float, ...]] = []

    def score(x: torch.Tensor) -> float:
        tried.append(tuple(space.check(x[None])[0].tolist()))
        return -float((x - 0.35).abs().sum())

    found = entry.settle(space, score)
    if found is None:
        assert name == "choice"
        return
    assert found[1] == len(set(tried))


def test_a_grid_settles_the_coefficient_and_then_the_setting() -> None:
    entry = Entry("TIES", map_bo.Ties(search=["density"]), (0.5, 1.0), 2.0, values=(0.1, 0.2, 0.5))
    space = entry.operator.space(EXPERTS, lower=0.0, upper=2.0)

    def score(x: torch.Tensor) -> float:
        return float(x[0] + x[-1])

    found = entry.settle(space, score)
    assert found is not None
    assert found[0].tolist() == [1.0, 1.0, 1.0, 1.0, 0.5]
    assert found[1] == 4  # the setting's default was among the first
    shared = Entry("SLERP", map_bo.Slerp(), (0.8,), shares=True)
    settled = shared.settle(shared.operator.space(EXPERTS, lower=0.0, upper=1.0), score)
    assert settled is not None
    assert settled[0].sum() == pytest.approx(0.8)


def test_choices_see_one_half_and_the_other_is_reported() -> None:
    outcomes = torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0]])
    assert first_half(outcomes).tolist() == [[1.0, 1.0, 1.0]]
    assert second_half(outcomes).tolist() == [[0.0, 0.0]]


def test_the_error_of_a_gap_is_that_of_paired_examples() -> None:
    own = torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    right = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    assert normalised(right, own) == pytest.approx((0.5 / 0.75 + 0.25 / 0.5) / 2)
    assert gap(right, right, own) == (0.0, 0.0)  # what both get wrong is no noise
    difference, error = gap(own, right, own)
    assert difference == pytest.approx(1 - normalised(right, own))
    per_set = [(own - right)[i] / own[i].mean() for i in range(2)]
    wanted = sum(float(one.var()) / 4 for one in per_set) ** 0.5 / 2
    assert error == pytest.approx(wanted)


def test_a_preference_for_normalised_accuracy_ranks_as_it_does() -> None:
    metrics = (Metric("a"), Metric("b"))
    scale = Scale(metrics, [0.2, 0.5], [0.9, 0.7], "as given")  # type: ignore[arg-type]
    own = torch.tensor([0.9, 0.6], dtype=torch.float64)
    values = torch.tensor([[0.5, 0.6], [0.3, 0.9], [0.8, 0.2]], dtype=torch.float64)
    found = utility(values, Preference(weights=weights_for(scale, own)), scale)
    wanted = (values / own).sum(-1)
    ratio = (found[1:] - found[0]) / (wanted[1:] - wanted[0])
    assert ratio[0] == pytest.approx(float(ratio[1]))
    assert ratio[0] > 0


def test_a_run_sees_the_first_half_alone_and_every_outcome_is_kept(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = _problem(images, size=20)
    halves = Halves(problem, tmp_path)
    X = torch.tensor([[0.5, 0.25]], dtype=torch.float64)
    seen = halves.evaluate(X, generator=make_generator(0))
    outcomes = halves.outcomes(X[0])
    assert outcomes.shape == (2, 20)
    assert seen.Y.tolist() == [outcomes[:, ::2].mean(-1).tolist()]
    assert seen.counts.tolist() == [[10.0, 10.0]]
    whole = problem.evaluate(X, generator=make_generator(0))
    assert outcomes.mean(-1).tolist() == pytest.approx(whole.Y[0].tolist())

    def fail(*args: object, **settings: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(problem, "load", fail)
    assert torch.equal(Halves(problem, tmp_path).outcomes(X[0]), outcomes)
    with pytest.raises(AssertionError, match="measured again"):
        Halves(problem, tmp_path).outcomes(X[0] + 1e-3)


@pytest.mark.slow
def test_operators_are_compared_by_the_command(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "PROBLEMS", {"vision": _problem})
    line = ["vision", "--root", str(images), "--budget", "8", "--size", "20"]
    line += ["--only", "ties", "choice", "--out", str(tmp_path / "out"), "--work", str(tmp_path)]
    main(line)
    numbers = json.loads((tmp_path / "out" / "operators.json").read_text())
    assert list(numbers["operators"]) == ["ties", "choice"]
    assert numbers["halves"] == [10, 10]
    assert numbers["without"]["individual experts"]["reported"] == pytest.approx(1.0)
    ties = numbers["operators"]["ties"]
    assert set(ties["grid"]["x"]) == {"mnist", "notmnist", "density"}
    assert "grid" not in numbers["operators"]["choice"]
    assert numbers["operators"]["choice"]["search"]["x"]["operator"] in {
        "task_arithmetic",
        "ties",
        "tsv_m",
        "iso_c",
    }
    page = (tmp_path / "out" / "OPERATORS.md").read_text()
    assert "| TIES | 8 |" in page
    assert f", density {ties['grid']['x']['density']:.2g} |" in page
    assert "in 0 of 1 operators" in page or "in 1 of 1 operators" in page
    main(line)  # everything is kept
    assert json.loads((tmp_path / "out" / "operators.json").read_text()) == numbers
    assert words(numbers, "the command").startswith("`the command`")


@pytest.mark.parametrize("name", STUDIES)
def test_every_table_has_its_command_and_numbers(name: str) -> None:
    text = (ROOT / "experiments" / name / "OPERATORS.md").read_text()
    recorded = text.partition(FIRST)[2].partition(LAST)[0]
    assert f"`python -m experiments.operators {name} " in recorded
    assert (ROOT / "experiments" / name / "operators.json").exists()
