from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from map_bo.data import Metric, Observations
from map_bo.errors import SamplerError
from map_bo.rng import child_seed, make_generator
from map_bo.samplers.sampler import Sampler
from map_bo.space import CoefficientSpace
from tests.contracts.sampler_contract import SamplerContract, measured, some_seen

optuna = pytest.importorskip("optuna", reason="needs the benchmark extra")

from optuna.samplers import NSGAIIISampler  # noqa: E402

from benchmarks.quality.optuna_baselines import NSGA3, TPE  # noqa: E402


class TestTPE(SamplerContract):
    @pytest.fixture
    def sampler(self) -> Sampler:
        return TPE(startup=5)


class TestNSGA3(SamplerContract):
    @pytest.fixture
    def sampler(self) -> Sampler:
        return NSGA3(population=5)


KINDS: list[Any] = [TPE, NSGA3]
BOX = CoefficientSpace.box(("a", "b", "c"))


def run(sampler: Sampler, n: int, seed: int = 0, failed: tuple[int, ...] = ()) -> Observations:
    seen = measured(torch.zeros(0, 3, dtype=torch.float64))
    while len(seen) < n:
        X = sampler.propose(seen, BOX, 1, generator=make_generator(seed))
        seen = seen.append(measured(X, failed=(0,) if len(seen) in failed else ()))
    return seen


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_replaying_nsga3_is_the_study_that_never_stopped() -> None:
    generator = make_generator(3)
    seen = run(NSGA3(population=6), 40, seed=3, failed=(4, 15))
    sampler = NSGAIIISampler(population_size=6, seed=child_seed(generator, "nsga3"))
    study = optuna.create_study(sampler=sampler, directions=["maximize", "minimize"])
    known: set[tuple[float, ...]] = set()
    for x, y, reason in zip(seen.X, seen.Y.tolist(), seen.failures, strict=True):
        while True:
            trial = study.ask()
            native = tuple(trial.suggest_float(f"c{i}", 0.0, 1.0) for i in range(3))
            if native not in known:
                break
        known.add(native)
        assert tuple(x.tolist()) == native
        if reason is None:
            study.tell(trial, y)
        else:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)


@pytest.mark.parametrize("kind", KINDS)
def test_directions_are_those_of_the_metrics(kind: Any) -> None:
    # The first metric is best near one corner, the second, a loss, near the other: the middle of
    # what is proposed late lies between these, and turns about when the directions do.
    seen = run(kind(), 36)
    turned = measured(seen.X)
    flipped = tuple(
        replace(metric, direction="min" if metric.direction == "max" else "max", kind="unbounded")
        for metric in seen.metrics
    )
    worst = Observations(turned.X, turned.Y, flipped)
    for _ in range(12):
        seen = seen.append(measured(kind().propose(seen, BOX, 1, generator=make_generator(1))))
        X = kind().propose(worst, BOX, 1, generator=make_generator(1))
        worst = worst.append(Observations(X, measured(X).Y, flipped))
    Y, bad = seen.Y[36:].mean(0), worst.Y[36:].mean(0)
    assert Y[0] > bad[0]
    assert Y[1] < bad[1]


@pytest.mark.parametrize("kind", KINDS)
def test_evaluations_of_another_box_are_left_out(kind: Any) -> None:
    seen = some_seen(BOX, 14)
    far = seen.append(measured(torch.full((1, 3), 2.0, dtype=torch.float64)))
    BOX.check(kind().propose(far, BOX, 2, generator=make_generator(0)))


@pytest.mark.parametrize("kind", KINDS)
def test_optuna_says_nothing_and_keeps_its_level(
    kind: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    before = optuna.logging.get_verbosity()
    kind().propose(some_seen(BOX, 14), BOX, 1, generator=make_generator(0))
    assert optuna.logging.get_verbosity() == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_metrics(kind: Any, m: int) -> None:
    X = BOX.sample(14, generator=make_generator(0))
    Y = torch.cdist(X, BOX.sample(m, generator=make_generator(1)))
    seen = Observations(X, Y, tuple(Metric(f"m{i}", kind="unbounded") for i in range(m)))
    BOX.check(kind().propose(seen, BOX, 2, generator=make_generator(0)))


def test_settings_are_checked() -> None:
    with pytest.raises(SamplerError, match="population of 1 cannot mate"):
        NSGA3(population=1)
