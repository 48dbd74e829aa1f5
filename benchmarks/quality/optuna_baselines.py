"""Optuna's multi-objective samplers behind the project's protocol, to compare with.

Optuna (Akiba et al. 2019) proposes, through its own library and with its own defaults save for
what is said below; constraints it knows nothing of: what leaves them is moved to the nearest point
of the space. Its studies are rebuilt at every call from what was seen, with seeds from the
generator, so that these baselines can be interrupted, resumed and driven like any other sampler.
Failed evaluations are failed trials. Needs the ``benchmark`` extra.
"""

from __future__ import annotations

import logging
import warnings
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import optuna
import torch
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, NSGAIIISampler, TPESampler
from optuna.study import Study, StudyDirection
from optuna.trial import TrialState
from torch import Generator, Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import SamplerError
from map_bo.rng import child_seed
from map_bo.samplers.designs.space_filling import fresh_points, is_repeat
from map_bo.space import CoefficientSpace

__all__ = ["NSGA3", "TPE"]

_REPEATS = 1000  # in a row, after which a point is taken for one that the study never asked for


@dataclass(frozen=True)
class _Optuna:
    @abstractmethod
    def _study(
        self, seen: Observations, space: CoefficientSpace, pending: Tensor, generator: Generator
    ) -> Study:
        """Return a study that knows what was seen and what is pending."""

    def propose(
        self,
        seen: Observations,
        space: CoefficientSpace,
        n: int,
        *,
        pending: Tensor | None = None,
        generator: Generator,
    ) -> Tensor:
        """Return ``n x d`` points to evaluate next; see :class:`map_bo.samplers.sampler.Sampler`.

        Trials at points that are known already are asked for and passed over.
        """
        waiting = torch.zeros(0, space.d, dtype=torch.float64)
        if pending is not None:
            waiting = pending.to(torch.float64)

        def asked(study: Study) -> Iterator[Tensor]:
            while True:
                yield _ask(study, space)[1]

        fresh_points(iter(()), seen, space, min(n, 0), pending=pending)  # refuses what is wrong
        with _quiet():
            inside = seen.select(space.contains(seen.X))
            study = self._study(inside, space, waiting, generator)
            return fresh_points(asked(study), seen, space, n, pending=pending)


@dataclass(frozen=True)
class TPE(_Optuna):
    """Optuna's tree-structured Parzen estimator, multi-objective (Ozaki et al. 2022).

    Running trials count as bad ones (``constant_liar``), as Optuna advises for batches.

    Attributes:
        startup: Random trials at the start; 10 is Optuna's default.
    """

    startup: int = 10

    def _study(
        self, seen: Observations, space: CoefficientSpace, pending: Tensor, generator: Generator
    ) -> Study:
        seed = child_seed(generator, "tpe", len(seen), len(pending))
        sampler = TPESampler(n_startup_trials=self.startup, seed=seed, constant_liar=True)
        study, box = _new(sampler, seen.metrics), _box(space)
        for x, values, reason in zip(
            space.project(seen.X).tolist(), seen.Y.tolist(), seen.failures, strict=True
        ):
            failed = reason is not None
            study.add_trial(
                optuna.create_trial(
                    state=TrialState.FAIL if failed else TrialState.COMPLETE,
                    params=dict(zip(box, x, strict=True)),
                    distributions=box,
                    values=None if failed else values,
                )
            )
        for x in space.project(pending).tolist():
            study.enqueue_trial(dict(zip(box, x, strict=True)))
            study.ask(fixed_distributions=box)
        return study


@dataclass(frozen=True)
class NSGA3(_Optuna):
    """Optuna's NSGA-III.

    Its generations are kept in the study, so the study is lived through again: every trial that it
    asked for is asked for once more and told. A point that it did not ask for (of a batch that
    went on before its first values were known, or of another sampler) enters as a queued trial.

    Attributes:
        population: Size of a generation. ``None``: 12, or four more than there are experts where
            that is more. Optuna's default of 50 would be random search at the budgets compared.
    """

    population: int | None = None

    def __post_init__(self) -> None:
        if self.population is not None and self.population < 2:
            raise SamplerError(
                f"a population of {self.population} cannot mate", hint="give 2 or more, or None"
            )

    def _study(
        self, seen: Observations, space: CoefficientSpace, pending: Tensor, generator: Generator
    ) -> Study:
        size = self.population or max(12, len(space.experts) + 4)
        seed = child_seed(generator, "nsga3")
        sampler = NSGAIIISampler(population_size=size, seed=seed)
        study, rows = _new(sampler, seen.metrics), torch.cat([seen.X, pending])
        for i in range(len(rows)):
            trial = _again(study, space, rows[i : i + 1], rows[:i])
            if i >= len(seen):
                continue
            if seen.failures[i] is not None:
                study.tell(trial, state=TrialState.FAIL)
            else:
                study.tell(trial, seen.Y[i].tolist())
        return study


def _again(study: Study, space: CoefficientSpace, row: Tensor, earlier: Tensor) -> optuna.Trial:
    """Return the trial that is at ``row`` (``1 x d``), asked for as it was the first time."""
    for _ in range(_REPEATS):
        trial, point = _ask(study, space)
        if bool(is_repeat(point, row, space)):
            return trial
        if not bool(is_repeat(point, earlier, space)):
            break  # repeats of earlier points were passed over then as well
    study.enqueue_trial(dict(zip(_box(space), space.project(row)[0].tolist(), strict=True)))
    queued, _ = _ask(study, space)
    # Optuna numbers a trial's generation when it draws; a queued one would have none.
    _ = queued.relative_params
    return queued


def _ask(study: Study, space: CoefficientSpace) -> tuple[optuna.Trial, Tensor]:
    """Return a new trial and its point, ``1 x d``, in the space."""
    box = _box(space)
    trial = study.ask(fixed_distributions=box)
    values = [[trial.params[name] for name in box]]
    return trial, space.project(torch.tensor(values, dtype=torch.float64))


def _new(sampler: BaseSampler, metrics: tuple[Metric, ...]) -> Study:
    up, down = StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE
    directions = [up if metric.direction == "max" else down for metric in metrics]
    return optuna.create_study(sampler=sampler, directions=directions)


def _box(space: CoefficientSpace) -> dict[str, BaseDistribution]:
    return {
        f"c{i}": FloatDistribution(low, high)
        for i, (low, high) in enumerate(zip(space.lower, space.upper, strict=True))
    }


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("optuna")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant_liar is called experimental
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
