from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from map_bo.merging.vectors.operator import MergeOperator
from map_bo.operators import averages as module
from map_bo.operators.averages import Slerp, WeightedAverage, products, spherical_mean
from map_bo.rng import make_generator
from tests.contracts.operator_contract import OperatorContract
from tests.operators.cases import AVERAGES, flat_vectors, hard_vectors, label, merge

BLOCKS = {"early": r"^first\.", "late": "*"}


class TestAverages(OperatorContract):
    negative = False

    @pytest.fixture(params=[*AVERAGES, Slerp(blocks=BLOCKS)], ids=label)
    def operator(self, request: pytest.FixtureRequest) -> MergeOperator:
        made: MergeOperator = request.param
        return made


def vectors_of(n: int, size: int = 12, seed: int = 0, lean: float = 0.3) -> Tensor:
    """Return ``n x size`` vectors of different lengths that lean towards each other."""
    generator = make_generator(seed)
    X = torch.randn(n, size, generator=generator, dtype=torch.float64) + lean
    return X * torch.linspace(0.5, 2.0, n).double()[:, None]


def weights_of(n: int, seed: int = 0) -> Tensor:
    w = torch.rand(n, generator=make_generator(50 + seed), dtype=torch.float64) + 0.05
    return w / w.sum()


def shoemake(a: Tensor, b: Tensor, t: float, norms: str) -> Tensor:
    """Return the SLERP of two vectors, from its formula."""
    u, v = a / a.norm(), b / b.norm()
    angle = torch.acos((u @ v).clamp(-1, 1))
    left, right = torch.sin((1 - t) * angle) / angle.sin(), torch.sin(t * angle) / angle.sin()
    if norms == "own":
        u, v = a, b
    result: Tensor = left * u + right * v
    return result if norms == "own" else result * ((1 - t) * a.norm() + t * b.norm())


@pytest.mark.parametrize("norms", ["mean", "own"])
@given(st.floats(0.001, 0.999), st.integers(0, 30))
def test_two_vectors_follow_the_formula(norms: str, t: float, seed: int) -> None:
    X = vectors_of(2, seed=seed, lean=0.0)
    w = spherical_mean(X @ X.T, torch.tensor([1 - t, t]).double(), norms)
    assert torch.allclose(w @ X, shoemake(X[0], X[1], t, norms), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("n", [3, 5, 8])
@pytest.mark.parametrize("lean", [0.0, 0.3, 3.0])
def test_the_squared_angles_are_least(n: int, lean: float) -> None:
    for seed in range(5):
        X, w = vectors_of(n, 20, seed, lean), weights_of(n, seed)
        U = X / X.norm(dim=-1, keepdim=True)
        found = spherical_mean(U @ U.T, w, "own") @ U
        assert float(found.norm()) == pytest.approx(1.0, abs=1e-9)

        def mean_square(point: Tensor, U: Tensor = U, w: Tensor = w) -> Tensor:
            return (w * torch.acos((U @ (point / point.norm())).clamp(-1, 1)).square()).sum()

        point = found.clone().requires_grad_()
        [gradient] = torch.autograd.grad(mean_square(point), point)
        assert float(gradient.norm()) < 1e-6
        generator = make_generator(seed)
        for _ in range(20):
            near = found + 0.05 * torch.randn(20, generator=generator, dtype=torch.float64)
            assert float(mean_square(near)) >= float(mean_square(found)) - 1e-12


def test_turning_all_vectors_turns_the_mean() -> None:
    X, w = vectors_of(4), weights_of(4)
    Q = torch.linalg.qr(torch.randn(12, 12, generator=make_generator(3), dtype=torch.float64))[0]
    Y = X @ Q
    mean = spherical_mean(X @ X.T, w) @ X
    assert torch.allclose(spherical_mean(Y @ Y.T, w) @ Y, mean @ Q, atol=1e-8)


@pytest.mark.parametrize("norms", ["mean", "own"])
def test_lengths_of_the_mean(norms: str) -> None:
    X, w = vectors_of(4), weights_of(4)
    lengths = X.norm(dim=-1)
    mean = spherical_mean(X @ X.T, w, norms) @ X
    if norms == "mean":
        assert float(mean.norm()) == pytest.approx(float(w @ lengths))
    else:  # of vectors of one length that length
        U = X / lengths[:, None] * 3
        assert float((spherical_mean(U @ U.T, w, norms) @ U).norm()) == pytest.approx(3.0)


def test_directions_that_cannot_be_turned_into_are_averaged() -> None:
    a = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    w = torch.tensor([0.4, 0.6], dtype=torch.float64)
    for X in (torch.stack([a, -2 * a]), torch.stack([a, 0 * a]), torch.zeros(2, 3).double()):
        for norms in ("mean", "own"):
            assert torch.equal(spherical_mean(X @ X.T, w, norms), w)
    third = torch.full((3,), 1 / 3, dtype=torch.float64)
    around = torch.tensor([[math.cos(t), math.sin(t)] for t in (0, 2.0943951, 4.1887902)]).double()
    assert bool(torch.isfinite(spherical_mean(around @ around.T, third)).all())


@pytest.mark.parametrize("gap", [0.0, 1e-12, 1e-9, 1e-6])
def test_nearly_parallel_vectors_are_averaged(gap: float) -> None:
    X = torch.ones(3, 6, dtype=torch.float64)
    X[1, 0] += gap
    X[2] *= 2
    w = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    for norms in ("mean", "own"):
        assert torch.allclose(spherical_mean(X @ X.T, w, norms) @ X, w @ X, atol=1e-5)


def test_means_of_many_tensors_are_those_of_each_alone() -> None:
    w = weights_of(4)
    sets = [vectors_of(4, 12, seed, lean) for seed, lean in ((0, 0.0), (1, 0.3), (2, 3.0))]
    sets += [torch.zeros(4, 12).double(), vectors_of(4) * torch.tensor([[1.0], [0], [1], [1]])]
    grams = torch.stack([X @ X.T for X in sets])
    for norms in ("mean", "own"):
        together = spherical_mean(grams, w, norms)
        for gram, found in zip(grams, together, strict=True):
            assert torch.allclose(found, spherical_mean(gram, w, norms), rtol=1e-12)


@pytest.mark.parametrize("norms", ["mean", "own"])
@pytest.mark.parametrize("size", [2, 3])
def test_vectors_that_depend_on_each_other(norms: str, size: int) -> None:
    """As rows that are narrower than there are experts: many combinations are their mean."""
    orders = [[0, 1, 2, 3], [3, 1, 0, 2]]
    for seed in range(40):
        X, w = vectors_of(4, size, seed, lean=0.0), weights_of(4, seed)
        found = []
        for order in orders:
            part = X[order]
            weights = spherical_mean(part @ part.T, w[order], norms)
            found.append(weights @ part)
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
        longest = float(torch.linalg.vector_norm(X, dim=1).max())
        assert float(torch.linalg.vector_norm(found[0])) < 4.001 * longest
    alike = torch.tensor([[3.0, 0.0], [1.0, 0.0], [2.0, 0.1]]).double()
    w = torch.tensor([0.6, 0.3, 0.1]).double()
    length = torch.linalg.vector_norm(spherical_mean(alike @ alike.T, w, norms) @ alike)
    assert float(length) == pytest.approx(0.6 * 3 + 0.3 + 0.2, rel=1e-3)


def test_vectors_without_weight_do_not_count() -> None:
    X = vectors_of(3)
    w = torch.tensor([0.0, 0.7, 0.3], dtype=torch.float64)
    found = spherical_mean(X @ X.T, w)
    assert float(found[0]) == 0
    assert torch.allclose(found[1:], spherical_mean(X[1:] @ X[1:].T, w[1:]))
    one_hot = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    assert torch.equal(spherical_mean(X @ X.T, one_hot), one_hot)


@pytest.mark.parametrize("operator", AVERAGES[1:], ids=label)
def test_slerp_of_models(operator: Slerp) -> None:
    base, deltas = torch.randn(30, generator=make_generator(1)), vectors_of(2, 30).float()
    vectors = flat_vectors(base, deltas)
    c = [0.3, 0.5]
    s, t = sum(c), c[1] / sum(c)
    start = base.double()
    a, b = deltas.double()
    if operator.of == "weights":
        mean = shoemake(start + a, start + b, t, operator.norms)
        expected = (1 - s) * start + s * mean
    else:
        expected = start + s * shoemake(a, b, t, operator.norms)
    assert torch.allclose(merge(operator, vectors, c).double(), expected, atol=1e-5)


@pytest.mark.parametrize("operator", AVERAGES[1:], ids=label)
def test_slerp_is_tensor_by_tensor(operator: Slerp) -> None:
    vectors = hard_vectors()
    c = [0.3, 0.5, 0.4]
    found = merge(operator, vectors, c)
    for slot in vectors.layout.slots:
        rows = torch.stack([slot.of(row).flatten() for row in vectors.rows])
        if slot.numel:
            alone = merge(operator, flat_vectors(rows[0], rows[1:]), c)
            assert torch.allclose(slot.of(found).flatten(), alone[: slot.numel], atol=1e-6)


def test_weighted_average_of_models() -> None:
    vectors = hard_vectors()
    c = torch.tensor([0.3, 0.5, 0.4])
    experts = vectors.base + vectors.deltas
    expected = (c[:, None] * experts).sum(0) / c.sum()
    assert torch.allclose(merge(WeightedAverage(), vectors, c), expected, atol=1e-5)


@pytest.mark.parametrize("piece", [5, 1 << 20])
def test_products_are_inner_products(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", piece)
    for dtype in (torch.float32, torch.bfloat16):
        vectors = hard_vectors(dtype=dtype)
        found = products(vectors)
        for gram, slot in zip(found, vectors.layout.slots, strict=True):
            rows = vectors.rows[:, slot.offset : slot.stop].double()
            assert torch.allclose(gram, rows @ rows.T, atol=1e-12)
