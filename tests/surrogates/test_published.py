from __future__ import annotations

import pytest
import torch

from map_bo.data import Metric, Observations
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace
from map_bo.surrogates.features import n_features, quadratic_features
from map_bo.surrogates.links import IdentityLink, LogitLink, SoftplusLink, from_link
from map_bo.surrogates.prediction import predict
from map_bo.surrogates.published import PublishedQuadratic
from map_bo.surrogates.quadratic import Quadratic
from map_bo.surrogates.surrogate import Surrogate
from tests.contracts.surrogate_contract import SurrogateContract, mixed_observations

METRICS = (
    Metric("accuracy", lower=0.0, upper=2.0),
    Metric("loss", kind="loss", direction="min", lower=-1.0),
    Metric("score", kind="unbounded"),
)
LINKS = (LogitLink(0.0, 2.0), SoftplusLink(-1.0), IdentityLink())


class TestReferenceContract(SurrogateContract):
    @pytest.fixture
    def surrogate(self) -> Surrogate:
        return PublishedQuadratic()


def exact(n: int, d: int) -> tuple[Observations, CoefficientSpace]:
    generator = make_generator(n + d)
    space = CoefficientSpace.box([f"e{i}" for i in range(d)])
    weights = torch.randn(3, n_features(d), generator=generator, dtype=torch.float64)
    X = space.sample(n, generator=generator)
    return Observations(X, from_link(quadratic_features(X) @ weights.T, LINKS), METRICS), space


def test_recovers_links_of_quadratics_from_enough_exact_rows() -> None:
    seen, space = exact(30, 3)
    model = PublishedQuadratic().fit(seen, space)
    assert model.links == LINKS
    new, _ = exact(30, 3)
    torch.testing.assert_close(
        from_link(model.link_mean(new.X), LINKS), new.Y, rtol=1e-4, atol=1e-5
    )


def test_box_plays_no_part() -> None:
    seen, space = exact(20, 2)
    wide = CoefficientSpace.box(("a", "b"), lower=-3.0, upper=3.0)
    ours, theirs = PublishedQuadratic().fit(seen, space), PublishedQuadratic().fit(seen, wide)
    assert torch.equal(ours.weights, theirs.weights)


def test_too_few_rows_are_met_exactly_and_say_little() -> None:
    # Below the number of coefficients an unregularised fit goes through every row and is wrong
    # elsewhere, which is what the Bayesian quadratic repairs.
    seen, space = exact(8, 3)
    assert len(seen) < n_features(3)
    reference = PublishedQuadratic().fit(seen, space)
    torch.testing.assert_close(
        from_link(reference.link_mean(seen.X), LINKS), seen.Y, rtol=1e-2, atol=1e-2
    )
    assert bool(torch.isfinite(reference.weights).all())


def test_an_optimiser_that_gives_up_leaves_its_last_iterate() -> None:
    # Contradicting rows with a metric at its bound: the weights run away to no limit.
    space = CoefficientSpace.box(("a", "b"))
    X = space.sample(12, generator=make_generator(0))
    Y = (X[:, :1] > 0.5).double()
    model = PublishedQuadratic().fit(Observations(X, Y, (Metric("step"),)), space)
    assert bool(torch.isfinite(model.weights).all())
    assert not torch.equal(model.weights, torch.ones_like(model.weights))


def test_has_no_uncertainty() -> None:
    seen, space = mixed_observations()
    ours, theirs = Quadratic().fit(seen, space), PublishedQuadratic().fit(seen, space)
    assert float(predict(theirs, seen.X).std.max()) < 1e-5
    assert float(predict(ours, seen.X).std.min()) > 1e-4
