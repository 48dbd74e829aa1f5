"""What samplers that look at a posterior have in common: a design first, then points of the fit."""

from __future__ import annotations

import logging
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self, runtime_checkable

import torch
from botorch.exceptions.errors import BotorchError
from botorch.exceptions.warnings import BotorchWarning
from linear_operator.utils.errors import NanError, NotPSDError
from linear_operator.utils.warnings import NumericalWarning
from torch import Generator, Tensor

from map_bo.data import Metric, Observations, to_maximisation
from map_bo.errors import SamplerError, SurrogateError
from map_bo.rng import child, child_seed
from map_bo.samplers.designs.space_filling import Sobol, is_repeat
from map_bo.samplers.sampler import Sampler
from map_bo.space import CoefficientSpace
from map_bo.surrogates.auto import Auto
from map_bo.surrogates.prediction import objective
from map_bo.surrogates.surrogate import Surrogate, SurrogateModel, has_uncertainty
from map_bo.surrogates.validation import LeavesOneOut, validate

__all__ = [
    "NEAREST",
    "PosteriorDriven",
    "Situation",
    "TakesReference",
    "reference_point",
]

NEAREST = 1e-4  # of a coefficient's range: nearer proposals would measure the same thing again
_LOWER = 0.1  # share of the observed range below the worst value, where no anchor is at hand
_FAILURES = (
    SurrogateError,
    BotorchError,
    NanError,
    NotPSDError,
    torch.linalg.LinAlgError,  # type: ignore[attr-defined]
    ArithmeticError,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Situation:
    """What is known when the next points are to be chosen.

    Gains are metric values turned so that larger is better, less the reference point and
    divided by ``scale``: 0 is the reference, and about 1 the best that was observed.

    Attributes:
        model: The fitted surrogate.
        good: The evaluations that succeeded.
        space: The coefficients.
        taken: ``p x d`` points whose value is on its way or will never come: pending points and
            failed evaluations. They count as if their values were known up to the posterior.
        known: ``q x d`` points that must not be proposed again: everything seen or pending.
        reference: ``m`` reference point, turned so that larger is better.
        scale: ``m`` units of the gains, positive.
        generator: A source for this proposal alone.
    """

    model: SurrogateModel
    good: Observations
    space: CoefficientSpace
    taken: Tensor
    known: Tensor
    reference: Tensor
    scale: Tensor
    generator: Generator

    def gains(self) -> Callable[[Tensor, Tensor | None], Tensor]:
        """Return the function from samples on the link scale (``... x m``) to gains."""
        to_metric = objective(self.model)

        def scaled(samples: Tensor, X: Tensor | None = None) -> Tensor:
            return (to_metric(samples, X) - self.reference) / self.scale

        return scaled

    def mean_gains(self, X: Tensor) -> Tensor:
        """Return the predicted gains at ``X``: ``n x m`` for ``n x d``, differentiable."""
        return self.gains()(self.model.link_mean(X), None)

    @property
    def observed(self) -> Tensor:
        """The gains that were observed, ``n x m``."""
        return (to_maximisation(self.good.Y, self.good.metrics) - self.reference) / self.scale


@runtime_checkable
class TakesReference(Protocol):
    """A sampler that scales metrics by a reference point, and takes the run's."""

    def above(self, reference: Mapping[str, float]) -> Sampler:
        """Return the sampler with this reference point, unless it has one of its own."""
        ...


@dataclass(frozen=True)
class PosteriorDriven:
    """Base of the samplers that look through a surrogate's posterior.

    The first ``initial`` points come from the design. Then the surrogate is fitted to what
    succeeded and the points are chosen by :meth:`choose`. Pending points and failed evaluations
    count as if their values were known up to the posterior, so that neither they nor their
    surroundings are proposed over and over.

    The design goes on instead, with the reason in the log, when fewer evaluations succeeded than
    there are experts and two more (or than ``initial``, if that is less), when the surrogate
    cannot be fitted, and when the choice fails numerically or ends in points known already.

    Attributes:
        surrogate: What the sampler looks through. ``None`` is the surrogate of the run; outside
            of any run it is the default one of a run, :class:`~map_bo.surrogates.auto.Auto`.
        design: Proposes the initial points.
        initial: Evaluations, seen or pending, before the first fit. ``None``: as many as a box has
            anchors (base, ``N`` experts, uniform blend) and ``max(2, N // 2)`` more.
        reference: Reference point by metric name, in the metrics' own units; metrics left out
            keep the default of :func:`reference_point`.
    """

    surrogate: Surrogate | None = None
    design: Sampler = field(default_factory=Sobol)
    initial: int | None = None
    reference: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if self.initial is not None and self.initial < 0:
            raise SamplerError(
                f"initial is {self.initial}", hint="give 0 or more, or None for the default"
            )
        if self.surrogate is not None:
            self.check_surrogate(self.surrogate)

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
            SamplerError: When the sampler cannot handle these metrics; or when ``reference``
                names an unknown one.
        """
        return self.propose_and_tell(seen, space, n, pending=pending, generator=generator)[0]

    def propose_and_tell(
        self,
        seen: Observations,
        space: CoefficientSpace,
        n: int,
        *,
        pending: Tensor | None = None,
        generator: Generator,
    ) -> tuple[Tensor, Mapping[str, Any]]:
        """Return the points and what was fitted, with its scores; see :class:`TellsFit`."""
        self.check(seen.metrics)
        waiting = seen.X[:0] if pending is None else pending.to(torch.float64)
        count = len(seen) + len(waiting)
        first = min(n, max(0, self.initial_points(space) - count))
        succeeded = int(seen.ok.sum())
        needed = max(2, min(self.initial_points(space), len(space.experts) + 2))
        if first == n or succeeded < needed:
            if first < n:
                _log.warning("%d of %d evaluations succeeded: the design goes on", succeeded, count)
            points = self.design.propose(seen, space, n, pending=pending, generator=generator)
            return points, {}
        chosen = self.design.propose(seen, space, first, pending=pending, generator=generator)
        waiting = torch.cat([waiting, chosen])
        with _seeded(child_seed(generator, "acquisition", count)):
            try:
                found, fit = self._choose(seen, space, n - first, waiting, generator)
            except _FAILURES as error:
                _log.warning("the design goes on: %s: %s", type(error).__name__, error)
                found, fit = seen.X[:0], {}
            else:
                if len(found) < n - first:
                    _log.warning("the design goes on: it is best at points known already")
        chosen, waiting = torch.cat([chosen, found]), torch.cat([waiting, found])
        rest = self.design.propose(
            seen, space, n - len(chosen), pending=waiting, generator=generator
        )
        return torch.cat([chosen, rest]), fit

    def above(self, reference: Mapping[str, float]) -> Self:
        """Return the sampler with this reference point, unless it has one of its own."""
        return self if self.reference is not None else replace(self, reference=dict(reference))

    def with_surrogate(self, surrogate: Surrogate) -> Self:
        """Return the sampler that looks through this surrogate; see `SeesThroughSurrogate`."""
        return replace(self, surrogate=surrogate)

    def without_design(self) -> Self:
        """Return the sampler that chooses from its first proposal on; see `StartsWithDesign`."""
        return replace(self, initial=0)

    def check_surrogate(self, surrogate: Surrogate) -> None:
        """Refuse a surrogate that the sampler cannot look through.

        Raises:
            SamplerError: With the alternative in its hint.
        """
        if not isinstance(surrogate, Surrogate):
            raise SamplerError(
                f"surrogate must be the settings of a surrogate, got {surrogate!r}",
                hint="give an object with `fit`, such as map_bo.surrogates.quadratic.Quadratic()",
            )
        if not has_uncertainty(surrogate):
            raise SamplerError(
                f"{type(self).__name__} looks through a posterior, and the fit of "
                f"{type(surrogate).__name__} has no uncertainty",
                hint="give the sampler a surrogate of its own (sampler.surrogate=quadratic), or "
                "use one that looks through none, such as sampler=sobol or sampler=published",
            )

    def initial_points(self, space: CoefficientSpace) -> int:
        """Return how many evaluations come before the first fit."""
        experts = len(space.experts)
        return experts + 2 + max(2, experts // 2) if self.initial is None else self.initial

    def check(self, metrics: tuple[Metric, ...]) -> None:
        """Refuse metrics that the sampler cannot handle.

        Raises:
            SamplerError: With the alternative in its hint.
        """
        names = [metric.name for metric in metrics]
        unknown = sorted(set(self.reference or ()) - set(names))
        if unknown:
            raise SamplerError(
                f"the reference point names unknown metrics: {', '.join(unknown)}",
                hint=f"the metrics are {', '.join(names)}",
            )

    @abstractmethod
    def choose(self, situation: Situation, n: int) -> Tensor:
        """Return up to ``n`` new points, ``k x d``, the best first."""

    def _choose(
        self,
        seen: Observations,
        space: CoefficientSpace,
        n: int,
        waiting: Tensor,
        generator: Generator,
    ) -> tuple[Tensor, Mapping[str, Any]]:
        good = seen.succeeded()
        surrogate = Auto() if self.surrogate is None else self.surrogate
        model = surrogate.fit(seen, space)
        reference = reference_point(seen, space, self.reference)
        gains = to_maximisation(good.Y, good.metrics)
        situation = Situation(
            model=model,
            good=good,
            space=space,
            taken=torch.cat([seen.X[~seen.ok], waiting]),
            known=torch.cat([seen.X, waiting]),
            reference=reference,
            scale=(gains.amax(0) - torch.minimum(reference, gains.amin(0))).clamp_min(1e-12),
            generator=child(generator, "acquisition", len(seen) + len(waiting)),
        )
        found = self.choose(situation, n)
        scores = validate(model).describe() if isinstance(model, LeavesOneOut) else {}
        return found, {"settings": repr(surrogate), "model": type(model).__name__, **scores}


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
