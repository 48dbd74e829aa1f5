from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.vectors.operator import MergeOperator
from map_bo.merging.vectors.parallel import arena
from map_bo.operators.random_mask import LEVELS, element_key, uniform_levels
from map_bo.operators.sparse import (
    ELECTIONS,
    NORMALISATIONS,
    Breadcrumbs,
    Dare,
    Della,
    Magnitude,
    Ties,
    elected_sum,
    weighted_sum,
)
from map_bo.rng import make_generator
from tests.contracts.operator_contract import OperatorContract
from tests.operators.cases import flat_vectors, hard_vectors, merge

BLOCKS = {"early": r"^first\.", "late": "*"}


class TestSparse(OperatorContract):
    storage_error = 5e-2

    @pytest.fixture(
        params=[
            Ties(),
            Ties(search=["density", "scale"], blocks=BLOCKS),
            Ties(trim="tensor", election="weighted_mass", normalisation="weights"),
            Magnitude(trim="tensor", density=0.3),
            Breadcrumbs(search=["density", "gamma"], trim="global", joining="elect"),
            Dare(),
            Della(joining="sum", search=["drop_rate", "epsilon", "scale"]),
        ],
        ids=lambda operator: f"{operator.name}-{'-'.join(operator.search)}",
    )
    def operator(self, request: pytest.FixtureRequest) -> MergeOperator:
        made: MergeOperator = request.param
        return made


def dense_trim(delta: Tensor, density: float) -> Tensor:
    """Keep the largest share of a whole vector, by sorting."""
    count = max(1, int(density * delta.numel() + 1e-9))
    limit = delta.abs().sort(descending=True).values[count - 1]
    return torch.where(delta.abs() >= limit, delta, 0.0)


def test_ties_is_the_papers() -> None:
    base, deltas = flat(experts=4)
    rows = torch.stack([dense_trim(delta, 0.2) for delta in deltas])
    elected = torch.where(rows.sum(0) >= 0, 1.0, -1.0)
    agree = (rows.sign() == elected) & (rows != 0)
    merged = (rows * agree).sum(0) / agree.sum(0).clamp_min(1)
    found = merge(Ties(), flat_vectors(base, deltas), [0.7] * 4)
    assert torch.allclose(found, base + 0.7 * merged, atol=1e-6)


@pytest.mark.parametrize("joining", ["sum", "elect"])
def test_dare_given_the_mask(joining: str) -> None:
    base, deltas = flat()
    vectors = flat_vectors(base, deltas)
    operator = Dare(drop_rate=0.25, joining=joining, seed=3)
    c = torch.tensor([0.5, -0.2, 1.0])
    rows = torch.zeros_like(deltas)
    for n, row in enumerate(rows):
        key = element_key(3, vectors.experts[n], "w")
        mask = uniform_levels([key], 0, len(row))[0].int() + LEVELS // 2 >= LEVELS // 4
        row.copy_(deltas[n] * mask / 0.75)
    if joining == "sum":
        merged = (c[:, None] * rows).sum(0)
    else:
        elected = torch.where(rows.sum(0) >= 0, 1.0, -1.0)
        agree = (rows.sign() == elected) & (rows != 0)
        merged = (c[:, None] * rows * agree).sum(0) / agree.sum(0).clamp_min(1)
    assert torch.allclose(merge(operator, vectors, c), base + merged, atol=1e-5)


def test_breadcrumbs_are_between_the_percentiles() -> None:
    base, deltas = flat(size=1000)
    found = merge(Breadcrumbs(), flat_vectors(base, deltas), [1.0, 0.0, 0.0]) - base
    sizes = deltas[0].abs().double()
    low, high = (float(torch.quantile(sizes, q)) for q in (0.85, 0.993))
    expected = torch.where((sizes >= low) & (sizes <= high), deltas[0], 0.0)
    differ = (found - expected).abs() > 1e-5
    assert int(differ.sum()) <= 2  # the percentiles lie between numbers
    assert 141 <= int((found.abs() > 1e-6).sum()) <= 144


@pytest.mark.parametrize("trim", ["tensor", "global"])
@pytest.mark.parametrize("shares", [(0.19, 0.11), (0.3, 0.01), (0.65, 0.01), (0.143, 0.007)])
def test_breadcrumbs_keep_the_floor_of_their_density(
    trim: str, shares: tuple[float, float]
) -> None:
    density, gamma = shares
    base, deltas = flat(size=1152)
    operator = Breadcrumbs(density=density, gamma=gamma, trim=trim)
    found = merge(operator, flat_vectors(base * 0, deltas), [1.0, 0.0, 0.0])
    order = deltas[0].abs().argsort(descending=True)
    gone = math.floor(gamma * 1152)
    kept = order[gone : gone + math.floor(density * 1152)]
    assert set(found.nonzero().flatten().tolist()) == set(kept.tolist())


def test_della_elects_among_what_magprune_left() -> None:
    base, deltas = flat(experts=4, size=4000)
    vectors = flat_vectors(base.view(40, 100), deltas)
    sums = [
        merge(Della(joining="sum", drop_rate=0.4, epsilon=0.2), vectors, torch.eye(4)[n]) - base
        for n in range(4)
    ]
    rows = torch.where(torch.stack(sums).abs() > 1e-5, torch.stack(sums), 0.0)
    assert 0.35 < float((rows == 0).float().mean()) < 0.45
    elected = torch.where(rows.sum(0) >= 0, 1.0, -1.0)
    agree = (rows.sign() == elected) & (rows != 0)
    merged = rows.mul(agree).sum(0) / agree.sum(0).clamp_min(1)
    found = merge(Della(drop_rate=0.4, epsilon=0.2), vectors, [1.0] * 4)
    assert float(((found - base - merged).abs() > 1e-4).double().mean()) < 1e-3


@pytest.mark.parametrize("trim", ["global", "tensor"])
def test_densities_of_none_and_all(trim: str) -> None:
    vectors = hard_vectors()
    c = [0.5, -0.2, 1.0]
    nothing = (Ties(density=0, trim=trim), Breadcrumbs(density=0, trim=trim))
    everything = (Magnitude(density=1, trim=trim), Breadcrumbs(density=1, trim=trim))
    for operator in nothing:
        assert torch.equal(merge(operator, vectors, c), vectors.base)
    whole = vectors.base + (torch.tensor(c)[:, None] * vectors.deltas).sum(0)
    for whole_operator in everything:
        assert torch.allclose(merge(whole_operator, vectors, c), whole, atol=1e-5)


def test_searched_density_is_near_the_fixed_one() -> None:
    vectors = hard_vectors(shapes={"w": (200, 100)}, zeros=0.0)
    searched = Ties(search=["density"])
    for density in (0.05, 0.3, 0.7, 1.0):
        fixed = merge(Ties(density=density), vectors, [0.5, 0.2, 1.0])
        found = merge(searched, vectors, [0.5, 0.2, 1.0, density])
        # Numbers near the threshold, and those that equal it, may come out otherwise.
        assert float((found != fixed).double().mean()) < 0.35
    assert torch.equal(found, fixed)


def flat(experts: int = 3, size: int = 320) -> tuple[Tensor, Tensor]:
    generator = make_generator(7)
    return (
        torch.randn(size, generator=generator),
        torch.randn(experts, size, generator=generator),
    )


# Multiples of 1/8 and coefficients of 1/4: sums are exact, so that ties are ties in any order.
eighths = st.integers(-16, 16).map(lambda k: k / 8)
quarters = st.integers(-8, 8).map(lambda k: k / 4)


def by_loops(rows: Tensor, c: list[float], election: str, normalisation: str) -> list[float]:
    """Elect and average one number after another, as the papers write it."""
    merged = []
    for column in rows.t().tolist():
        weighted = [weight * t for weight, t in zip(c, column, strict=True)]
        if election == "mass":
            mass = sum(column)
        elif election == "weighted_mass":
            mass = sum(weighted)
        else:
            mass = sum((t > 0) - (t < 0) for t in column)
        sign = 1 if mass >= 0 else -1
        voters = weighted if election == "weighted_mass" else column
        agree = [n for n, vote in enumerate(voters) if vote * sign > 0]
        total = sum(weighted[n] for n in agree)
        if normalisation == "agreeing":
            total /= max(1, len(agree))
        elif normalisation == "weights":
            by = sum(c[n] for n in agree)
            total /= by if abs(by) > 1e-6 else 1.0
        merged.append(total)
    return merged


@pytest.mark.parametrize("election", ELECTIONS)
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@given(st.data())
def test_is_the_disjoint_merge_of_the_paper(
    election: str, normalisation: str, data: st.DataObject
) -> None:
    n = data.draw(st.integers(1, 5))
    columns = data.draw(st.integers(0, 6))
    values = data.draw(st.lists(eighths, min_size=n * columns, max_size=n * columns))
    c = data.draw(st.lists(quarters, min_size=n, max_size=n))
    rows = torch.tensor(values, dtype=torch.float32).view(n, columns)
    before = rows.clone()
    found = elected_sum(rows, torch.tensor(c, dtype=torch.float64), election, normalisation)
    expected = torch.tensor(by_loops(rows, c, election, normalisation), dtype=torch.float32)
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(rows, before)
    arena.reset()
    again = elected_sum(rows, torch.tensor(c).double(), election, normalisation, empty=arena.empty)
    assert torch.equal(again, found)


def test_equal_coefficients_are_the_papers_lambda() -> None:
    rows = torch.randn(4, 50, generator=make_generator(0))
    rows[rows.abs() < 0.5] = 0
    ones = torch.ones(4, dtype=torch.float64)
    mean = elected_sum(rows, ones, "mass", "agreeing")
    assert torch.allclose(elected_sum(rows, 0.3 * ones, "mass", "agreeing"), 0.3 * mean)
    # Divided by the sum of equal coefficients it is the mean itself.
    for election in ("mass", "weighted_mass"):
        assert torch.allclose(elected_sum(rows, 0.3 * ones, election, "weights"), mean, atol=1e-6)


def test_ties_go_to_plus_and_zeros_agree_with_nobody() -> None:
    rows = torch.tensor([[1.0, -2.0, 0.0, -0.0, 3.0], [-1.0, 2.0, 0.0, 0.0, 0.0]])
    c = torch.ones(2, dtype=torch.float64)
    for election in ELECTIONS:
        found = elected_sum(rows, c, election, "agreeing")
        assert found.tolist() == [1.0, 2.0, 0.0, 0.0, 3.0]


def test_weighted_sum() -> None:
    rows = torch.randn(3, 20, generator=make_generator(1))
    c = torch.tensor([0.5, -2.0, 0.1], dtype=torch.float64)
    expected = (c[:, None] * rows.double()).sum(0).float()
    assert torch.allclose(weighted_sum(rows, c), expected, atol=1e-6)


@pytest.mark.parametrize(("rate", "epsilon"), [(0.1, 0.2), (0.5, 0.98), (0.9, 0.19), (0.0, 0.0)])
def test_drop_rates_of_della_within_the_unit_interval_are_taken(
    rate: float, epsilon: float
) -> None:
    assert Della(drop_rate=rate, epsilon=epsilon).epsilon == epsilon


@pytest.mark.parametrize(
    ("rate", "epsilon", "message"),
    [
        (0.1, 0.25, "drop rates from -0.025 to 0.225 are not in"),
        (0.75, 0.5, "drop rates from 0.5 to 1 are not in"),
        (0.9, 0.5, "drop rates from 0.65 to 1.15 are not in"),
        (0.5, -0.1, "epsilon must"),
        (0.5, 1.5, "epsilon must"),
    ],
)
def test_drop_rates_of_della_beyond_it_are_refused(
    rate: float, epsilon: float, message: str
) -> None:
    with pytest.raises(MergeError, match=message):
        Della(drop_rate=rate, epsilon=epsilon)
