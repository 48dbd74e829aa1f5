from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from map_bo.merging.adapters.low_rank import (
    AdaptedTensor,
    LowRank,
    approximate,
    stack,
    truncate,
)
from map_bo.rng import make_generator


def change(rows: int, columns: int, rank: int, seed: int = 0, scale: float = 1.0) -> LowRank:
    generator = make_generator(seed)
    return LowRank(
        torch.randn(rows, rank, generator=generator),
        torch.randn(rank, columns, generator=generator),
        scale,
    )


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted.to(found), rtol=1e-5, atol=1e-5)


class TestLowRank:
    @given(
        rows=st.integers(1, 5), columns=st.integers(1, 5), rank=st.integers(0, 3), data=st.data()
    )
    def test_a_piece_is_a_piece_of_the_product(
        self, rows: int, columns: int, rank: int, data: st.DataObject
    ) -> None:
        one = change(rows, columns, rank, scale=-0.5)
        stop = data.draw(st.integers(0, rows * columns))
        start = data.draw(st.integers(0, stop))
        close(one.piece(start, stop), (-0.5 * one.B @ one.A).flatten()[start:stop])

    def test_changes_are_stacked_to_their_sum(self) -> None:
        parts = [change(4, 5, rank, seed, scale) for rank, seed, scale in ((1, 1, 2.0), (2, 2, -1))]
        both = stack(parts)
        assert both.rank == 3
        close(both.dense(), parts[0].dense() + parts[1].dense())


class TestTruncate:
    @pytest.mark.parametrize("rank", [1, 2, 3])
    def test_it_is_the_best_of_its_rank(self, rank: int) -> None:
        whole = stack([change(6, 7, 2, 1), change(6, 7, 2, 2, 3.0)])
        found, cut, size = truncate(whole, rank)
        values = torch.linalg.svdvals(whole.dense().double())
        assert found.rank == rank
        assert cut == pytest.approx(float(values[rank:].norm()), rel=1e-5)
        assert size == pytest.approx(float(values.norm()), rel=1e-5)
        assert float((whole.dense() - found.dense()).norm()) == pytest.approx(cut, rel=1e-4)

    def test_without_a_rank_only_rounding_goes(self) -> None:
        one = change(6, 7, 2)
        found, cut, size = truncate(stack([one, one, one]), None)
        assert found.rank == 2
        assert cut < 1e-6 * size
        close(found.dense(), 3 * one.dense())

    def test_nothing_stays_nothing(self) -> None:
        found, cut, size = truncate(LowRank(torch.zeros(3, 2), torch.zeros(2, 4)), None)
        assert (found.rank, cut, size) == (1, 0.0, 0.0)
        assert not bool(found.dense().any())


class TestApproximate:
    @pytest.mark.parametrize("shape", [(8, 12), (700, 600)])
    def test_near_the_best_with_its_own_error(self, shape: tuple[int, int]) -> None:
        noise = torch.randn(*shape, generator=make_generator(3))
        matrix = change(*shape, 3).dense() + 1e-3 * noise
        found, cut, size = approximate(matrix, 3, generator=make_generator(0))
        best = float(torch.linalg.svdvals(matrix.double())[3:].norm())
        assert best * (1 - 1e-3) <= cut <= 1.01 * best
        assert size == pytest.approx(float(matrix.norm()), rel=1e-5)
        assert found.rank == 3


class TestAdaptedTensor:
    """Experts 0 and 2 are of low rank, 1 and 2 change by full values; expert 3 changes nothing."""

    @pytest.fixture
    def changes(self) -> list[Tensor]:
        value = torch.randn(2, 4, 5, generator=make_generator(9))
        low = [change(4, 5, 2, 1, 2.0).dense(), change(4, 5, 1, 2).dense()]
        return [low[0], value[0], low[1] + value[1], torch.zeros(4, 5)]

    @pytest.fixture
    def adapted(self) -> AdaptedTensor:
        value = torch.randn(2, 4, 5, generator=make_generator(9))
        return AdaptedTensor.of(
            {2: change(4, 5, 1, 2), 0: change(4, 5, 2, 1, 2.0)},
            {1: value[0], 2: value[1]},
            (4, 5),
            dtype=torch.float32,
            device="cpu",
        )

    def test_who_changes_it(self, adapted: AdaptedTensor) -> None:
        assert adapted.experts == (0, 1, 2)
        assert adapted.owner.tolist() == [0, 0, 2]
        assert adapted.nbytes == 4 * (4 * 3 + 3 * 5 + 2 * 20) + 8 * 3

    @pytest.mark.parametrize("weights", [[0.5, -1.0, 2.0, 7.0], [0.0, 0.0, 0.0, 1.0], [0, 0, 1, 0]])
    def test_the_weighted_sum_by_rows(
        self, adapted: AdaptedTensor, changes: list[Tensor], weights: list[float]
    ) -> None:
        c = torch.tensor(weights, dtype=torch.float64)
        wanted = sum((w * v for w, v in zip(weights, changes, strict=True)), torch.zeros(4, 5))
        for first, last in ((0, 4), (1, 3)):
            target = torch.ones((last - first) * 5)
            adapted.add(c, target, first)
            close(target.view(-1, 5), 1 + wanted[first:last])

    def test_pieces_of_an_expert(self, adapted: AdaptedTensor, changes: list[Tensor]) -> None:
        for expert, wanted in enumerate(changes):
            out = torch.ones(9)
            adapted.read(expert, 3, 12, out)
            close(out, 1 + wanted.flatten()[3:12])

    def test_inner_products(self, adapted: AdaptedTensor, changes: list[Tensor]) -> None:
        flat = torch.randn(20, generator=make_generator(4))
        rows = torch.stack([one.flatten() for one in changes])
        close(adapted.project(flat, 4), rows.double() @ flat.double())
        close(adapted.gram(4), rows.double() @ rows.double().T)
