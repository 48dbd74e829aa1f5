from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from map_bo.errors import MergeError
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.vectors.blocks import block_norms, relative_importance
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.task_vectors import TaskVectors
from tests.merging.small_models import build, family

FIRST_LAST = TaskArithmetic(blocks={"first": r"^first", "last": r"^last"})


def opened(kind: str) -> tuple[object, dict[str, object]]:
    base, experts = family(kind)
    return open_checkpoint(base), {name: open_checkpoint(e) for name, e in experts.items()}


def test_norms_are_those_of_the_resident_task_vectors() -> None:
    base, experts = opened("mlp")
    norms = block_norms(base, experts, FIRST_LAST.block, 2)  # type: ignore[arg-type]
    vectors = TaskVectors.load(base, experts)  # type: ignore[arg-type]
    expected = torch.zeros(3, 2, dtype=torch.float64)
    for slot in vectors.layout.slots:
        for row, delta in enumerate(vectors.deltas):
            expected[row, FIRST_LAST.block(slot.name)] += slot.of(delta).double().square().sum()
    torch.testing.assert_close(norms, expected.sqrt(), rtol=1e-5, atol=1e-8)


def test_statistics_count_and_counters_do_not() -> None:
    base, experts = opened("cnn")
    asked: list[str] = []

    def block(name: str) -> int:
        asked.append(name)
        return 0

    norms = block_norms(base, experts, block, 1)  # type: ignore[arg-type]
    assert norms.shape == (3, 1)
    assert "norm.running_var" in asked
    assert not [name for name in asked if name.endswith("num_batches_tracked")]


def test_tied_tensors_count_once() -> None:
    base, experts = opened("tied")
    every = {"all": ".*"}
    operator = TaskArithmetic(blocks=every)
    norms = block_norms(base, experts, operator.block, 1)  # type: ignore[arg-type]
    vectors = TaskVectors.load(base, experts)  # type: ignore[arg-type]
    torch.testing.assert_close(
        norms[:, 0], vectors.deltas.double().norm(dim=-1), rtol=1e-5, atol=1e-8
    )


def test_another_architecture_is_refused() -> None:
    base, experts = opened("mlp")
    with pytest.raises(MergeError, match="lacks"):
        block_norms(
            base,  # type: ignore[arg-type]
            {**experts, "odd": open_checkpoint(build("cnn"))},  # type: ignore[dict-item]
            lambda name: 0,
            1,
        )


@given(st.lists(st.floats(0.01, 1e3), min_size=2, max_size=8), st.floats(1e-3, 1e3))
def test_importances_are_relative(norms: list[float], unit: float) -> None:
    values = torch.tensor([norms], dtype=torch.float64)
    sizes = torch.tensor(relative_importance(values), dtype=torch.float64)
    torch.testing.assert_close(
        sizes.clamp_min(0.011),
        (values / values.square().mean().sqrt())[0].clamp_min(0.011),
        rtol=1e-3,
        atol=0.0,
    )
    scaled = torch.tensor(relative_importance(unit * values), dtype=torch.float64)
    torch.testing.assert_close(scaled, sizes, rtol=1e-3, atol=0.0)


def test_blocks_that_did_not_move_keep_a_little_and_rounding_hides_noise() -> None:
    norms = torch.tensor([[0.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    sizes = relative_importance(norms)
    assert sizes[0] == 0.01
    assert relative_importance(norms * (1 + 1e-12)) == sizes
    assert relative_importance(torch.zeros(2, 2)) == ()


def test_an_expert_may_lack_a_name_that_the_model_ties() -> None:
    base, experts = family("tied")
    apart = open_checkpoint({k: v.clone() for k, v in base.state_dict().items()})
    lacking = {
        label: open_checkpoint(
            {k: v for k, v in model.state_dict().items() if k != "output.weight"}
        )
        for label, model in experts.items()
    }
    ties = {"output.weight": "embed.weight"}
    found = block_norms(apart, lacking, lambda name: 0, 1, ties=ties)
    expected = block_norms(
        open_checkpoint(base),
        {label: open_checkpoint(model) for label, model in experts.items()},
        lambda name: 0,
        1,
    )
    torch.testing.assert_close(found, expected)
