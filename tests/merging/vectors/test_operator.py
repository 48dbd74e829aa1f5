"""Which abilities the operators of map_bo declare, and what they are checked by."""

from __future__ import annotations

import pytest
import torch

from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.vectors.blocks import HasBlocks
from map_bo.merging.vectors.kernel import KernelMerge, ReadsPieces
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.on_disk import OnDiskVectors
from map_bo.merging.vectors.operator import (
    ChecksValues,
    Deltas,
    Followable,
    HasDerivatives,
    Linear,
    MergeOperator,
    PreparedMerge,
)
from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.operators.averages import Slerp, WeightedAverage
from map_bo.operators.consensus import Consensus
from map_bo.operators.searchable import SearchableOperator
from map_bo.operators.sparse import Breadcrumbs, Dare, Della, Magnitude, Ties
from map_bo.operators.statistics.fisher import Fisher
from map_bo.operators.statistics.regmean import RegMean
from tests.merging.small_models import family

KINDS = (
    Breadcrumbs, Consensus, Dare, Della, Fisher, Magnitude, RegMean, Slerp, Ties, WeightedAverage,
)  # fmt: skip


def vectors(on_disk: bool) -> Deltas:
    base, experts = family("mlp")
    opened = open_checkpoint(base), {name: open_checkpoint(e) for name, e in experts.items()}
    return OnDiskVectors(*opened) if on_disk else TaskVectors.load(*opened)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_operators_declare(kind: type[SearchableOperator]) -> None:
    operator = kind()
    for ability in (MergeOperator, HasBlocks, ReadsPieces, ChecksValues):
        assert isinstance(operator, ability), ability
    assert not isinstance(operator, Linear)
    assert isinstance(operator, Followable) == (kind in (Fisher, RegMean))
    blocks = operator.with_blocks({"a": "^a", "rest": "*"})
    assert type(blocks) is kind
    assert blocks.blocks == {"a": "^a", "rest": "*"}
    assert operator.blocks is None


def test_what_task_arithmetic_declares() -> None:
    operator = TaskArithmetic()
    for ability in (MergeOperator, HasBlocks, ReadsPieces, Linear):
        assert isinstance(operator, ability), ability
    assert not isinstance(operator, ChecksValues)


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_is_prepared(on_disk: bool) -> None:
    deltas = vectors(on_disk)
    assert isinstance(deltas, Deltas)
    linear, ties = TaskArithmetic().prepare(deltas), Ties().prepare(deltas)
    assert isinstance(linear, PreparedMerge)
    assert isinstance(linear, HasDerivatives) == (not on_disk)  # derivatives need all of it
    assert not isinstance(ties, HasDerivatives)
    pieces = TaskArithmetic().prepare_pieces(deltas)
    assert isinstance(pieces, KernelMerge)
    c = torch.tensor([0.3, -0.2, 0.5])
    outs = [torch.empty(deltas.layout.size) for _ in range(2)]
    linear.write(c, outs[0])
    pieces.write(c, outs[1])
    torch.testing.assert_close(outs[0], outs[1])
