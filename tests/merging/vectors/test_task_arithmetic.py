from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.export.bounded import merge_linearly
from map_bo.merging.vectors.linear_merge import LinearMerge, TaskArithmetic
from map_bo.merging.vectors.operator import Linear, MergeOperator
from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.plain import from_plain, to_plain
from tests.contracts.operator_contract import EXPERTS, OperatorContract, example_vectors
from tests.merging.small_models import MODELS, family

BLOCKS = {"early": r"^first\.", "late": "*"}
coefficients = st.lists(st.floats(-2, 2, width=32), min_size=3, max_size=3)


class TestTaskArithmetic(OperatorContract):
    @pytest.fixture
    def operator(self) -> MergeOperator:
        return TaskArithmetic()


class TestBlockwise(OperatorContract):
    @pytest.fixture
    def operator(self) -> MergeOperator:
        return TaskArithmetic(BLOCKS)


def merge(
    vectors: TaskVectors,
    c: list[float] | Tensor,
    blocks: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    out = torch.full((vectors.layout.size,), torch.nan, dtype=dtype)
    TaskArithmetic(blocks).prepare(vectors).write(torch.as_tensor(c, dtype=torch.float64), out)
    return out


def without_floors(vectors: TaskVectors) -> TaskVectors:
    return replace(vectors, floors=())


def test_one_hot_is_the_expert() -> None:
    vectors = example_vectors()
    for i in range(3):
        expert = vectors.base + vectors.deltas[i]
        assert torch.allclose(merge(vectors, torch.eye(3)[i]), expert, rtol=1e-6, atol=1e-7)


def test_negative_zero_of_the_base_survives() -> None:
    vectors = example_vectors()
    vectors.base[-1] = -0.0
    assert str(merge(vectors, [0.0] * 3)[-1].item()) == "-0.0"


@given(coefficients)
def test_is_the_weighted_sum(c: list[float]) -> None:
    vectors = without_floors(example_vectors())
    expected = (
        vectors.base.double() + torch.tensor(c, dtype=torch.float64) @ vectors.deltas.double()
    )
    assert torch.allclose(merge(vectors, c).double(), expected, rtol=1e-5, atol=1e-5)


@given(coefficients, coefficients, st.floats(-1, 1))
def test_is_linear_around_the_base(a: list[float], b: list[float], t: float) -> None:
    vectors = without_floors(example_vectors())
    ta, tb = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    base = vectors.base.double()
    left = merge(vectors, ta + t * tb).double() - base
    right = (merge(vectors, ta).double() - base) + t * (merge(vectors, tb).double() - base)
    assert torch.allclose(left, right, atol=1e-5)


@given(coefficients, st.permutations(range(3)))
def test_order_of_the_experts_does_not_matter(c: list[float], order: list[int]) -> None:
    vectors = example_vectors()
    other = replace(
        vectors,
        experts=tuple(vectors.experts[i] for i in order),
        rows=torch.cat([vectors.rows[:1], vectors.deltas[order]]),
    )
    assert torch.allclose(
        merge(vectors, c), merge(other, [c[i] for i in order]), rtol=1e-5, atol=1e-5
    )


@given(coefficients, st.integers(1, 2000), st.integers(1, 2000))
def test_tile_and_chunk_do_not_matter(c: list[float], tile: int, chunk: int) -> None:
    for storage in (torch.float32, torch.bfloat16, torch.float16):
        vectors = example_vectors(dtype=storage)
        whole = merge(vectors, c)
        for kind in (torch.float32, torch.float64):
            out = torch.full((vectors.layout.size,), torch.nan, dtype=kind)
            segments = ((0, 100, 0), (100, vectors.layout.size, 0))
            linear = LinearMerge(vectors, segments, tile=tile, chunk=chunk)
            linear.write(torch.tensor(c, dtype=torch.float64), out)
            assert torch.allclose(out.float(), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inference", [False, True])
def test_threads_write_the_same(inference: bool) -> None:
    # To the bit: threads share out whole chunks, and torch uses one thread within each.
    vectors = example_vectors(8000, dtype=torch.bfloat16)  # several chunks
    alone = merge(vectors, [0.3, -0.4, 0.9])
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with torch.inference_mode(inference):
            for _ in range(5):
                assert torch.equal(merge(vectors, [0.3, -0.4, 0.9]), alone)
    finally:
        torch.set_num_threads(before)


def test_bfloat16_accumulates_in_float32() -> None:
    # Each delta alone would be rounded away if the sum were kept in bfloat16.
    base = {"w": torch.full((64,), 1.0)}
    experts = {
        f"e{i}": open_checkpoint({"w": torch.full((64,), 1.0 + 2.0**-9 * (1 + 2.0**-6 * i))})
        for i in range(8)
    }
    vectors = TaskVectors.load(open_checkpoint(base), experts, dtype=torch.bfloat16)
    exact = vectors.rows.double().sum(0)
    assert torch.allclose(merge(vectors, [1.0] * 8).double(), exact, rtol=1e-6)
    rounded = merge(vectors, [1.0] * 8, dtype=torch.bfloat16)
    assert torch.equal(rounded, exact.bfloat16())


def test_lower_precision_of_products_does_not_reach_the_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vectors = example_vectors()
    expected = merge(vectors, [0.3, 0.6, 0.1])

    def refuse(*args: object, **settings: object) -> None:
        raise AssertionError("a matrix product was used")

    monkeypatch.setattr(torch, "bmm", refuse)
    monkeypatch.setattr(torch, "mm", refuse)
    products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    try:
        found = merge(vectors, [0.3, 0.6, 0.1])
    finally:
        products.fp32_precision = before
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", sorted(MODELS))
@pytest.mark.parametrize("blocks", [None, {"weights": r"\.weight$", "others": "*"}])
def test_flat_merge_equals_the_merge_tensor_by_tensor(
    kind: str, blocks: dict[str, str] | None
) -> None:
    base, experts = family(kind)
    checkpoints = {name: open_checkpoint(expert) for name, expert in experts.items()}
    vectors = TaskVectors.load(open_checkpoint(base), checkpoints)
    operator = TaskArithmetic(blocks)
    space = operator.space(vectors.experts, lower=-1.0, upper=1.5)
    c = torch.linspace(-0.9, 1.4, space.d, dtype=torch.float64)
    flat = vectors.layout.state_dict(merge(vectors, c, blocks), vectors.fixed)
    on_disk = dict(
        merge_linearly(open_checkpoint(base), checkpoints, operator.weights(tuple(experts), c))
    )
    assert flat.keys() == on_disk.keys()
    for name, tensor in on_disk.items():
        assert torch.allclose(flat[name], tensor, rtol=1e-5, atol=1e-6), name


def test_blocks_scale_their_own_tensors() -> None:
    vectors = without_floors(example_vectors())
    c = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])  # e0/early, e0/late, e1/early, ...
    assert TaskArithmetic(BLOCKS).space(EXPERTS, lower=0, upper=1).names[:2] == (
        "e0/early",
        "e0/late",
    )
    found = merge(vectors, c, BLOCKS)
    whole = {0: merge(vectors, c[0::2]), 1: merge(vectors, c[1::2])}
    for slot in vectors.layout.slots:
        block = 0 if slot.name.startswith("first") else 1
        assert torch.allclose(slot.of(found), slot.of(whole[block]), rtol=1e-6, atol=1e-6)


def test_one_block_at_zero_leaves_its_tensors_as_the_base() -> None:
    vectors = example_vectors()
    found = merge(vectors, [0.5, 0.0] * 3, BLOCKS)
    last = next(slot for slot in vectors.layout.slots if slot.name == "last.bias")
    assert torch.equal(last.of(found), last.of(vectors.base))


def test_weights_by_tensor() -> None:
    c = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    operator = TaskArithmetic(BLOCKS)
    assert isinstance(operator, Linear)
    of = operator.weights(("a", "b"), c)
    assert of("first.weight") == {"a": 0.1, "b": 0.3}
    assert of("last.bias") == {"a": 0.2, "b": 0.4}
    assert TaskArithmetic().weights(("a", "b"), c[:2])("any") == {"a": 0.1, "b": 0.2}


def test_blocks_that_do_not_divide_the_tensors_are_refused() -> None:
    vectors = example_vectors()
    with pytest.raises(MergeError, match=r"'last.bias' belongs to no block") as caught:
        TaskArithmetic({"early": "^first"}).prepare(vectors)
    assert "'*'" in str(caught.value.hint)
    with pytest.raises(MergeError, match=r"'first.weight' belongs to the blocks a, b"):
        TaskArithmetic({"a": "first", "b": "weight", "c": "*"}).prepare(vectors)
    with pytest.raises(MergeError, match=r"belongs to the blocks a, b"):
        TaskArithmetic({"a": "*", "b": "*"}).prepare(vectors)
    with pytest.raises(MergeError, match="no floating tensor belongs to the blocks typo"):
        TaskArithmetic({"typo": "frist", "b": "*"}).prepare(vectors)
    with pytest.raises(MergeError, match=r"'\(' of block 'a' is not a regular expression"):
        TaskArithmetic({"a": "("})
    with pytest.raises(MergeError, match="there are no blocks"):
        TaskArithmetic({})


def test_settings_are_equal_by_value_and_described() -> None:
    assert TaskArithmetic(BLOCKS) == TaskArithmetic(dict(BLOCKS))
    assert to_plain(TaskArithmetic(BLOCKS))["fields"] == {"blocks": BLOCKS}
    assert from_plain(to_plain(TaskArithmetic(BLOCKS))) == TaskArithmetic(BLOCKS)


@pytest.mark.parametrize("blocks", [None, BLOCKS])
@pytest.mark.parametrize("chunk", [None, 7])
def test_directional_derivatives_are_those_of_the_merge(
    blocks: dict[str, str] | None, chunk: int | None
) -> None:
    vectors = without_floors(example_vectors())
    linear = TaskArithmetic(blocks).prepare(vectors)
    assert isinstance(linear, LinearMerge)
    if chunk is not None:
        linear = LinearMerge(vectors, linear._segments, linear._blocks, chunk=chunk)
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(vectors.layout.size, generator=generator)
    found = linear.directional(gradient)
    zero = torch.zeros(len(found))
    for i in range(len(found)):
        # Along coefficient i the merge moves by its part of a task vector.
        moved = merge(vectors, torch.eye(len(found))[i], blocks) - merge(vectors, zero, blocks)
        assert float(found[i]) == pytest.approx(float(moved @ gradient), rel=1e-4, abs=1e-5)
    for wrong in (gradient[:-1], gradient.double()):
        with pytest.raises(MergeError, match=r"a gradient has shape .*\nhint: give a flat float32"):
            linear.directional(wrong)
