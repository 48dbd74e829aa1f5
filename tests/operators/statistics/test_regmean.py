from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.vectors.kernel import KernelMerge
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.on_disk import OnDiskVectors
from map_bo.merging.vectors.operator import MergeOperator
from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.operators.statistics.known_statistics import NeedsStatistics
from map_bo.operators.statistics.regmean import RegMean, scaled_products
from map_bo.operators.statistics.statistics import Statistics, save_statistics, statistics_of
from map_bo.rng import make_generator
from tests.contracts.operator_contract import EXPERTS, OperatorContract, example_vectors
from tests.operators.expert_statistics import inputs, products

coefficients = st.lists(st.floats(0, 2, width=32), min_size=3, max_size=3)
C = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)


class TestRegMean(OperatorContract):
    negative = False
    same_bits_mapped = False

    @pytest.fixture
    def operator(self) -> MergeOperator:
        return RegMean(products(example_vectors()))


class TestRegMeanOfFilesInBlocks(OperatorContract):
    negative = False
    same_bits_mapped = False

    @pytest.fixture
    def operator(self, tmp_path: Path) -> MergeOperator:
        found = products(example_vectors())
        files = {
            e: save_statistics(tmp_path / f"{e}.safetensors", statistics_of(found[e], "grams"))
            for e in EXPERTS
        }
        return RegMean(files, alpha=1.0, blocks={"early": r"^first\.", "late": "*"})


def merge(vectors: TaskVectors, operator: MergeOperator, c: Tensor) -> Tensor:
    out = torch.full_like(vectors.base, torch.nan)
    operator.prepare(vectors).write(c, out)
    return out


def layer(vectors: TaskVectors, flat: Tensor) -> Tensor:
    return next(slot for slot in vectors.layout.slots if slot.name == "first.weight").of(flat)


def linear_models(transposed: bool = False) -> tuple[TaskVectors, dict[str, Tensor]]:
    """Return linear models of 6 inputs and 4 outputs, and the inputs that each knows."""
    generator = make_generator(5)
    base = torch.randn(4, 6, generator=generator)
    tuned = {e: base + 0.3 * torch.randn(4, 6, generator=generator) for e in EXPERTS}

    def state(weight: Tensor) -> dict[str, Tensor]:
        return {"w": weight.T.contiguous() if transposed else weight}

    experts = {e: open_checkpoint(state(w)) for e, w in tuned.items()}
    vectors = TaskVectors.load(open_checkpoint(state(base)), experts)
    return vectors, {e: inputs(e, 25 + 10 * i, 6) for i, e in enumerate(EXPERTS)}


@pytest.mark.parametrize("transposed", [False, True])
@given(c=coefficients)
def test_of_linear_models_it_is_the_least_squares_solution(
    transposed: bool, c: list[float]
) -> None:
    if sum(c) < 0.1:
        return
    vectors, x = linear_models(transposed)
    shares = torch.tensor(c, dtype=torch.float64) / sum(c)
    operator = RegMean({e: {"w": x[e].T @ x[e]} for e in EXPERTS}, alpha=1.0, ridge=0.0)
    w = {e: (vectors.base + vectors.deltas[i])[:24] for i, e in enumerate(EXPERTS)}
    w = {e: (t.view(6, 4) if transposed else t.view(4, 6).T) for e, t in w.items()}
    roots = dict(zip(EXPERTS, shares.sqrt().tolist(), strict=True))
    stacked = torch.cat([roots[e] * x[e].double() for e in EXPERTS])
    outputs = torch.cat([roots[e] * x[e].double() @ w[e].double() for e in EXPERTS])
    expected = torch.linalg.lstsq(stacked, outputs).solution
    found = merge(vectors, operator, shares)[:24]
    found = found.view(6, 4) if transposed else found.view(4, 6).T
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_it_beats_the_weighted_average_on_the_experts_outputs() -> None:
    vectors, x = linear_models()
    operator = RegMean({e: {"w": x[e].T @ x[e] / len(x[e])} for e in EXPERTS}, alpha=1.0)
    third = torch.full((3,), 1 / 3, dtype=torch.float64)

    def error(flat: Tensor) -> float:
        w = flat[:24].view(4, 6)
        wanted = [(vectors.base + d)[:24].view(4, 6) for d in vectors.deltas]
        return sum(
            float(((x[e] @ (w - w_n).T) ** 2).mean())
            for e, w_n in zip(EXPERTS, wanted, strict=True)
        )

    average = error(merge(vectors, TaskArithmetic(), third))
    assert error(merge(vectors, operator, third)) < 0.9 * average


def closed_form(base: Tensor, deltas: Tensor, products: Tensor, c: Tensor) -> Tensor:
    """Return ``base + sum(c) (sum c_n D_n G_n) (sum c_n G_n)^-1``, restated from the paper."""
    left = (c.view(-1, 1, 1) * products.double()).sum(0)
    right = (c.view(-1, 1, 1) * (deltas.double() @ products.double())).sum(0)
    found: Tensor = base.double() + c.sum() * torch.linalg.solve(left.mT, right.mT).mT
    return found


@given(coefficients)
def test_the_operator_is_the_closed_form(c: list[float]) -> None:
    if sum(c) < 1e-3:
        return
    vectors = example_vectors()
    found = products(vectors)
    x = torch.tensor(c, dtype=torch.float64)
    scaled = scaled_products(torch.stack([found[e]["first.weight"] for e in EXPERTS]), 0.9, 1e-6)
    base, *deltas = (layer(vectors, row) for row in vectors.rows)
    expected = closed_form(base, torch.stack(deltas), scaled, x)
    merged = layer(vectors, merge(vectors, RegMean(found), x))
    assert torch.allclose(merged.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("i", range(3))
@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0])
def test_one_hot_is_the_expert(i: int, alpha: float) -> None:
    vectors = example_vectors()
    operator = RegMean(products(vectors, rows=20), alpha=alpha)  # fewer rows than inputs
    found = merge(vectors, operator, torch.eye(3, dtype=torch.float64)[i])
    assert torch.allclose(found, vectors.base + vectors.deltas[i], rtol=1e-6, atol=1e-6)


@given(coefficients)
def test_equal_products_give_the_weighted_average(c: list[float]) -> None:
    vectors = example_vectors()
    operator = RegMean(dict.fromkeys(EXPERTS, products(vectors)["e0"]))
    x = torch.tensor(c, dtype=torch.float64)
    expected = merge(vectors, TaskArithmetic(), x)
    assert torch.allclose(merge(vectors, operator, x), expected, rtol=1e-4, atol=1e-5)


@given(coefficients, st.floats(0.01, 3), st.integers(-12, 12))
def test_scaling_laws(c: list[float], t: float, power: int) -> None:
    """A common factor of the products does nothing; one of the coefficients moves on the line."""
    vectors = example_vectors()
    found = products(vectors)
    larger = {e: {name: 2.0**power * gram for name, gram in found[e].items()} for e in EXPERTS}
    x = torch.tensor(c, dtype=torch.float64)
    base = layer(vectors, vectors.base)
    one = layer(vectors, merge(vectors, RegMean(found), x)) - base
    other = layer(vectors, merge(vectors, RegMean(larger), t * x)) - base
    assert torch.allclose(other, t * one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("transposed", [False, True])
def test_streamed_task_vectors_give_the_same(transposed: bool) -> None:
    generator = make_generator(7)
    base = {"w": torch.randn(12, 5, generator=generator), "b": torch.randn(9, generator=generator)}
    experts = {
        e: open_checkpoint(
            {k: t + 0.1 * torch.randn(t.shape, generator=generator) for k, t in base.items()}
        )
        for e in EXPERTS
    }
    width = 12 if transposed else 5
    operator = RegMean({e: {"w": (x := inputs(e, 30, width)).T @ x} for e in EXPERTS})
    resident = TaskVectors.load(open_checkpoint(base), experts)
    streamed = OnDiskVectors(open_checkpoint(base), experts)
    one, other = (torch.zeros(resident.layout.size) for _ in range(2))
    operator.prepare(resident).write(C, one)
    operator.prepare(streamed).write(C, other)
    assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


def test_threads_write_the_same() -> None:
    vectors = example_vectors(20_000)
    operator = RegMean(products(vectors))
    alone = merge(vectors, operator, C)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.allclose(merge(vectors, operator, C), alone, rtol=1e-6, atol=1e-6)
    finally:
        torch.set_num_threads(before)


@given(coefficients, st.floats(0, 1))
def test_alpha_can_be_searched(c: list[float], alpha: float) -> None:
    vectors = example_vectors()
    operator = RegMean(products(vectors), search=["alpha"])
    assert operator.space(EXPERTS, lower=0, upper=1).names[-1] == "alpha"
    x = torch.tensor(c, dtype=torch.float64)
    found = merge(vectors, operator, torch.cat([x, x.new_tensor([alpha])]))
    fixed = merge(vectors, RegMean(products(vectors), alpha=alpha), x)
    assert torch.allclose(found, fixed, rtol=1e-6, atol=1e-6)


@given(st.integers(1, 3000))
def test_chunks_do_not_matter(chunk: int) -> None:
    vectors = example_vectors()
    operator = RegMean(products(vectors))
    out = torch.empty_like(vectors.base)
    blocks = tuple(0 for _ in vectors.layout.slots)
    KernelMerge(vectors, operator.prepare(vectors).kernel, blocks, chunk=chunk).write(C, out)
    assert torch.allclose(out, merge(vectors, operator, C), rtol=1e-6, atol=1e-6)


def test_scaled_products() -> None:
    grams = torch.tensor([[[4.0, 2.0], [2.0, 1.0]], [[1.0, -1.0], [-1.0, 2.0]]])
    found = scaled_products(grams, 0.5, 0.1)
    # The mean of the diagonals 4, 1, 1, 2 is 2.
    expected = torch.tensor([[[4.2, 1.0], [1.0, 1.2]], [[1.2, -0.5], [-0.5, 2.2]]])
    assert torch.allclose(found, expected)


def test_without_products_off_the_diagonal_it_weights_input_by_input() -> None:
    vectors, x = linear_models()
    found = {e: x[e].T @ x[e] for e in EXPERTS}
    operator = RegMean({e: {"w": g} for e, g in found.items()}, alpha=0.0, ridge=0.0)
    weights = torch.stack([c * found[e].diagonal() for c, e in zip(C, EXPERTS, strict=True)])
    tuned = (vectors.base + vectors.deltas)[:, :24].view(3, 4, 6)
    expected = (weights[:, None] * tuned).sum(0) / weights.sum(0)
    merged = merge(vectors, operator, C)[:24].view(4, 6)
    assert torch.allclose(merged, expected.float(), rtol=1e-5, atol=1e-5)


def test_inputs_that_never_occur_get_the_weighted_average() -> None:
    vectors, x = linear_models()
    for values in x.values():
        values[:, 2] = 0
    operator = RegMean({e: {"w": x[e].T @ x[e]} for e in EXPERTS}, alpha=1.0)
    found = merge(vectors, operator, C)[:24].view(4, 6)
    average = merge(vectors, TaskArithmetic(), C)[:24].view(4, 6)
    assert torch.allclose(found[:, 2], average[:, 2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[:, 3], average[:, 3], rtol=1e-2)
    nothing = RegMean({e: {"w": torch.zeros(6, 6)} for e in EXPERTS})
    assert torch.allclose(merge(vectors, nothing, C)[:24].view(4, 6), average, rtol=1e-5, atol=1e-6)
    singular = RegMean({e: {"w": x[e].T @ x[e]} for e in EXPERTS}, alpha=1.0, ridge=0.0)
    with pytest.raises(MergeError, match="cannot be inverted") as caught:
        merge(vectors, singular, C)
    assert "ridge" in str(caught.value.hint)


def test_a_square_transposed_weight_is_told_by_its_record() -> None:
    generator = make_generator(1)
    base = torch.randn(5, 5, generator=generator)
    tuned = {e: base + torch.randn(5, 5, generator=generator) for e in EXPERTS}
    g = {e: {"w": (x := inputs(e, 40, 5)).T @ x} for e in EXPERTS}

    def merged(transposed: bool) -> Tensor:
        def turn(w: Tensor) -> Tensor:
            return w.T.contiguous() if transposed else w

        vectors = TaskVectors.load(
            open_checkpoint({"w": turn(base)}),
            {e: open_checkpoint({"w": turn(w)}) for e, w in tuned.items()},
        )
        known = {
            e: Statistics("grams", open_checkpoint(g[e]), settings={"transposed": ["w"]})
            for e in EXPERTS
        }
        found = merge(vectors, RegMean(known if transposed else g), C)[:25].view(5, 5)
        return turn(found)

    assert torch.allclose(merged(True), merged(False), rtol=1e-5, atol=1e-5)


def test_it_needs_fitting_statistics_of_every_expert() -> None:
    vectors = example_vectors()
    assert isinstance(RegMean(), NeedsStatistics)
    with pytest.raises(MergeError, match="regmean has no statistics for e0, e1, e2"):
        RegMean().space(EXPERTS, lower=0, upper=1)
    found = products(vectors)
    for shape in ((29, 29), (30, 29), (30,)):
        with pytest.raises(MergeError, match=r"'e1' for 'first.weight'"):
            RegMean({**found, "e1": {"first.weight": torch.ones(shape)}}).prepare(vectors)
    with pytest.raises(MergeError, match="differ in shape between experts"):
        RegMean({**found, "e1": {"first.weight": torch.eye(40)}}).prepare(vectors)
    with pytest.raises(MergeError, match=r"alpha must .* got 1.5"):
        RegMean(alpha=1.5)
    with pytest.raises(MergeError, match=r"ridge must .* got -1"):
        RegMean(ridge=-1)
