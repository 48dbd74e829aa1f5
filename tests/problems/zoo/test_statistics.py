from __future__ import annotations

from pathlib import Path

import pytest
import torch

from map_bo.errors import DataError, MergeError
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.vectors.operator import MergeOperator
from map_bo.operators.statistics.fisher import Fisher
from map_bo.operators.statistics.regmean import RegMean, RegMeanPlusPlus
from map_bo.operators.statistics.statistics import load_statistics
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.problems.zoo import statistics as zoo_statistics
from map_bo.problems.zoo.digits import DigitsZoo, digits_problem
from map_bo.problems.zoo.statistics import digits_statistics
from map_bo.rng import make_generator

OPERATORS = [Fisher(), RegMean(), RegMeanPlusPlus()]


@pytest.mark.parametrize("arch", ["mlp", "cnn"])
@pytest.mark.parametrize("operator", OPERATORS, ids=["fisher", "regmean", "regmean++"])
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
    experts, base = zoo.checkpoints().experts, zoo.checkpoints().base
    files = digits_statistics("mlp", experts, "fisher", tmp_path, base=base)
    for name, file in files.items():
        known = load_statistics(file, kind="fisher", model=experts[name])
        assert known.examples == zoo_statistics.EXAMPLES
        assert known.data == f"{name}: {zoo_statistics.EXAMPLES} training images"
        assert known.tensors.names == tuple(sorted(open_checkpoint(experts[name]).names))

    def refuse(*args: object, **settings: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(zoo_statistics, "fisher", refuse)
    assert digits_statistics("mlp", experts, "fisher", tmp_path, base=base) == files


def test_those_in_the_merged_model_belong_to_all_experts(tmp_path: Path) -> None:
    two, three = (DigitsZoo(n, epochs=1).checkpoints() for n in (2, 3))
    files = digits_statistics("mlp", two.experts, "merged_grams", tmp_path, base=two.base)
    more = digits_statistics("mlp", three.experts, "merged_grams", tmp_path, base=three.base)
    for name, file in files.items():
        known = load_statistics(file, kind="merged_grams", model=two.experts[name])
        assert known.settings["coefficients"] == dict.fromkeys(files, 0.5)
        assert file != more[name]


def test_given_statistics_stay(tmp_path: Path) -> None:
    zoo = DigitsZoo(2, epochs=1)
    made = zoo.checkpoints()
    files = digits_statistics("mlp", made.experts, "fisher", tmp_path, base=made.base)
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
    made = DigitsZoo(2, epochs=1).checkpoints()
    with pytest.raises(DataError, match="cannot be kept") as caught:
        digits_statistics("mlp", made.experts, "grams", tmp_path / "file", base=made.base)
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
