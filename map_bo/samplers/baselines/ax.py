"""Ax as a sampler: its default multi-objective strategy, an external baseline behind our protocol.

Ax (Olson et al., *Ax: A Platform for Adaptive Experimentation*, 2025) decides alone: it starts at
the centre of the space, goes on with Sobol points, then fits a Gaussian process to each metric and
maximises a noisy hypervolume acquisition of its choice (in 1.3.1 qLogNEHVI up to four metrics,
qLogNParEGO beyond). The project's own links, surrogates and anchors take no part in it.

The sampler keeps no state: at every call an Ax experiment is built anew from what was seen, with a
seed from the generator. Ax is imported at the first proposal, which takes some seconds.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from botorch.exceptions.errors import BotorchError
from linear_operator.utils.errors import NanError, NotPSDError
from torch import Generator, Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import SamplerError
from map_bo.rng import child_seed
from map_bo.samplers.baselines.ax_library import import_ax, quiet
from map_bo.samplers.designs.space_filling import fresh_points, is_repeat
from map_bo.samplers.posterior.driven import NEAREST
from map_bo.scale import Scale
from map_bo.space import CoefficientSpace

if TYPE_CHECKING:
    from ax.api.client import Client

__all__ = ["AxSampler"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AxSampler:
    """Ax's default strategy, "Center+Sobol+MBM:fast" in Ax 1.3.1.

    Evaluations that succeeded are completed trials, with the standard error of the mean where the
    variance of every one of them is known; pending points are running trials; failed evaluations
    are abandoned trials, which Ax neither fits nor suggests again. Evaluations outside the space
    are left out. The Sobol points go on, with the reason in the log, when Ax cannot fit its model
    or repeats a point.

    A choice is a categorical parameter of Ax; settings that only one option has are parameters
    everywhere, and put to their defaults in what Ax proposes under another.

    Any number of metrics works. Measured with Ax 1.3.1 on one core, a proposal of one point takes
    some 10 seconds with four metrics and 25 evaluations, and less with more metrics, for which Ax
    takes another acquisition.

    Attributes:
        initial: Points of the centre and the Sobol sequence, evaluations of other origin included
            in the count; 5 is Ax's default. Failed evaluations do not count.
        thresholds: Whether Ax is told a reference point (an objective threshold a metric): the
            worst value among the base and the experts, where two of them were seen. By default it
            infers one from the data.
    """

    takes_choice: ClassVar[bool] = True

    initial: int = 5
    thresholds: bool = False

    def __post_init__(self) -> None:
        if self.initial < 1:
            raise SamplerError(f"initial is {self.initial}", hint="Ax starts with 1 point or more")

    def propose(
        self,
        seen: Observations,
        space: CoefficientSpace,
        n: int,
        *,
        pending: Tensor | None = None,
        generator: Generator,
    ) -> Tensor:
        """Return ``n x d`` points to evaluate next; see :class:`Sampler`.

        Raises:
            SamplerError: When the space has equality constraints, which Ax does not know; when
                ``n`` is negative, or the evaluations are of another space.
            MissingDependencyError: When Ax is not installed.
        """
        if any(constraint.equality for constraint in space.constraints):
            raise SamplerError(
                "Ax has no equality constraints, and this space requires one (the simplex does)",
                hint="use sampler=adaptive, or bound the sum from above instead",
            )
        import_ax("sampler=ax")
        waiting = torch.zeros(0, space.d, dtype=torch.float64)
        if pending is not None:
            waiting = pending.to(torch.float64)
        succeeded = int(seen.ok.sum())
        first = n
        if succeeded >= max(1, self.initial // 2):  # as Ax counts: half of them must be observed
            first = min(n, max(0, self.initial - succeeded - len(waiting)))
        start = self._start(seen, space, len(seen) + len(waiting) + max(n, 0), generator)
        found = fresh_points(start, seen, space, first, pending=pending)
        if first < n:
            waiting = torch.cat([waiting, found])
            modelled = self._modelled(seen, space, n - first, waiting, generator)
            found, waiting = torch.cat([found, modelled]), torch.cat([waiting, modelled])
            start = self._start(seen, space, len(seen) + len(waiting) + n, generator)
            rest = fresh_points(start, seen, space, n - len(found), pending=waiting)
            found = torch.cat([found, rest])
        return found

    def _start(
        self, seen: Observations, space: CoefficientSpace, n: int, generator: Generator
    ) -> Iterator[Tensor]:
        """Yield chunks of the points that Ax starts an experiment with: the centre, then Sobol."""
        seed, drawn = child_seed(generator, "ax", "start"), 0
        while True:
            with quiet():
                client = self._client(space, seen.metrics, seed, initial=n)
                points = _points(client, n, space)
            yield points[drawn:]
            drawn, n = len(points), 2 * n

    def _modelled(
        self,
        seen: Observations,
        space: CoefficientSpace,
        n: int,
        waiting: Tensor,
        source: Generator,
    ) -> Tensor:
        """Return up to ``n x d`` new points that Ax's model asks for."""
        from ax.exceptions.core import AxError

        seed = child_seed(source, "ax", len(seen), len(waiting))
        inside = seen.select(space.contains(seen.X))
        failures = (AxError, BotorchError, NanError, NotPSDError, RuntimeError, ValueError)
        try:
            with quiet():
                client = self._client(space, seen.metrics, seed, seen=inside)
                _attach(client, inside, space)
                for row in space.project(waiting):
                    client.attach_trial(_named(row, space))
                points = _points(client, n, space)
        except failures as error:
            _log.warning("Ax's Sobol points go on: %s: %s", type(error).__name__, error)
            return waiting[:0]
        known, found = torch.cat([seen.X, waiting]), waiting[:0]
        for row in points:
            point = row.unsqueeze(0)
            if bool(is_repeat(point, torch.cat([known, found]), space, tolerance=NEAREST)):
                _log.warning("Ax's Sobol points go on: it asks for a point that is known already")
            else:
                found = torch.cat([found, point])
        return found

    def _client(
        self,
        space: CoefficientSpace,
        metrics: tuple[Metric, ...],
        seed: int,
        *,
        seen: Observations | None = None,
        initial: int = 0,
    ) -> Client:
        """Return an experiment without trials: ``initial`` points, then the model."""
        from ax.api.client import Client
        from ax.api.configs import ChoiceParameterConfig, RangeParameterConfig

        client, placed = Client(random_seed=seed), space.placed_choice
        client.configure_experiment(
            # Names of our own: Ax takes those of coefficients and metrics for expressions.
            [
                ChoiceParameterConfig(
                    name=f"c{i}",
                    values=list(range(placed.count)),
                    parameter_type="int",
                    is_ordered=False,
                )
                if placed is not None and i == placed.column
                else RangeParameterConfig(name=f"c{i}", bounds=bounds, parameter_type="float")
                for i, bounds in enumerate(zip(space.lower, space.upper, strict=True))
                if bounds[0] < bounds[1]
            ],
            [
                " + ".join(f"{weight!r} * c{i}" for i, weight in enumerate(weights) if weight)
                + f" <= {bound!r}"
                for weights, bound in ((c.weights, c.bound) for c in space.constraints_on_free)
            ],
        )
        thresholds = None
        if self.thresholds and seen is not None and len(metrics) > 1:
            worst = Scale.of(seen, space).point.tolist()
            thresholds = [
                f"m{i} {'>=' if metric.direction == 'max' else '<='} {value!r}"
                for i, (metric, value) in enumerate(zip(metrics, worst, strict=True))
            ]
        signs = ("" if metric.direction == "max" else "-" for metric in metrics)
        client.configure_optimization(
            ", ".join(f"{sign}m{i}" for i, sign in enumerate(signs)), thresholds
        )
        client.configure_generation_strategy(
            initialization_budget=initial,
            initialization_random_seed=seed,
            allow_exceeding_initialization_budget=True,
        )
        return client


def _attach(client: Client, seen: Observations, space: CoefficientSpace) -> None:
    """Tell an experiment what was seen."""
    errors = seen.Yvar.sqrt()
    # A metric's noise is given for all its values or inferred from them, never half and half.
    errors[:, ~torch.isfinite(errors[seen.ok]).all(0)] = torch.nan
    rows = zip(space.project(seen.X), seen.Y.tolist(), errors.tolist(), seen.failures, strict=True)
    for x, values, spread, reason in rows:
        trial = client.attach_trial(_named(x, space))
        if reason is not None or any(map(math.isnan, values)):  # Ax takes whole trials only
            client.mark_trial_abandoned(trial)
            continue
        client.complete_trial(
            trial,
            {
                f"m{i}": value if math.isnan(sem) else (value, sem)
                for i, (value, sem) in enumerate(zip(values, spread, strict=True))
            },
        )


def _points(client: Client, n: int, space: CoefficientSpace) -> Tensor:
    """Return up to ``n x d`` points that an experiment generates next."""
    if n == 0:
        return torch.zeros(0, space.d, dtype=torch.float64)
    trials = client.get_next_trials(n).values()
    X = [[trial.get(f"c{i}", low) for i, low in enumerate(space.lower)] for trial in trials]
    # Ax lets a constraint be missed by its rounding.
    return space.project(torch.tensor(X, dtype=torch.float64).reshape(-1, space.d))


def _named(x: Tensor, space: CoefficientSpace) -> dict[str, float]:
    """Return what is searched of a point by Ax's names; what is fixed is no parameter of Ax."""
    bounds = zip(x.tolist(), space.lower, space.upper, strict=True)
    found = {f"c{i}": value for i, (value, low, high) in enumerate(bounds) if low < high}
    placed = space.placed_choice
    if placed is not None and placed.free:
        found[f"c{placed.column}"] = int(placed.codes(x))
    return found
