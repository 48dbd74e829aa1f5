"""The mergekit.yaml beside an exported merge gives that merge in mergekit."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from map_bo.merging.vectors.operator import MergeOperator
from map_bo.operators.mergekit.recipes import from_mergekit
from map_bo.problems.merged.problem import MergedModelProblem
from tests.operators.expressible import CASES, language_model, save_family

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Path]]:
    return request.param, save_family(tmp_path_factory.mktemp(request.param), request.param)


def export(
    kind: str, folders: dict[str, Path], operator: MergeOperator, c: list[float], out: Path
) -> Path:
    problem = MergedModelProblem(
        lambda: language_model(kind),
        base=folders["base"],
        experts={name: folders[name] for name in ("math", "code")},
        evaluators={"nothing": lambda model: 0.0},
        operator=operator,
        upper=2.0,
    )
    return problem.export(torch.tensor(c, dtype=torch.float64), out)


def run_mergekit(recipe: Path, out: Path) -> None:
    pytest.importorskip(
        "mergekit", reason="mergekit is the oracle: pip install 'map-bo[benchmark]'"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what mergekit imports is deprecated here and there
        from mergekit.config import MergeConfiguration
        from mergekit.merge import MergeOptions, run_merge

        options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
        content = yaml.safe_load(recipe.read_text())
        run_merge(MergeConfiguration.model_validate(content), str(out), options)


@pytest.mark.parametrize("case", CASES)
def test_mergekit_gives_the_exported_merge(
    case: str, family: tuple[str, dict[str, Path]], tmp_path: Path
) -> None:
    kind, folders = family
    merged = export(kind, folders, *CASES[case], tmp_path / "ours")
    run_mergekit(merged / "mergekit.yaml", tmp_path / "theirs")
    ours = load_file(merged / "model.safetensors")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    moved = load_file(folders["base"] / "model.safetensors")
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-6, msg=name)
    assert any(not torch.equal(tensor, moved[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("case", ["ties_blocks", "ties_paper_blocks", "average_base"])
def test_the_recipe_is_read_as_the_merge(
    case: str, family: tuple[str, dict[str, Path]], tmp_path: Path
) -> None:
    kind, folders = family
    merged = export(kind, folders, *CASES[case], tmp_path / "ours")
    read = from_mergekit(merged / "mergekit.yaml")
    assert read.base == str(folders["base"])
    assert read.experts == {name: str(folders[name]) for name in ("math", "code")}
    again = export(
        kind, folders, read.operator, list(read.coefficients.values()), tmp_path / "again"
    )
    left, right = (load_file(out / "model.safetensors") for out in (merged, again))
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=1e-5, atol=1e-6, msg=name)
