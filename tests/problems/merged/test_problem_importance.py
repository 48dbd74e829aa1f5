from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from map_bo.merging.checkpoints.checkpoint import Checkpoint
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.space import CoefficientSpace
from tests.merging.small_models import build, family, inputs

BLOCKS = TaskArithmetic(blocks={"first": r"^first", "last": r"^last"})


def problem(**changes: Any) -> MergedModelProblem:
    base, experts = family("mlp")
    score = {"mean": lambda model: float(model(inputs("mlp")).detach().sigmoid().mean())}
    settings: dict[str, Any] = {"base": base, "experts": experts, "evaluators": score, **changes}
    return MergedModelProblem(build("mlp", 5), **settings)


def test_blocks_have_the_norms_of_what_they_scale() -> None:
    space = problem(operator=BLOCKS).space
    base, experts = family("mlp")
    norms = []
    for expert in experts.values():
        for part in ("first", "last"):
            gaps = [
                (value - base.state_dict()[name]).double().flatten()
                for name, value in expert.state_dict().items()
                if name.startswith(part)
            ]
            norms.append(float(torch.cat(gaps).norm()))
    sizes = torch.tensor(norms) / torch.tensor(norms).square().mean().sqrt()
    torch.testing.assert_close(torch.tensor(space.importance), sizes, rtol=1e-3, atol=0.0)
    assert space.names[:2] == ("e0/first", "e0/last")


def test_one_coefficient_an_expert_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Checkpoint, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(Checkpoint, "load", refuse)
    assert problem().space.importance == ()


def test_norms_are_read_once_and_the_space_stays_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    here = problem(operator=BLOCKS)
    first = here.space
    monkeypatch.setattr(Checkpoint, "load", lambda self, name: 1 / 0)
    assert here.space is first


def test_two_problems_of_the_same_files_have_the_same_space() -> None:
    assert problem(operator=BLOCKS).space == problem(operator=BLOCKS).space
    assert problem(operator=BLOCKS).describe() == problem(operator=BLOCKS).describe()


def test_given_importances_stay_and_constraints_are_kept() -> None:
    bounded = CoefficientSpace.box(("e0", "e1", "e2"), blocks=("first", "last"), sum_at_most=1.5)
    found = problem(operator=BLOCKS, space=bounded).space
    assert found.constraints == bounded.constraints
    assert len(found.importance) == 6
    told = CoefficientSpace(
        bounded.names,
        bounded.lower,
        bounded.upper,
        owner=bounded.owner,
        experts=bounded.experts,
        importance=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0),
    )
    assert problem(operator=BLOCKS, space=told).space == told


def test_other_operators_have_no_importances() -> None:
    class Halves:
        """An operator with two coefficients an expert that are no blocks of tensors."""

        space = staticmethod(BLOCKS.space)
        prepare = staticmethod(BLOCKS.prepare)

    assert problem(operator=Halves()).space.importance == ()


def test_a_model_is_asked_for_its_ties_only_where_there_are_blocks() -> None:
    made: list[nn.Module] = []

    def build_once() -> nn.Module:
        made.append(build("mlp", 5))
        return made[-1]

    base, experts = family("mlp")
    settings: dict[str, Any] = {"base": base, "experts": experts}
    settings["evaluators"] = {"mean": lambda model: 0.5}
    assert MergedModelProblem(build_once, **settings).space.d == 3
    assert made == []
    assert MergedModelProblem(build_once, operator=BLOCKS, **settings).space.d == 6
    assert len(made) == 1
