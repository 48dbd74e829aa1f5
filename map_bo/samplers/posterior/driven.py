"""What samplers that look at a posterior have in common: a design first, then points of the fit."""

from __future__ import annotations

import logging
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, Self, runtime_checkable

import torch
from botorch.exceptions.errors import BotorchError
from botorch.exceptions.warnings import BotorchWarning
from linear_operator.utils.errors import NanError, NotPSDError
from linear_operator.utils.warnings import NumericalWarning
from torch import Generator, Tensor

from map_bo.choice import handles_choice
from map_bo.constraints import AtLeast, AtMost, Constraint
from map_bo.data import Metric, Observations, to_maximisation
from map_bo.errors import SamplerError, SurrogateError
from map_bo.rng import child, child_seed
from map_bo.samplers.designs.space_filling import Sobol
from map_bo.samplers.sampler import Sampler, design_points
from map_bo.scale import Scale
from map_bo.space import CoefficientSpace
from map_bo.surrogates.auto import Auto
from map_bo.surrogates.feasibility import Feasibility, Requirements
from map_bo.surrogates.outliers import Screening, fit_screened
from map_bo.surrogates.prediction import objective
from map_bo.surrogates.surrogate import Surrogate, SurrogateModel, has_uncertainty
from map_bo.surrogates.validation import LeavesOneOut, fitted_rows, validate

__all__ = [
    "NEAREST",
    "PosteriorDriven",
    "Situation",
    "TakesReference",
    "with_reference",
]

NEAREST = 1e-4  # of a coefficient's range: nearer proposals would measure the same thing again
_STEEP = 2.0  # gains that a point loses for each e-fold by which it is too likely to be infeasible
_FAILURES = (
    SurrogateError,
    BotorchError,
    NanError,
    NotPSDError,
    torch.linalg.LinAlgError,  # type: ignore[attr-defined]
    ArithmeticError,
)

_FITTING = (
    "fitting is now with_surrogate, and without_design for initial=0; the old name goes in "
    "version 0.3"
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Situation:
    """What is known when the next points are to be chosen.

    Gains are metric values turned so that larger is better, less the reference point and
    divided by ``unit``: 0 is the reference, and about 1 the best that was observed. A metric
    without a range has gain 1 everywhere; see :class:`map_bo.scale.Scale`.

    Attributes:
        model: The fitted surrogate.
        good: The evaluations that succeeded.
        space: The coefficients.
        taken: ``p x d`` points whose value is on its way or will never come: pending points and
            failed evaluations. They count as if their values were known up to the posterior.
        known: ``q x d`` points that must not be proposed again: everything seen or pending.
        scale: The reference point of the metrics.
        generator: A source for this proposal alone.
        feasibility: How likely points are feasible; None where all of them are.
        worth: How likely points are feasible and beat every threshold of the user's reference
            point; None where there is no such threshold either.
        failed: How many of ``taken`` are failed evaluations; they come first.
        seed: Seed of what libraries draw that take no generator.
        whole: Which of the rows that ``model`` was fitted to are those of ``good``: partial rows
            are fitted to too. None where all are.
    """

    model: SurrogateModel
    good: Observations
    space: CoefficientSpace
    taken: Tensor
    known: Tensor
    scale: Scale
    generator: Generator
    feasibility: Feasibility | None = None
    worth: Feasibility | None = None
    failed: int = 0
    seed: int = 0
    whole: Tensor | None = None

    @cached_property
    def unit(self) -> Tensor:
        """``m`` units of the gains, positive: how far the observations reach."""
        return self.scale.observed_unit(self.good.Y)

    def gains(self) -> Callable[[Tensor, Tensor | None], Tensor]:
        """Return the function from samples on the link scale (``... x m``) to gains."""
        to_metric = objective(self.model)

        def scaled(samples: Tensor, X: Tensor | None = None) -> Tensor:
            return self.scale.gains(to_metric(samples, X), maximised=True, unit=self.unit)

        return scaled

    def mean_gains(self, X: Tensor) -> Tensor:
        """Return the predicted gains at ``X``: ``n x m`` for ``n x d``, differentiable."""
        return self.gains()(self.model.link_mean(X), None)

    def allowed(self, gains: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return ``gains`` (``n x d`` to ``n x m``), less what points lack to be worth something.

        Those are points that work, keep the constraints and beat the user's reference point.
        """
        worth = self.worth
        if worth is None:
            return gains
        return lambda X: gains(X) - _STEEP * worth.excess(X).unsqueeze(-1)

    @property
    def observed(self) -> Tensor:
        """The gains that were observed, ``n x m``."""
        return self.scale.gains(self.good.Y, unit=self.unit)


@runtime_checkable
class TakesReference(Protocol):
    """A sampler that scales metrics by a reference point, and takes the run's."""

    def with_reference(self, reference: Mapping[str, float]) -> Sampler:
        """Return the sampler with this reference point, unless it has one of its own."""
        ...


@runtime_checkable
class _TakesReferenceAsBefore(Protocol):
    """What :class:`TakesReference` was in version 0.1."""

    def above(self, reference: Mapping[str, float]) -> Sampler: ...


def with_reference(sampler: Sampler, reference: Mapping[str, float]) -> Sampler:
    """Return ``sampler`` with the run's reference point, or as it is where it takes none."""
    if isinstance(sampler, TakesReference):
        return sampler.with_reference(reference)
    if isinstance(sampler, _TakesReferenceAsBefore):
        warnings.warn(
            f"{type(sampler).__name__}.above is now with_reference; the old name goes in "
            "version 0.3",
            DeprecationWarning,
            stacklevel=2,
        )
        return sampler.above(reference)
    return sampler


@dataclass(frozen=True)
class PosteriorDriven:
    """Base of the samplers that look through a surrogate's posterior.

    The first ``initial`` points come from the design. Then the surrogate is fitted to what
    succeeded and the points are chosen by :meth:`choose`. Pending points and failed evaluations
    count as if their values were known up to the posterior, so that neither they nor their
    surroundings are proposed over and over.

    The design goes on instead, with the reason in the log, when fewer evaluations succeeded than
    there are experts and two more (or than ``initial``, if that is less), when the surrogate
    cannot be fitted, and when the choice fails numerically or ends in points known already. No
    reason is logged while outcomes enough for a fit are on their way.

    Attributes:
        surrogate: What the sampler looks through. ``None`` is the surrogate of the run; outside
            of any run it is the default one of a run, :class:`~map_bo.surrogates.auto.Auto`.
        design: Proposes the initial points.
        initial: Evaluations, seen or pending, before the first fit. ``None``: as many as a box has
            anchors (base, ``N`` experts, uniform blend, which every option has) and
            ``max(2, N // 2)`` more.
        reference: Reference point by metric name, in the metrics' own units; metrics left out
            keep the default of :meth:`map_bo.scale.Scale.of`.
        requirements: What points have to fulfil; a run sets it.
    """

    surrogate: Surrogate | None = None
    design: Sampler = field(default_factory=Sobol)
    initial: int | None = None
    reference: Mapping[str, float] | None = None
    requirements: Requirements = field(default_factory=Requirements, repr=False)

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
                # What is on its way is no reason to worry.
                coming = succeeded + len(waiting) + first >= needed
                _log.log(
                    logging.DEBUG if coming else logging.WARNING,
                    "%d of %d evaluations succeeded and a fit needs %d: the design goes on",
                    succeeded,
                    count,
                    needed,
                )
            return self._designed(seen, space, n, pending, generator), {}
        chosen = self._designed(seen, space, first, pending, generator)
        waiting = torch.cat([waiting, chosen])
        seed = child_seed(generator, "acquisition", count)
        with _seeded(seed):
            try:
                found, fit = self._choose(seen, space, n - first, waiting, generator, seed)
            except _FAILURES as error:
                _log.warning("the design goes on: %s: %s", type(error).__name__, error)
                found, fit = seen.X[:0], {}
            else:
                if len(found) < n - first:
                    _log.warning("the design goes on: it is best at points known already")
        chosen, waiting = torch.cat([chosen, found]), torch.cat([waiting, found])
        rest = self._designed(seen, space, n - len(chosen), waiting, generator)
        return torch.cat([chosen, rest]), fit

    def _designed(
        self,
        seen: Observations,
        space: CoefficientSpace,
        n: int,
        pending: Tensor | None,
        generator: Generator,
    ) -> Tensor:
        return design_points(
            self.design,
            seen,
            space,
            n,
            pending=pending,
            generator=generator,
            requirements=self.requirements,
        )

    def with_reference(self, reference: Mapping[str, float]) -> Self:
        """Return the sampler with this reference point, unless it has one of its own."""
        return self if self.reference is not None else replace(self, reference=dict(reference))

    def with_requirements(self, requirements: Requirements) -> Self:
        """Return the sampler that keeps to these requirements; see `HasRequirements`."""
        return replace(self, requirements=requirements)

    def with_surrogate(self, surrogate: Surrogate) -> Self:
        """Return the sampler that looks through this surrogate; see `SeesThroughSurrogate`."""
        return replace(self, surrogate=surrogate)

    def fitting(self, surrogate: Surrogate, *, initial: int | None = None) -> Self:
        """Return the sampler with this surrogate; the name of `with_surrogate` in version 0.1."""
        warnings.warn(_FITTING, DeprecationWarning, stacklevel=2)
        found = self.with_surrogate(surrogate)
        return found if initial is None else replace(found, initial=initial)

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

    @property
    def takes_choice(self) -> bool:
        """Whether its design and, if it has one, its surrogate handle a space with a choice."""
        parts = [self.design] if self.surrogate is None else [self.design, self.surrogate]
        return all(handles_choice(part) for part in parts)

    def initial_points(self, space: CoefficientSpace) -> int:
        """Return how many evaluations come before the first fit."""
        if self.initial is not None:
            return self.initial
        experts, blends = len(space.experts), len(space.by_option)
        return experts + 1 + blends + max(2, experts // 2)

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

    def situation(
        self,
        seen: Observations,
        space: CoefficientSpace,
        waiting: Tensor,
        *,
        generator: Generator,
        seed: int,
    ) -> tuple[Situation, Screening, Surrogate]:
        """Return what is known, the fit behind it, and the surrogate that was fitted.

        Args:
            seen: All evaluations so far.
            space: The coefficients.
            waiting: ``p x d`` points that are being evaluated.
            generator: Source of all randomness; read, never advanced.
            seed: Seed of what libraries draw that take no generator.

        Raises:
            SurrogateError: When nothing can be fitted.
        """
        surrogate = Auto() if self.surrogate is None else self.surrogate
        screening = fit_screened(surrogate, seen, space)
        model, every, seen = screening.model, seen, screening.kept
        good = seen.succeeded()
        situation = Situation(
            model=model,
            good=good,
            space=space,
            taken=torch.cat([seen.X[seen.failed_rows], waiting]),
            known=torch.cat([seen.X, waiting]),
            scale=Scale.of(seen, space, self.reference, self.requirements.constraints),
            generator=child(generator, "acquisition", len(seen) + len(waiting)),
            feasibility=self.requirements.given(every, space, model),
            worth=self._worth(every, space, model),
            failed=int(seen.failed_rows.sum()),
            seed=seed,
            whole=fitted_rows(model, seen).ok if bool(seen.partial.any()) else None,
        )
        return situation, screening, surrogate

    def _choose(
        self,
        seen: Observations,
        space: CoefficientSpace,
        n: int,
        waiting: Tensor,
        generator: Generator,
        seed: int,
    ) -> tuple[Tensor, Mapping[str, Any]]:
        situation, screening, surrogate = self.situation(
            seen, space, waiting, generator=generator, seed=seed
        )
        model = situation.model
        found = self.choose(situation, n)
        scores = validate(model).describe() if isinstance(model, LeavesOneOut) else {}
        if screening.outliers:
            scores = {**scores, "outliers": [one.describe() for one in screening.outliers]}
        return found, {"settings": repr(surrogate), "model": type(model).__name__, **scores}

    def _worth(
        self, seen: Observations, space: CoefficientSpace, model: SurrogateModel
    ) -> Feasibility | None:
        held = {one.metric for one in self.requirements.constraints}
        limits = [x for x in thresholds(seen, space, self.reference) if x.metric not in held]
        return replace(
            self.requirements, constraints=(*self.requirements.constraints, *limits)
        ).given(seen, space, model)


def thresholds(
    seen: Observations, space: CoefficientSpace, reference: Mapping[str, float] | None
) -> list[Constraint]:
    """Return what a user's reference point asks of metrics.

    It asks something where it is better than the worst of base and experts: what does not beat it
    is worth nothing to the user. A reference point that is not moves no proposal.
    """
    if not reference:
        return []
    usual = to_maximisation(Scale.of(seen, space).point, seen.metrics).tolist()
    found: list[Constraint] = []
    for metric, low in zip(seen.metrics, usual, strict=True):
        if metric.name not in reference:
            continue
        value = float(reference[metric.name])
        if metric.direction == "max" and value > low:
            found.append(AtLeast(metric.name, value))
        elif metric.direction == "min" and -value > low:
            found.append(AtMost(metric.name, value))
    return found


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
