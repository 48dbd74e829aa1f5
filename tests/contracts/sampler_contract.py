"""What every sampler must do; an implementation supplies the ``sampler`` fixture and inherits."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import multiprocessing
import pickle
import random
from concurrent.futures import ProcessPoolExecutor
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from map_bo.choice import handles_choice
from map_bo.data import Metric, Observations
from map_bo.errors import ConfigError, SamplerError
from map_bo.loop.settings import Settings
from map_bo.rng import child, make_generator
from map_bo.samplers.posterior.covariance import Covariances, measurement_noise
from map_bo.samplers.sampler import (
    FillsSpace,
    Sampler,
    SeesThroughSurrogate,
    looking_through,
)
from map_bo.space import CoefficientSpace
from map_bo.surrogates.quadratic import Quadratic
from map_bo.surrogates.surrogate import SurrogateModel
from tests.choices import CHOICE, some_of

EXPERTS = ("a", "b", "c")
METRICS = (Metric("first"), Metric("second", direction="min", kind="loss"))
SPACES = {
    "box": CoefficientSpace.box(EXPERTS),
    "wide": CoefficientSpace.box(EXPERTS, lower=-3.0, upper=3.0),
    "sum": CoefficientSpace.box(EXPERTS, sum_at_most=1.5),
    "simplex": CoefficientSpace.box(EXPERTS, simplex=True),
    "blocks": CoefficientSpace.box(EXPERTS[:2], blocks=("x", "y"), sum_at_most=1.5),
    "fixed": CoefficientSpace(("a", "fixed", "b", "c"), (0, 0.4, 0, 0), (1, 0.4, 1, 1)).with_sum(2),
    # Two experts and two settings of the operator, whose bounds have nothing to do with weights.
    "settings": CoefficientSpace(
        ("a", "b", "density", "scale"),
        (0.0, 0.0, 0.05, 1.5),
        (1.0, 1.0, 0.5, 4.0),
        owner=(0, 1, -1, -1),
        experts=("a", "b"),
        defaults=(0.2, 2.0),
    ),
}


def measured(X: Tensor, *, failed: tuple[int, ...] = ()) -> Observations:
    """Return two smooth, conflicting metrics at ``X``; the rows in ``failed`` failed."""
    target = torch.linspace(0.9, 0.1, X.shape[-1], dtype=torch.float64)
    accuracy = torch.sigmoid(2 - 3 * (X - target).square().sum(-1))
    loss = 0.1 + (X - target.flip(0)).square().sum(-1)
    Y = torch.stack([accuracy, loss], -1)
    Y[list(failed)] = torch.nan
    return Observations(
        X,
        Y,
        METRICS,
        Yvar=torch.full_like(Y, 1e-4),
        failures=tuple("it broke" if i in failed else None for i in range(len(X))),
    )


def some_seen(space: CoefficientSpace, n: int, *, failed: tuple[int, ...] = ()) -> Observations:
    """Return evaluations at the anchors and at random points, ``n`` in all."""
    X = torch.cat([space.anchors().X, space.sample(n, generator=make_generator(99))])
    return measured(X[:n], failed=failed)


@functools.cache
def fresh_process() -> ProcessPoolExecutor:
    """Return a process that shares nothing with this one; started once, imports are slow."""
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    atexit.register(pool.shutdown)
    return pool


def propose_elsewhere(
    sampler: Sampler, space: CoefficientSpace, seed: int, threads: int, in_flight: int = 0
) -> list[list[float]]:
    """Propose two points after eight, and so many in flight; runs in the other process.

    A product over more threads, or fewer, may end in other digits.
    """
    torch.set_num_threads(threads)
    seen = some_seen(space, 8)
    pending = space.sample(in_flight, generator=make_generator(98)) if in_flight else None
    points: list[list[float]] = sampler.propose(
        seen, space, 2, pending=pending, generator=make_generator(seed)
    ).tolist()
    return points


def in_turn(
    sampler: Sampler, seen: Observations, space: CoefficientSpace, n: int, *, generator: Generator
) -> Tensor:
    """Return ``n x d`` points, asked one by one with those before pending."""
    found = seen.X[:0]
    for _ in range(n):
        waiting = found if len(found) else None
        X = sampler.propose(seen, space, 1, pending=waiting, generator=generator)
        found = torch.cat([found, X])
    return found


def away(A: Tensor, B: Tensor, space: CoefficientSpace) -> Tensor:
    """Return distances ``a x b``: largest difference of a coefficient, share of its range."""
    return torch.cdist(space.normalise(A), space.normalise(B), p=torch.inf)


def learned(seen: Observations, X: Tensor, space: CoefficientSpace) -> float:
    """Return the share of the variance all over the space that measuring ``X`` would take off.

    That is under the quadratic; what is measured there does not matter.
    """
    model = Quadratic().fit(seen, space)
    noise = measurement_noise(model, seen.X)
    everywhere = space.sample(200, generator=make_generator(1))
    before, after = (
        Covariances(model, everywhere[:1], noise, pending).to(everywhere)[1].sum(-1)
        for pending in (None, X)
    )
    return float(((before - after) / before).mean())


@dataclasses.dataclass(frozen=True)
class Mistaken:
    """A legal surrogate that disagrees: it takes each row's values for another row's."""

    leaves_one_out: ClassVar[bool] = True

    def fit(self, seen: Observations, space: CoefficientSpace) -> SurrogateModel:
        good = seen.succeeded()
        wrong = dataclasses.replace(good, Y=good.Y.roll(len(good) // 3, 0))
        return Quadratic().fit(wrong, space)


class SamplerContract:
    """The laws of :class:`map_bo.samplers.sampler.Sampler`."""

    telling = 2
    """How many proposals tell two surrogates apart, by far."""

    crowded = 0.02
    """Largest difference of a coefficient, share of its range, up to which points are crowded."""

    @pytest.fixture
    def sampler(self) -> Sampler:
        raise NotImplementedError

    @pytest.fixture(params=sorted(SPACES))
    def space(self, request: pytest.FixtureRequest) -> CoefficientSpace:
        return SPACES[request.param]

    @pytest.fixture
    def box(self) -> CoefficientSpace:
        return SPACES["box"]

    @pytest.fixture
    def generator(self) -> Generator:
        return make_generator(7)

    def test_satisfies_the_protocol_and_is_frozen(self, sampler: Sampler) -> None:
        assert isinstance(sampler, Sampler)
        field = dataclasses.fields(sampler)[0].name  # type: ignore[arg-type]
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(sampler, field, None)

    @pytest.mark.parametrize(("n", "seen"), [(0, 0), (1, 0), (3, 4), (2, 9)])
    def test_proposes_distinct_new_points_of_the_space(
        self, sampler: Sampler, space: CoefficientSpace, generator: Generator, n: int, seen: int
    ) -> None:
        before = some_seen(space, seen)
        X = sampler.propose(before, space, n, generator=generator)
        assert X.shape == (n, space.d)
        assert X.dtype == torch.float64
        space.check(X)
        together = torch.cat([before.X, X])
        assert len(torch.unique(together, dim=0)) == len(together)

    def test_the_same_seed_proposes_the_same_points_and_random_states_stay(
        self, sampler: Sampler, space: CoefficientSpace, generator: Generator
    ) -> None:
        seen = some_seen(space, 9)
        state = generator.get_state()
        torch_state, python_state = torch.random.get_rng_state(), random.getstate()
        numpy_state = pickle.dumps(np.random.get_state())  # noqa: NPY002
        first = sampler.propose(seen, space, 2, generator=generator)
        assert torch.equal(generator.get_state(), state)
        assert torch.equal(torch.random.get_rng_state(), torch_state)
        assert random.getstate() == python_state
        assert pickle.dumps(np.random.get_state()) == numpy_state  # noqa: NPY002
        again = sampler.propose(seen, space, 2, generator=make_generator(7))
        assert torch.equal(first, again)

    @pytest.mark.slow
    def test_a_fresh_process_proposes_the_same_points(
        self, sampler: Sampler, space: CoefficientSpace
    ) -> None:
        arguments = sampler, space, 5, torch.get_num_threads()
        elsewhere = fresh_process().submit(propose_elsewhere, *arguments).result()
        assert elsewhere == propose_elsewhere(*arguments)

    def test_other_seeds_propose_other_points(
        self, sampler: Sampler, box: CoefficientSpace
    ) -> None:
        seen = measured(torch.zeros(0, box.d, dtype=torch.float64))
        first = sampler.propose(seen, box, 12, generator=make_generator(1))
        other = sampler.propose(seen, box, 12, generator=make_generator(2))
        assert not torch.equal(first, other)

    @pytest.mark.slow
    def test_nothing_depends_on_earlier_draws_or_proposals(
        self, sampler: Sampler, box: CoefficientSpace, generator: Generator
    ) -> None:
        seen = some_seen(box, 9)
        first = sampler.propose(seen, box, 2, generator=generator)
        sampler.propose(some_seen(box, 3), box, 3, generator=generator)
        torch.rand(10, generator=generator)
        assert torch.equal(sampler.propose(seen, box, 2, generator=generator), first)

    @pytest.mark.parametrize("seen", [0, 9])
    def test_pending_points_are_not_proposed_again(
        self, sampler: Sampler, space: CoefficientSpace, generator: Generator, seen: int
    ) -> None:
        before = some_seen(space, seen)
        pending = sampler.propose(before, space, 3, generator=generator)
        X = sampler.propose(before, space, 3, pending=pending, generator=generator)
        space.check(X)
        assert len(torch.unique(torch.cat([pending, X]), dim=0)) == 6

    def test_what_is_pending_is_not_crowded(self, sampler: Sampler, box: CoefficientSpace) -> None:
        # As many points are pending both times, so a sampler that does not look where they are
        # proposes the same point again, or its neighbour.
        seen, generator = some_seen(box, 16), make_generator(0)
        elsewhere = torch.tensor([[0.123, 0.456, 0.789]], dtype=torch.float64)
        first = sampler.propose(seen, box, 1, pending=elsewhere, generator=generator)
        then = sampler.propose(seen, box, 1, pending=first, generator=generator)
        assert float(away(first, then, box)) > self.crowded

    @pytest.mark.slow
    def test_points_asked_in_turn_are_as_good_as_a_batch(
        self, sampler: Sampler, box: CoefficientSpace
    ) -> None:
        seen, generator = some_seen(box, 16), make_generator(0)
        batch = sampler.propose(seen, box, 4, generator=generator)
        each = in_turn(sampler, seen, box, 4, generator=generator)
        if isinstance(sampler, FillsSpace):
            assert torch.equal(each, batch)
        distances = away(each, each, box) + torch.eye(4)
        assert float(distances.min()) > self.crowded
        assert learned(seen, each, box) > 0.5 * learned(seen, batch, box)

    def test_with_points_in_flight_the_seed_decides(
        self, sampler: Sampler, box: CoefficientSpace
    ) -> None:
        seen = some_seen(box, 12, failed=(7,))
        pending = box.sample(3, generator=make_generator(98))
        first, again = (
            sampler.propose(seen, box, 2, pending=pending, generator=make_generator(7))
            for _ in range(2)
        )
        assert torch.equal(first, again)
        given = torch.cat([seen.X, pending])
        assert torch.equal(given, torch.cat([some_seen(box, 12).X, pending]))  # nothing is written
        assert float(away(first, given, box).min()) > 0

    @pytest.mark.slow
    def test_with_points_in_flight_a_fresh_process_proposes_the_same(
        self, sampler: Sampler, box: CoefficientSpace
    ) -> None:
        arguments = sampler, box, 5, torch.get_num_threads(), 3
        elsewhere = fresh_process().submit(propose_elsewhere, *arguments).result()
        assert elsewhere == propose_elsewhere(*arguments)

    def test_failed_evaluations_are_not_proposed_again(
        self, sampler: Sampler, box: CoefficientSpace, generator: Generator
    ) -> None:
        empty = measured(torch.zeros(0, box.d, dtype=torch.float64))
        first = sampler.propose(empty, box, 6, generator=generator)
        for failed in ((0, 2), tuple(range(6))):
            seen = measured(first, failed=failed)
            X = sampler.propose(seen, box, 3, generator=generator)
            box.check(X)
            assert len(torch.unique(torch.cat([first, X]), dim=0)) == 9

    def test_a_child_generator_is_as_good_as_any(
        self, sampler: Sampler, box: CoefficientSpace, generator: Generator
    ) -> None:
        X = sampler.propose(some_seen(box, 8), box, 1, generator=child(generator, "sampler"))
        box.check(X)

    def test_a_negative_number_is_refused(
        self, sampler: Sampler, box: CoefficientSpace, generator: Generator
    ) -> None:
        with pytest.raises(SamplerError, match="-1 points were asked for"):
            sampler.propose(some_seen(box, 2), box, -1, generator=generator)

    def test_evaluations_of_another_space_are_refused(
        self, sampler: Sampler, box: CoefficientSpace, generator: Generator
    ) -> None:
        other = measured(torch.zeros(1, box.d + 1, dtype=torch.float64))
        with pytest.raises(SamplerError, match="in a space of 3 coefficients"):
            sampler.propose(other, box, 1, generator=generator)

    def test_surrogates_that_disagree_lead_to_different_proposals(
        self, sampler: Sampler, box: CoefficientSpace, generator: Generator
    ) -> None:
        if not isinstance(sampler, SeesThroughSurrogate):
            return
        seen = some_seen(box, 14)
        right, wrong = (
            sampler.with_surrogate(surrogate).propose(seen, box, self.telling, generator=generator)
            for surrogate in (Quadratic(), Mistaken())
        )
        assert not torch.allclose(right, wrong, atol=1e-3)

    def test_a_surrogate_of_its_own_comes_before_that_of_the_run(self, sampler: Sampler) -> None:
        if not isinstance(sampler, SeesThroughSurrogate):
            assert looking_through(sampler, Quadratic()) is sampler
            return
        own = sampler.with_surrogate(Quadratic())
        assert isinstance(own, SeesThroughSurrogate)
        assert own.surrogate == Quadratic()
        assert looking_through(own, Mistaken()) is own

    def test_a_choice_is_handled_or_refused_before_anything_is_evaluated(
        self, sampler: Sampler, generator: Generator
    ) -> None:
        if not handles_choice(sampler):
            settings = Settings(budget=9, sampler=sampler, surrogate=Quadratic())
            with pytest.raises(
                ConfigError, match=r"does not handle a choice, and this .* operator"
            ):
                settings.check_space(CHOICE)
            return
        first = sampler.propose(some_of(CHOICE, 0), CHOICE, 12, generator=generator)
        CHOICE.check(first)
        assert len(torch.unique(first, dim=0)) == 12
        if isinstance(sampler, FillsSpace):
            assert set(first[:, 2].tolist()) == {0.0, 1.0, 2.0}
        seen = some_of(CHOICE, 14)
        X = sampler.propose(seen, CHOICE, 1, generator=generator)
        CHOICE.check(X)
        assert len(torch.unique(torch.cat([seen.X, X]), dim=0)) == 15
