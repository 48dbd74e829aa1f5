from __future__ import annotations

import torch

from map_bo.nested.nodes import Seeded
from map_bo.rng import make_generator
from map_bo.samplers.designs.space_filling import Sobol
from map_bo.samplers.sampler import Sampler
from map_bo.space import CoefficientSpace
from tests.contracts.sampler_contract import SPACES, measured

SPACE = SPACES["box"]
POINTS = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]], dtype=torch.float64)


def propose(seen: int, n: int, pending: int = 0) -> torch.Tensor:
    waiting = POINTS[seen : seen + pending] if pending else None
    return Seeded(POINTS, Sobol()).propose(
        measured(POINTS[:seen]), SPACE, n, pending=waiting, generator=make_generator(3)
    )


def test_points_come_one_after_another() -> None:
    assert torch.equal(propose(0, 1), POINTS[:1])
    assert torch.equal(propose(1, 1), POINTS[1:2])
    assert torch.equal(propose(0, 3), POINTS)
    assert torch.equal(propose(0, 1, pending=2), POINTS[2:])
    assert torch.equal(propose(1, 1, pending=1), POINTS[2:])


def test_then_the_sampler_goes_on_from_what_was_seen() -> None:
    seen = measured(POINTS)
    expected = Sobol().propose(seen, SPACE, 4, generator=make_generator(3))
    assert torch.equal(propose(3, 4), expected)
    assert len(torch.unique(torch.cat([POINTS, expected]), dim=0)) == 7


def test_a_batch_ends_with_the_points_so_that_the_sampler_sees_them_all() -> None:
    assert torch.equal(propose(2, 3), POINTS[2:])
    assert torch.equal(propose(1, 7, pending=1), POINTS[2:])
    assert len(propose(2, 3, pending=1)) == 3


def test_without_points_it_is_the_sampler() -> None:
    nothing = Seeded(POINTS[:0], Sobol())
    assert isinstance(nothing, Sampler)
    for seen in (measured(POINTS[:0]), measured(POINTS)):
        found = nothing.propose(seen, SPACE, 2, generator=make_generator(3))
        assert torch.equal(found, Sobol().propose(seen, SPACE, 2, generator=make_generator(3)))


def test_points_are_brought_into_the_space() -> None:
    narrow = CoefficientSpace.box(("a", "b", "c"), upper=0.5)
    seeded = Seeded(POINTS, Sobol())
    found = seeded.propose(measured(POINTS[:0]), narrow, 2, generator=make_generator(0))
    assert torch.equal(found, POINTS[:2].clamp(max=0.5))
    assert repr(seeded) == f"Seeded(3 points, {Sobol()!r})"
