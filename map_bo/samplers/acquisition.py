"""The sampler driven by the posterior: noisy expected hypervolume improvement, and the default."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from botorch.acquisition.acquisition import AcquisitionFunction
from botorch.acquisition.logei import qLogNoisyExpectedImprovement
from botorch.acquisition.multi_objective.objective import GenericMCMultiOutputObjective
from botorch.acquisition.multi_objective.utils import prune_inferior_points_multi_objective
from botorch.acquisition.objective import GenericMCObjective
from botorch.exceptions.errors import BotorchError
from botorch.exceptions.warnings import BotorchWarning
from botorch.optim.initializers import initialize_q_batch
from botorch.optim.optimize import optimize_acqf
from botorch.sampling.normal import SobolQMCNormalSampler
from linear_operator.utils.errors import NanError, NotPSDError
from linear_operator.utils.warnings import NumericalWarning
from torch import Generator, Tensor

from map_bo.data import Metric, Observations, to_maximisation
from map_bo.errors import SamplerError, SurrogateError
from map_bo.rng import child, child_seed
from map_bo.samplers.improvement import LogNoisyImprovement
from map_bo.samplers.sampler import Sampler
from map_bo.samplers.space_filling import Sobol, is_repeat, sobol_points
from map_bo.space import CoefficientSpace
from map_bo.surrogates.prediction import objective
from map_bo.surrogates.quadratic import Quadratic
from map_bo.surrogates.surrogate import Surrogate, SurrogateModel

__all__ = ["Adaptive", "QLogNEHVI", "reference_point"]

_MOST_METRICS = 4
_LOWER = 0.1  # share of the observed range below the worst value, where no anchor is at hand
_NEAR = 0.1  # standard deviation of starts around good observations, share of the box
_SAME = 1e-4  # of a coefficient's range: nearer proposals would measure the same thing again
_FAILURES = (
    SurrogateError,
    BotorchError,
    NanError,
    NotPSDError,
    torch.linalg.LinAlgError,  # type: ignore[attr-defined]
    ArithmeticError,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QLogNEHVI:
    """Maximises the noisy expected hypervolume improvement over the surrogate's posterior.

    The first ``initial`` points come from the design. Then the surrogate is fitted to what
    succeeded, and each further point maximises the logarithm of the expected improvement of the
    noisy hypervolume (Daulton, Balandat and Bakshy, 2021; Ament et al., 2023), points of one call
    one after the other. Pending points, and those of the same call, count as if their values were
    known up to the posterior; so do failed evaluations, so that neither they nor their
    surroundings are proposed over and over. With a single metric it is the noisy expected
    improvement.

    The design goes on instead, with the reason in the log, when fewer evaluations succeeded than
    there are coefficients and one more (or than ``initial``, if that is less), when the surrogate
    cannot be fitted, and when the optimisation fails numerically or ends in points known already.

    Attributes:
        surrogate: What is fitted; ``None`` is the quadratic surrogate.
        design: Proposes the initial points.
        initial: Evaluations, seen or pending, before the first fit. ``None``: as many as a box has
            anchors (base, ``N`` experts, uniform blend) and ``max(2, N // 2)`` more.
        restarts: Starts of the optimiser.
        raw_samples: Points that the starts are chosen from: half of them cover the space, half
            lie around the observations on the front.
        mc_samples: Samples of the posterior.
        reference: Reference point by metric name, in the metrics' own units; metrics left out
            keep the default of :func:`reference_point`.
        steps: Steps of the optimiser from each start.
    """

    surrogate: Surrogate | None = None
    design: Sampler = field(default_factory=Sobol)
    initial: int | None = None
    restarts: int = 4
    raw_samples: int = 64
    mc_samples: int = 32
    reference: Mapping[str, float] | None = None
    steps: int = 30

    def __post_init__(self) -> None:
        for name in ("restarts", "raw_samples", "mc_samples", "steps"):
            if getattr(self, name) < 1:
                raise SamplerError(
                    f"{name} is {getattr(self, name)}", hint=f"{name} must be at least 1"
                )
        if self.initial is not None and self.initial < 0:
            raise SamplerError(
                f"initial is {self.initial}", hint="give 0 or more, or None for the default"
            )

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
            SamplerError: With more than four metrics, whose box decompositions grow out of
                bounds; or when ``reference`` names an unknown metric.
        """
        _check(seen.metrics, self.reference)
        waiting = seen.X[:0] if pending is None else pending.to(torch.float64)
        count = len(seen) + len(waiting)
        first = min(n, max(0, self.initial_points(space) - count))
        succeeded = int(seen.ok.sum())
        needed = max(2, min(self.initial_points(space), space.d + 1))
        if first == n or succeeded < needed:
            if first < n:
                _log.warning("%d of %d evaluations succeeded: the design goes on", succeeded, count)
            return self.design.propose(seen, space, n, pending=pending, generator=generator)
        chosen = self.design.propose(seen, space, first, pending=pending, generator=generator)
        waiting = torch.cat([waiting, chosen])
        with _seeded(child_seed(generator, "acquisition", count)):
            try:
                found = self._maximise(seen, space, n - first, waiting, generator)
            except _FAILURES as error:
                _log.warning("the design goes on: %s: %s", type(error).__name__, error)
                found = seen.X[:0]
        chosen, waiting = torch.cat([chosen, found]), torch.cat([waiting, found])
        rest = self.design.propose(
            seen, space, n - len(chosen), pending=waiting, generator=generator
        )
        return torch.cat([chosen, rest])

    def initial_points(self, space: CoefficientSpace) -> int:
        """Return how many evaluations come before the first fit."""
        experts = len(space.experts)
        return experts + 2 + max(2, experts // 2) if self.initial is None else self.initial

    def _maximise(
        self,
        seen: Observations,
        space: CoefficientSpace,
        n: int,
        waiting: Tensor,
        generator: Generator,
    ) -> Tensor:
        model = (Quadratic() if self.surrogate is None else self.surrogate).fit(seen, space)
        known = seen.X
        as_pending = torch.cat([seen.X[~seen.ok], waiting])
        reference = reference_point(seen, space, self.reference)
        source = child(generator, "acquisition", len(seen) + len(waiting))
        acquisition = self._acquisition(model, seen.succeeded(), reference, as_pending, source)
        found = seen.X[:0]
        for i in range(n):
            if i:
                acquisition.set_X_pending(torch.cat([as_pending, found]))
            starts = self._raw_samples(model, seen.succeeded(), space, child(source, i))
            point = self._best(acquisition, starts, space, torch.cat([known, waiting, found]))
            if not len(point):
                _log.warning("the design goes on: the acquisition is best at points known already")
                break
            found = torch.cat([found, point])
        return found

    def _acquisition(
        self,
        model: SurrogateModel,
        good: Observations,
        reference: Tensor,
        pending: Tensor,
        source: Generator,
    ) -> AcquisitionFunction:
        # Metrics are scaled by their observed range: botorch's smoothing has absolute widths.
        to_metric = objective(model)
        gains = to_maximisation(good.Y, good.metrics)
        scale = (gains.amax(0) - torch.minimum(reference, gains.amin(0))).clamp_min(1e-12)
        seed = child_seed(source, "noise")
        sampler = SobolQMCNormalSampler(torch.Size([self.mc_samples]), seed=seed)

        def scaled(samples: Tensor, X: Tensor | None = None) -> Tensor:
            return (to_metric(samples, X) - reference) / scale

        def only(samples: Tensor, X: Tensor | None = None) -> Tensor:
            return scaled(samples, X)[..., 0]

        if len(good.metrics) == 1:
            return qLogNoisyExpectedImprovement(
                model,
                X_baseline=good.X,
                sampler=sampler,
                objective=GenericMCObjective(only),
                X_pending=pending if len(pending) else None,
                prune_baseline=True,
                cache_root=False,
            )
        zero = torch.zeros_like(reference)
        # Points that are on the front of no sample change nothing but the time it takes.
        baseline = prune_inferior_points_multi_objective(
            model,
            good.X,
            ref_point=zero,
            objective=GenericMCMultiOutputObjective(scaled),
            num_samples=2 * self.mc_samples,
        )
        return LogNoisyImprovement(
            model,
            ref_point=zero,
            X_baseline=baseline if len(baseline) else good.X[:1],
            sampler=sampler,
            objective=GenericMCMultiOutputObjective(scaled),
            X_pending=pending if len(pending) else None,
        )

    def _raw_samples(
        self, model: SurrogateModel, good: Observations, space: CoefficientSpace, source: Generator
    ) -> Tensor:
        """Return the starts to choose from, ``raw_samples x d`` and no more."""
        near = self.raw_samples // 2
        spread = _first(sobol_points(space, generator=source), self.raw_samples - near)
        gains = to_maximisation(good.Y, good.metrics)
        # The observations that are best for some weighting are on the front; which, is left to
        # chance, so that starts differ from call to call.
        weights = torch.rand(near, gains.shape[-1], generator=source, dtype=gains.dtype)
        scaled = (gains - gains.amin(0)) / (gains.amax(0) - gains.amin(0)).clamp_min(1e-12)
        rows = (scaled.unsqueeze(0) / weights.clamp_min(1e-3).unsqueeze(1)).amin(-1).argmax(-1)
        step = torch.randn(near, space.d, generator=source, dtype=torch.float64) * _NEAR
        around = space.project(space.unnormalise(space.normalise(good.X[rows]) + step))
        return torch.cat([spread, around])

    def _best(
        self,
        acquisition: AcquisitionFunction,
        starts: Tensor,
        space: CoefficientSpace,
        known: Tensor,
    ) -> Tensor:
        """Return the best new point found, ``1 x d``, or ``0 x d`` when there is none."""
        with torch.no_grad():
            values = torch.cat([acquisition(part.unsqueeze(1)) for part in torch.split(starts, 32)])
        if not bool(torch.isfinite(values).any()):
            raise ArithmeticError("the acquisition is nowhere finite")
        values = values.nan_to_num(nan=-math.inf)
        finite = torch.isfinite(values)
        count = min(self.restarts, int(finite.sum()))
        chosen, _ = initialize_q_batch(starts[finite].unsqueeze(1), values[finite], n=count)
        inequalities, equalities = _constraints(space)
        found, found_values = optimize_acqf(
            acquisition,
            bounds=space.bounds,
            q=1,
            num_restarts=count,
            batch_initial_conditions=chosen,
            inequality_constraints=inequalities,
            equality_constraints=equalities,
            options={"maxiter": self.steps},
            return_best_only=False,
            retry_on_optimization_warning=False,
        )
        points = torch.cat([space.project(found.squeeze(1)), starts])
        values = torch.cat([torch.as_tensor(found_values).nan_to_num(nan=-math.inf), values])
        order = values.argsort(descending=True, stable=True)
        new = order[~is_repeat(points[order], known, space, tolerance=_SAME)]
        return points[new[:1]]


@dataclass(frozen=True)
class Adaptive:
    """The default: noisy expected hypervolume improvement, where the metrics are few enough.

    With at most four metrics it is :class:`QLogNEHVI`, with more its design all the way.

    Attributes:
        acquisition: The sampler for up to four metrics.
    """

    acquisition: QLogNEHVI = field(default_factory=QLogNEHVI)

    def propose(
        self,
        seen: Observations,
        space: CoefficientSpace,
        n: int,
        *,
        pending: Tensor | None = None,
        generator: Generator,
    ) -> Tensor:
        """Return ``n x d`` points to evaluate next; see :class:`Sampler`."""
        few = len(seen.metrics) <= _MOST_METRICS
        chosen: Sampler = self.acquisition if few else self.acquisition.design
        return chosen.propose(seen, space, n, pending=pending, generator=generator)


def reference_point(
    seen: Observations, space: CoefficientSpace, given: Mapping[str, float] | None = None
) -> Tensor:
    """Return the reference point of the acquisition, ``m`` values turned so that larger is better.

    For each metric it is the worst value among the base and the experts as observed. Where fewer
    than two of them succeeded it is a tenth of the observed range below the worst observation.
    Values in ``given`` (by metric name, own units) take precedence.
    """
    good = seen.succeeded()
    gains = to_maximisation(good.Y, good.metrics)
    anchors = space.anchors()
    ends = anchors.X[[kind != "blend" for kind in anchors.kinds]]
    measured = is_repeat(good.X, ends, space)
    if int(measured.sum()) >= 2:
        point = gains[measured].amin(0)
    else:
        point = gains.amin(0) - _LOWER * (gains.amax(0) - gains.amin(0))
    values = {} if given is None else given
    own = to_maximisation(point, good.metrics)
    for i, metric in enumerate(good.metrics):
        own[i] = values.get(metric.name, float(own[i]))
    return to_maximisation(own, good.metrics)


def _check(metrics: tuple[Metric, ...], reference: Mapping[str, float] | None) -> None:
    if len(metrics) > _MOST_METRICS:
        raise SamplerError(
            f"qLogNEHVI takes up to {_MOST_METRICS} metrics and there are {len(metrics)}",
            hint="use sampler=sobol, or sampler=adaptive, which turns to it by itself",
        )
    names = [metric.name for metric in metrics]
    unknown = sorted(set(reference or ()) - set(names))
    if unknown:
        raise SamplerError(
            f"the reference point names unknown metrics: {', '.join(unknown)}",
            hint=f"the metrics are {', '.join(names)}",
        )


def _constraints(
    space: CoefficientSpace,
) -> tuple[list[tuple[Tensor, Tensor, float]] | None, list[tuple[Tensor, Tensor, float]] | None]:
    """Return the constraints as botorch wants them: ``sum_i a_i x_i >= b``, and ``== b``."""
    inequalities, equalities = [], []
    for constraint in space.constraints:
        weights = torch.tensor(constraint.weights, dtype=torch.float64)
        indices = weights.nonzero().flatten()
        if constraint.equality:
            equalities.append((indices, weights[indices], constraint.bound))
        else:
            inequalities.append((indices, -weights[indices], -constraint.bound))
    return inequalities or None, equalities or None


def _first(points: Iterator[Tensor], n: int) -> Tensor:
    found = [next(points)]
    while sum(map(len, found)) < n:
        found.append(next(points))
    return torch.cat(found)[:n]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    # Botorch draws from torch's global generator here and there; it gets a seed of its own, and
    # afterwards the generator is as it was.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.default_generator.manual_seed(seed)
        for category in (BotorchWarning, NumericalWarning):
            warnings.simplefilter("ignore", category=category)
        # The optimiser reports that it stopped at its limit of steps, which is meant.
        warnings.filterwarnings("ignore", message="Optimization failed", category=RuntimeWarning)
        yield
