from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from map_bo.errors import CheckpointError, MergeError
from map_bo.merging.adapters.lora import (
    CONFIG,
    LoraSettings,
    Orientation,
    OwnTensor,
    own_tensors,
    place,
    read_settings,
)
from map_bo.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint

PREFIX = "base_model.model."


def named(**shapes: tuple[int, ...]) -> Checkpoint:
    return open_checkpoint(
        {name.replace("__", "."): torch.ones(shape) for name, shape in shapes.items()}
    )


class TestSettings:
    def test_ranks_and_scales_by_module(self) -> None:
        settings = LoraSettings(8, 16.0, {r"layers\.0\.fc": 2, "head": 4}, {"fc": 3.0, "head": 1.0})
        # The end of a name is matched, by the first expression that does.
        assert settings.rank("model.layers.0.fc") == 2
        assert settings.rank("model.layers.1.fc") == 8
        assert settings.rank("my_head") == 8  # not a dotted part
        assert settings.scale("model.layers.0.fc") == 3 / 2
        assert settings.scale("head") == 1 / 4
        assert settings.scale("other") == 2.0

    def test_rank_stabilised_scales(self) -> None:
        assert LoraSettings(9, 6.0, rslora=True).scale("any") == 6 / math.sqrt(9)

    def test_what_a_configuration_says(self, tmp_path: Path) -> None:
        content: dict[str, Any] = {
            "peft_type": "lora",
            "r": 4,
            "lora_alpha": 2,
            "rank_pattern": {"q": 1},
            "use_rslora": True,
            "base_model_name_or_path": "org/base",
            "task_type": None,
        }
        (tmp_path / CONFIG).write_text(json.dumps(content))
        assert read_settings(tmp_path) == LoraSettings(
            4, 2.0, {"q": 1}, rslora=True, base="org/base"
        )
        content["alpha_pattern"] = {"(": 1}
        (tmp_path / CONFIG).write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match="unusable alpha_pattern"):
            read_settings(tmp_path)


class TestOwnTensors:
    def test_what_each_tensor_is(self) -> None:
        found = own_tensors(
            [
                f"{PREFIX}a.fc.lora_A.weight",
                f"{PREFIX}a.fc.lora_B.default.weight",
                f"{PREFIX}a.fc.lora_B.bias",
                f"{PREFIX}e.lora_embedding_A",
                f"{PREFIX}head.modules_to_save.default.weight",
                f"{PREFIX}head.original_module.weight",
                f"{PREFIX}fc.base_layer.bias",
                "norm",
            ],
            "x",
        )
        assert list(found.values()) == [
            OwnTensor("a.fc", "weight", "A"),
            OwnTensor("a.fc", "weight", "B"),
            OwnTensor("a.fc", "bias", "bias"),
            OwnTensor("e", "weight", "embedding_A"),
            OwnTensor("head", "weight", "value"),
            OwnTensor("fc", "bias", "value"),
            OwnTensor("", "norm", "value"),
        ]
        assert [tensor.target for tensor in found.values()][-2:] == ["fc.bias", "norm"]

    def test_several_adapters_in_one_file(self) -> None:
        names = [f"{PREFIX}fc.lora_A.{label}.weight" for label in ("one", "two")]
        with pytest.raises(CheckpointError, match="several adapters: one, two"):
            own_tensors(names, "x")


class TestPlace:
    @pytest.mark.parametrize(
        ("target", "name", "prefix"),
        [
            ("a.fc.weight", "a.fc.weight", ("", "")),
            ("fc.weight", "a.fc.weight", ("", "a.")),
            ("model.a.fc.weight", "a.fc.weight", ("model.", "")),
        ],
    )
    def test_by_the_same_change_of_prefix(
        self, target: str, name: str, prefix: tuple[str, str]
    ) -> None:
        base = named(a__fc__weight=(1,), a__norm__weight=(1,))
        assert place([target], base.names, "x") == ({target: name}, prefix)

    @pytest.mark.parametrize(
        ("targets", "message"),
        [
            (["fc.weight"], "could be a.fc.weight, b.fc.weight"),
            (["gone.weight"], "changes 'gone.weight', which the base lacks"),
            (["a.fc.weight", "norm.weight"], "under different prefixes"),
        ],
    )
    def test_what_has_no_place(self, targets: list[str], message: str) -> None:
        base = named(a__fc__weight=(1,), b__fc__weight=(1,), a__norm__weight=(1,))
        with pytest.raises(MergeError, match=message):
            place(targets, base.names, "x")


class TestOrientation:
    def base(self) -> Checkpoint:
        return named(
            h__0__fc__weight=(4, 4),
            h__0__proj__weight=(3, 5),  # in x out, as its bias tells
            h__0__proj__bias=(5,),
            h__1__fc__weight=(4, 4),
            other__weight=(4, 4),
        )

    def test_the_nearest_modules_tell(self) -> None:
        orientation = Orientation(self.base(), default=False)
        assert orientation.of_square("h.0.fc.weight")
        assert orientation.of_square("h.1.fc.weight")  # of another layer, but of that stack
        orientation.seen["h.1.proj.weight"] = False
        assert not orientation.of_square("h.1.fc.weight")

    @pytest.mark.parametrize("default", [False, True])
    def test_the_configuration_counts_where_none_tells_or_they_differ(self, default: bool) -> None:
        orientation = Orientation(self.base(), default)
        assert orientation.of_square("other.weight") is default
        orientation.seen |= {"h.2.a.weight": True, "h.2.b.weight": False}
        assert orientation.of_square("h.2.fc.weight") is default
