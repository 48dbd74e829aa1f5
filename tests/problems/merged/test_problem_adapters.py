"""Adapters as experts of a problem, and its points as adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from map_bo.errors import MergeError
from map_bo.merging.adapters.adapter import adapter_checkpoint
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.operator import Deltas, PreparedMerge
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace
from tests.merging.adapter_files import write_adapter
from tests.merging.small_models import Mlp, build, inputs, tuned

SHAPES = {"first.weight": (7, 5), "last.weight": (3, 7), "last.bias": (3,)}
X = torch.tensor([[0.4, 0.9, -0.2]], dtype=torch.float64)


def mean(model: nn.Module) -> float:
    return float(model(inputs("mlp")).detach().sigmoid().mean())


@dataclass(frozen=True)
class Squared:
    """An operator that is not linear in its coefficients."""

    def space(self, experts: tuple[str, ...], *, lower: float, upper: float) -> CoefficientSpace:
        return CoefficientSpace.box(experts, lower=lower, upper=upper)

    def prepare(self, deltas: Deltas) -> PreparedMerge:
        inner = TaskArithmetic().prepare(deltas)

        class Prepared:
            def write(self, c: Tensor, out: Tensor) -> None:
                inner.write(c.square(), out)

        return Prepared()

    def describe(self) -> dict[str, Any]:
        return {"name": "squared"}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., MergedModelProblem]:
    def problem(whole: bool = True, **settings: Any) -> MergedModelProblem:
        base = build("mlp")
        experts: dict[str, Any] = {
            "a": write_adapter(tmp_path / "a", SHAPES, seed=1, modules=["first", "last"]),
            "b": str(
                write_adapter(
                    tmp_path / "b", SHAPES, seed=2, modules=["last"], values=["last.bias"]
                )
            ),
            "c": tuned(base, "mlp", 3)
            if whole
            else write_adapter(tmp_path / "c", SHAPES, seed=3, modules=["first"], rank=1),
        }
        return MergedModelProblem(
            Mlp(),
            base=base,
            experts=experts,
            evaluators={"mean": mean},
            lower=-1.0,
            **settings,
        )

    return problem


def by_hand(whole: bool, tmp_path: Path, c: Tensor) -> Mapping[str, Tensor]:
    base = open_checkpoint(build("mlp"))
    experts = [
        adapter_checkpoint(tmp_path / "a", base),
        adapter_checkpoint(tmp_path / "b", base),
        open_checkpoint(tuned(build("mlp"), "mlp", 3))
        if whole
        else adapter_checkpoint(tmp_path / "c", base),
    ]
    return {
        name: base.load(name)
        + sum(
            w * (expert.load(name) - base.load(name))
            for w, expert in zip(c.tolist(), experts, strict=True)
        )
        for name in base.names
    }


class TestExperts:
    @pytest.mark.parametrize("blocks", [None, {"first": "first", "rest": "*"}])
    def test_adapters_beside_whole_models(
        self, make: Callable[..., MergedModelProblem], tmp_path: Path, blocks: Any
    ) -> None:
        problem = make(operator=TaskArithmetic(blocks))
        x = X.repeat_interleave(2, dim=1) if blocks else X
        wanted = Mlp()
        wanted.load_state_dict(by_hand(True, tmp_path, X[0]))
        seen = problem.evaluate(x, generator=make_generator(0))
        assert float(seen.Y[0, 0]) == pytest.approx(mean(wanted), abs=1e-6)
        merged = problem.merged(x[0])
        for name, tensor in wanted.state_dict().items():
            torch.testing.assert_close(merged[name], tensor)
        exported = open_checkpoint(problem.export(x[0], tmp_path / "out"))
        for name, tensor in wanted.state_dict().items():
            torch.testing.assert_close(exported.load(name), tensor)
        assert problem.similarity().shape == (3, 3)
        assert len(problem.space.importance) == (6 if blocks else 0)


class TestExport:
    def test_adapters_exactly(
        self, make: Callable[..., MergedModelProblem], tmp_path: Path
    ) -> None:
        problem = make(whole=False)
        result = problem.export_adapter(X[0], tmp_path / "out")
        assert result.rank == 3  # 2 + 1 in the first layer; the last has 3 rows
        assert result.error < 1e-6
        base = open_checkpoint(build("mlp"))
        found = adapter_checkpoint(result.path, base)
        for name, tensor in problem.merged(X[0]).items():
            torch.testing.assert_close(found.load(name), tensor)

    def test_whole_models_by_rank(
        self, make: Callable[..., MergedModelProblem], tmp_path: Path
    ) -> None:
        problem = make()
        with pytest.raises(MergeError, match="exact change is not of low rank"):
            problem.export_adapter(X[0], tmp_path / "out")
        errors = [
            problem.export_adapter(X[0], tmp_path / str(rank), rank=rank).error
            for rank in (1, 3, 7)
        ]
        assert errors[0] > errors[1] > errors[2]
        assert errors[2] < 1e-6
        found = adapter_checkpoint(tmp_path / "7", open_checkpoint(build("mlp")))
        for name, tensor in problem.merged(X[0]).items():
            torch.testing.assert_close(found.load(name), tensor)
        with pytest.raises(MergeError, match="which have no factors"):
            problem.export_adapter(X[0], tmp_path / "out", rank=7, others="refuse")

    def test_an_operator_that_is_not_linear(
        self, make: Callable[..., MergedModelProblem], tmp_path: Path
    ) -> None:
        problem = make(operator=Squared())
        result = problem.export_adapter(X[0], tmp_path / "out", rank=7)
        found = adapter_checkpoint(result.path, open_checkpoint(build("mlp")))
        for name, tensor in problem.merged(X[0]).items():
            torch.testing.assert_close(found.load(name), tensor)
