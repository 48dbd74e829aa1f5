from __future__ import annotations

from pathlib import Path

import pytest
import torch

from map_bo.errors import DataError, MergeError
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.vectors.operator import MergeOperator
from map_bo.operators.statistics.fisher import Fisher
from map_bo.operators.statistics.regmean import RegMean
from map_bo.operators.statistics.statistics import load_statistics
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.problems.zoo import statistics as zoo_statistics
from map_bo.problems.zoo.digits import DigitsZoo, digits_problem
from map_bo.problems.zoo.statistics import digits_statistics
from map_bo.rng import make_generator

OPERATORS = [Fisher(), RegMean()]


@pytest.mark.parametrize("arch", ["mlp", "cnn"])
@pytest.mark.parametrize("operator", OPERATORS, ids=["fisher", "regmean"])
def test_digits_fill_in_their_statistics(arch: str, operator: MergeOperator) -> None:
    settings = {"arch": arch, "epochs": 1, "size": 50}
    problem = digits_problem(2, operator=operator, **settings)  # type: ignore[arg-type]
    X = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], dtype=torch.float64)
    found = problem.evaluate(X, generator=make_generator(0))
    assert found.failures == (None,) * 4
    plain = digits_problem(2, **settings)  # type: ignore[arg-type]
    expected = plain.evaluate(X[:3], generator=make_generator(0))
    assert torch.equal(found.Y[:3], expected.Y)  # the base and the experts
    merged, average = problem.merged(X[3]), plain.merged(X[3])
    assert any(not torch.allclose(merged[key], average[key], atol=1e-4) for key in merged)


def test_they_are_computed_once_and_belong_to_the_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo = DigitsZoo(2, epochs=1)
    experts = zoo.checkpoints().experts
    files = digits_statistics("mlp", experts, "fisher", tmp_path)
    for name, file in files.items():
        known = load_statistics(file, kind="fisher", model=experts[name])
        assert known.examples == zoo_statistics.EXAMPLES
        assert known.data == f"{name}: {zoo_statistics.EXAMPLES} training images"
        assert known.tensors.names == tuple(sorted(open_checkpoint(experts[name]).names))

    def refuse(*args: object, **settings: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(zoo_statistics, "fisher", refuse)
    assert digits_statistics("mlp", experts, "fisher", tmp_path) == files


def test_given_statistics_stay(tmp_path: Path) -> None:
    zoo = DigitsZoo(2, epochs=1)
    files = digits_statistics("mlp", zoo.checkpoints().experts, "fisher", tmp_path)
    swapped = dict(zip(files, reversed(files.values()), strict=True))
    problem = digits_problem(2, epochs=1, size=50, operator=Fisher(swapped))
    with pytest.raises(MergeError, match="computed for another model"):
        problem.prepare()


def test_a_problem_of_other_models_names_what_is_missing() -> None:
    files = DigitsZoo(2, epochs=1).checkpoints()
    with pytest.raises(MergeError, match="regmean has no statistics for rot90, invert") as caught:
        MergedModelProblem(
            torch.nn.Identity(),
            base=files.base,
            experts=dict(files.experts),
            evaluators={"one": lambda model: 1.0},
            operator=RegMean(),
        )
    assert "+operator.statistics.rot90=FILE" in str(caught.value.hint)


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    experts = DigitsZoo(2, epochs=1).checkpoints().experts
    with pytest.raises(DataError, match="cannot be kept") as caught:
        digits_statistics("mlp", experts, "grams", tmp_path / "file")
    assert "MAP_BO_CACHE" in str(caught.value.hint)


def test_an_export_has_the_statistics_in_its_recipe(tmp_path: Path) -> None:
    problem = digits_problem(2, epochs=1, size=50, operator=RegMean())
    out = problem.export(torch.tensor([0.4, 0.6]), tmp_path / "merged")
    text = (out / "recipe.yaml").read_text()
    assert "class: map_bo.operators.statistics.regmean:RegMean" in text
    assert "training images" in text
    assert "no method for the operator regmean" in (out / "mergekit.yaml").read_text()
    merged, written = problem.merged(torch.tensor([0.4, 0.6])), open_checkpoint(out)
    assert all(torch.equal(written.load(name), merged[name]) for name in written.names)
