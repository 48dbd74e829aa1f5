from __future__ import annotations

import re
from typing import Any

import pytest

from map_bo.errors import ConfigError
from map_bo.operators.mergekit.form import Recipe, as_bool, as_number, blocks_of, entries


class TestNumbers:
    @pytest.mark.parametrize(("value", "number"), [(1, 1.0), ("1e-5", 1e-5), (-0.5, -0.5)])
    def test_a_number(self, value: Any, number: float) -> None:
        assert as_number("w", value) == number

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ("much", "w must be a number, got 'much'"),
            (float("nan"), "w must be a number, got nan"),
            (None, "w must be a number, got None"),
            ([0, 1], "w is a gradient over layers"),
        ],
    )
    def test_what_is_not_one(self, value: Any, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            as_number("w", value)

    def test_true_and_false(self) -> None:
        assert [as_bool("n", value) for value in (True, False, 1, 0)] == [True, False, True, False]
        with pytest.raises(ConfigError, match="n must be true or false, got 'yes'"):
            as_bool("n", "yes")


class TestEntries:
    def test_what_comes_first_counts(self) -> None:
        assert entries("w", [None, 0.5, 0.7]) == ((None, 0.5),)
        filters = [{"filter": "mlp", "value": 1}, {"value": 2}]
        assert entries("w", [filters, 0.7]) == (("mlp", 1.0), (None, 2.0))
        assert entries("w", [{"filter": "mlp", "value": 1}, 0.7]) == (("mlp", 1.0), (None, 0.7))

    def test_a_filter_that_an_earlier_one_shadows_is_left_out(self) -> None:
        filters = [{"filter": t, "value": i} for i, t in enumerate(("mlp", "mlp.up", "attn"))]
        assert entries("w", [filters]) == (("mlp", 0.0), ("attn", 2.0))

    def test_nothing_at_all(self) -> None:
        with pytest.raises(ConfigError, match="the recipe gives no w"):
            entries("w", [None, None])
        with pytest.raises(ConfigError, match="w has the entry"):
            entries("w", [[{"filter": "mlp"}]])


class TestBlocks:
    def test_numbers_alone_are_one_block(self) -> None:
        assert blocks_of([((None, 1.0),), ((None, 2.0),)]) == (None, [[1.0, 2.0]])

    def test_the_first_filter_that_a_name_holds_takes_it(self) -> None:
        column = (("mlp", 1.0), ("up", 2.0), (None, 3.0))
        patterns, rows = blocks_of([column, ((None, 9.0),)])
        assert rows == [[1.0, 9.0], [2.0, 9.0], [3.0, 9.0]]
        assert patterns is not None
        assert list(patterns) == ["mlp", "up", "rest"]
        names = {"layer.mlp.up": "mlp", "up.weight": "up", "norm": None}
        for name, block in names.items():
            matches = [b for b, p in patterns.items() if p != "*" and re.search(p, name)]
            assert matches == ([] if block is None else [block])

    def test_filters_must_be_the_same_in_all_columns(self) -> None:
        with pytest.raises(ConfigError, match="filters differ"):
            blocks_of([(("a", 1.0), (None, 2.0)), (("b", 1.0), (None, 2.0))])


class TestRecipe:
    def content(self, **changes: Any) -> dict[str, Any]:
        models = [
            {"model": "org/base"},
            {"model": "org/a", "parameters": {"weight": 1}},
            {"model": "b"},
        ]
        return {
            "merge_method": "ties",
            "base_model": "org/base",
            "models": models,
            "parameters": {"weight": 0.5, "normalize": True},
            **changes,
        }

    def test_parameters_of_a_model_come_before_those_of_all(self) -> None:
        recipe = Recipe(self.content())
        assert recipe.models == ["org/base", "org/a", "b"]
        assert recipe.others() == ["org/a", "b"]
        assert recipe.own("weight", recipe.others()) == [((None, 1.0),), ((None, 0.5),)]
        assert recipe.flag("normalize", False)
        assert not recipe.flag("rescale", False)
        with pytest.raises(ConfigError, match="weight is not one number"):
            recipe.number("weight", 1.0, recipe.others())

    def test_revisions_and_references(self) -> None:
        inner = {"model": {"path": "org/a", "revision": "v2"}}
        recipe = Recipe(self.content(models=[{"model": inner}]))
        assert recipe.models == ["org/a@v2"]
        with pytest.raises(ConfigError, match="has a LoRA adapter"):
            Recipe(self.content(models=[{"model": "org/a+org/lora"}]))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"slices": [1]}, "the recipe has slices"),
            ({"more": 1}, "has the unknown more"),
            ({"models": "org/a"}, "models are not a list"),
            ({"models": [{"model": "x"}, {"model": "x"}]}, "lists x twice"),
            ({"parameters": [1]}, "are not a mapping"),
            ({"tokenizer_source": "union"}, "builds another tokenizer"),
        ],
    )
    def test_what_there_is_nothing_for(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            Recipe(self.content(**changes))

    def test_what_is_missing(self) -> None:
        content = self.content()
        del content["merge_method"]
        with pytest.raises(ConfigError, match="lacks merge_method"):
            Recipe(content)
        with pytest.raises(ConfigError, match="ties needs a base_model"):
            Recipe(self.content(base_model=None)).required_base()
        with pytest.raises(ConfigError, match="no models but the base"):
            Recipe(self.content(models=[{"model": "org/base"}])).others()
