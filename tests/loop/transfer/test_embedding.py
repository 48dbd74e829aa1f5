from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from map_bo.data import Metric, Observations
from map_bo.errors import DataError, SpaceError
from map_bo.loop.transfer.embedding import Taken, embed
from map_bo.loop.transfer.study import StartFrom, Study
from map_bo.space import CoefficientSpace
from tests.loop.transfer.grown import Growing

OLD = Growing()
NEW = Growing(("a", "b", "c"), ("x", "y", "z"))
X = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.25, 0.75]], dtype=torch.float64)


def study(**changes: Any) -> Study:
    old = Study.of(
        OLD.seen_at(X),
        OLD.space,
        source={"from": "test"},
        title="the old study",
        problem=OLD.describe(),
    )
    return replace(old, **changes)


def taken(old: Study, new: Growing = NEW, space: Any = None, **how: Any) -> Taken:
    return embed(
        old, space or new.space, new.metrics, StartFrom("old", **how), problem=new.describe()
    )


def test_a_new_expert_has_zero_and_a_new_metric_was_not_measured() -> None:
    found = taken(study())
    seen = found.observations
    assert torch.equal(seen.X, torch.cat([X, torch.zeros(3, 1)], -1))
    assert torch.equal(seen.Y[:, :2], OLD.true_values(X))
    assert bool(seen.Y[:, 2].isnan().all())
    assert seen.failures == (None,) * 3
    assert bool(seen.incomplete.all())
    assert found.source["new_experts"] == ["c"]
    assert found.source["not_measured"] == {"z": 3}
    assert any("0 for the new experts: c" in note for note in found.source["notes"])


def test_names_are_matched_whatever_their_order() -> None:
    new = Growing(("c", "b", "a"), ("y", "x"))
    seen = taken(study(), new).observations
    assert torch.equal(seen.X, torch.cat([torch.zeros(3, 1), X.flip(-1)], -1))
    assert torch.equal(seen.Y, OLD.true_values(X).flip(-1))


def test_names_can_be_mapped() -> None:
    new = Growing(("b", "maths"), ("y", "x"), {"maths": "a"})
    found = taken(study(), new, experts={"a": "maths"})
    assert torch.equal(found.observations.X, X.flip(-1))
    assert found.source["coefficients"] == {"a": "maths"}
    dropped = taken(study(), metrics={"y": None}).observations
    assert dropped.measured.tolist() == [[True, False, False]] * 3


def test_observations_without_names_have_the_first_coefficients() -> None:
    found = taken(study(names=(), owner=()))
    assert torch.equal(found.observations.X[:, :2], X)
    assert any("without names" in note for note in found.source["notes"])


def test_a_coefficient_of_an_expert_stands_for_all_its_blocks() -> None:
    space = CoefficientSpace.box(("a", "b", "c"), blocks=("early", "late"))
    seen = taken(study(), space=space).observations
    assert seen.X[2].tolist() == [0.25, 0.25, 0.75, 0.75, 0.0, 0.0]
    old = replace(study(), names=("a/early", "a/late"), owner=("a", "a"))
    with pytest.raises(DataError, match="has 2 coefficients of expert 'a'"):
        taken(old)


def test_mapping_an_expert_maps_its_blocks() -> None:
    space = CoefficientSpace.box(("m", "b"), blocks=("early", "late"))
    old = replace(study(), names=("a/early", "a/late"), owner=("a", "a"))
    seen = taken(
        old, Growing(("m", "b"), digests={"m": "a"}), space=space, experts={"a": "m"}
    ).observations
    assert seen.X[2].tolist() == [0.25, 0.75, 0.0, 0.0]


def test_a_setting_of_the_operator_needs_a_value() -> None:
    space = CoefficientSpace(
        ("a", "b", "density"), (0.0,) * 3, (1.0,) * 3, owner=(0, 1, -1), experts=("a", "b"),
        defaults=(0.5,),
    )  # fmt: skip
    with pytest.raises(DataError, match="'density', a setting of the operator without a neutral"):
        taken(study(), Growing(), space=space)
    seen = taken(study(), Growing(), space=space, values={"density": 0.2}).observations
    assert seen.X[:, 2].tolist() == [0.2] * 3
    operator = {"class": "m:Ties", "fields": {"density": 0.3}}
    old = study(problem={**OLD.describe(), "operator": operator})
    new = {**Growing().describe(), "operator": {"class": "m:Ties", "fields": {"density": 0.5}}}
    found = embed(old, space, OLD.metrics, StartFrom("old"), problem=new)
    assert found.observations.X[:, 2].tolist() == [0.3] * 3
    with pytest.raises(DataError, match="names 'a', which is no setting"):
        taken(study(), Growing(), space=space, values={"a": 0.2})


def test_what_failed_in_a_metric_that_is_gone_has_not_failed() -> None:
    seen = OLD.seen_at(X)
    Y = seen.Y.clone()
    Y[0, 1], Y[1, 0] = torch.nan, torch.nan
    old = replace(study(), Y=Y, failures=("y failed", "x failed", None))
    found = taken(old, metrics={"y": None}).observations
    assert found.failures == (None, "x failed", None)
    assert found.measured[:, 0].tolist() == [True, False, True]
    kept = taken(old).observations
    assert kept.failures == ("y failed", "x failed", None)
    assert kept.measured.sum(0).tolist() == [2, 2, 0]


@pytest.mark.parametrize(
    ("metric", "part"),
    [
        (Metric("x", "min", kind="unbounded"), "direction"),
        (Metric("x", kind="proportion"), "kind"),
        (Metric("x", kind="unbounded", lower=-5.0), "lower"),
    ],
)
def test_a_metric_of_another_kind_is_refused(metric: Metric, part: str) -> None:
    old = replace(study(), metrics=(metric, OLD.metrics[1]))
    with pytest.raises(DataError, match=f"metric 'x' has {part}"):
        taken(old)


@pytest.mark.parametrize(
    ("digests", "message"),
    [
        ({"base": "other"}, "merged into another base"),
        ({"a": "other"}, "expert 'a' of the old study has other weights"),
    ],
)
def test_other_weights_are_refused(digests: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        taken(study(), replace_digests(digests))
    if "a" in digests:
        found = taken(study(), replace_digests(digests), experts={"a": None}, skip=True)
        assert found.observations.X.tolist() == [[0.0, 0.0, 0.0]]
        assert found.source["left_out"] == 2


def replace_digests(digests: dict[str, str]) -> Growing:
    return Growing(("a", "b", "c"), ("x", "y", "z"), digests)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ({"class": "m:A", "fields": {}}, {"class": "m:B", "fields": {}}, "another operator"),
        (
            {"class": "m:A", "fields": {"density": 0.2}},
            {"class": "m:A", "fields": {"density": 0.4}},
            "operator.density was 0.2 and is 0.4",
        ),
    ],
)
def test_another_operator_is_refused(old: Any, new: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        embed(
            study(problem={**OLD.describe(), "operator": old}), NEW.space, NEW.metrics,
            StartFrom("old"), problem={**NEW.describe(), "operator": new},
        )  # fmt: skip


def test_another_problem_and_other_examples_are_refused_unless_trusted() -> None:
    old = study(problem={**OLD.describe(), "zoo": {"size": 40}}, examples={"x": "1", "y": "2"})

    def found(size: int = 80, **how: Any) -> Taken:
        new = {**NEW.describe(), "zoo": {"size": size}}
        told = StartFrom("old", **how)
        return embed(old, NEW.space, NEW.metrics, told, problem=new, examples={"x": "1", "y": "3"})

    with pytest.raises(DataError, match=r"zoo.size was 40 and is 80"):
        found()
    assert len(found(trust_data=True).observations) == 3
    with pytest.raises(DataError, match="'y' was measured on other examples"):
        found(40)
    assert found(40, metrics={"y": None}).observations.measured.sum(0).tolist() == [3, 0, 0]
    assert found(trust_data=True).observations.measured.sum(0).tolist() == [3, 3, 0]


def test_rows_outside_the_space_are_named_or_left_out() -> None:
    old = replace(
        study(), X=torch.tensor([[0.0, 0.5], [1.5, 0.0], [0.0, -2.0]], dtype=torch.float64)
    )
    with pytest.raises(SpaceError, match=r"2 of 3 rows .* row 2: a is 1.5, which is not in \[0, 1"):
        taken(old)
    found = taken(old, skip=True)
    assert len(found.observations) == 1
    assert found.source["left_out"] == 2
    assert any(
        "2 of 3 rows of the imported study were left out" in n for n in found.source["notes"]
    )
    with pytest.raises(DataError, match="no row of the old study can be taken"):
        taken(replace(old, X=old.X + 3), skip=True)


def test_a_new_expert_that_cannot_be_zero_is_told() -> None:
    space = CoefficientSpace(("a", "b", "c"), (0.0, 0.0, 0.2), (1.0,) * 3)
    with pytest.raises(SpaceError, match=r"c is 0, which is not in \[0.2, 1\]"):
        taken(study(), space=space)


def test_rows_that_use_an_expert_which_is_gone_are_told() -> None:
    with pytest.raises(DataError, match=r"row 2: it uses 'a' \(1\), which the run does not have"):
        taken(study(), Growing(("b", "c")))
    seen = taken(study(), Growing(("b", "c")), skip=True).observations
    assert seen.X.tolist() == [[0.0, 0.0]]


def test_a_table_is_checked_row_by_row() -> None:
    old = replace(
        study(), metrics=("x", "y"), source={"from": "csv"}, problem=None,
        X=torch.tensor([[0.1, 0.1], [0.1, 0.1], [0.2, 0.2]], dtype=torch.float64),
        Y=torch.tensor([[0.5, 0.5], [0.5, 0.5], [torch.nan, torch.nan]], dtype=torch.float64),
    )  # fmt: skip
    with pytest.raises(DataError, match="row 2: it repeats row 1"):
        taken(old)
    old = replace(
        old, Y=torch.tensor([[0.5, 0.5], [0.5, 0.6], [torch.nan, torch.nan]], dtype=torch.float64)
    )
    with pytest.raises(DataError, match=r"1 of 3 rows .* row 3: it has no value of a metric"):
        taken(old)
    assert len(taken(old, skip=True).observations) == 2  # measured twice
    bounded = (Metric("x"), Metric("y"))
    old = replace(old, Y=torch.tensor([[0.5, 0.5], [0.5, 1.6], [1.0, 0.0]], dtype=torch.float64))
    with pytest.raises(DataError, match=r"row 2: y is 1.6, which is not in \[0, 1\]"):
        embed(old, NEW.space, bounded, StartFrom("old"))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"experts": {"nobody": "a"}}, "names 'nobody', which the old study does not have"),
        ({"metrics": {"x": "w"}}, "maps 'x' to 'w', which the run does not have"),
        ({"experts": {"a": "b"}}, "two coefficients of the old study become 'b'"),
        ({"metrics": {"x": None, "y": None}}, "none of the metrics of the run"),
        ({"experts": {"a": None, "b": None}}, "none of the coefficients of the run"),
    ],
)
def test_mappings_that_cannot_be_are_told(how: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        taken(study(), **how)


def test_more_coefficients_than_the_run_has_need_names() -> None:
    seen = Observations(torch.rand(2, 4), torch.rand(2, 2), NEW.metrics[:2])
    old = Study.of(seen, None, source={}, title="the given observations")
    with pytest.raises(DataError, match="has 4 coefficients, and the run 3"):
        taken(old)


def test_gradients_are_kept_only_where_the_coefficients_are_the_same() -> None:
    seen = replace(OLD.seen_at(X), gradients=torch.ones(3, 2, 2))
    old = Study.of(seen, OLD.space, source={}, title="old", problem=OLD.describe())
    assert taken(old).observations.gradients is None
    kept = taken(old, Growing(tasks=("x", "y", "z"))).observations.gradients
    assert kept is not None
    assert kept[:, :, 0].isnan().tolist() == [[False, False, True]] * 3
