from __future__ import annotations

import subprocess
import sys

import torch
from hypothesis import given
from hypothesis import strategies as st

from map_bo.rng import child, child_seed, make_generator, numpy_generator


@given(st.integers(0, 2**40), st.text(max_size=5), st.integers(0, 100))
def test_a_child_does_not_depend_on_what_its_parent_drew(seed: int, name: str, number: int) -> None:
    parent = make_generator(seed)
    before = torch.rand(3, generator=child(parent, name, number))
    torch.rand(17, generator=parent)
    assert torch.equal(before, torch.rand(3, generator=child(parent, name, number)))


def test_children_with_other_names_differ() -> None:
    parent = make_generator(0)
    seeds = {child_seed(parent, name) for name in ("a", "b", "a/b", 1, 2)}
    assert len(seeds) == 5
    assert child_seed(parent, "a", "b") == child_seed(make_generator(0), "a", "b")


def test_grandchildren_of_different_parents_differ() -> None:
    assert child_seed(child(make_generator(0), "x"), "y") != child_seed(
        child(make_generator(1), "x"), "y"
    )


def test_a_fresh_process_agrees() -> None:
    code = (
        "from map_bo.rng import *; g = make_generator(3);"
        "print(child_seed(g, 'x', 1), numpy_generator(g, 'y').integers(10**9))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    generator = make_generator(3)
    assert int(out[0]) == child_seed(generator, "x", 1)
    assert int(out[1]) == numpy_generator(generator, "y").integers(10**9)


def test_global_state_is_not_touched() -> None:
    before = torch.random.get_rng_state()
    torch.rand(4, generator=child(make_generator(5), "a"))
    assert torch.equal(before, torch.random.get_rng_state())
