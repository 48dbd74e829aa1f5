from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from map_bo.errors import MergeError, SpaceError
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.export.model import merge_checkpoints
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.operator import MergeOperator
from map_bo.operators.averages import Slerp, WeightedAverage
from map_bo.operators.recipes import merge_again
from map_bo.operators.searchable import OperatorChoice, each_operator
from map_bo.operators.sparse import Dare, Ties
from map_bo.plain import from_plain, identity_of, to_plain
from map_bo.rng import make_generator
from tests.merging.hard_checkpoints import hard_family
from tests.operators.cases import hard_vectors

OPTIONS: dict[str, MergeOperator] = {
    "sum": TaskArithmetic(),
    "ties": Ties(search={"density": (0.2, 0.8), "scale": (0.5, 2.0)}),
    "dare": Dare(drop_rate=0.5, search=["drop_rate"]),
    "slerp": Slerp(),
}
CHOICE = OperatorChoice(OPTIONS)
EXPERTS = ("e0", "e1", "e2")


def written(operator: MergeOperator, c: Tensor) -> Tensor:
    vectors = hard_vectors()
    out = torch.empty(vectors.layout.size)
    operator.prepare(vectors).write(c, out)
    return out


def test_the_space_has_coefficients_the_operator_and_its_settings() -> None:
    space = CHOICE.space(EXPERTS, lower=0.0, upper=1.5)
    settings = ("ties.density", "ties.scale", "dare.drop_rate")
    assert space.names == (*EXPERTS, "operator", *settings)
    assert space.settings == ("operator", *settings)
    assert space.choice is not None
    assert space.choice.options == tuple(OPTIONS)
    assert space.upper == (1.5, 1.5, 1.5, 3.0, 0.8, 2.0, 0.95)
    assert space.defaults == (0.0, 0.2, 1.0, 0.5)


@pytest.mark.parametrize("option", OPTIONS)
def test_a_row_is_merged_as_its_own_operator_merges(option: str) -> None:
    space = CHOICE.space(EXPERTS, lower=0.0, upper=1.0)
    code = list(OPTIONS).index(option)
    row = space.by_option[code].sample(1, generator=make_generator(code))[0]
    own = OPTIONS[option].space(EXPERTS, lower=0.0, upper=1.0).names
    named = dict(zip(space.names, row.tolist(), strict=True))
    alone = [named.get(f"{option}.{name}", named.get(name)) for name in own]
    merged = written(CHOICE, row)
    expected = written(OPTIONS[option], torch.tensor(alone, dtype=torch.float64))
    assert torch.equal(merged, expected)
    operator, names, c = CHOICE.chosen(EXPERTS, row)
    assert (operator, names, c.tolist()) == (OPTIONS[option], own, alone)


def test_options_differ() -> None:
    rows = [torch.tensor([0.4, 0.3, 0.2, code, 0.5, 1.0, 0.5]).double() for code in range(4)]
    merges = [written(CHOICE, row) for row in rows]
    assert all(not torch.equal(merges[0], other) for other in merges[1:])


def test_blocks_of_the_choice_are_those_of_all_options() -> None:
    blocks = {"first": "0", "rest": "*"}
    choice = OperatorChoice(OPTIONS, blocks)
    assert all(getattr(one, "blocks", None) == blocks for one in each_operator(choice))
    assert OperatorChoice(OPTIONS).with_blocks(blocks) == choice
    names = choice.space(EXPERTS[:2], lower=0.0, upper=1.0).names
    assert names[:5] == ("e0/first", "e0/rest", "e1/first", "e1/rest", "operator")


def test_it_survives_plain_data() -> None:
    assert from_plain(to_plain(CHOICE)) == CHOICE
    assert identity_of(CHOICE) != identity_of(OperatorChoice({**OPTIONS, "dare": Dare()}))


def test_values_are_checked_by_the_chosen_operator() -> None:
    rest = {"ties.density": 5.0, "ties.scale": 1.0, "dare.drop_rate": 0.5}
    CHOICE.check_values({"e0": -0.5, "operator": 0.0, **rest})
    with pytest.raises(MergeError, match="density"):
        CHOICE.check_values({"e0": 0.5, "operator": 1.0, **rest})
    with pytest.raises(MergeError, match="must not be negative"):
        CHOICE.check_values({"e0": -0.5, "operator": 3.0, **rest})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"options": {"sum": TaskArithmetic()}}, "two or more options, got"),
        ({"options": [TaskArithmetic(), Ties()]}, "two or more options, got"),
        ({"options": {"sum": TaskArithmetic(), "ties": Ties}}, "'ties' must be the settings"),
        ({"options": {"sum": TaskArithmetic(), "inner": CHOICE}}, "'inner' must be the settings"),
        (
            {"options": {"sum": TaskArithmetic(), "ties": Ties(blocks={"all": "*"})}},
            "different blocks: ties and sum",
        ),
    ],
)
def test_impossible_choices_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        OperatorChoice(**arguments)


def test_bounds_and_names_that_an_option_cannot_have_are_refused() -> None:
    with pytest.raises(MergeError, match="slerp takes no negative coefficients"):
        CHOICE.space(EXPERTS, lower=-1.0, upper=1.0)
    with pytest.raises(MergeError, match=r"'ties\.small' are called like settings|ties\.small"):
        CHOICE.space(("ties.small", "e1"), lower=0.0, upper=1.0)
    with pytest.raises(SpaceError, match="appear twice: operator"):
        CHOICE.space(("operator", "e1"), lower=0.0, upper=1.0)


def test_files_are_of_the_operator_that_was_chosen(tmp_path: Path) -> None:
    base, experts = hard_family(tmp_path / "in")
    given: dict[str, float | str] = dict.fromkeys(experts, 0.5)
    given |= {"operator": "ties", "ties.density": 0.4}
    ties = Ties(trim="tensor", search=["density"])
    choice = OperatorChoice({"sum": TaskArithmetic(), "ties": ties})
    out = merge_checkpoints(
        base, experts, given, tmp_path / "merged", operator=choice, progress=False
    )
    told = yaml.safe_load((out / "recipe.yaml").read_text())
    assert told["operator"]["class"] == "map_bo.operators.sparse:Ties"
    assert told["coefficients"] == {**dict.fromkeys(experts, 0.5), "density": 0.4}
    card = (out / "README.md").read_text()
    assert "Ties(" in card
    assert "| density | 0.4 |" in card
    assert "operator |" not in card
    alone = merge_checkpoints(
        base,
        experts,
        {**dict.fromkeys(experts, 0.5), "density": 0.4},
        tmp_path / "alone",
        operator=ties,
        progress=False,
    )
    again = merge_again(out, tmp_path / "again", progress=False)
    digests = {open_checkpoint(folder).digest() for folder in (out, alone, again)}
    assert len(digests) == 1


def test_files_need_a_known_operator_and_its_settings(tmp_path: Path) -> None:
    base, experts = hard_family(tmp_path / "in")
    given = dict.fromkeys(experts, 0.5)
    choice = OperatorChoice({"mean": WeightedAverage(), "ties": Ties(search=["density"])})

    def merge(**more: float | str) -> None:
        merge_checkpoints(
            base, experts, {**given, **more}, tmp_path / "out", operator=choice, progress=False
        )

    with pytest.raises(SpaceError, match="operator has no option 'dare'"):
        merge(operator="dare")
    with pytest.raises(MergeError, match=r"no value is given for ties\.density"):
        merge(operator="ties")
    merge(operator="mean")
