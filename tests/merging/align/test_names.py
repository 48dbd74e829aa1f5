from __future__ import annotations

import pytest
import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.align.experts import align_names
from map_bo.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint


def of(*names: str, tied: tuple[str, ...] = (), **changed: Tensor) -> Checkpoint:
    one = torch.ones(2, 3)
    tensors = {name: one if name in tied else torch.ones(2, 3) for name in names}
    return open_checkpoint({**tensors, **changed})


def test_own_names_come_first() -> None:
    assert align_names(of("a", "b"), of("a", "b"), "e") == {"a": "a", "b": "b"}


@pytest.mark.parametrize("expert", [of("a"), of("b"), of("a", "b"), of("a", "b", tied=("a", "b"))])
def test_a_tied_tensor_under_any_of_its_names(expert: Checkpoint) -> None:
    recorded = of("a", "b", tied=("a", "b"))
    assert align_names(recorded, expert, "e") == {"a": expert.names[0]}
    # As a model ties them whose base was saved with both.
    assert align_names(of("a", "b"), expert, "e", {"b": "a"}) == {"a": expert.names[0]}


def test_an_alias_is_no_further_tensor() -> None:
    assert align_names(of("a"), of("a", "b", tied=("a", "b")), "e") == {"a": "a"}


@pytest.mark.parametrize(
    ("expert", "message"),
    [
        (of("a"), "expert 'e' lacks 1 of the base's tensors: b\n"),
        (of("a", "b", "c"), "expert 'e' has 1 tensors that the base lacks: c\n"),
        (of("a", b=torch.ones(3, 2)), r"other shapes than the base: b \[3, 2\] against \[2, 3\]"),
        (of("a", b=torch.ones(2, 3, dtype=torch.int8)), "other kinds of dtype .*: b torch.int8"),
        (of("a", b=torch.ones(2, 3, dtype=torch.complex64)), "b torch.complex64 against"),
    ],
)
def test_what_does_not_fit(expert: Checkpoint, message: str) -> None:
    with pytest.raises(MergeError, match=message) as caught:
        align_names(of("a", "b"), expert, "e")
    assert caught.value.hint
