"""What every merge operator must keep to."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from map_bo.errors import MergeError
from map_bo.merging.align.layout import FlatLayout, is_variance
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.vectors.operator import MergeOperator, PreparedMerge, recipe_of
from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.plain import from_plain, to_plain
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace

EXPERTS = ("e0", "e1", "e2")


def example_vectors(
    size: int = 40, dtype: torch.dtype = torch.float32, cache: Path | None = None
) -> TaskVectors:
    """Return three experts: a variance, a counter and at least ``size`` by 30 weights."""
    generator = make_generator(0)

    def draw() -> dict[str, Tensor]:
        return {
            "first.weight": torch.randn(40, 30, generator=generator).repeat(-(-size // 40), 1),
            "first.running_var": torch.rand(8, generator=generator) + 0.1,
            "last.bias": torch.randn(9, generator=generator),
        }

    base = draw()
    experts: dict[str, dict[str, Tensor]] = {}
    for name in EXPERTS:
        other = draw()
        experts[name] = {k: v + 0.3 * (other[k] - v) for k, v in base.items()}
    states = {name: {**tensors, "count": torch.tensor(3)} for name, tensors in experts.items()}
    return TaskVectors.load(
        open_checkpoint({**base, "count": torch.tensor(1)}),
        {name: open_checkpoint(tensors) for name, tensors in states.items()},
        dtype=dtype,
        cache=cache,
    )


def _long_vectors(times: int, dtype: torch.dtype) -> TaskVectors:
    """Return the example with its matrix so many times, 1200 weights each, and its bias."""
    short = example_vectors()
    slots = {slot.name: slot for slot in short.layout.slots}
    first, last = slots["first.weight"], slots["last.bias"]
    parts = [short.rows[:, slot.offset : slot.stop] for slot in (first, last)]
    rows = torch.cat([parts[0].repeat(1, times), parts[1]], dim=1).to(dtype)
    long = replace(first, offset=0, shape=torch.Size((40 * times, 30)))
    layout = FlatLayout((long, replace(last, offset=long.numel)), size=rows.shape[1])
    return TaskVectors(EXPERTS, layout, rows)


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the size in bytes of the largest new tensor that an operation makes."""

    def __init__(self, known: tuple[Tensor, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A view of what was prepared is no new memory.
        given = {
            leaf.untyped_storage().data_ptr()
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage.data_ptr() not in self.known | given:
                    self.largest = max(self.largest, storage.nbytes())
        return result


def base_row(space: CoefficientSpace) -> Tensor:
    """Return the coefficients of the base: 0, and the settings that are searched at rest."""
    anchors = space.anchors()
    assert anchors.names[0] == "base"
    return anchors.X[0]


class OperatorContract:
    """Inherit, and give the fixture ``operator``."""

    # Bytes that one allocation of `write` may take: a chunk, never a model.
    scratch_limit = 24 << 20
    # The relative error from storing in 16 bits. Where numbers are ranked it also changes which
    # of them are kept.
    storage_error = 5e-3
    # Whether coefficients below 0 mean something; an operator that refuses them says so.
    negative = True
    # Whether mapped rows give the same bits; not where more is prepared of those in memory.
    same_bits_mapped = True

    def fitted(self, operator: MergeOperator, vectors: TaskVectors) -> MergeOperator:
        """Return the operator for vectors of other shapes; override where it depends on them."""
        return operator

    @pytest.fixture
    def operator(self) -> MergeOperator:
        raise NotImplementedError

    @pytest.fixture
    def space(self, operator: MergeOperator) -> CoefficientSpace:
        return operator.space(EXPERTS, lower=0.0, upper=1.0)

    def test_is_an_operator(self, operator: MergeOperator) -> None:
        assert isinstance(operator, MergeOperator)
        assert isinstance(operator.prepare(example_vectors()), PreparedMerge)

    def test_space_belongs_to_the_experts(
        self, operator: MergeOperator, space: CoefficientSpace
    ) -> None:
        assert space.experts == EXPERTS
        lowest = -0.5 if self.negative else 0.5
        wide = operator.space(EXPERTS, lower=lowest, upper=2.0)
        assert wide.names == space.names
        moving = [i for i, owner in enumerate(wide.owner) if owner >= 0]
        assert {(wide.lower[i], wide.upper[i]) for i in moving} == {(lowest, 2.0)}

    def test_negative_coefficients_are_merged_or_refused(
        self, operator: MergeOperator, space: CoefficientSpace
    ) -> None:
        vectors = example_vectors()
        prepared = operator.prepare(vectors)
        out = torch.full_like(vectors.base, torch.nan)
        c = base_row(space)
        moving = torch.tensor(space.owner) >= 0
        c[moving] = torch.linspace(-0.5, 0.5, int(moving.sum()), dtype=torch.float64)
        if self.negative:
            prepared.write(c, out)
            assert bool(torch.isfinite(out).all())
        else:
            with pytest.raises(MergeError, match="negative") as caught:
                operator.space(EXPERTS, lower=-0.5, upper=2.0)
            assert caught.value.hint
            with pytest.raises(MergeError, match="negative"):
                prepared.write(c, out)

    def test_description_is_plain_and_settings_can_be_pickled(
        self, operator: MergeOperator
    ) -> None:
        told = to_plain(operator)
        assert json.loads(json.dumps(told)) == told
        assert from_plain(told, trust=[type(operator).__module__]) == operator
        assert to_plain(pickle.loads(pickle.dumps(operator))) == told
        assert json.loads(json.dumps(recipe_of(operator))) == recipe_of(operator)

    def test_the_base_is_at_zero(self, operator: MergeOperator, space: CoefficientSpace) -> None:
        vectors = example_vectors()
        out = torch.full_like(vectors.base, torch.nan)
        operator.prepare(vectors).write(base_row(space), out)
        assert torch.equal(out, vectors.base)

    def test_every_number_is_written_and_the_same_again(
        self, operator: MergeOperator, space: CoefficientSpace
    ) -> None:
        vectors = example_vectors()
        prepared = operator.prepare(vectors)
        rows = vectors.rows.clone()
        c = space.sample(2, generator=make_generator(1))
        first, second = (torch.full_like(vectors.base, torch.nan) for _ in range(2))
        prepared.write(c[0], first)
        prepared.write(c[1], second)
        prepared.write(c[0], second)
        assert bool(torch.isfinite(first).all())
        assert torch.equal(first, second)  # nothing is kept from candidate to candidate
        assert torch.equal(rows, vectors.rows)
        again = torch.empty_like(first)
        operator.prepare(example_vectors()).write(c[0], again)
        assert torch.equal(first, again)

    def test_variances_stay_positive(self, operator: MergeOperator) -> None:
        vectors = example_vectors()
        wide = operator.space(EXPERTS, lower=-9.0 if self.negative else 0.0, upper=9.0)
        out = torch.empty_like(vectors.base)
        slot = next(slot for slot in vectors.layout.slots if is_variance(slot.name))
        prepared = operator.prepare(vectors)
        for c in wide.sample(20, generator=make_generator(2)):
            prepared.write(c, out)
            assert float(slot.of(out).min()) >= 0.05

    @pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_any_floating_output(
        self,
        operator: MergeOperator,
        space: CoefficientSpace,
        storage: torch.dtype,
        kind: torch.dtype,
    ) -> None:
        c = space.sample(1, generator=make_generator(3))[0]
        exact = torch.empty_like(example_vectors().base)
        operator.prepare(example_vectors()).write(c, exact)
        vectors = example_vectors(dtype=storage)
        out = torch.empty(vectors.layout.size, dtype=kind)
        operator.prepare(vectors).write(c, out)
        limit = max(
            5e-3 if kind == torch.bfloat16 else 1e-3,
            self.storage_error if storage != torch.float32 else 0.0,
        )
        error = float((out.double() - exact.double()).norm() / exact.double().norm())
        assert error < limit

    @pytest.mark.slow
    def test_nothing_of_the_size_of_the_model_is_allocated(
        self, operator: MergeOperator, space: CoefficientSpace
    ) -> None:
        c = space.sample(1, generator=make_generator(4))[0]
        largest: dict[tuple[torch.dtype, torch.dtype], int] = {}
        for times in (1000, 2000):
            for storage in (torch.float32, torch.bfloat16, torch.float16):
                vectors = _long_vectors(times, storage)
                prepared = self.fitted(operator, vectors).prepare(vectors)
                for kind in (torch.float32, torch.bfloat16):
                    out = torch.empty(vectors.layout.size, dtype=kind)
                    with Allocations((vectors.rows, out)) as seen:
                        prepared.write(c, out)
                    assert seen.largest < self.scratch_limit
                    # A model twice as large takes no more.
                    assert seen.largest <= largest.setdefault((storage, kind), seen.largest)

    @pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float16])
    def test_mapped_rows_merge_as_those_in_memory(
        self,
        operator: MergeOperator,
        space: CoefficientSpace,
        storage: torch.dtype,
        tmp_path: Path,
    ) -> None:
        c = space.sample(1, generator=make_generator(5))[0]
        vectors = example_vectors(dtype=storage)
        mapped = example_vectors(dtype=storage, cache=tmp_path)
        there, here = (torch.empty(vectors.layout.size) for _ in range(2))
        operator.prepare(vectors).write(c, there)
        operator.prepare(mapped).write(c, here)
        if self.same_bits_mapped:
            assert torch.equal(there, here)
        else:
            torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-6)
        assert torch.equal(vectors.rows, mapped.rows)

    def test_wrong_coefficients_are_refused(
        self, operator: MergeOperator, space: CoefficientSpace
    ) -> None:
        vectors = example_vectors()
        prepared = operator.prepare(vectors)
        out = torch.empty_like(vectors.base)
        with pytest.raises(MergeError, match=rf"must have shape \({space.d},\)"):
            prepared.write(torch.zeros(space.d + 1), out)
        with pytest.raises(MergeError, match="must be finite"):
            prepared.write(torch.full((space.d,), torch.nan), out)
        with pytest.raises(MergeError, match="would be written to"):
            prepared.write(torch.zeros(space.d), out[:-1])
