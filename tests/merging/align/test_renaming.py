from __future__ import annotations

import pytest

from map_bo.errors import MergeError
from map_bo.merging.align.renaming import Renaming, canonical_name, leading_parts, match_names

BASE = ["emb.weight", "layers.0.fc.weight", "layers.0.fc.bias", "norm.weight"]


def match(own: list[str], theirs: list[str] = BASE) -> Renaming:
    return match_names(own, theirs, lambda one, two: True, "expert 'e'")


@pytest.mark.parametrize(
    "prefix",
    [
        "_orig_mod.",
        "module.",
        "model.",
        "_fsdp_wrapped_module.",
        "base_model.model.",
        "_orig_mod.module.",
        "module._orig_mod.",
        "model._orig_mod.base_model.model.",
        "student.net.",
    ],
)
def test_any_prefix_is_removed_or_added(prefix: str) -> None:
    long = [f"{prefix}{name}" for name in BASE]
    assert match(long).names == dict(zip(BASE, long, strict=True))
    assert match(BASE, long).names == dict(zip(long, BASE, strict=True))


def test_wrappers_within_names_are_left_out() -> None:
    own = [n.replace("layers.0.", "layers.0._fsdp_wrapped_module.") for n in BASE]
    found = match(own)
    assert found.names["layers.0.fc.bias"] == "layers.0._fsdp_wrapped_module.fc.bias"
    assert found.wrappers == ("_fsdp_wrapped_module",)
    assert not found.removed


def test_one_prefix_is_exchanged_for_another() -> None:
    own, theirs = [f"model.{n}" for n in BASE], [f"bert.{n}" for n in BASE]
    found = match([*own, "head.weight"], theirs)
    assert (found.removed, found.added) == ("model.", "bert.")
    assert found.rest == {"head.weight": "head.weight"}


def test_a_head_beside_the_prefix_is_found_or_left() -> None:
    own = [*(f"net.bert.{n}" for n in BASE), "net.head.weight"]
    assert match(own).rest == {"net.head.weight": "head.weight"}
    with_head = match([*(f"bert.{n}" for n in BASE), "head.weight"], [*BASE, "head.weight"])
    assert with_head.names["head.weight"] == "head.weight"
    assert not with_head.rest


def test_old_names_of_normalisation() -> None:
    assert canonical_name("encoder.LayerNorm.gamma") == "encoder.LayerNorm.weight"
    assert canonical_name("encoder.LayerNorm.beta") == "encoder.LayerNorm.bias"
    assert canonical_name("noise.gamma") == "noise.gamma"
    found = match(
        ["x.LayerNorm.weight", "x.LayerNorm.bias"], ["x.LayerNorm.gamma", "x.LayerNorm.beta"]
    )
    assert found.names["x.LayerNorm.gamma"] == "x.LayerNorm.weight"


def test_two_parts_that_fit_alike_are_refused() -> None:
    own = [*(f"teacher.{n}" for n in BASE), *(f"student.{n}" for n in BASE)]
    with pytest.raises(MergeError, match=r"several parts that fit: under '\w+.' and '\w+.'"):
        match(own)


def test_names_that_are_there_are_not_touched() -> None:
    own = [*BASE, *(f"ema.{n}" for n in BASE)]
    found = match(own)
    assert found.names == {n: n for n in BASE}
    assert len(found.rest) == len(BASE)


def test_leading_parts() -> None:
    assert leading_parts(["a.b.w", "a.b.c.w"]) == "a.b."
    assert leading_parts(["a.w", "w"]) == ""
    assert leading_parts([]) == ""
