from __future__ import annotations

import logging
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import MissingDependencyError, SamplerError
from map_bo.rng import make_generator
from map_bo.samplers.baselines.ax import AxSampler
from map_bo.samplers.designs.space_filling import is_repeat
from map_bo.samplers.sampler import Sampler
from map_bo.space import CoefficientSpace, LinearConstraint
from tests.contracts.sampler_contract import METRICS, SPACES, SamplerContract, measured, some_seen

BOX = SPACES["box"]
NOTHING = measured(torch.zeros(0, 3, dtype=torch.float64))


def losses(X: Tensor, m: int = 1) -> Observations:
    """Return ``m`` losses, each least near a corner of its own."""
    target = 0.2 + 0.6 * torch.eye(m, X.shape[-1], dtype=torch.float64)
    metrics = tuple(Metric(f"m {i}", direction="min", kind="loss") for i in range(m))
    return Observations(X, torch.cdist(X, target).square(), metrics)


@pytest.mark.slow
class TestTheStart(SamplerContract):
    """The laws up to the first fit; a fit takes seconds, and has tests of its own below."""

    @pytest.fixture
    def sampler(self) -> Sampler:
        return AxSampler(initial=16)

    @pytest.fixture(params=["box", "sum"])
    def space(self, request: pytest.FixtureRequest) -> CoefficientSpace:
        return SPACES[request.param]


@pytest.mark.slow
def test_a_fit_is_decided_by_the_seed_and_leaves_random_states_alone() -> None:
    seen, generator = some_seen(BOX, 9), make_generator(3)
    states = generator.get_state(), torch.random.get_rng_state()
    first = AxSampler().propose(seen, BOX, 2, generator=generator)
    assert torch.equal(generator.get_state(), states[0])
    assert torch.equal(torch.random.get_rng_state(), states[1])
    torch.rand(5, generator=generator)
    assert torch.equal(AxSampler().propose(seen, BOX, 2, generator=generator), first)
    more = AxSampler().propose(seen, BOX, 2, pending=first, generator=generator)
    assert len(torch.unique(torch.cat([seen.X, first, more]), dim=0)) == 13


@pytest.mark.parametrize("name", ["box", "wide", "sum"])
def test_it_starts_at_the_centre_and_goes_on_with_sobol_points(name: str) -> None:
    space, generator = SPACES[name], make_generator(1)
    start = AxSampler().propose(NOTHING, space, 9, generator=generator)
    space.check(start)
    if name != "sum":
        assert torch.equal(start[:1], space.bounds.mean(0, keepdim=True))
    # One sequence, however it is asked for and whatever fails; only half need be known.
    X = AxSampler().propose(measured(start[:1]), space, 2, generator=generator)
    assert torch.equal(X, start[1:3])
    X = AxSampler().propose(NOTHING, space, 2, pending=start[:4], generator=generator)
    assert torch.equal(X, start[4:6])
    seen = measured(start[:6], failed=(0, 3))
    X = AxSampler().propose(seen, space, 1, generator=generator)
    assert torch.equal(X, start[6:7])


def test_the_model_takes_over_after_the_start(caplog: pytest.LogCaptureFixture) -> None:
    generator = make_generator(1)
    seen = losses(AxSampler().propose(losses(NOTHING.X), BOX, 8, generator=generator))
    X = AxSampler().propose(seen, BOX, 1, generator=generator)
    BOX.check(X)
    assert not is_repeat(X, seen.X, BOX).any()
    start = AxSampler(initial=9).propose(seen, BOX, 1, generator=generator)
    assert not torch.equal(X, start)
    assert not caplog.records  # the Sobol points did not go on for want of a model


@pytest.mark.slow
def test_it_minimises_what_is_to_be_minimised() -> None:
    seen = losses(NOTHING.X)
    for _ in range(16):
        X = AxSampler().propose(seen, BOX, 1, generator=make_generator(0))
        seen = seen.append(losses(X))
    assert float(seen.Y[10:].min()) < 0.005


@pytest.mark.slow
@pytest.mark.parametrize("thresholds", [False, True])
@pytest.mark.parametrize("m", [2, 6])
def test_model_points_depend_on_values_directions_and_thresholds(
    m: int, thresholds: bool, caplog: pytest.LogCaptureFixture
) -> None:
    space = CoefficientSpace.box([f"e{i}" for i in range(m)])
    X = torch.cat([space.anchors().X, space.sample(8, generator=make_generator(0))])
    seen = losses(X, m)
    found = AxSampler(thresholds=thresholds).propose(seen, space, 2, generator=make_generator(0))
    space.check(found)
    assert not caplog.records
    # All targets lie in [0.2, 0.8]: nothing near the far corner is worth measuring.
    assert float(losses(found, m).Y.amin(-1).max()) < float(seen.Y.amin(-1).max())


@pytest.mark.slow
def test_failures_are_not_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    generator = make_generator(2)
    seen = losses(AxSampler().propose(losses(NOTHING.X), BOX, 6, generator=generator))
    for _ in range(3):
        X = AxSampler().propose(seen, BOX, 1, generator=generator)
        assert not is_repeat(X, seen.X, BOX, tolerance=1e-2).any()
        seen = seen.append(Observations.failed(X, seen.metrics, "it broke"))
    assert not caplog.records


@pytest.mark.slow
def test_noise_that_is_known_for_some_is_inferred_for_all(
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen = some_seen(BOX, 9)
    Yvar = seen.Yvar.clone()
    Yvar[3, 0] = torch.nan
    some = Observations(seen.X, seen.Y, METRICS, Yvar=Yvar)
    BOX.check(AxSampler().propose(some, BOX, 1, generator=make_generator(0)))
    assert not caplog.records


def test_evaluations_outside_the_space_are_left_out() -> None:
    far = torch.full((1, 3), 2.0, dtype=torch.float64)
    start = AxSampler().propose(losses(NOTHING.X), BOX, 6, generator=make_generator(0))
    seen = losses(torch.cat([start, far]))
    X = AxSampler().propose(seen, BOX, 1, generator=make_generator(0))
    BOX.check(X)


def test_it_says_nothing_and_leaves_logging_and_warnings_alone(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    AxSampler().propose(NOTHING, BOX, 1, generator=make_generator(0))  # imports Ax
    capfd.readouterr()
    logger, filters = logging.getLogger("ax"), list(warnings.filters)
    before = (logger.handlers, logger.propagate)
    seen = losses(AxSampler().propose(losses(NOTHING.X), BOX, 6, generator=make_generator(0)))
    AxSampler().propose(seen, BOX, 1, generator=make_generator(0))
    assert (logger.handlers, logger.propagate) == before
    assert warnings.filters == filters
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.name.startswith("ax")]


@pytest.mark.parametrize(
    "space",
    [
        SPACES["simplex"],
        CoefficientSpace(
            ("a", "b"), (0.0,) * 2, (1.0,) * 2, (LinearConstraint((1.0, -1.0), 0.0, True),)
        ),
    ],
)
def test_equality_constraints_are_refused(space: CoefficientSpace) -> None:
    empty = measured(torch.zeros(0, space.d, dtype=torch.float64))
    with pytest.raises(SamplerError, match="no equality constraints") as caught:
        AxSampler().propose(empty, space, 1, generator=make_generator(0))
    assert "sampler=adaptive" in str(caught.value.hint)


def test_a_missing_ax_is_told_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ax.api.client", None)
    with pytest.raises(MissingDependencyError, match="needs Ax") as caught:
        AxSampler().propose(NOTHING, BOX, 1, generator=make_generator(0))
    assert caught.value.hint == 'pip install "ax-platform>=1.3.1"'


@pytest.mark.slow
def test_ax_is_imported_at_the_first_proposal_only_and_in_silence() -> None:
    code = """
import sys
from map_bo.data import Metric, Observations
from map_bo.rng import make_generator
from map_bo.samplers.baselines.ax import AxSampler
from map_bo.space import CoefficientSpace
sampler, empty = AxSampler(), Observations.empty(2, [Metric("m")])
print("ax" in sys.modules)
sampler.propose(empty, CoefficientSpace.box(("a", "b")), 1, generator=make_generator(0))
print("ax" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
    assert done.stderr == ""


def test_settings_are_checked() -> None:
    with pytest.raises(SamplerError, match="initial is 0"):
        AxSampler(initial=0)
