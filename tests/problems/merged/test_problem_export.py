"""What a problem writes is the model that it evaluates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from map_bo.errors import MergeError
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.export.bounded import merges_files
from map_bo.merging.export.model import ExportSettings
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.operator import MergeOperator
from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.operators.averages import Slerp, WeightedAverage
from map_bo.operators.consensus import Consensus
from map_bo.operators.recipes import merge_again
from map_bo.operators.sparse import Breadcrumbs, Dare, Della, Magnitude, Ties
from map_bo.operators.statistics.fisher import Fisher
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.rng import make_generator
from tests.merging.adapter_files import SHAPES, write_adapter
from tests.merging.hard_checkpoints import everything, loaded, saved
from tests.merging.small_models import Cnn, Mlp, build, family, inputs
from tests.operators.expert_statistics import fishers

BLOCKS = {"last": r"^(head|last|middle)", "rest": "*"}
OPERATORS: dict[str, MergeOperator] = {
    "task arithmetic": TaskArithmetic(),
    "task arithmetic in blocks": TaskArithmetic(BLOCKS),
    "average": WeightedAverage(),
    "slerp": Slerp(blocks=BLOCKS),
    "magnitude": Magnitude(),
    "ties": Ties(),
    "ties searched": Ties(trim="tensor", search=["density", "scale"], blocks=BLOCKS),
    "breadcrumbs": Breadcrumbs(density=0.5),
    "dare": Dare(drop_rate=0.5, search=["drop_rate"]),
    "della": Della(blocks=BLOCKS),
    "consensus": Consensus(),
}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def problem(
    kind: str, operator: MergeOperator, *, files: Path | None = None, **settings: Any
) -> MergedModelProblem:
    base, experts = family(kind)
    models: dict[str, Any] = {"base": base, **experts}
    if files is not None:
        models = {
            name: saved(files / name, {k: v.clone() for k, v in model.state_dict().items()})
            for name, model in models.items()
        }
    return MergedModelProblem(
        build(kind),
        base=models.pop("base"),
        experts=models,
        evaluators={"mean": lambda model: float(model(inputs(kind)).detach().sigmoid().mean())},
        operator=operator,
        **settings,
    )


def point(of: MergedModelProblem, seed: int = 1) -> Tensor:
    return of.space.sample(1, generator=make_generator(seed))[0]


def require_same(written: Path, merged: Mapping[str, Tensor]) -> None:
    found = loaded(written)
    assert sorted(found) == sorted(merged)
    for name, value in found.items():
        torch.testing.assert_close(value, merged[name], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", ["cnn", "tied"])
@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator(name: str, kind: str, tmp_path: Path) -> None:
    merging = problem(kind, OPERATORS[name])
    x = point(merging)
    out = merging.export(x, tmp_path / "m", settings=ExportSettings(shard_size=100))
    require_same(out, merging.merged(x))
    assert len(list(out.glob("model-*.safetensors"))) > 1


@pytest.mark.parametrize("name", ["task arithmetic", "ties", "della"])
def test_recalibrated_statistics_take_the_place_of_merged_ones(name: str, tmp_path: Path) -> None:
    plain = problem("cnn", OPERATORS[name])
    merging = problem("cnn", OPERATORS[name], recalibration=[inputs("cnn")])
    x = point(merging)
    out = merging.export(x, tmp_path / "m")
    require_same(out, merging.merged(x))
    assert not torch.equal(loaded(out)["norm.running_mean"], plain.merged(x)["norm.running_mean"])
    with pytest.raises(MergeError, match="measured anew"):
        merge_again(out, tmp_path / "again", progress=False)


class TestTies:
    """Files that store the tied tensors apart, or one of them alone: the model ties them."""

    @pytest.mark.parametrize("name", OPERATORS)
    def test_they_are_merged_as_the_model_has_them(self, name: str, tmp_path: Path) -> None:
        merging = problem("tied", OPERATORS[name], files=tmp_path / "in")
        x = point(merging)
        out = merging.export(x, tmp_path / "m")
        found = loaded(out)
        assert torch.equal(found["output.weight"], found["embed.weight"])
        require_same(out, merging.merged(x))
        second = merge_again(out, tmp_path / "again", progress=False)
        assert open_checkpoint(second).digest() == open_checkpoint(out).digest()

    @pytest.mark.parametrize("name", ["task arithmetic", "task arithmetic in blocks", "ties"])
    def test_an_expert_may_lack_one_of_the_names(self, name: str, tmp_path: Path) -> None:
        base, experts = family("tied")
        merging = MergedModelProblem(
            build("tied"),
            base={k: v.clone() for k, v in base.state_dict().items()},
            experts={
                label: {k: v for k, v in model.state_dict().items() if k != "output.weight"}
                for label, model in experts.items()
            },
            evaluators={"one": lambda model: 1.0},
            operator=OPERATORS[name],
        )
        x = point(merging)
        require_same(merging.export(x, tmp_path / "m"), merging.merged(x))

    def test_the_recipe_names_what_its_files_do_not(self, tmp_path: Path) -> None:
        merging = problem("tied", Ties(), files=tmp_path / "in")
        out = merging.export(point(merging), tmp_path / "m")
        merged = yaml.safe_load((out / "recipe.yaml").read_text())["merged"]
        assert merged["ties"] == {"output.weight": "embed.weight"}


def test_bfloat16_files_are_merged_in_float32_and_rounded_once(tmp_path: Path) -> None:
    base, experts = family("mlp")
    files = {
        name: saved(tmp_path / name, {k: v.bfloat16() for k, v in model.state_dict().items()})
        for name, model in (("base", base), *experts.items())
    }
    merging = MergedModelProblem(
        Mlp(),
        base=files["base"],
        experts={name: files[name] for name in experts},
        evaluators={"one": lambda model: 1.0},
        operator=Ties(),
    )
    x = point(merging)
    found, expected = loaded(merging.export(x, tmp_path / "m")), merging.merged(x)
    for name, value in found.items():
        assert value.dtype == torch.bfloat16
        torch.testing.assert_close(value, expected[name], rtol=2**-8, atol=0)


@pytest.mark.parametrize("name", ["task arithmetic", "ties", "slerp"])
def test_float64_models(name: str, tmp_path: Path) -> None:
    base, experts = family("mlp")
    merging = MergedModelProblem(
        Mlp().double(),
        base=base.double(),
        experts={label: model.double() for label, model in experts.items()},
        evaluators={"one": lambda model: 1.0},
        operator=OPERATORS[name],
    )
    x = point(merging)
    found, expected = loaded(merging.export(x, tmp_path / "m")), merging.merged(x)
    for key, value in found.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-6)


def test_fisher_from_a_problem(tmp_path: Path) -> None:
    base, experts = family("cnn")
    opened = {name: open_checkpoint(model) for name, model in experts.items()}
    found = fishers(TaskVectors.load(open_checkpoint(base), opened))
    merging = problem("cnn", Fisher(found))
    x = point(merging)
    require_same(merging.export(x, tmp_path / "m"), merging.merged(x))


def test_adapters_among_the_experts(tmp_path: Path) -> None:
    class Layer(nn.Module):
        def __init__(self, **parts: nn.Module) -> None:
            super().__init__()
            for name, part in parts.items():
                self.add_module(name, part)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            first = Layer(fc=nn.Linear(5, 6), norm=nn.BatchNorm1d(6))
            second = Layer(fc=nn.Linear(7, 40, bias=False), conv=nn.Conv2d(3, 4, 2, bias=False))
            self.layers = nn.ModuleList([first, second])
            self.head = nn.Linear(7, 7, bias=False)

    adapters = {
        "a": write_adapter(tmp_path / "a", SHAPES, seed=1, modules=["head", "layers.0.fc"]),
        "b": write_adapter(tmp_path / "b", SHAPES, seed=2, modules=["layers.1.conv", "head"]),
    }
    merging = MergedModelProblem(
        Model(),
        base=Model(),
        experts=adapters,
        evaluators={"one": lambda model: 1.0},
        operator=Ties(density=0.5),
    )
    x = point(merging)
    require_same(merging.export(x, tmp_path / "m"), merging.merged(x))


class TestEarly:
    """What cannot be written is refused before anything is loaded."""

    def test_the_target(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        merging = problem("cnn", Ties(), recalibration=[inputs("cnn")])
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "x").write_text("x")
        monkeypatch.setattr(MergedModelProblem, "load", lambda *_: pytest.fail("loaded"))
        before = everything(tmp_path)
        with pytest.raises(MergeError, match="exists and is not empty"):
            merging.export(point(merging), tmp_path / "m")
        assert everything(tmp_path) == before

    def test_memory(self, tmp_path: Path) -> None:
        merging = problem("mlp", Ties(), files=tmp_path / "in")
        before = everything(tmp_path)
        with pytest.raises(MergeError, match="max_memory is 10 MB, and this merge needs"):
            merging.export(point(merging), tmp_path / "new" / "m", settings=ExportSettings("10MB"))
        assert everything(tmp_path) == before


def test_no_model_is_loaded_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A linear merge goes from files to files without an architecture."""

    def never() -> nn.Module:
        raise AssertionError("built")

    base, experts = family("cnn")
    merging = MergedModelProblem(
        never,
        base=base,
        experts=experts,
        evaluators={"one": lambda model: 1.0},
    )
    monkeypatch.setattr(TaskVectors, "load", lambda *a, **k: pytest.fail("loaded"))
    out = merging.export(point(merging), tmp_path / "m")
    assert loaded(out).keys() == Cnn().state_dict().keys()
    assert merges_files(open_checkpoint(base), TaskArithmetic())
