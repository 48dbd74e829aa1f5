from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.vectors.operator import MergeOperator
from map_bo.operators import spherical as module
from map_bo.operators.averages import Slerp, spherical_mean
from map_bo.operators.spherical import (
    MultiSlerp,
    NuSlerp,
    arc_mean,
    direction_mean,
    line_products,
)
from map_bo.rng import make_generator
from tests.contracts.operator_contract import OperatorContract
from tests.operators.cases import flat_vectors, hard_vectors, label, merge

OPERATORS = [
    MultiSlerp(),
    MultiSlerp(of="weights"),
    NuSlerp(),
    NuSlerp(of="weights", along="column"),
    NuSlerp(along="tensor"),
    NuSlerp(blocks={"early": r"^first\.", "late": "*"}),
]


class TestSpherical(OperatorContract):
    negative = False

    @pytest.fixture(params=OPERATORS, ids=label)
    def operator(self, request: pytest.FixtureRequest) -> MergeOperator:
        made: MergeOperator = request.param
        return made


def vectors_of(n: int, size: int = 12, seed: int = 0) -> Tensor:
    """Return ``n x size`` vectors of different lengths that lean towards each other."""
    generator = make_generator(seed)
    X = torch.randn(n, size, generator=generator, dtype=torch.float64) + 0.3
    return X * torch.linspace(0.5, 2.0, n).double()[:, None]


def weights_of(n: int, seed: int = 0) -> Tensor:
    w = torch.rand(n, generator=make_generator(50 + seed), dtype=torch.float64) + 0.05
    return w / w.sum()


def by_tangents(X: Tensor, w: Tensor) -> Tensor:
    """Return the barycentre in the words of its author: a tangent space, and back to the sphere."""
    lengths = X.norm(dim=1)
    units = X / lengths[:, None]
    pole = (w[:, None] * units).sum(0)
    pole = pole / pole.norm()
    tangents = units - (units @ pole)[:, None] * pole
    step = (w[:, None] * tangents).sum(0)
    size = step.norm()
    turned = pole * size.cos() + step * torch.sinc(size / torch.pi)
    result: Tensor = turned * (w @ lengths)
    return result


@given(st.integers(0, 100), st.integers(2, 6))
def test_barycentres_are_those_of_the_tangent_space(seed: int, n: int) -> None:
    X, w = vectors_of(n, seed=seed), weights_of(n, seed)
    found = direction_mean(X @ X.T, w) @ X
    assert torch.allclose(found, by_tangents(X, w), rtol=1e-8, atol=1e-9)


def test_halves_of_two_are_the_mean_on_the_sphere() -> None:
    X, half = vectors_of(2), torch.tensor([0.5, 0.5], dtype=torch.float64)
    gram = X @ X.T
    assert torch.allclose(direction_mean(gram, half), spherical_mean(gram, half), atol=1e-8)


def test_lengths_of_barycentres_are_the_mean_length() -> None:
    X, w = vectors_of(4), weights_of(4)
    assert float((direction_mean(X @ X.T, w) @ X).norm()) == pytest.approx(float(w @ X.norm(dim=1)))


def test_barycentres_without_a_direction_are_averages() -> None:
    a = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    w = torch.tensor([0.5, 0.5], dtype=torch.float64)
    for X in (torch.stack([a, -a]), torch.zeros(2, 3).double()):
        assert torch.equal(direction_mean(X @ X.T, w), w)
    # A zero vector has no direction and half of the mean length.
    one = torch.stack([a, 0 * a])
    assert torch.allclose(direction_mean(one @ one.T, w) @ one, 0.5 * a)


def test_many_means_are_those_of_each_alone() -> None:
    sets = [vectors_of(3, seed=k) for k in range(4)] + [torch.zeros(3, 12).double()]
    grams, w = torch.stack([X @ X.T for X in sets]), weights_of(3)
    for mean in (direction_mean, arc_mean):
        together = mean(grams, w)
        for gram, found in zip(grams, together, strict=True):
            assert torch.allclose(found, mean(gram, w), rtol=1e-12)


@given(st.integers(0, 100), st.floats(0.0, 1.0))
def test_arcs_of_two_are_the_mean_that_is_found_by_steps(seed: int, t: float) -> None:
    X = vectors_of(2, seed=seed)
    w = torch.tensor([1 - t, t], dtype=torch.float64)
    gram = X @ X.T
    assert torch.allclose(arc_mean(gram, w), spherical_mean(gram, w, "own"), atol=1e-7)


@pytest.mark.parametrize("gap", [0.0, 1e-12, 1e-7])
def test_arcs_of_nearly_parallel_or_opposite_vectors_are_chords(gap: float) -> None:
    a = torch.ones(6, dtype=torch.float64)
    b = a.clone()
    b[0] += gap
    w = torch.tensor([0.3, 0.7], dtype=torch.float64)
    for X in (torch.stack([a, 2 * b]), torch.stack([a, 0 * b]), torch.stack([a, -a])):
        assert torch.allclose(arc_mean(X @ X.T, w) @ X, w @ X, atol=1e-6)


@pytest.mark.parametrize("of", ["deltas", "weights"])
@pytest.mark.parametrize("along", ["row", "column"])
@pytest.mark.parametrize("c", [[0.3, 0.5], [0.2, 0.5, 0.6], [0.0, 1.0, 0.0]])
def test_each_row_and_column_turns_as_a_tensor_of_its_own(
    of: str, along: str, c: list[float]
) -> None:
    n = len(c)
    generator = make_generator(3)
    base = torch.randn(7, 5, generator=generator)
    deltas = torch.randn(n, 7, 5, generator=generator)
    deltas[0, 2] = 0.0  # a row that an expert left as it was
    vectors = flat_vectors(base, deltas)
    found = merge(NuSlerp(of=of, along=along), vectors, c)[:35].view(7, 5)
    turned = (found, base, deltas) if along == "row" else (found.T, base.T, deltas.mT)
    for k in range(len(turned[1])):
        alone = flat_vectors(turned[1][k], turned[2][:, k])
        expected = merge(Slerp(of=of, norms="own"), alone, c)[: turned[1].shape[1]]
        assert torch.allclose(turned[0][k], expected, atol=1e-5), k


def test_along_the_tensor_it_is_slerp() -> None:
    vectors, c = hard_vectors(), [0.3, 0.5, 0.4]
    for of in ("deltas", "weights"):
        left = merge(NuSlerp(of=of, along="tensor"), vectors, c)
        assert torch.equal(left, merge(Slerp(of=of, norms="own"), vectors, c))


def test_a_row_of_a_convolution_makes_one_output() -> None:
    generator = make_generator(5)
    base = torch.randn(4, 3, 2, 2, generator=generator)
    deltas = torch.randn(2, 4, 3, 2, 2, generator=generator)
    found = merge(NuSlerp(), flat_vectors(base, deltas), [0.4, 0.6])[:48]
    flat = flat_vectors(base.view(4, 12), deltas.view(2, 4, 12))
    assert torch.equal(found, merge(NuSlerp(), flat, [0.4, 0.6])[:48])


@pytest.mark.parametrize("piece", [4, 1 << 20])
@pytest.mark.parametrize("along", ["row", "column"])
def test_products_of_lines_are_inner_products(
    piece: int, along: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PIECE", piece)
    vectors = hard_vectors()
    found = dict(
        zip((s.name for s in vectors.layout.slots), line_products(vectors, along), strict=True)
    )
    slot = next(s for s in vectors.layout.slots if s.name == "layer.0.weight")
    rows = torch.stack([slot.of(row) for row in vectors.rows]).double()
    lines = rows.transpose(0, 1) if along == "row" else rows.permute(2, 0, 1)
    assert torch.allclose(found["layer.0.weight"], lines @ lines.mT, atol=1e-9)
    whole = torch.stack(
        [
            row[s.offset : s.stop]
            for row in vectors.rows
            for s in vectors.layout.slots
            if s.name == "layer.0.bias"
        ]
    ).double()
    assert torch.allclose(found["layer.0.bias"][0], whole @ whole.T, atol=1e-9)
    assert len(found["empty"]) == 0


def test_settings_that_cannot_be() -> None:
    with pytest.raises(MergeError, match="of must be one of deltas, weights, got 'models'"):
        MultiSlerp(of="models")
    with pytest.raises(MergeError, match="along must be one of tensor, row, column, got 'line'"):
        NuSlerp(along="line")
