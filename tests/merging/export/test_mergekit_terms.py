"""Which merges of methods without weights mergekit can say, and why not the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from map_bo.merging.export.mergekit_config import NotExpressible
from map_bo.merging.export.mergekit_terms import Said, terms_of

SHAPES: dict[str, tuple[int, ...]] = {"w": (20, 30), "b": (40,)}
SETTINGS: dict[str, dict[str, Any]] = {
    "multislerp": {"of": "deltas"},
    "nuslerp": {"of": "deltas", "along": "row"},
    "nearswap": {"strength": 0.1, "unit": "absolute"},
    "model_stock": {"each": "tensor"},
    "sce": {"density": 0.5},
    "ram": {"threshold": 0.01, "rescale": 0.1, "most": 0.2, "over": "tensor"},
}


def said(
    name: str,
    c: Sequence[float],
    *,
    searched: Sequence[str] = (),
    shapes: dict[str, tuple[int, ...]] | None = None,
    **settings: Any,
) -> Said:
    used = SHAPES if shapes is None else shapes
    experts = tuple(f"e{n}" for n in range(len(c)))
    return Said(
        {**SETTINGS[name], **settings}, searched, experts, dict.fromkeys(used, tuple(c)), used
    )


def test_shares_on_the_sphere_are_weights() -> None:
    terms = terms_of("multislerp", said("multislerp", [0.2, 0.3, 0.5]))
    assert (terms.method, terms.weighted, terms.base) == ("multislerp", True, True)
    assert not terms_of("multislerp", said("multislerp", [0.5, 0.5], of="weights")).base
    for along, flat, column in (("row", False, False), ("column", False, True)):
        terms = terms_of("nuslerp", said("nuslerp", [0.2, 0.8], along=along))
        assert terms.parameters == {"nuslerp_flatten": flat, "nuslerp_row_wise": column}


def test_nearswap_is_of_the_one_expert_that_moves() -> None:
    terms = terms_of("nearswap", said("nearswap", [0.0, 1.0, 0.0]))
    assert terms.experts == ("e1",)
    assert terms.parameters == {"t": 0.1}


def test_methods_without_weights() -> None:
    terms = terms_of("model_stock", said("model_stock", [0.25] * 4, each="row"))
    assert terms.parameters == {"filter_wise": True}
    assert not terms.weighted
    terms = terms_of("sce", said("sce", [1.0, 1.0], searched=["density"]))
    assert terms.parameters == {"select_topk": 0.5}
    assert any("searched" in note for note in terms.notes)
    assert any("equal shares" in note for note in terms.notes)
    terms = terms_of("ram", said("ram", [1.0, 1.0]))
    assert (terms.method, terms.parameters) == (
        "ramplus_tl",
        {"r": 0.1, "alpha": 0.2, "epsilon": 0.01},
    )
    terms = terms_of("ram", said("ram", [1.0, 1.0], rescale=0.0, over="model"))
    assert (terms.method, terms.parameters) == ("ram", {"epsilon": 0.01})


@pytest.mark.parametrize(
    ("merge", "name", "why"),
    [
        (said("multislerp", [0.5, 0.6]), "multislerp", "sum to 1.1"),
        (said("nuslerp", [0.2, 0.3, 0.5]), "nuslerp", "of two models, not 3"),
        (said("nuslerp", [0.5, 0.5], shapes={"conv": (2, 3, 4, 4)}), "nuslerp", "'conv'"),
        (said("nearswap", [1.0, 0.5]), "nearswap", "of one expert, and 2 move"),
        (said("nearswap", [0.0, 0.5]), "nearswap", "all coefficients 1, and there is 0.5"),
        (said("nearswap", [1.0], unit="rms"), "nearswap", "unit=absolute"),
        (said("nearswap", [1.0], strength=1e-8), "nearswap", "from 1e-06"),
        (said("model_stock", [1.0]), "model_stock", "two experts or more"),
        (said("model_stock", [0.5, 0.4]), "model_stock", "coefficients 0.5, and there is 0.4"),
        (said("sce", [1.0, 0.9]), "sce", "coefficients 1, and there is 0.9"),
        (said("sce", [1.0], density=0.01), "sce", "keeps nothing of small tensors such as 'b'"),
        (said("ram", [1.0, 1.0], over="model"), "ram", "over=tensor"),
        (said("ram", [0.0, 1.0]), "ram", "coefficients 1, and there is 0"),
    ],
)
def test_what_cannot_be_said(merge: Said, name: str, why: str) -> None:
    with pytest.raises(NotExpressible, match=why):
        terms_of(name, merge)
