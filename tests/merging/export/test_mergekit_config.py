"""What mergekit can say of a merge, and why it cannot say the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.export.mergekit_config import MergekitConfig, NotExpressible, express

TENSORS = {"h.0.w": torch.ones(4, 5), "h.1.w": torch.ones(8), "head": torch.ones(100)}
BASE = open_checkpoint({**TENSORS, "count": torch.tensor(1)})
EXPERTS = {name: open_checkpoint({n: t + 1 for n, t in TENSORS.items()}) for name in ("a", "b")}
TIES = {
    "name": "ties",
    "density": 0.5,
    "trim": "tensor",
    "joining": "elect",
    "election": "weighted_mass",
    "normalisation": "weights",
    "scale": 0.5,
    "blocks": None,
    "search": {},
}
CRUMBS = {**TIES, "name": "breadcrumbs", "gamma": 0.25, "joining": "sum"}
SLERP: dict[str, Any] = {
    "name": "slerp",
    "of": "weights",
    "norms": "own",
    "blocks": None,
    "search": {},
}
BLOCKS = {"layers": r"^h\.", "rest": "*"}


def said(operator: dict[str, Any], **coefficients: float) -> MergekitConfig:
    return express(BASE, EXPERTS, operator, coefficients or {"a": 0.3, "b": 0.7}, None)


def in_blocks(*values: float) -> dict[str, float]:
    names = ("a/layers", "a/rest", "b/layers", "b/rest")
    return dict(zip(names, values, strict=True))


class TestExpressed:
    def test_ties(self) -> None:
        config = said(TIES)
        assert config.method == "ties"
        assert config.base is BASE
        assert [model for model, _ in config.models] == list(EXPERTS.values())
        assert [own for _, own in config.models] == [{"weight": 0.3}, {"weight": 0.7}]
        assert config.parameters == {
            "density": 0.5,
            "normalize": True,
            "rescale": False,
            "lambda": 0.5,
        }
        assert "equal the threshold" in "".join(config.notes)

    def test_the_papers_ties(self) -> None:
        paper = {**TIES, "election": "mass", "normalisation": "agreeing"}
        config = said(paper, a=0.6, b=0.6)
        assert [own for _, own in config.models] == [{"weight": 1.0}] * 2
        assert config.parameters["normalize"] is True
        assert config.parameters["lambda"] == pytest.approx(0.3)

    def test_coefficients_by_block_are_filters(self) -> None:
        config = said({**TIES, "blocks": BLOCKS}, **in_blocks(0.1, 0.2, 0.5, 0.5))
        (_, a), (_, b) = config.models
        assert a["weight"] == [{"filter": "head", "value": 0.2}, {"filter": "h.", "value": 0.1}]
        assert b["weight"] == 0.5

    def test_uneven_experts_have_the_same_filters(self) -> None:
        three = {"one": r"h\.0", "two": r"h\.1", "rest": "*"}
        names = [f"{e}/{b}" for e in EXPERTS for b in three]
        values = (0.1, 0.1, 0.3, 0.1, 0.2, 0.2)
        config = said({**TIES, "blocks": three}, **dict(zip(names, values, strict=True)))
        texts = [[entry["filter"] for entry in own["weight"]] for _, own in config.models]
        assert texts[0] == texts[1]

    def test_all_tensors_at_once_are_as_any(self) -> None:
        assert said({**TIES, "trim": "global", "density": 1.0}).method == "ties"
        one = {"w": torch.ones(4)}
        experts = {"a": open_checkpoint({"w": torch.zeros(4)})}
        config = express(open_checkpoint(one), experts, {**TIES, "trim": "global"}, {"a": 1}, None)
        assert config.method == "ties"

    def test_the_largest_numbers_are_breadcrumbs_without_outliers(self) -> None:
        for name in ("magnitude", "ties"):
            config = said({**TIES, "name": name, "joining": "sum"})
            assert config.method == "breadcrumbs"
            assert config.parameters["gamma"] == 0.0
        assert said({**TIES, "name": "magnitude"}).method == "ties"

    def test_breadcrumbs(self) -> None:
        config = said(CRUMBS)
        assert config.method == "breadcrumbs"
        assert (config.parameters["density"], config.parameters["gamma"]) == (0.5, 0.25)
        assert "one number fewer" not in "".join(config.notes)
        # .05 of 20 and 8 numbers: shares that are no whole numbers add up to one.
        config = said({**CRUMBS, "density": 0.3, "gamma": 0.1})
        assert "one number fewer" in "".join(config.notes)
        assert said({**CRUMBS, "joining": "elect", "normalisation": "none"}).method == (
            "breadcrumbs_ties"
        )

    def test_searched_settings_count(self) -> None:
        operator = {**TIES, "search": {"scale": [0.1, 2.0], "density": [0.1, 0.9]}}
        config = said(operator, a=0.3, b=0.7, scale=1.5, density=0.25)
        assert (config.parameters["density"], config.parameters["lambda"]) == (0.25, 1.5)
        assert "searched" in "".join(config.notes)

    def test_averages(self) -> None:
        average: dict[str, Any] = {"name": "weighted_average", "blocks": None, "search": {}}
        config = said(average)
        assert config.method == "linear"
        assert config.models[0] == (BASE, {"weight": 0.0})
        assert config.parameters == {"normalize": True}
        config = said({**average, "blocks": BLOCKS}, **in_blocks(0.0, 0.2, 0.0, 0.5))
        assert config.models[0][1]["weight"] == [
            {"filter": "head", "value": 0.0},
            {"filter": "h.", "value": 1.0},
        ]

    def test_on_the_sphere(self) -> None:
        first, second = EXPERTS.values()
        config = said(SLERP)
        assert (config.method, config.base) == ("slerp", first)
        assert config.models == ((first, {}), (second, {}))
        assert config.parameters == {"t": 0.7}
        config = said({**SLERP, "of": "deltas"})
        assert (config.method, config.base) == ("nuslerp", BASE)
        halves = {"a": 0.5, "b": 0.5}
        assert said({**SLERP, "norms": "mean"}, **halves).method == "karcher"
        assert said({**SLERP, "norms": "mean", "of": "deltas"}, **halves).method == "multislerp"

    @given(
        density=st.integers(1, 99).map(lambda k: k / 100),
        gamma=st.integers(0, 10).map(lambda k: k / 100),
    )
    def test_shares_are_rounded_as_they_are_here(self, density: float, gamma: float) -> None:
        config = said({**CRUMBS, "density": max(density, 0.15), "gamma": gamma})
        hundred = TENSORS["head"].numel()  # mergekit: int(share * numbers)
        assert int(config.parameters["density"] * hundred) == round(max(density, 0.15) * 100)
        assert int(config.parameters["gamma"] * hundred) == round(gamma * 100)


@pytest.mark.parametrize(
    ("operator", "coefficients", "why"),
    [
        ({**TIES, "trim": "global"}, {}, "ranks the numbers of each tensor apart"),
        ({**TIES, "election": "count"}, {}, "by mass, not by count"),
        ({**TIES, "election": "mass"}, {}, "elects signs by the weighted task vectors"),
        ({**TIES, "normalisation": "agreeing"}, {}, "divides by the sum of the weights"),
        (
            {**TIES, "normalisation": "agreeing"},
            {"a": -1.0, "b": -1.0},
            "divides by the sum of the weights",
        ),
        ({**CRUMBS, "density": 0.1}, {}, "keeps nothing of small tensors such as 'h.1.w'"),
        ({**TIES, "name": "dare"}, {}, "draws random masks of its own"),
        ({**TIES, "name": "della"}, {}, "draws random masks of its own"),
        ({"name": "consensus"}, {}, "no method for the operator consensus"),
        ({"name": "regmean"}, {}, "no method for the operator regmean"),
        (SLERP, {"a": 0.2, "b": 0.3}, "sum to 0.5, and mergekit's spherical merges do not"),
        ({**SLERP, "norms": "mean"}, {}, "in equal parts"),
        (TIES, {"a": 1.0}, "not one for each expert"),
        ({**TIES, "blocks": BLOCKS}, {}, "not one for each expert and block"),
        ({**TIES, "blocks": {"layers": r"^h\."}}, {"a": 1.0}, "belongs to no block"),
        ({**TIES, "search": {"scale": [0, 1]}}, {}, "lack the settings scale"),
    ],
)
def test_what_mergekit_cannot_say(
    operator: dict[str, Any], coefficients: dict[str, float], why: str
) -> None:
    with pytest.raises(NotExpressible, match=why):
        said(operator, **coefficients)
