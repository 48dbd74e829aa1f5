from __future__ import annotations

from dataclasses import replace
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
from map_bo.operators.statistics.fisher import Fisher, fisher_average
from map_bo.operators.statistics.known_statistics import NeedsStatistics
from map_bo.operators.statistics.statistics import save_statistics, statistics_of
from map_bo.rng import make_generator
from tests.contracts.operator_contract import EXPERTS, OperatorContract, example_vectors
from tests.operators.expert_statistics import fishers

coefficients = st.lists(st.floats(0, 2, width=32), min_size=3, max_size=3)
C = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)


class TestFisher(OperatorContract):
    negative = False

    @pytest.fixture
    def operator(self) -> MergeOperator:
        return Fisher(fishers(example_vectors()))

    def fitted(self, operator: MergeOperator, vectors: TaskVectors) -> MergeOperator:
        return Fisher(fishers(vectors))


class TestFisherOfFilesInBlocks(OperatorContract):
    negative = False

    @pytest.fixture
    def operator(self, tmp_path: Path) -> MergeOperator:
        found = fishers(example_vectors())
        files = {
            e: save_statistics(tmp_path / f"{e}.safetensors", statistics_of(found[e], "fisher"))
            for e in EXPERTS
        }
        return Fisher(files, normalise=False, blocks={"early": r"^first\.", "late": "*"})

    def fitted(self, operator: MergeOperator, vectors: TaskVectors) -> MergeOperator:
        assert isinstance(operator, Fisher)
        return operator.with_statistics(fishers(vectors))


def merge(vectors: TaskVectors, operator: MergeOperator, c: Tensor) -> Tensor:
    out = torch.full_like(vectors.base, torch.nan)
    operator.prepare(vectors).write(c, out)
    return out


def drawn(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(50, generator=generator)
    deltas = torch.randn(3, 50, generator=generator)
    return base, deltas, 10 ** torch.empty(3, 50).uniform_(-6, 2, generator=generator)


@given(st.integers(0, 99), coefficients.filter(lambda c: sum(c) > 1e-3))
def test_is_the_closed_form_of_the_paper_where_coefficients_sum_to_one(
    seed: int, c: list[float]
) -> None:
    base, deltas, f = (t.double() for t in drawn(seed))
    shares = torch.tensor(c, dtype=torch.float64) / sum(c)
    thetas = base + deltas
    expected = (shares[:, None] * f * thetas).sum(0) / (shares[:, None] * f).sum(0)
    assert torch.allclose(fisher_average(base, deltas, f, shares), expected, rtol=1e-9, atol=1e-9)


@given(st.integers(0, 99), coefficients)
def test_it_minimises_the_sum_of_quadratics(seed: int, c: list[float]) -> None:
    """Where losses are quadratics with these Fishers, no neighbour is better than the merge."""
    if sum(c) < 1e-2:
        return
    base, deltas, f = (t.double() for t in drawn(seed))
    shares = torch.tensor(c, dtype=torch.float64) / sum(c)
    merged = fisher_average(base, deltas, f, shares).requires_grad_()
    loss = (shares[:, None] * f * (merged - base - deltas).square()).sum()
    (gradient,) = torch.autograd.grad(loss, merged)
    scale = (shares[:, None] * f * (1 + deltas.abs())).sum(0)
    assert bool((gradient.abs() < 1e-9 * scale).all())


@given(coefficients)
def test_equal_fishers_give_the_weighted_average(c: list[float]) -> None:
    vectors = example_vectors()
    one = fishers(vectors)["e0"]
    operator = Fisher(dict.fromkeys(EXPERTS, one))
    x = torch.tensor(c, dtype=torch.float64)
    expected = merge(vectors, TaskArithmetic(), x)
    assert torch.allclose(merge(vectors, operator, x), expected, rtol=1e-4, atol=1e-5)


@given(st.integers(0, 99), coefficients, st.permutations(range(3)))
def test_order_of_the_experts_does_not_matter(seed: int, c: list[float], order: list[int]) -> None:
    base, deltas, f = drawn(seed)
    x = torch.tensor(c, dtype=torch.float64)
    found = fisher_average(base, deltas[order], f[order], x[order])
    assert torch.allclose(fisher_average(base, deltas, f, x), found, rtol=1e-5, atol=1e-5)


@given(st.floats(1e-6, 1e6), st.integers(0, 2))
def test_the_size_of_a_fisher_does_not_matter_when_normalised(scale: float, which: int) -> None:
    vectors = example_vectors()
    found = fishers(vectors)
    name = EXPERTS[which]
    scaled = {**found, name: {k: v * scale for k, v in found[name].items()}}
    one, other = (merge(vectors, Fisher(f), C) for f in (found, scaled))
    assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)
    unequal = merge(vectors, Fisher(scaled, normalise=False), C)
    if not 0.5 < scale < 2:
        assert not torch.allclose(one, unequal, rtol=1e-2, atol=1e-2)


@given(coefficients, st.floats(0.01, 3))
def test_a_common_factor_moves_along_the_line_from_the_base(c: list[float], t: float) -> None:
    base, deltas, f = (tensor.double() for tensor in drawn(3))
    x = torch.tensor(c, dtype=torch.float64)
    one, other = fisher_average(base, deltas, f, x), fisher_average(base, deltas, f, t * x)
    assert torch.allclose(other - base, t * (one - base), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("i", range(3))
def test_one_hot_is_the_expert(i: int) -> None:
    vectors = example_vectors()
    found = merge(vectors, Fisher(fishers(vectors)), torch.eye(3, dtype=torch.float64)[i])
    assert torch.equal(found, vectors.base + vectors.deltas[i])


def test_streamed_task_vectors_and_files_give_the_same(tmp_path: Path) -> None:
    generator = make_generator(7)
    base = {"w": torch.randn(12, 5, generator=generator), "b": torch.randn(9, generator=generator)}
    experts = {
        e: open_checkpoint(
            {k: t + 0.1 * torch.randn(t.shape, generator=generator) for k, t in base.items()}
        )
        for e in EXPERTS
    }
    resident = TaskVectors.load(open_checkpoint(base), experts)
    found = fishers(resident)
    files = {
        e: save_statistics(tmp_path / f"{e}.safetensors", statistics_of(found[e], "fisher"))
        for e in EXPERTS
    }
    streamed = OnDiskVectors(open_checkpoint(base), experts)
    blocks = tuple(0 for _ in resident.layout.slots)
    one, other = (torch.zeros(resident.layout.size) for _ in range(2))
    Fisher(found).prepare(resident).write(C, one)
    kernel = Fisher(files).prepare(streamed).kernel
    KernelMerge(streamed, kernel, blocks, chunk=7).write(C, other)
    assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


@given(st.integers(1, 2000))
def test_chunks_do_not_matter(chunk: int) -> None:
    vectors = example_vectors()
    operator = Fisher(fishers(vectors))
    prepared = operator.prepare(vectors)
    out = torch.empty_like(vectors.base)
    blocks = tuple(0 for _ in vectors.layout.slots)
    KernelMerge(vectors, prepared.kernel, blocks, chunk=chunk).write(C, out)
    assert torch.allclose(out, merge(vectors, operator, C), rtol=1e-6, atol=1e-7)


def test_where_all_fishers_are_zero_the_coefficients_decide() -> None:
    vectors = example_vectors()
    found = fishers(vectors)
    for tensors in found.values():
        tensors["last.bias"][:4] = 0
    last = next(slot for slot in vectors.layout.slots if slot.name == "last.bias")
    average = last.of(merge(vectors, TaskArithmetic(), C))
    merged = last.of(merge(vectors, Fisher(found, floor=0.0), C))
    assert torch.allclose(merged[:4], average[:4], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(merged[4:], average[4:], rtol=1e-2)


def test_an_expert_with_all_the_fisher_decides() -> None:
    vectors = example_vectors()
    found = fishers(vectors)
    found["e0"]["last.bias"][0] = found["e2"]["last.bias"][0] = 0
    last = next(slot for slot in vectors.layout.slots if slot.name == "last.bias")
    merged = last.of(merge(vectors, Fisher(found, floor=0.0), C))[0]
    expert = last.of(vectors.base + vectors.deltas[1])[0]
    assert float(merged) == pytest.approx(float(expert), rel=1e-5)


def test_tensors_without_a_fisher_are_averaged() -> None:
    vectors = replace(example_vectors(), floors=())
    variance = next(slot for slot in vectors.layout.slots if "running_var" in slot.name)
    found = variance.of(merge(vectors, Fisher(fishers(vectors)), C))
    expected = variance.of(merge(vectors, TaskArithmetic(), C))
    assert torch.allclose(found, expected, rtol=1e-6)


def test_it_needs_statistics_of_every_expert() -> None:
    operator = Fisher()
    assert isinstance(operator, NeedsStatistics)
    with pytest.raises(MergeError, match="fisher has no statistics for e0, e1, e2") as caught:
        operator.space(EXPERTS, lower=0, upper=1)
    assert "fisher(model, loader)" in str(caught.value.hint)
    with pytest.raises(MergeError, match="no statistics for e0"):
        operator.prepare(example_vectors())
    vectors = example_vectors()
    assert operator.with_statistics(fishers(vectors)).space(EXPERTS, lower=0, upper=1).d == 3


def test_statistics_that_do_not_fit_are_refused() -> None:
    vectors = example_vectors()

    def refused(match: str, change: dict[str, Tensor | None]) -> None:
        found = fishers(vectors)
        for name, tensor in change.items():
            if tensor is None:
                del found["e1"][name]
            else:
                found["e1"][name] = tensor
        with pytest.raises(MergeError, match=match):
            Fisher(found).prepare(vectors)

    refused("statistics of e1 lack the tensor 'last.bias'", {"last.bias": None})
    refused("'e1' are of another model: the merged one has no other", {"other": torch.ones(2)})
    refused(r"'e1' for 'last.bias' is \[4\], and the tensor \[9\]", {"last.bias": torch.ones(4)})
    refused("'e1' is negative in 'last.bias'", {"last.bias": -torch.ones(9)})
    refused("'e1' hold NaN or infinity in 'last.bias'", {"last.bias": torch.full((9,), torch.nan)})
    zeros = {name: torch.zeros_like(t) for name, t in fishers(vectors)["e1"].items()}
    refused("Fisher of e1 is zero everywhere", dict(zeros))
    with pytest.raises(MergeError, match=r"floor must .* got -1"):
        Fisher(floor=-1)
