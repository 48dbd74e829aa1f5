"""mergekit as an oracle: the same experts for both, and both merges as state dicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.vectors.operator import MergeOperator
from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.rng import make_generator

State = dict[str, Tensor]

# Whole numbers of every density and gamma used in the tests: 600, 40, 200 and 960 numbers.
SHAPES = {"h.0.weight": (20, 30), "h.0.bias": (40,), "h.1.weight": (10, 20), "head": (8, 6, 20)}
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


def states(experts: int = 3, *, spread: float = 0.3) -> dict[str, State]:
    """Return a base and experts ``e0``, ... as state dicts; no two magnitudes are equal."""
    generator = make_generator(11)

    def draw(scale: float) -> State:
        return {n: scale * torch.randn(s, generator=generator) for n, s in SHAPES.items()}

    base = draw(1.0)
    result = {"base": base}
    for i in range(experts):
        delta = draw(spread)
        result[f"e{i}"] = {name: base[name] + delta[name] for name in base}
    return result


def vectors_of(models: Mapping[str, State]) -> TaskVectors:
    """Return the task vectors of the models but ``base``."""
    opened = {name: open_checkpoint(state) for name, state in models.items()}
    return TaskVectors.load(opened.pop("base"), opened, check_base=False)


def ours(operator: MergeOperator, models: Mapping[str, State], c: Sequence[float]) -> State:
    """Return the merge of map_bo."""
    vectors = vectors_of(models)
    flat = torch.empty(vectors.layout.size)
    operator.prepare(vectors).write(torch.tensor(c, dtype=torch.float64), flat)
    return vectors.layout.state_dict(flat, vectors.fixed)


def theirs(
    method: str,
    models: Mapping[str, State],
    *,
    base: str | None = "base",
    scale: float | None = None,
    **parameters: Any,
) -> State:
    """Return the merge of mergekit; lists are values of the inputs other than the base.

    ``scale`` is what mergekit calls ``lambda``, which is no name in Python.
    """
    merge_methods = pytest.importorskip("mergekit.merge_methods")
    inputs = [name for name in models if name != base or method == "linear"]
    given = {
        name: dict(zip(inputs, value, strict=True)) if isinstance(value, (list, tuple)) else value
        for name, value in parameters.items()
    }
    if scale is not None:
        given["lambda"] = scale
    result: State = merge_methods.merge_state_dicts(models, method, base=base, parameters=given)
    return result


def assert_same(left: State, right: State, **tolerance: Any) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], **{**CLOSE, **tolerance}, msg=name)


def without(models: Mapping[str, State], *names: str) -> dict[str, State]:
    return {name: state for name, state in models.items() if name not in names}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global numbers, which mergekit draws its masks from, and put them back."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
