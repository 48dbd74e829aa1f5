from __future__ import annotations

import pytest
import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.align import experts as align_experts
from map_bo.merging.align.experts import pieces_of, require_same_fixed, require_tied, same_values
from map_bo.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint


@pytest.fixture(autouse=True, params=[3, 1 << 20])
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(align_experts, "_PIECE", request.param)


def of(value: Tensor) -> Checkpoint:
    return open_checkpoint({"w": value, "other": torch.ones(1)})


def test_pieces_are_all_elements() -> None:
    for count in (0, 1, 3, 4, 10):
        indices = [i for start, stop in pieces_of(count) for i in range(start, stop)]
        assert indices == list(range(count))


@pytest.mark.parametrize("where", [0, 5, 9])
def test_one_other_value_is_seen_wherever_it_is(where: int) -> None:
    changed = torch.arange(10)
    changed[where] = 77
    assert same_values(of(torch.arange(10)), "w", of(torch.arange(10)), "w")
    assert not same_values(of(torch.arange(10)), "w", of(changed), "w")


def test_shapes_count_and_dtypes_do_not() -> None:
    assert not same_values(of(torch.ones(2, 3)), "w", of(torch.ones(3, 2)), "w")
    assert same_values(of(torch.ones(7)), "w", of(torch.ones(7).bfloat16()), "w")
    assert same_values(of(torch.zeros(0)), "w", of(torch.zeros(0)), "w")


def test_fixed_tensors_may_differ_in_a_counter_alone() -> None:
    base, same = of(torch.arange(10)), of(torch.arange(10))
    require_same_fixed(base, "w", same, "w", "math")
    with pytest.raises(MergeError, match=r"'w' \(torch.int64\) differs .* expert 'math'"):
        require_same_fixed(base, "w", of(torch.arange(1, 11)), "w", "math")
    require_same_fixed(of(torch.tensor(1)), "w", of(torch.tensor(2)), "w", "math")


def test_tied_tensors_must_agree() -> None:
    a = torch.arange(8.0)
    tied = open_checkpoint({"a": a, "b": a.clone(), "c": a})
    require_tied(tied, {"b": "a", "c": "a", "unknown": "a"}, "the base")
    untied = open_checkpoint({"a": a, "b": a + 1})
    with pytest.raises(MergeError, match=r"'a' and 'b' are one tensor .* differ in the base"):
        require_tied(untied, {"b": "a"}, "the base")
