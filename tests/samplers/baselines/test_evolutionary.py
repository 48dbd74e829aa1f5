from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import SamplerError
from map_bo.pareto.indicators import hypervolume
from map_bo.rng import make_generator
from map_bo.samplers.baselines import evolutionary
from map_bo.samplers.baselines.evolutionary import NSGA2Sampler, NSGA3Sampler
from map_bo.samplers.designs.space_filling import Sobol, Uniform, is_repeat
from map_bo.samplers.sampler import Sampler
from map_bo.space import CoefficientSpace
from tests.contracts.sampler_contract import SPACES, SamplerContract, measured, some_seen

KINDS = [NSGA2Sampler, NSGA3Sampler]


def bowls(X: Tensor, m: int, *, failed: tuple[int, ...] = ()) -> Observations:
    """Return ``m`` metrics, each best (0) at one corner of the box."""
    Y = -torch.cdist(X, torch.eye(m, X.shape[-1], dtype=torch.float64)).square()
    Y[list(failed)] = torch.nan
    metrics = tuple(Metric(f"m{i}", kind="unbounded") for i in range(m))
    reasons = tuple("it broke" if i in failed else None for i in range(len(X)))
    return Observations(X, Y, metrics, failures=reasons)


def box(d: int) -> CoefficientSpace:
    return CoefficientSpace.box([f"e{i}" for i in range(d)])


def spend(sampler: Sampler, space: CoefficientSpace, m: int, budget: int, seed: int) -> Tensor:
    """Return the values of a run of single evaluations."""
    seen = bowls(torch.zeros(0, space.d, dtype=torch.float64), m)
    generator = make_generator(seed)
    for _ in range(budget):
        seen = seen.append(bowls(sampler.propose(seen, space, 1, generator=generator), m))
    return seen.Y


class TestNSGA2Sampler(SamplerContract):
    @pytest.fixture
    def sampler(self) -> Sampler:
        return NSGA2Sampler(population=6)


class TestNSGA3Sampler(SamplerContract):
    @pytest.fixture
    def sampler(self) -> Sampler:
        return NSGA3Sampler(population=6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("anchors", [True, False])
def test_the_population_comes_from_the_design(kind: Any, anchors: bool) -> None:
    space, generator = SPACES["box"], make_generator(2)
    empty = measured(torch.zeros(0, space.d, dtype=torch.float64))
    design = Sobol(anchors=anchors).propose(empty, space, 12, generator=generator)
    sampler = kind(anchors=anchors)
    assert torch.equal(sampler.propose(empty, space, 12, generator=generator), design)
    X = sampler.propose(measured(design[:10]), space, 5, generator=generator)
    assert torch.equal(X[:2], design[10:])
    assert not is_repeat(X[2:], design, space).any()
    # A failed evaluation is none of the population: the design goes on for it.
    more = Sobol(anchors=anchors).propose(measured(design), space, 1, generator=generator)
    X = sampler.propose(measured(design, failed=(3,)), space, 2, generator=generator)
    assert torch.equal(X[:1], more)


@pytest.mark.parametrize("kind", KINDS)
def test_only_survivors_have_children(kind: Any) -> None:
    # Eight points near the front, and many that are dominated or failed, far from it in every
    # coefficient: children of these would lie beyond.
    space, source = CoefficientSpace.box(("a", "b", "c"), upper=3.0), make_generator(4)
    good = torch.eye(3, dtype=torch.float64)[torch.arange(8) % 3] * 0.8 + 0.1
    good = good + 0.05 * torch.rand(8, 3, generator=source, dtype=torch.float64)
    bad = 2.5 + 0.5 * torch.rand(12, 3, generator=source, dtype=torch.float64)
    seen = bowls(torch.cat([good, bad]), 3, failed=tuple(range(14, 20)))
    X = kind(population=8).propose(seen, space, 30, generator=source)
    assert float(X.median()) < 1.0
    assert float((X > 2.0).double().mean()) < 0.05  # a mutation may still go far


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [1, 2, 4, 9])
def test_any_number_of_metrics(kind: Any, m: int) -> None:
    space = box(max(2, m))
    seen = bowls(space.sample(24, generator=make_generator(0)), m)
    X = kind(population=20).propose(seen, space, 4, generator=make_generator(1))
    space.check(X)
    assert not is_repeat(X, seen.X, space).any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_evolution_beats_chance(kind: Any) -> None:
    # Two metrics in six coefficients: the front is a line in the box, which chance rarely meets.
    space, reference = box(6), torch.full((2,), -2.5, dtype=torch.float64)
    evolved, chance = (
        sum(hypervolume(spend(sampler, space, 2, 120, seed), reference) for seed in range(4))
        for sampler in (kind(anchors=False), Uniform(anchors=False))
    )
    assert evolved > 1.05 * chance


@pytest.mark.parametrize("kind", KINDS)
def test_children_depend_on_how_much_was_seen_and_is_pending(kind: Any) -> None:
    space, generator = SPACES["box"], make_generator(0)
    seen = some_seen(space, 14)
    X = kind().propose(seen, space, 1, generator=generator)
    again = kind().propose(seen, space, 1, pending=X, generator=generator)
    later = kind().propose(seen.append(measured(X)), space, 1, generator=generator)
    assert not torch.equal(again, X)
    assert not torch.equal(later, X)
    assert not torch.equal(later, again)


def test_the_design_fills_up_what_cannot_be_bred() -> None:
    # Below this bound only the base is left of the box: no child is new, and none is lost.
    space = CoefficientSpace.box(("a", "b"), sum_at_most=1e-12)
    X = torch.zeros(2, 2, dtype=torch.float64)
    found = NSGA2Sampler(population=2).propose(bowls(X, 2), space, 3, generator=make_generator(0))
    assert found.shape == (3, 2)
    assert float(found.abs().max()) < 1e-11


@pytest.mark.slow
def test_directions_cover_the_simplex_at_any_size() -> None:
    for m, size, count in ((2, 12, 12), (3, 12, 10), (4, 16, 14), (5, 6, 6), (9, 12, 12)):
        found = evolutionary._directions(m, size)
        assert found.shape == (count, m)
        np.testing.assert_allclose(found.sum(-1), 1.0, atol=1e-6)
        assert (found >= 0).all()
        corners = np.isclose(found.max(-1), 1.0).sum()
        assert m >= corners
        assert len(found) > corners  # something inside the simplex
    assert np.array_equal(
        evolutionary._directions.__wrapped__(9, 12), evolutionary._directions(9, 12)
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"population": 1}, "population of 1 cannot mate"), ({"eta": 1.0}, "eta is 1.0")],
)
@pytest.mark.parametrize("kind", KINDS)
def test_settings_are_checked(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SamplerError, match=message):
        kind(**settings)
