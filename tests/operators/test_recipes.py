"""Recipes are followed to the same bytes, or refused with a reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from map_bo.errors import CheckpointError, MergeError, SettingsError
from map_bo.merging.align.vocabulary import fit_vocabulary
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.export.bounded import merge_linearly
from map_bo.merging.export.model import merge_checkpoints, write_model
from map_bo.merging.vectors.operator import recipe_of
from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.operators.averages import WeightedAverage
from map_bo.operators.recipes import merge_again, operator_of
from map_bo.operators.sparse import Dare, Ties
from map_bo.operators.statistics.fisher import Fisher
from map_bo.operators.statistics.regmean import RegMean
from map_bo.operators.statistics.statistics import save_statistics, statistics_of
from tests.merging.adapter_files import small_adapters, small_base
from tests.merging.hard_checkpoints import everything, hard_family, loaded, opened, saved
from tests.operators.expert_statistics import fishers, inputs
from tests.operators.test_operators_on_disk import OPERATORS, coefficients


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def made(folder: Path, operator: Any, **settings: Any) -> Path:
    """Merge the hard family and return the folder."""
    base, experts = hard_family(folder / "in", torch.bfloat16, torch.bfloat16)
    return merge_checkpoints(
        base,
        experts,
        coefficients(operator, tuple(experts)),
        folder / "first",
        operator=operator,
        check_base=False,
        progress=False,
        **settings,
    )


def again(first: Path, **settings: Any) -> Path:
    return merge_again(first, first.parent / "again", progress=False, **settings)


def require_same_files(first: Path, second: Path) -> None:
    assert everything(first) == everything(second)
    for path in first.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == second.joinpath(path.relative_to(first)).read_bytes()


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator(name: str, tmp_path: Path) -> None:
    first = made(tmp_path, OPERATORS[name], record={"run": "here", "numbers": [1, 0.1]})
    require_same_files(first, again(first))


def test_from_the_file_with_other_bounds(tmp_path: Path) -> None:
    first = made(tmp_path, Ties())
    second = merge_again(
        first / "recipe.yaml",
        tmp_path / "again",
        shard_size="1kB",
        max_memory="20GB",
        progress=False,
    )
    assert len(list(second.glob("model-*"))) > 1
    assert open_checkpoint(second).digest() == open_checkpoint(first).digest()


def test_ties_that_only_the_model_knew(tmp_path: Path) -> None:
    base, experts = hard_family(tmp_path / "in")
    for folder in (base, *experts.values()):
        tensors = loaded(folder)
        shutil.rmtree(folder)
        saved(folder, {**tensors, "head.weight": tensors["embed.weight"].clone()})
    first = merge_checkpoints(
        base,
        experts,
        {"math": 0.5, "code": 1.0},
        tmp_path / "first",
        operator=Dare(drop_rate=0.5),
        ties={"head.weight": "embed.weight"},
        progress=False,
    )
    assert torch.equal(loaded(first)["head.weight"], loaded(first)["embed.weight"])
    require_same_files(first, again(first))


def test_float64_and_complex(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "a"):
        saved(
            tmp_path / "in" / name,
            {
                "w": torch.randn(5, generator=generator).double(),
                "z": torch.randn(4, generator=generator, dtype=torch.complex64),
            },
        )
    first = merge_checkpoints(
        tmp_path / "in" / "base",
        {"a": tmp_path / "in" / "a"},
        {"a": 0.3},
        tmp_path / "first",
        progress=False,
    )
    require_same_files(first, again(first))


def test_adapters_as_experts(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", loaded(small_base()))
    adapters = small_adapters(tmp_path / "in", open_checkpoint(base))
    first = merge_checkpoints(
        base,
        {name: adapter.source for name, adapter in adapters.items()},
        {"math": 0.5, "chat": 1.0},
        tmp_path / "first",
        operator=Ties(density=0.5),
        progress=False,
    )
    require_same_files(first, again(first))


class TestStatistics:
    @pytest.fixture
    def family(self, tmp_path: Path) -> tuple[Path, dict[str, Path], TaskVectors]:
        base, experts = hard_family(tmp_path / "in")
        return base, experts, TaskVectors.load(*opened(base, experts), check_base=False)

    def kept(self, folder: Path, found: Mapping[str, Any], kind: str) -> dict[str, Path]:
        return {
            label: save_statistics(folder / f"{label}.safetensors", statistics_of(each, kind))
            for label, each in found.items()
        }

    @pytest.mark.parametrize("kind", ["fisher", "grams"])
    def test_in_files(
        self, kind: str, family: tuple[Path, dict[str, Path], TaskVectors], tmp_path: Path
    ) -> None:
        base, experts, vectors = family
        operator: Any
        if kind == "fisher":
            operator = Fisher(self.kept(tmp_path, fishers(vectors), kind))
        else:
            found = {e: {"block.1.fc.weight": (x := inputs(e, 90, 33)).T @ x / 90} for e in experts}
            operator = RegMean(self.kept(tmp_path, found, kind), search=["alpha"])
        given = coefficients(operator, tuple(experts))
        first = merge_checkpoints(
            base, experts, given, tmp_path / "first", operator=operator, progress=False
        )
        require_same_files(first, again(first))
        # Runs are told by the same description as before, wherever the files are.
        assert "source" not in json.dumps(operator.describe())
        (tmp_path / "code.safetensors").write_bytes((tmp_path / "math.safetensors").read_bytes())
        with pytest.raises(MergeError, match=r"code\.safetensors holds other statistics than when"):
            merge_again(first, tmp_path / "third", progress=False)
        (tmp_path / "code.safetensors").unlink()
        with pytest.raises(CheckpointError, match="does not exist"):
            merge_again(first, tmp_path / "third", progress=False)

    def test_in_memory(
        self, family: tuple[Path, dict[str, Path], TaskVectors], tmp_path: Path
    ) -> None:
        base, experts, vectors = family
        first = merge_checkpoints(
            base,
            experts,
            {"math": 1.0},
            tmp_path / "first",
            operator=Fisher(fishers(vectors)),
            progress=False,
        )
        with pytest.raises(MergeError, match="'math', which Fisher merges by, were in no file"):
            again(first)


class TestVocabulary:
    @pytest.fixture
    def first(self, tmp_path: Path) -> Path:
        generator = torch.Generator().manual_seed(0)
        base = {"embed.weight": torch.randn(6, 4, generator=generator), "b": torch.ones(3)}
        tuned = {"embed.weight": torch.randn(8, 4, generator=generator), "b": torch.zeros(3)}
        for name, tensors in (("base", base), ("a", tuned)):
            saved(tmp_path / "in" / name, tensors)
            (tmp_path / "in" / name / "config.json").write_text(
                json.dumps({"vocab_size": len(tensors["embed.weight"])})
            )
        opened_base = open_checkpoint(tmp_path / "in" / "base")
        expert = fit_vocabulary(
            open_checkpoint(tmp_path / "in" / "a"), opened_base, "base", label="a"
        )
        return merge_checkpoints(
            opened_base,
            {"a": expert},
            {"a": 0.5},
            tmp_path / "first",
            operator=WeightedAverage(),
            check_base=False,
            progress=False,
        )

    def test_experts_are_fitted_again(self, first: Path) -> None:
        require_same_files(first, again(first))

    def test_a_fitting_that_comes_out_otherwise(self, first: Path) -> None:
        content = yaml.safe_load((first / "recipe.yaml").read_text())
        content["experts"]["a"]["fitting"]["rows"]["embed.weight"]["kept"] = 5
        (first / "recipe.yaml").write_text(yaml.safe_dump(content))
        with pytest.raises(MergeError, match=r"'a' is fitted .* in another way"):
            again(first)
        content["experts"]["a"]["fitting"]["vocabulary"] = "letters"
        (first / "recipe.yaml").write_text(yaml.safe_dump(content))
        with pytest.raises(MergeError, match=r"the vocabulary rule must .* got 'letters'"):
            again(first)


Change = Callable[[dict[str, Any]], object]


class TestRefusals:
    @pytest.fixture
    def first(self, tmp_path: Path) -> Path:
        return made(tmp_path, Ties(search=["density"]))

    def refused(self, first: Path, message: str, change: Change | None = None) -> None:
        file = first / "recipe.yaml"
        if change is not None:
            content = yaml.safe_load(file.read_text())
            change(content)
            file.write_text(yaml.safe_dump(content))
        before = everything(first.parent)
        with pytest.raises((MergeError, CheckpointError, SettingsError), match=message) as caught:
            again(first)
        assert caught.value.hint
        assert everything(first.parent) == before

    @pytest.mark.parametrize("who", ["base", "code"])
    def test_other_weights(self, first: Path, who: str) -> None:
        folder = first.parent / "in" / who
        tensors = loaded(folder)
        tensors["scalar"] += 1
        shutil.rmtree(folder)
        saved(folder, tensors)
        self.refused(first, f"in/{who} has other weights than when the recipe was written")

    def test_inputs_that_are_gone(self, first: Path) -> None:
        shutil.rmtree(first.parent / "in" / "code")
        self.refused(first, "in/code does not exist")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda c: c.pop("merged"), "incomplete or damaged: it lacks 'merged'"),
            (lambda c: c.update(merged=None), "incomplete or damaged"),
            (lambda c: c.update(merged=[1]), "incomplete or damaged"),
            (lambda c: c["merged"].update(ties=3), "incomplete or damaged"),
            (lambda c: c.pop("base"), "it lacks 'base'"),
            (lambda c: c["base"].pop("sha256"), "it lacks 'sha256'"),
            (lambda c: c["base"].update(source=None), "a source is None"),
            (lambda c: c.update(base="here"), "incomplete or damaged"),
            (lambda c: c.pop("experts"), "it lacks 'experts'"),
            (lambda c: c.update(experts=["a"]), "incomplete or damaged"),
            (lambda c: c.update(experts={}), "there are no experts|no coefficients"),
            (lambda c: c["experts"]["code"].pop("source"), "it lacks 'source'"),
            (lambda c: c.pop("operator"), "it lacks 'operator'"),
            (lambda c: c.update(operator="ties"), "incomplete or damaged"),
            (lambda c: c.update(operator={"name": "magic"}), "the operator 'magic' is not known"),
            (lambda c: c["operator"].pop("class"), "the operator None is not known"),
            (lambda c: c["operator"].update({"class": "os:system"}), "os is not a package whose"),
            (lambda c: c["operator"].update({"class": "map_bo.space:Anchors"}), "has no field"),
            (lambda c: c["operator"].update({"class": 3}), "not the name of a class"),
            (lambda c: c.update(operator={"words": "mine"}), "recorded in words alone"),
            (lambda c: c["operator"]["fields"].update(depth=3), "Ties has no field 'depth'"),
            (lambda c: c["operator"]["fields"].update(density="much"), "must .* got 'much'"),
            (lambda c: c["operator"]["fields"].update(scale="much"), "scale must .* got 'much'"),
            (lambda c: c["operator"]["fields"].update(trim="all"), "trim must .* got 'all'"),
            (
                lambda c: c["operator"]["fields"].update(blocks=7),
                "incomplete or damaged|blocks must be",
            ),
            (lambda c: c["operator"]["fields"].update(blocks={"a": "("}), "not a regular"),
            (lambda c: c["operator"]["fields"].update(search=["seed"]), "cannot search 'seed'"),
            (lambda c: c.pop("coefficients"), "it lacks 'coefficients'"),
            (lambda c: c.update(coefficients=[1]), "incomplete or damaged"),
            (lambda c: c["coefficients"].update(code="half"), "could not convert string to float"),
            (lambda c: c["coefficients"].update(code=float("nan")), "code must be finite"),
            (lambda c: c["coefficients"].update(density=7.0), "density must .* got 7.0"),
            (lambda c: c["coefficients"].pop("density"), "no value is given for density"),
            (lambda c: c["coefficients"].update(more=1.0), "no coefficients 'more'"),
            (lambda c: c.update(recipe=9), "is not a recipe of format 1 or 2"),
        ],
    )
    def test_damaged_recipes(self, first: Path, change: Change, message: str) -> None:
        self.refused(first, message, change)

    @pytest.mark.parametrize("text", ["", "[1, 2", "just words", "\x00", "recipe: 1"])
    def test_what_is_no_recipe(self, first: Path, text: str) -> None:
        (first / "recipe.yaml").write_text(text)
        self.refused(first, "is not YAML|is not a recipe|incomplete or damaged")

    def test_recalibrated_models(self, first: Path) -> None:
        self.refused(
            first,
            "batch normalisation were measured anew",
            lambda c: c["merged"].update(recalibrated=["norm.running_mean"]),
        )

    def test_adapters(self, first: Path) -> None:
        self.refused(
            first,
            "this is the recipe of an adapter",
            lambda c: c["merged"].update(adapter={"rank": 2}),
        )

    def test_models_that_were_in_memory(self, first: Path, tmp_path: Path) -> None:
        linear = nn.Linear(2, 3)
        state = {name: value + 1 for name, value in linear.state_dict().items()}
        for base, expert in ((linear, state), (state, linear)):
            out = tmp_path / f"memory {type(base).__name__}"
            merge_checkpoints(base, {"a": expert}, {}, out, check_base=False, progress=False)
            with pytest.raises(MergeError, match=r"in memory.* was merged from memory"):
                merge_again(out, tmp_path / "again", progress=False)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"max_memory": "abc"}, "max_memory must .* got 'abc'"),
            ({"shard_size": "-1"}, "shard_size must .* got '-1'"),
        ],
    )
    def test_nothing_is_read_for_settings_and_targets_that_cannot_be(
        self,
        first: Path,
        settings: dict[str, Any],
        message: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def digest_all(checkpoints: object) -> None:
            raise AssertionError("all was read")

        monkeypatch.setattr("map_bo.operators.recipes.digest_all", digest_all)
        with pytest.raises(MergeError, match=message):
            again(first, **settings)
        (first.parent / "again").mkdir()
        (first.parent / "again" / "x").write_text("x")
        with pytest.raises(MergeError, match="exists and is not empty"):
            again(first)


def test_another_way_of_writing_leads_to_the_same(tmp_path: Path) -> None:
    """A recipe of `write_model` itself, with tensors merged one by one."""
    base, experts = opened(*hard_family(tmp_path / "in"))
    c = {"math": 0.5, "code": 0.25, "chat": 0.5}
    first = write_model(
        tmp_path / "first",
        tensors=merge_linearly(base, experts, lambda name: c),
        base=base,
        experts=experts,
        operator={"name": "task_arithmetic", "blocks": None},
        coefficients=c,
    )
    second = loaded(again(first))
    for name, value in loaded(first).items():
        torch.testing.assert_close(second[name], value, rtol=1e-6, atol=1e-6)


def test_operators_come_back_from_their_descriptions() -> None:
    for operator in OPERATORS.values():
        assert operator_of(json.loads(json.dumps(recipe_of(operator)))) == operator
