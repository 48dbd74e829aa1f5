from __future__ import annotations

import pytest
import torch

from map_bo.errors import MergeError
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.problems.merged.heads import TaskHeads
from map_bo.problems.merged.loading import make_live
from tests.merging.small_models import build, family


def vectors(kind: str) -> TaskVectors:
    base, experts = family(kind)
    return TaskVectors.load(
        open_checkpoint(base), {name: open_checkpoint(e) for name, e in experts.items()}
    )


def test_the_model_is_bound_to_the_task_vectors() -> None:
    found = vectors("mlp")
    loaded = make_live(
        build("mlp"),
        found,
        TaskArithmetic(),
        {"a": lambda model: 0.5},
        TaskHeads(),
        recalibrated=False,
        gradients=True,
    )
    assert loaded.vectors is found
    assert loaded.derivatives is not None
    x = torch.zeros(len(found.experts), dtype=torch.float64)
    with loaded.live as live:
        model = live.write(loaded.prepared, x)
        base = family("mlp")[0].state_dict()
        assert all(torch.equal(v, base[name]) for name, v in model.state_dict().items())


def test_a_model_without_batch_norm_is_not_recalibrated() -> None:
    with pytest.raises(MergeError, match="no BatchNorm layers"):
        make_live(
            build("mlp"),
            vectors("mlp"),
            TaskArithmetic(),
            {},
            TaskHeads(),
            recalibrated=True,
            gradients=False,
        )
