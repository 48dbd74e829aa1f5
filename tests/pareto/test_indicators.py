from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from map_bo.errors import DataError
from map_bo.pareto.indicators import (
    _along_directions,
    epsilon_additive,
    hypervolume,
    hypervolume_kind,
    igd,
    igd_plus,
    preference_weights,
    win_rate_dominance,
    win_rate_per_objective,
)
from map_bo.rng import make_generator

VALUE = st.floats(-2, 2, allow_nan=False, width=32)


@st.composite
def fronts(draw: st.DrawFn, most: int = 8, widest: int = 6) -> Tensor:
    n, m = draw(st.integers(1, most)), draw(st.integers(1, widest))
    rows = st.lists(VALUE, min_size=m, max_size=m)
    return torch.tensor(draw(st.lists(rows, min_size=n, max_size=n)), dtype=torch.float64)


def inclusion_exclusion(Y: Tensor, reference: Tensor) -> float:
    """The volume of a union of boxes, summed over all subsets of them."""
    boxes = (Y - reference)[((Y - reference) > 0).all(-1)]
    total = 0.0
    for size in range(1, len(boxes) + 1):
        for chosen in itertools.combinations(range(len(boxes)), size):
            total -= (-1) ** size * float(boxes[list(chosen)].amin(0).prod())
    return total


def sphere(n: int, m: int, seed: int = 0) -> Tensor:
    Z = torch.randn(n, m, generator=make_generator(seed), dtype=torch.float64).abs()
    return Z / Z.square().sum(-1, keepdim=True).sqrt()


def zeros(m: int) -> Tensor:
    return torch.zeros(m, dtype=torch.float64)


class TestHypervolume:
    @given(Y=fronts())
    @settings(max_examples=80, deadline=None)
    def test_matches_inclusion_exclusion(self, Y: Tensor) -> None:
        reference = zeros(Y.shape[-1])
        expected = inclusion_exclusion(Y, reference)
        assert hypervolume(Y, reference) == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert hypervolume_kind(Y, reference) == "exact"

    @given(Y=fronts(most=20), data=st.data())
    @settings(max_examples=80, deadline=None)
    def test_a_new_point_never_lowers_it(self, Y: Tensor, data: st.DataObject) -> None:
        m = Y.shape[-1]
        new = torch.tensor(data.draw(st.lists(VALUE, min_size=m, max_size=m)), dtype=torch.float64)
        before = hypervolume(Y, zeros(m))
        assert hypervolume(torch.cat([Y, new.unsqueeze(0)]), zeros(m)) >= before * (1 - 1e-12)

    @given(Y=fronts(most=20), seed=st.integers(0, 99))
    @settings(max_examples=80, deadline=None)
    def test_order_and_repetition_do_not_matter(self, Y: Tensor, seed: int) -> None:
        order = torch.randperm(len(Y), generator=make_generator(seed))
        reference = zeros(Y.shape[-1])
        assert hypervolume(Y[order], reference) == hypervolume(Y, reference)
        assert hypervolume(torch.cat([Y, Y]), reference) == hypervolume(Y, reference)

    @given(Y=fronts(most=12), factor=st.floats(0.1, 10), shift=st.floats(-3, 3))
    @settings(max_examples=60, deadline=None)
    def test_scales_with_each_metric(self, Y: Tensor, factor: float, shift: float) -> None:
        reference = zeros(Y.shape[-1])
        moved, origin = Y.clone(), reference.clone()
        moved[:, 0] = factor * Y[:, 0] + shift
        origin[0] = shift
        expected = factor * hypervolume(Y, reference)
        assert hypervolume(moved, origin) == pytest.approx(expected, rel=1e-6, abs=1e-9)

    def test_points_that_do_not_beat_the_reference_count_nothing(self) -> None:
        Y = torch.tensor([[1.0, 0.0], [5.0, -1.0], [0.0, 9.0]])
        assert hypervolume(Y, zeros(2)) == 0.0
        assert hypervolume(torch.zeros(0, 2), zeros(2)) == 0.0

    def test_a_single_metric_is_a_length(self) -> None:
        assert hypervolume(torch.tensor([[1.0], [3.0], [-4.0]]), zeros(1) + 0.5) == 2.5

    @pytest.mark.parametrize(("m", "n"), [(6, 301), (7, 151), (8, 101), (9, 61)])
    def test_large_sets_are_approximated_well(self, m: int, n: int) -> None:
        import moocore

        Y = sphere(n, m)
        assert hypervolume_kind(Y, zeros(m)) == "approximate"
        assert hypervolume_kind(Y[:-1], zeros(m)) == "exact"
        exact = moocore.hypervolume(Y.numpy(), ref=zeros(m).numpy(), maximise=True)
        assert hypervolume(Y, zeros(m)) == pytest.approx(exact, rel=5e-3)
        assert hypervolume(Y, zeros(m)) == hypervolume(Y.flip(0), zeros(m))

    def test_the_approximation_stands_unequal_scales(self) -> None:
        scale = torch.logspace(-4, 4, 8, dtype=torch.float64)
        Y = sphere(150, 8)
        expected = hypervolume(Y, zeros(8)) * float(scale.prod())
        assert hypervolume(Y * scale, zeros(8)) == pytest.approx(expected, rel=1e-6)

    def test_refuses_what_it_cannot_measure(self) -> None:
        with pytest.raises(DataError, match="NaN or infinity"):
            hypervolume(torch.tensor([[torch.nan, 1.0]]), zeros(2))
        with pytest.raises(DataError, match="reference point has shape"):
            hypervolume(torch.ones(2, 3), zeros(2))
        with pytest.raises(DataError, match="values must be a matrix, got shape"):
            hypervolume(torch.ones(3), zeros(3))


class TestDistances:
    truth = torch.tensor([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)

    def test_the_truth_is_at_no_distance(self) -> None:
        for indicator in (igd, igd_plus, epsilon_additive):
            assert indicator(self.truth, self.truth) == pytest.approx(0.0, abs=1e-12)

    def test_a_shift_is_measured(self) -> None:
        worse = self.truth - 0.1
        assert epsilon_additive(worse, self.truth) == pytest.approx(0.1)
        assert epsilon_additive(self.truth + 0.1, self.truth) == pytest.approx(-0.1)
        assert igd(worse, self.truth) == pytest.approx(0.02**0.5)
        assert igd_plus(worse, self.truth) == pytest.approx(0.02**0.5)

    def test_igd_plus_forgives_being_better_and_igd_does_not(self) -> None:
        better = self.truth + 0.1
        assert igd_plus(better, self.truth) == pytest.approx(0.0, abs=1e-12)
        assert igd(better, self.truth) > 0.1

    def test_fronts_that_do_not_match_are_refused(self) -> None:
        for indicator in (igd, igd_plus, epsilon_additive, win_rate_per_objective):
            with pytest.raises(DataError, match="cannot be compared"):
                indicator(torch.ones(2, 3), self.truth)
            with pytest.raises(DataError, match="cannot be compared"):
                indicator(torch.ones(0, 2), self.truth)
            with pytest.raises(DataError, match="cannot be compared"):
                indicator(self.truth, torch.ones(3, 3))
            with pytest.raises(DataError, match="values must be a matrix"):
                indicator(torch.ones(2), self.truth)
            with pytest.raises(DataError, match="values must be a matrix"):
                indicator(self.truth, torch.ones(2))


class TestWinRates:
    @given(pair=st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99)))
    @settings(max_examples=40, deadline=None)
    def test_laws(self, pair: tuple[int, int, int]) -> None:
        n, k, seed = pair
        generator = make_generator(seed)
        A = torch.randint(0, 3, (n, 2), generator=generator).double()
        B = torch.randint(0, 3, (k, 2), generator=generator).double()
        rate = win_rate_per_objective(A, B)
        assert rate + win_rate_per_objective(B, A) == pytest.approx(1.0)
        assert win_rate_per_objective(A, A) == pytest.approx(0.5)
        assert win_rate_dominance(A, B) + win_rate_dominance(B, A) <= 1.0
        pairs = [(a, b) for a in A for b in B]
        assert rate == pytest.approx(
            sum(float((a > b).sum() + 0.5 * (a == b).sum()) for a, b in pairs) / (2 * len(pairs))
        )
        beaten = sum(bool((a >= b).all() and (a > b).any()) for a, b in pairs)
        assert win_rate_dominance(A, B) == pytest.approx(beaten / len(pairs))


class TestPreferences:
    def test_weights_are_uniform_on_the_simplex(self) -> None:
        W = preference_weights(4000, 3, generator=make_generator(0))
        assert (W >= 0).all()
        assert torch.allclose(W.sum(-1), torch.ones(4000, dtype=torch.float64))
        # Under Dirichlet(1, 1, 1) a weight has mean 1/3 and variance 1/18.
        assert torch.allclose(W.mean(0), torch.full((3,), 1 / 3).double(), atol=0.02)
        assert torch.allclose(W.var(0), torch.full((3,), 1 / 18).double(), atol=0.005)
        assert torch.equal(W, preference_weights(4000, 3, generator=make_generator(0)))


def test_beyond_thirty_one_metrics_a_volume_is_approximate_and_grows() -> None:
    zero = torch.zeros(32, dtype=torch.float64)
    one = torch.linspace(0.9, 1.0, 32, dtype=torch.float64).unsqueeze(0)
    assert hypervolume(one, zero) == pytest.approx(float(one.prod()))
    assert hypervolume_kind(one, zero) == "exact"
    two = torch.cat([one, one.flip(-1)])
    assert hypervolume_kind(two, zero) == "approximate"
    assert float(one.prod()) <= hypervolume(two, zero) <= 2 * float(one.prod())
    assert hypervolume(two, zero) == hypervolume(two, zero)
    assert hypervolume(-two, zero) == 0


def test_directions_agree_with_exact_volumes() -> None:
    Y = torch.rand(8, 3, generator=make_generator(0), dtype=torch.float64)
    zero = torch.zeros(3, dtype=torch.float64)
    assert _along_directions(Y) == pytest.approx(hypervolume(Y, zero), rel=0.05)
