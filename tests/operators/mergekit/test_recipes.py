"""mergekit's recipes read as operators; what is exported for mergekit reads back the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from map_bo.errors import ConfigError, MapBoError
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.export.mergekit_config import mergekit_text
from map_bo.merging.vectors.blocks import Blocks
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.operator import Linear
from map_bo.operators import from_mergekit
from map_bo.operators.mergekit.form import blocks_of
from map_bo.operators.nearswap import NearSwap
from map_bo.operators.sce import Sce
from map_bo.operators.shared_regions import Ram
from map_bo.operators.sparse import Breadcrumbs, Dare, Della, Ties
from map_bo.operators.spherical import MultiSlerp, NuSlerp
from map_bo.operators.stock import ModelStock
from map_bo.plain import to_plain
from tests.operators.expressible import CASES
from tests.operators.oracle import assert_same, ours, states


def recipe(
    method: str,
    *weights: Any,
    base: str | None = "org/base",
    scale: Any = None,
    **parameters: Any,
) -> Any:
    """Return a recipe; ``scale`` is its ``lambda``."""
    parameters |= {} if scale is None else {"lambda": scale}
    models = [
        {"model": f"org/e{i}", "parameters": {"weight": weight}} for i, weight in enumerate(weights)
    ]
    head = {} if base is None else {"base_model": base}
    return {"merge_method": method, **head, "models": models, "parameters": parameters}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    for name, state in states(2).items():
        (folder / name).mkdir()
        save_file(state, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text("{}")
    return folder


class TestRoundTrip:
    @pytest.mark.parametrize("case", CASES)
    def test_what_is_written_is_read_as_the_same_merge(self, case: str, folders: Path) -> None:
        operator, c = CASES[case]
        models = states(2)
        experts = {name: open_checkpoint(folders / name) for name in ("e0", "e1")}
        names = operator.space(tuple(experts), lower=0.0, upper=2.0).names
        linear = isinstance(operator, Linear)
        text = mergekit_text(
            base=open_checkpoint(folders / "base"),
            experts=experts,
            operator=to_plain(operator),
            coefficients=dict(zip(names, c, strict=True)),
            weights=operator.weights(tuple(experts), torch.tensor(c).double()) if linear else None,  # type: ignore[attr-defined]
        )
        content = yaml.safe_load(text)
        assert content is not None, text
        read = from_mergekit(content)
        # nearswap is of one expert there, so the one that does not move is not listed.
        listed = ("e1",) if case == "nearswap" else tuple(experts)
        assert read.experts == {name: str(folders / name) for name in listed}
        assert read.base in (None, str(folders / "base"))
        read_models = {name: models[name] for name in ("base", *listed)}
        again = ours(read.operator, read_models, list(read.coefficients.values()))
        assert_same(ours(operator, models, c), again)

    def test_a_file(self, tmp_path: Path) -> None:
        file = tmp_path / "recipe.yml"
        file.write_text(yaml.safe_dump(recipe("ties", 0.5, 0.25, density=0.4)))
        assert from_mergekit(file) == from_mergekit(recipe("ties", 0.5, 0.25, density=0.4))


class TestReading:
    def test_ties_with_mergekits_defaults(self) -> None:
        read = from_mergekit(recipe("ties", 0.5, 0.25))
        assert read.operator == Ties(
            density=1.0, trim="tensor", election="weighted_mass", normalisation="weights"
        )
        assert read.base == "org/base"
        assert read.experts == {"e0": "org/e0", "e1": "org/e1"}
        assert read.coefficients == {"e0": 0.5, "e1": 0.25}

    def test_own_parameters_count_before_shared_ones(self) -> None:
        content = recipe("ties", 0.5, 0.25, weight=7.0, density="5e-1")
        del content["models"][1]["parameters"]["weight"]
        read = from_mergekit(content)
        assert read.coefficients == {"e0": 0.5, "e1": 7.0}
        assert to_plain(read.operator)["fields"]["density"] == 0.5

    def test_random_methods(self) -> None:
        read = from_mergekit(recipe("dare_ties", 1, 1, density=0.53, scale=0.5))
        assert read.operator == Dare(
            drop_rate=0.47,
            joining="elect",
            election="weighted_mass",
            normalisation="none",
            scale=0.5,
        )
        plain = from_mergekit(recipe("dare_linear", 1, 1, density=0.25, rescale=False))
        assert plain.operator == Dare(drop_rate=0.75, scale=0.25)
        read = from_mergekit(recipe("della", 1, 1, density=0.5, epsilon=0.1))
        assert read.operator == Della(
            drop_rate=0.5, epsilon=0.2, election="weighted_mass", normalisation="weights"
        )
        assert from_mergekit(recipe("della_linear", 1, 1)).operator == Della(
            drop_rate=0.0, epsilon=0.0, joining="sum"
        )
        read = from_mergekit(recipe("breadcrumbs", 1, 1, density=0.5))
        assert read.operator == Breadcrumbs(density=0.5, gamma=0.01)

    def test_sums_that_are_normalised(self) -> None:
        read = from_mergekit(recipe("task_arithmetic", 1.0, 3.0, normalize=True, scale=2))
        assert read.coefficients == {"e0": 0.5, "e1": 1.5}

    def test_linear_with_a_share_of_the_base_is_task_arithmetic(self) -> None:
        content = recipe("linear", 1.0, 3.0)
        content["models"].append({"model": "org/base", "parameters": {"weight": 4.0}})
        read = from_mergekit(content)
        assert isinstance(read.operator, TaskArithmetic)
        assert read.coefficients == {"e0": 0.125, "e1": 0.375}

    def test_spherical_merges_of_whole_models_need_no_base(self) -> None:
        read = from_mergekit(
            {
                "merge_method": "slerp",
                "base_model": "org/a",
                "models": [{"model": "org/a"}, {"model": "org/b"}],
                "parameters": {"t": [{"filter": "mlp", "value": 0.25}, {"value": 0.5}]},
            }
        )
        assert read.base is None
        assert read.coefficients == {"a/mlp": 0.75, "a/rest": 0.5, "b/mlp": 0.25, "b/rest": 0.5}
        read = from_mergekit(recipe("karcher", 1, 1, 1, base=None))
        assert list(read.coefficients.values()) == [1 / 3] * 3

    def test_methods_without_weights_take_the_experts_as_they_are(self) -> None:
        read = from_mergekit(recipe("model_stock", 1, 1, 1, 1, filter_wise=True))
        assert read.operator == ModelStock(each="row")
        assert list(read.coefficients.values()) == [0.25] * 4
        read = from_mergekit(recipe("sce", 1, 1, select_topk=0.3))
        assert read.operator == Sce(density=0.3)
        assert list(read.coefficients.values()) == [1.0, 1.0]
        assert from_mergekit(recipe("nearswap", 1, t=0.01)).operator == NearSwap(
            strength=0.01, unit="absolute"
        )
        assert from_mergekit(recipe("ram", 1, 1)).operator == Ram(rescale=0.0, over="tensor")
        assert from_mergekit(recipe("ramplus_tl", 1, 1, r=0.3, alpha=0.5)).operator == Ram(
            rescale=0.3, most=0.5, over="tensor"
        )

    def test_weights_on_the_sphere_are_shares_or_go_a_part_of_the_way(self) -> None:
        read = from_mergekit(recipe("multislerp", 1, 2, 5))
        assert read.operator == MultiSlerp()
        assert list(read.coefficients.values()) == [0.125, 0.25, 0.625]
        read = from_mergekit(recipe("multislerp", 0.1, 0.4, normalize_weights=False))
        assert list(read.coefficients.values()) == [0.1, 0.4]
        read = from_mergekit(recipe("nuslerp", 1, 3, nuslerp_flatten=False, nuslerp_row_wise=True))
        assert read.operator == NuSlerp(along="column")
        assert list(read.coefficients.values()) == [0.25, 0.75]

    def test_references(self) -> None:
        content = recipe("ties", 1, 1)
        content["models"][0]["model"] = "other/e1@main"
        content["models"][1]["model"] = {"model": {"path": "org/e1", "revision": "v2"}}
        read = from_mergekit(content)
        assert read.experts == {"e1": "other/e1@main", "e1-2": "org/e1@v2"}

    def test_models_on_this_machine_tell_which_blocks_there_are(self, tmp_path: Path) -> None:
        save_file(
            {"h.0.weight": torch.ones(2), "h.1.weight": torch.ones(2)}, tmp_path / "w.safetensors"
        )
        weight = [{"filter": "h.0.", "value": 1}, {"filter": "h.1.", "value": 2}, {"value": 3}]
        somewhere = from_mergekit(recipe("ties", weight, 1))
        assert [name for name in somewhere.coefficients if "e0" in name] == [
            "e0/h.0.",
            "e0/h.1.",
            "e0/rest",
        ]
        here = from_mergekit(recipe("ties", weight, 1, base=str(tmp_path)))
        assert here.coefficients == {"e0/h.0.": 1, "e0/h.1.": 2, "e1/h.0.": 1, "e1/h.1.": 1}

    @given(
        filters=st.lists(st.sampled_from(["a", "b", "ab", "1", "11", "."]), min_size=1, max_size=4),
        name=st.lists(st.sampled_from(["a", "b", "ab", "1", "11"]), min_size=1).map(".".join),
    )
    def test_the_first_filter_that_is_a_part_of_a_name_counts(
        self, filters: list[str], name: str
    ) -> None:
        column = tuple((text, float(i)) for i, text in enumerate(dict.fromkeys(filters)))
        patterns, rows = blocks_of([(*column, (None, -1.0))])
        wanted = next((value for text, value in column if text in name), -1.0)
        assert rows[Blocks(patterns).of(name)] == [wanted]


def changed(content: Any, **parts: Any) -> Any:
    return {**content, **parts}


GRADIENT = [0.0, 0.5, 1.0]
ONE, TWO = ([{"filter": text, "value": 1.0}, {"value": 2.0}] for text in ("a", "b"))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (recipe("passthrough", 1, 1), "merge_method is 'passthrough'"),
        (changed(recipe("ties", 1), slices=[{}]), "has slices"),
        (changed(recipe("ties", 1), modules={"x": {}}), "has modules"),
        (changed(recipe("ties", 1), name="first"), "has the unknown name"),
        ({"merge_method": "ties"}, "lacks models"),
        (changed(recipe("ties", 1), models=[]), "models are not a list"),
        (changed(recipe("ties", 1), models=["org/e0"]), "is not a model of a recipe"),
        (changed(recipe("ties", 1), models=[{"model": {"path": "x"}}]), "is not a model"),
        (changed(recipe("ties", 1), models=[{"model": "org/base"}]), "no models but the base"),
        (changed(recipe("ties", 1), models=[{"model": "a+b"}]), "LoRA adapter"),
        (changed(recipe("ties", 1), models=[{"model": "a"}] * 2), "lists a twice"),
        (changed(recipe("ties", 1), parameters=3), "are not a mapping"),
        (changed(recipe("ties", 1), tokenizer_source="union"), "another tokenizer"),
        (changed(recipe("ties", 1), tokenizer={"source": "union"}), "another tokenizer"),
        (recipe("ties", 1, base=None), "ties needs a base_model"),
        (recipe("ties", GRADIENT, 1), "weight is a gradient over layers"),
        (recipe("ties", 1, density=GRADIENT), "density is a gradient"),
        (recipe("ties", ONE, TWO), "filters differ"),
        (recipe("ties", [{"filter": "a"}], 1), "weight has the entry"),
        (recipe("ties", "much", 1), "weight must be a number, got 'much'"),
        (recipe("ties", None, 1), "gives no weight"),
        (recipe("ties", 1, 1, density=ONE), "density is not one number"),
        (recipe("ties", 1, 1, density=-0.5), "density must .* got -0.5"),
        (recipe("ties", 1, 1, rescale=True), "rescale: true"),
        (recipe("ties", 1, 1, normalize="often"), "must be true or false, got 'often'"),
        (recipe("ties", 1, 2, scale=ONE), "with normalize"),
        (recipe("dare_ties", 1, 2, scale=[{"filter": "a", "value": -1}]), "negative"),
        (recipe("dare_linear", 1, density=0), "drop_rate must .* got 1"),
        (recipe("della", 1, density=0.5, rescale=False), "rescale: false"),
        (recipe("linear", 1, 1, normalize=False), "sum to 2 without normalize"),
        (recipe("linear", 1, -1, base=None), "negative weights"),
        (recipe("linear", 1, -1), "sum to 0"),
        (recipe("slerp", 1, base=None, t=0.5), "slerp needs a base_model"),
        (recipe("slerp", 1, t=1.5), "beyond one of its models"),
        (recipe("slerp", 1, 1, t=0.5), "read of two models, and there are 3"),
        (recipe("nuslerp", 1, 1, 1), "read of two models, and there are 3"),
        (recipe("multislerp", 1, 2, base=None, normalize_weights=False), "sum to 3 without norm"),
        (recipe("multislerp", 1, -0.5), "beyond one of its models"),
        (recipe("nearswap", 1, 1, t=0.1), "nearswap is of one model and the base, and there are 2"),
        (recipe("nearswap", 1), "gives no t"),
        (recipe("model_stock", 1, 1, base=None), "model_stock needs a base_model"),
        (recipe("sce", 1, 1, select_topk=ONE), "select_topk is not one number"),
        (recipe("ram", 1, 1, epsilon=-1), "threshold must be a number of at least 0, got -1"),
    ],
)
def test_what_cannot_be_read_says_why(content: Any, why: str) -> None:
    with pytest.raises(MapBoError, match=why) as caught:
        from_mergekit(content)
    assert caught.value.hint


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        from_mergekit(tmp_path / "none.yml")
    file = tmp_path / "recipe.yml"
    for text, why in (("a: [", "is not YAML"), ("- 1", "is not a mergekit recipe")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=why):
            from_mergekit(str(file))
