from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.vectors.on_disk import OnDiskVectors
from map_bo.merging.vectors.operator import MergeOperator
from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.operators.statistics.data_free import (
    EMBEDDINGS,
    DataFreeRegMean,
    products_of_changes,
)
from map_bo.operators.statistics.regmean import RegMean
from map_bo.rng import make_generator
from tests.contracts.operator_contract import EXPERTS, OperatorContract, example_vectors
from tests.operators.cases import chunked, hard_vectors, label, merge, write

coefficients = st.lists(st.floats(0, 2, width=32), min_size=3, max_size=3)


class TestDataFreeRegMean(OperatorContract):
    negative = False
    same_bits_mapped = False

    @pytest.fixture(
        params=[
            DataFreeRegMean(),
            DataFreeRegMean(alpha=0.5, search=["alpha", "ridge"], normalise=False),
        ],
        ids=label,
    )
    def operator(self, request: pytest.FixtureRequest) -> MergeOperator:
        made: MergeOperator = request.param
        return made


def closed_form(deltas: Tensor, c: Tensor, ridge: float, *, normalise: bool = True) -> Tensor:
    """Return the change of a layer, ``N x outputs x inputs``, restated with inverses."""
    deltas = deltas.double()
    grams = deltas.mT @ deltas
    if normalise:
        grams = grams / deltas.square().sum((1, 2))[:, None, None]
    extra = ridge * grams.diagonal(dim1=1, dim2=2).mean()
    grams = grams + extra * torch.eye(deltas.shape[2], dtype=torch.float64)
    left = (c[:, None, None] * grams).sum(0)
    right = (c[:, None, None] * (deltas @ grams)).sum(0)
    found: Tensor = c.sum() * right @ torch.linalg.inv(left)
    return found


@settings(deadline=None, max_examples=30)
@given(
    c=coefficients,
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    normalise=st.booleans(),
    seed=st.integers(0, 50),
)
def test_it_is_the_closed_form(
    c: list[float], shape: tuple[int, int], normalise: bool, seed: int
) -> None:
    if sum(c) < 1e-2:
        return
    vectors = hard_vectors(seed, shapes={"w": shape, "b": (4,)}, zeros=0.0)
    slots = {slot.name: slot for slot in vectors.layout.slots}
    x = torch.tensor(c, dtype=torch.float64)
    found = merge(DataFreeRegMean(ridge=0.1, normalise=normalise), vectors, x)
    deltas = torch.stack([slots["w"].of(delta) for delta in vectors.deltas])
    expected = slots["w"].of(vectors.base) + closed_form(deltas, x, 0.1, normalise=normalise)
    torch.testing.assert_close(slots["w"].of(found).double(), expected, rtol=1e-4, atol=1e-4)
    mean = slots["b"].of(vectors.base).double()
    mean = mean + x @ torch.stack([slots["b"].of(delta) for delta in vectors.deltas]).double()
    torch.testing.assert_close(slots["b"].of(found).double(), mean, rtol=1e-5, atol=1e-5)


def test_it_minimises_what_wudi_merging_goes_down() -> None:
    vectors = hard_vectors(0, shapes={"w": (12, 6)}, zeros=0.0)
    slot = vectors.layout.slots[0]
    deltas = torch.stack([slot.of(delta) for delta in vectors.deltas]).double()

    def objective(change: Tensor) -> float:
        apart = (change - deltas) @ deltas.mT
        return float((apart.square().sum((1, 2)) / deltas.square().sum((1, 2))).sum())

    third = torch.full((3,), 1 / 3, dtype=torch.float64)
    found = slot.of(merge(DataFreeRegMean(ridge=0.0), vectors, third) - vectors.base).double()
    least = objective(found)
    generator = make_generator(1)
    for size in (1e-2, 1e-1):
        step = size * torch.randn(found.shape, generator=generator).double()
        assert objective(found + step) > least
    assert objective(deltas.mean(0)) > least


def test_it_is_regmean_with_those_products() -> None:
    vectors = example_vectors()
    index = next(i for i, s in enumerate(vectors.layout.slots) if s.name == "first.weight")
    products = products_of_changes(vectors, index).float()
    assert torch.allclose(products.diagonal(dim1=1, dim2=2).sum(1), torch.ones(3))
    known = {e: {"first.weight": product} for e, product in zip(EXPERTS, products, strict=True)}
    c = [0.4, 0.1, 0.7]
    expected = merge(RegMean(known, alpha=0.7, ridge=0.3), vectors, c)
    found = merge(DataFreeRegMean(alpha=0.7, ridge=0.3), vectors, c)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("i", range(3))
def test_one_hot_is_the_expert(i: int) -> None:
    vectors = hard_vectors(2)
    found = merge(DataFreeRegMean(), vectors, torch.eye(3)[i])
    expected = vectors.base + vectors.deltas[i]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_much_ridge_is_the_weighted_average() -> None:
    vectors = hard_vectors(2)
    c = torch.tensor([0.2, 0.5, 0.1])
    expected = vectors.base + c @ vectors.deltas
    found = merge(DataFreeRegMean(ridge=1e6), vectors, c)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_convolutions_count_as_layers_of_patches() -> None:
    vectors = hard_vectors(3, shapes={"w": (8, 3, 2, 2)}, zeros=0.0)
    flat = hard_vectors(3, shapes={"w": (8, 12)}, zeros=0.0)
    c = [0.3, 0.3, 0.3]
    assert torch.equal(vectors.deltas, flat.deltas)
    assert torch.equal(merge(DataFreeRegMean(), vectors, c), merge(DataFreeRegMean(), flat, c))


def test_weights_that_are_inputs_by_outputs() -> None:
    vectors = hard_vectors(4, shapes={"c_fc.weight": (6, 9)}, zeros=0.0)
    slot = vectors.layout.slots[0]
    c = torch.tensor([0.3, 0.6, 0.2], dtype=torch.float64)
    found = slot.of(merge(DataFreeRegMean(transposed="c_fc", ridge=0.1), vectors, c))
    deltas = torch.stack([slot.of(delta).mT for delta in vectors.deltas])
    expected = slot.of(vectors.base) + closed_form(deltas, c, 0.1).mT
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "transformer.wte.weight",
        "embeddings.position_embeddings.weight",
        "shared.weight",
    ],
)
def test_embeddings_are_averaged(name: str) -> None:
    assert re.search(EMBEDDINGS, name)
    vectors = hard_vectors(5, shapes={name: (7, 5)})
    c = torch.tensor([0.3, 0.6, 0.2])
    expected = vectors.base + c @ vectors.deltas
    found = merge(DataFreeRegMean(), vectors, c)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(merge(DataFreeRegMean(skip=None), vectors, c), expected, atol=1e-3)


@pytest.mark.parametrize("name", ["lm_head.weight", "layers.0.mlp.shared_expert.up_proj.weight"])
def test_layers_are_not_taken_for_embeddings(name: str) -> None:
    assert not re.search(EMBEDDINGS, name)


@pytest.mark.parametrize("search", [(), ["alpha", "ridge"]])
def test_wherever_task_vectors_are(search: list[str]) -> None:
    generator = make_generator(7)
    shapes = {"w": (12, 5), "v": (5, 9), "c_fc": (6, 8)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    experts = {
        e: open_checkpoint(
            {k: t + 0.1 * torch.randn(t.shape, generator=generator) for k, t in base.items()}
        )
        for e in EXPERTS
    }
    resident = TaskVectors.load(open_checkpoint(base), experts)
    operator = DataFreeRegMean(transposed="c_fc", search=search)
    c = [0.4, 0.2, 0.3, 0.6, 0.8][: 3 + len(search)]
    expected = merge(operator, resident, c)
    on_disk = OnDiskVectors(open_checkpoint(base), experts)
    for deltas in (replace(resident, spare_memory=False), on_disk):
        for chunk in (1, 20, 1000):
            found = write(chunked(operator.prepare(deltas), chunk), resident, c)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if search:
        fixed = DataFreeRegMean(transposed="c_fc", alpha=0.6, ridge=0.8)
        torch.testing.assert_close(merge(fixed, resident, c[:3]), expected, rtol=1e-6, atol=1e-6)


def test_an_expert_that_leaves_a_layer_alone_has_no_say_in_it() -> None:
    vectors = hard_vectors(6, shapes={"w": (9, 5), "v": (3, 4)}, zeros=0.0)
    slot = vectors.layout.slots[0]
    slot.of(vectors.rows[2]).zero_()
    c = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    found = slot.of(merge(DataFreeRegMean(ridge=1e-6), vectors, c))
    expected = slot.of(vectors.base + vectors.deltas[0])  # the average of those who know: s = 1
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"alpha": 2.0}, "alpha must be a number between 0 and 1, got 2"),
        ({"ridge": -1.0}, "ridge must be finite and not negative, got -1"),
        ({"normalise": 1}, "normalise must be true or false, got 1"),
        ({"transposed": "["}, "transposed is not a regular expression"),
        ({"skip": 1}, "skip must be a regular expression, got 1"),
    ],
)
def test_settings_that_cannot_be(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(MergeError, match=message) as caught:
        DataFreeRegMean(**wrong)  # type: ignore[arg-type]
    assert caught.value.hint
