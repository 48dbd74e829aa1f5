from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from map_bo.errors import MergeError
from map_bo.merging.align.layout import FlatLayout, is_variance, join_ties
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.rng import make_generator

shapes = st.lists(st.integers(0, 7), max_size=4).map(tuple)


@given(st.lists(shapes, min_size=1, max_size=8))
def test_tensors_lie_behind_each_other_aligned_and_come_back(
    sizes: list[tuple[int, ...]],
) -> None:
    generator = make_generator(0)
    state = {f"t{i:02}": torch.randn(size, generator=generator) for i, size in enumerate(sizes)}
    if not any(tensor.numel() for tensor in state.values()):
        with pytest.raises(MergeError, match="no floating tensors to merge"):
            FlatLayout.of(open_checkpoint(state), {})
        return
    layout = FlatLayout.of(open_checkpoint(state), {})
    end = 0
    flat = torch.full((layout.size,), torch.nan)
    for slot in layout.slots:
        assert slot.offset >= end
        assert slot.offset % 32 == 0
        assert (slot.shape, slot.numel) == (state[slot.name].shape, state[slot.name].numel())
        end = slot.stop
        slot.of(flat).copy_(state[slot.name])
    assert end <= layout.size
    found = layout.state_dict(flat, {})
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_dtypes_fixed_tensors_and_ties_come_back() -> None:
    state = {
        "a": torch.ones(3, dtype=torch.bfloat16),
        "b": torch.ones(2, 2),
        "count": torch.tensor(4),
        "mask": torch.tensor([True, False]),
        "tied": torch.ones(2, 2),
    }
    layout = FlatLayout.of(open_checkpoint(state), {"tied": "b"})
    assert [slot.name for slot in layout.slots] == ["a", "b"]
    assert layout.fixed == ("count", "mask")
    fixed = {"count": state["count"], "mask": state["mask"]}
    found = layout.state_dict(torch.full((layout.size,), 2.0), fixed)
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        name: tensor.dtype for name, tensor in state.items()
    }
    assert found["tied"] is found["b"]
    found["count"].add_(1)
    found["b"].add_(1)
    assert int(fixed["count"]) == 4  # what is returned is new


def test_complex_tensors_are_refused() -> None:
    with pytest.raises(MergeError, match="complex tensors cannot be merged") as caught:
        FlatLayout.of(open_checkpoint({"w": torch.ones(2, dtype=torch.complex64)}), {})
    assert "view_as_real" in str(caught.value.hint)


def test_ties_of_both_sides_are_joined() -> None:
    state = {name: torch.ones(2) for name in ("a", "b", "c", "d")}
    base = open_checkpoint(state)
    assert join_ties(base, {}) == {}
    assert join_ties(base, {"b": "a", "c": "b"}) == {"b": "a", "c": "a"}
    assert join_ties(base, {"b": "gone", "c": "gone"}) == {"c": "b"}
    assert join_ties(base, {"a": "d"}) == {"d": "a"}
    shared = torch.ones(2)
    tied = open_checkpoint({"x": shared, "y": shared, "z": torch.zeros(2)})
    assert join_ties(tied, {}) == {"y": "x"}
    assert join_ties(tied, {"z": "y"}) == {"y": "x", "z": "x"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("running_var", True),
        ("layer1.0.bn1.running_var", True),
        ("running_variance", False),
        ("running_var.weight", False),
        ("bn.running_mean", False),
    ],
)
def test_variances_are_known_by_their_name(name: str, expected: bool) -> None:
    assert is_variance(name) is expected
