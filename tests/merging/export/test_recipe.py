from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from map_bo.errors import MergeError
from map_bo.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from map_bo.merging.export.bounded import merge_linearly
from map_bo.merging.export.mergekit_config import filters_for
from map_bo.merging.export.recipe import plain, read_recipe
from tests.merging.checkpoint_files import BASE, COEFFICIENTS, EXPERTS, export, merged, tensors_of


class TestRecipe:
    def test_it_tells_all(self, tmp_path: Path) -> None:
        record = {
            "run": Path("/runs/1"),
            "metrics": {"math": np.float64(0.1), "n": np.int32(3)},
            "x": torch.tensor([0.25, 1e-7], dtype=torch.float64),
            "none": None,
            "ok": True,
            "tuple": (1, "yes"),
            "nan": float("nan"),
        }
        out = export(tmp_path / "m", record=record)
        recipe = read_recipe(out)
        assert recipe == read_recipe(out / "recipe.yaml")
        assert recipe["base"] == {"source": BASE.source, "sha256": BASE.digest()}
        assert recipe["experts"] == {
            name: {"source": e.source, "sha256": e.digest()} for name, e in EXPERTS.items()
        }
        assert recipe["operator"] == {"name": "task_arithmetic", "blocks": None}
        assert recipe["coefficients"] == COEFFICIENTS
        assert recipe["merged"] == {"sha256": open_checkpoint(out).digest()}
        assert set(recipe["versions"]) == {"map_bo", "torch", "python"}
        nan = recipe["record"].pop("nan")
        assert nan != nan
        assert recipe["record"] == {
            "run": "/runs/1",
            "metrics": {"math": 0.1, "n": 3},
            "x": [0.25, 1e-7],
            "none": None,
            "ok": True,
            "tuple": [1, "yes"],
        }

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        )
    )
    def test_plain_data_survive_unchanged(self, data: object) -> None:
        assert plain(data) == data

    @given(value=st.floats(allow_nan=False), name=st.text(st.characters(codec="utf-8")))
    def test_numbers_and_names_survive_yaml(self, value: float, name: str) -> None:
        text = yaml.safe_dump(plain({name: value}), allow_unicode=True)
        assert yaml.safe_load(text) == {name: value}

    def test_what_is_no_recipe(self, tmp_path: Path) -> None:
        with pytest.raises(MergeError, match="cannot be read: No such file") as caught:
            read_recipe(tmp_path)
        assert caught.value.hint
        file = tmp_path / "recipe.yaml"
        for text, message in (
            ("a: [", "is not YAML"),
            ("recipe: 99", "is not a recipe of format 1"),
            ("- 1", "is not a recipe of format 1"),
            ("!!python/object/apply:os.system [true]", "is not YAML"),
        ):
            file.write_text(text)
            with pytest.raises(MergeError, match=message):
                read_recipe(file)
        file.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(MergeError, match="is not YAML"):
            read_recipe(file)


def in_folders(tmp_path: Path, odd: str = "") -> tuple[Checkpoint, dict[str, Checkpoint]]:
    """Hugging Face directories of base and two experts with tensors of one dtype."""
    result = []
    for i, label in enumerate(("base", "math", "code")):
        kept = {
            "h.1.weight": tensors_of(i)["first.weight"],
            "h.11.weight": tensors_of(i)["first.weight"] * 2,
            "head.weight": tensors_of(i)["third.scalar"],
        }
        folder = tmp_path / f"{label}{odd}"
        export(folder, tensors=kept.items(), base=open_checkpoint(kept), experts={})
        (folder / "config.json").write_text("{}")
        result.append(open_checkpoint(folder))
    return result[0], {"math": result[1], "code": result[2]}


class TestMergekit:
    def text(self, tmp_path: Path, **changes: Any) -> str:
        base, experts = in_folders(tmp_path, changes.pop("odd", ""))
        settings: dict[str, Any] = {
            "base": base,
            "experts": experts,
            "coefficients": {"math": 0.3, "code": -0.1},
        } | changes
        if "tensors" not in settings:
            settings["tensors"] = merge_linearly(settings["base"], {}, lambda name: {})
        return (export(tmp_path / "m", **settings) / "mergekit.yaml").read_text()

    def test_one_weight_for_each_expert(self, tmp_path: Path) -> None:
        content = yaml.safe_load(self.text(tmp_path))
        assert content == {
            "merge_method": "task_arithmetic",
            "base_model": str(tmp_path / "base"),
            "models": [
                {"model": str(tmp_path / "math"), "parameters": {"weight": 0.3}},
                {"model": str(tmp_path / "code"), "parameters": {"weight": -0.1}},
            ],
            "parameters": {"normalize": False, "lambda": 1.0},
            "dtype": "float32",
            "out_dtype": "float32",
        }

    def test_paths_that_mergekit_would_take_apart(self, tmp_path: Path) -> None:
        content = yaml.safe_load(self.text(tmp_path, odd="+x@y"))
        assert content["base_model"] == {"model": {"path": str(tmp_path / "base+x@y")}}

    def test_weights_that_differ_between_tensors_are_filters(self, tmp_path: Path) -> None:
        weights = {"h.1.weight": 0.5, "h.11.weight": 0.25, "head.weight": 0.5}
        content = yaml.safe_load(
            self.text(tmp_path, weights=lambda name: {"math": weights[name], "code": 1.0})
        )
        math, code = (model["parameters"]["weight"] for model in content["models"])
        assert math == [
            {"filter": "h.11.", "value": 0.25},
            {"filter": "head.", "value": 0.5},
            {"filter": "h.1.", "value": 0.5},
        ]
        assert code == 1.0

    @given(
        st.dictionaries(
            st.lists(st.sampled_from(["a", "b", "ab", "1", "11"]), min_size=1).map(".".join),
            st.sampled_from([0.0, 0.5, 1.0]),
            min_size=1,
        )
    )
    def test_filters_give_each_tensor_its_weight(self, wanted: dict[str, float]) -> None:
        filters = filters_for(wanted)
        for name, value in wanted.items():
            # mergekit takes the first filter that is a part of the name.
            assert next(v for text, v in filters if text in name) == value

    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"operator": {"name": "new"}}, "mergekit has no method for the operator new"),
            ({"operator": {}}, "no method for the operator without a name"),
            ({"coefficients": {"math": 1.0}}, "the coefficients are not one for each expert"),
            (
                {"experts": {"math": BASE}, "coefficients": {"math": 1.0}},
                "expert 'math' is not a Hugging Face directory",
            ),
            (
                {"base": BASE, "tensors": merged({}), "coefficients": {"math": 1, "code": 2}},
                "the base is not a Hugging Face directory",
            ),
        ],
    )
    def test_what_it_cannot_express_it_says(
        self, tmp_path: Path, changes: dict[str, Any], why: str
    ) -> None:
        if "tensors" in changes:
            changes = {**changes, "tensors": merged({})}
        text = self.text(tmp_path, **changes)
        assert text.startswith("# No mergekit configuration gives this merge: ")
        assert why in text
        assert yaml.safe_load(text) is None

    def test_mixed_dtypes_and_one_directory_twice(self, tmp_path: Path) -> None:
        base = tmp_path / "mixed"
        export(base)
        (base / "config.json").write_text("{}")
        one = open_checkpoint(base)
        expert = {"math": open_checkpoint(shutil.copytree(base, tmp_path / "copy"))}
        settings: dict[str, Any] = {"tensors": list(merged()), "coefficients": {"math": 1.0}}
        out = export(tmp_path / "a", base=one, experts=expert, **settings)
        assert "mixes dtypes (bfloat16, float32, float64)" in (out / "mergekit.yaml").read_text()
        out = export(tmp_path / "b", base=one, experts={"math": one}, **settings)
        assert "are the same directory" in (out / "mergekit.yaml").read_text()

    def test_running_variances_are_noted(self, tmp_path: Path) -> None:
        tensors = {"norm.running_var": torch.ones(2)}
        for label in ("base", "math"):
            export(tmp_path / label, tensors=tensors.items(), base=open_checkpoint(tensors))
            (tmp_path / label / "config.json").write_text("{}")
        out = export(
            tmp_path / "m",
            tensors=tensors.items(),
            base=open_checkpoint(tmp_path / "base"),
            experts={"math": open_checkpoint(tmp_path / "math")},
            coefficients={"math": 1.0},
        )
        text = (out / "mergekit.yaml").read_text()
        assert "does not keep running variances" in text
        assert yaml.safe_load(text)["merge_method"] == "task_arithmetic"
