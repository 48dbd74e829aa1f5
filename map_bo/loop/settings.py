"""Settings of a run: budget, batch, verification, failures; and the parts that do the work.

Importing this costs nothing, because the configuration's schema is made from it on the way to
``--help``: the parts, and with them the tensor libraries, are loaded when settings are made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

from map_bo.constraints import Constraint, read_constraints
from map_bo.errors import BudgetError, ConfigError, did_you_mean
from map_bo.loop.stopping import Stop
from map_bo.values import real_number, switch, whole_number

if TYPE_CHECKING:
    from map_bo.data import Metric
    from map_bo.pareto.solver import FrontSolver
    from map_bo.samplers.allocation.allocation import Allocation
    from map_bo.samplers.sampler import Sampler
    from map_bo.space import CoefficientSpace
    from map_bo.surrogates.feasibility import Requirements
    from map_bo.surrogates.surrogate import Surrogate
    from map_bo.workers.workers import WorkerSettings

__all__ = ["Settings"]

_HELD_OUT = "give the share of the examples that the search never sees, such as 0.3"
_NO_LIMIT = "give seconds, or None for no limit"
_WORDS = {"sampler": "sampler", "surrogate": "surrogate", "solver": "front solver"}
_EXAMPLES = {
    "sampler": "map_bo.samplers.adaptive.Adaptive()",
    "surrogate": "map_bo.surrogates.auto.Auto()",
    "solver": "map_bo.pareto.gradient.GradientSolver()",
}


def _sampler() -> Sampler:
    from map_bo.samplers.adaptive import Adaptive

    return Adaptive()


def _surrogate() -> Surrogate:
    from map_bo.surrogates.auto import Auto

    return Auto()


def _solver() -> FrontSolver:
    from map_bo.pareto.gradient import GradientSolver

    return GradientSolver()


def _seed(value: object) -> int:
    """Return a seed as an ``int``; a truth value counts as 0 or 1."""
    return whole_number(
        "seed",
        int(value) if isinstance(value, bool) else value,
        hint="give a whole number of any size and sign; seeds are counted modulo 2**63",
    )


def _reference(given: object) -> Mapping[str, float] | None:
    """Return a reference point as plain numbers; its names are checked against the problem."""
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"the reference point must map names of metrics to values, got {given!r}",
            hint='give one value per metric, such as reference={"math": 0.3, "code": 0.2}',
        )
    return {
        str(name): real_number(f"the reference point of {name}", value)
        for name, value in given.items()
    }


@dataclass(frozen=True)
class Settings:
    """Settings of a run.

    Attributes:
        budget: Number of evaluations: the search and, unless ``verify_extra``, the verification. A
            retry of a failed evaluation is not counted again; an evaluation that fails for good
            is.
        seed: Seed of the run's generator.
        sampler: Chooses what to evaluate next.
        surrogate: The surrogate of the run: the sampler looks through it unless it was given its
            own, the stopping rule asks it, and the front is solved on it.
        solver: Solves the surrogate for the front.
        batch: How many points are proposed at a time.
        verify: How many front points are measured at the end; ``None`` is 10 % of the budget, at
            most 8.
        verify_extra: Whether verification comes on top of the budget instead of inside it.
        guard: Whether the front is kept where the data support the surrogate.
        reference: Reference point of the hypervolume by metric name, own units: a threshold that
            moves the zero of the scale (:meth:`map_bo.scale.Scale.of`). ``None`` takes the worst
            value among the base and the experts. A sampler that scales by one takes it too,
            unless it was given its own.
        retries: How often a failed evaluation is tried again. What one attempt has measured is kept
            where the next does not measure it again. One in which the process died is tried again
            too; a single death never costs a point.
        timeout: Seconds after which an evaluation counts as failed; ``None`` for no limit.
        max_failure_share: The run stops with an error when at least three evaluations and more
            than this share of all have failed for good. One of which some metrics were measured has
            failed too: an evaluator that never works must stop the run, whatever the others do.
        failures: ``"learn"`` to keep away from where evaluations fail: proposals, the front and
            choices. Failures by chance close no region; see
            :mod:`map_bo.surrogates.feasibility`. ``"ignore"`` only avoids the failed points.
        least_feasible: The least probability of being feasible that a point of the front may have.
        constraints: What metrics have to keep: ``[AtLeast("safe", 0.9), AtMost("film", 1.7)]``, or
            ``{"safe": ">= 0.9", "film": "<= 1.7"}`` as in a configuration. A constrained metric is
            no objective.
        stop: Rule by which the search stops before its budget is spent, or its fields as a mapping;
            ``None`` for never. Verification takes place all the same.
        outliers: ``"auto"`` sets values aside that no fit to the others explains
            (:mod:`map_bo.surrogates.outliers`): they stay in the record and are listed in summary
            and report. ``"keep"`` fits to everything.
        workers: Who evaluates: a number of processes, or settings such as
            :class:`map_bo.workers.processes.Processes`. ``None`` evaluates in the driver's own
            process, one row after another.
        asynchronous: Whether a new point is proposed as soon as a worker is free, given those that
            are being evaluated. ``False`` proposes ``batch`` points when all earlier ones have
            their outcomes, so that proposals are the same for any number of workers. ``None`` is
            true where there is more than one worker.
        items: Which examples a row is measured on, where evaluators score example by example:
            ``"full"`` for all of them; a number for the same first examples of every set;
            ``"auto"`` for what settles the front per cost, with more examples for rows where they
            tell something (:class:`map_bo.samplers.allocation.front_doubt.FrontDoubt`);
            ``"halving"``; or settings of an allocation. The budget counts full evaluations: as many
            examples as so many evaluations of everything.
        holdout: Share of every set's examples that the search never sees, so that what it chooses
            can be confirmed on them.
    """

    budget: int
    seed: int = 0
    sampler: Sampler = field(default_factory=_sampler)
    surrogate: Surrogate = field(default_factory=_surrogate)
    solver: FrontSolver = field(default_factory=_solver)
    batch: int = 1
    verify: int | None = None
    verify_extra: bool = False
    guard: bool = True
    reference: Mapping[str, float] | None = None
    retries: int = 1
    timeout: float | None = None
    max_failure_share: float = 0.5
    failures: Literal["learn", "ignore"] = "learn"
    least_feasible: float = 0.5
    constraints: Sequence[Constraint] | Mapping[str, Any] | None = None
    stop: Stop | None = None
    outliers: Literal["auto", "keep"] = "auto"
    workers: WorkerSettings | int | None = None
    asynchronous: bool | None = None
    items: Allocation | int | str = "full"
    holdout: float = 0.0

    def __post_init__(self) -> None:
        put = object.__setattr__
        for name, least in (("budget", 1), ("batch", 1), ("retries", 0), ("verify", 0)):
            value = getattr(self, name)
            if value is None and name == "verify":
                continue
            number = whole_number(name, value)
            if number < least:
                kind = BudgetError if name == "budget" else ConfigError
                raise kind(
                    f"{name} must be at least {least}, got {number}",
                    hint="raise it, or leave it out for the default"
                    if name != "budget"
                    else "give the number of evaluations that you can afford",
                )
            put(self, name, number)
        put(self, "seed", _seed(self.seed))
        if self.outliers not in ("auto", "keep"):
            raise ConfigError(
                f"outliers must be 'auto' or 'keep', got {self.outliers!r}",
                hint="'keep' fits the surrogate to every value, 'auto' sets outliers aside",
            )
        for name in ("verify_extra", "guard"):
            put(self, name, switch(name, getattr(self, name)))
        if self.asynchronous is not None:
            put(self, "asynchronous", switch("asynchronous", self.asynchronous))
        self._read_workers()
        self._read_items()
        if self.timeout is not None:
            if not real_number("timeout", self.timeout, hint=_NO_LIMIT) > 0:
                raise ConfigError(f"timeout must be positive, got {self.timeout}", hint=_NO_LIMIT)
            put(self, "timeout", real_number("timeout", self.timeout))
        share = real_number(
            "max_failure_share",
            self.max_failure_share,
            least=0,
            most=1,
            hint="give the share of evaluations that may fail, such as 0.5",
        )
        put(self, "max_failure_share", share)
        put(self, "reference", _reference(self.reference))
        put(self, "constraints", read_constraints(self.constraints) or None)
        self._check_parts()
        if self.search < (3 if self.items == "full" else 1):  # parts of it buy more rows
            raise BudgetError(
                f"a budget of {self.budget} leaves {max(self.search, 0)} evaluations for the "
                f"search after {self.verifications} to verify",
                hint="no front can be predicted from fewer than 3 evaluations; raise the budget, "
                "lower `verify`, or set `verify_extra`",
            )
        put(self, "stop", Stop.of(self.stop))
        if self.reference is not None:
            from map_bo.samplers.posterior.driven import with_reference

            put(self, "sampler", with_reference(self.sampler, self.reference))
        self._hand_on(self.requirements)
        assert self.run_sampler  # here, so that a sampler refuses the surrogate before any run
        if self.scores_parts:
            assert self.allocation
        if self.stop is not None and (self.stop.least or 0) >= self.search:
            raise ConfigError(
                f"the first check of the stopping rule comes after {self.stop.least} evaluations, "
                f"and the search has {self.search}",
                hint="lower stop.least, raise the budget, or leave the stopping rule out",
            )

    def _read_workers(self) -> None:
        if self.workers is not None:
            from map_bo.workers.reading import read_workers

            object.__setattr__(self, "workers", read_workers(self.workers))

    def _read_items(self) -> None:
        hint = "give 'full', 'auto', 'halving', or a number of examples"
        if isinstance(self.items, str):
            if self.items not in ("full", "auto", "halving"):
                raise ConfigError(f"there is no loop.items {self.items!r}", hint=hint)
        elif isinstance(self.items, int | Real):
            put = object.__setattr__
            put(self, "items", whole_number("items", self.items, least=1, hint=hint))
        else:
            from map_bo.samplers.allocation.allocation import Allocation

            if isinstance(self.items, type) or not isinstance(self.items, Allocation):
                raise ConfigError(f"items must be an allocation, got {self.items!r}", hint=hint)
        held = real_number("holdout", self.holdout, least=0, hint=_HELD_OUT)
        if not held < 1:
            raise ConfigError(f"holdout must be below 1, got {held:g}", hint=_HELD_OUT)
        object.__setattr__(self, "holdout", float(held))

    @property
    def scores_parts(self) -> bool:
        """Whether rows may be measured on some of their examples alone."""
        return self.items != "full" or self.holdout > 0

    @property
    def allocation(self) -> Allocation:
        """What says which examples of which row are scored next, as the run uses it."""
        from map_bo.samplers.allocation.fixed import Fixed, Full, SuccessiveHalving
        from map_bo.samplers.allocation.front_doubt import FrontDoubt
        from map_bo.samplers.posterior.front_uncertainty import FrontUncertainty

        if isinstance(self.items, int):
            return Fixed(self.items)
        if not isinstance(self.items, str):
            found = self.items
        elif self.items == "auto":
            found = FrontDoubt(FrontUncertainty(reference=self.reference))
        else:
            found = SuccessiveHalving() if self.items == "halving" else Full()
        if isinstance(found, FrontDoubt):
            return found.through(self.run_surrogate, self.requirements)
        return found

    def _hand_on(self, requirements: Requirements) -> None:
        from map_bo.samplers.sampler import with_requirements

        if requirements != type(requirements)():
            object.__setattr__(self, "sampler", with_requirements(self.sampler, requirements))

    @property
    def requirements(self) -> Requirements:
        """What the points of the run have to fulfil."""
        from map_bo.surrogates.feasibility import Requirements

        return Requirements(self.failures, self.least_feasible, read_constraints(self.constraints))

    def _check_parts(self) -> None:
        """Refuse parts that are not what they should be, before anything is evaluated."""
        from map_bo.pareto.solver import FrontSolver
        from map_bo.samplers.sampler import Sampler
        from map_bo.surrogates.surrogate import Surrogate

        kinds = {"sampler": Sampler, "surrogate": Surrogate, "solver": FrontSolver}
        for name, kind in kinds.items():
            part, example = getattr(self, name), _EXAMPLES[name]
            if isinstance(part, type):
                raise ConfigError(
                    f"{name} must be settings, got the class {part.__name__}",
                    hint=f"make settings of it: {name}={part.__name__}(...)",
                )
            if not isinstance(part, kind):
                raise ConfigError(
                    f"{name} must be the settings of a {_WORDS[name]}, got {part!r}",
                    hint=f"give settings, such as {name}={example}; names are for the command "
                    f"line and configurations ({name}=...)",
                )

    def check_space(self, space: CoefficientSpace) -> None:
        """Refuse a space that cannot be searched, or not with these parts.

        Raises:
            SpaceError: When it holds a single point.
            ConfigError: When it has a choice that a part does not handle.
        """
        from map_bo.choice import handles_choice
        from map_bo.samplers.sampler import SeesThroughSurrogate

        space.refuse_single_point()
        if space.choice is None:
            return
        sampler = self.sampler
        own = sampler.surrogate if isinstance(sampler, SeesThroughSurrogate) else None
        for word, part in (("surrogate", self.surrogate), ("sampler's surrogate", own)):
            if part is not None and not handles_choice(part):
                raise ConfigError(
                    f"the {word} is {type(part).__name__}, which does not handle a choice, and "
                    f"this space has one: {space.choice.name}",
                    hint="use surrogate=auto, quadratic, gp or hybrid; a surrogate of your own "
                    "says that it does with takes_choice = True",
                )
        if not handles_choice(sampler):
            raise ConfigError(
                f"the sampler is {type(sampler).__name__}, which does not handle a choice, and "
                f"this space has one: {space.choice.name}",
                hint="use sampler=adaptive, one that looks through a surrogate, sobol, uniform, "
                "latin_hypercube, dirichlet, tied or ax; or merge with one operator",
            )

    def rehearse(self, space: CoefficientSpace, metrics: Sequence[Metric]) -> None:
        """Try out the surrogates of somebody else's that a run is to use.

        Raises:
            SurrogateError: When one would fail once the evaluations were paid for; see
                :func:`map_bo.surrogates.rehearsal.rehearse`.
        """
        from map_bo.samplers.sampler import SeesThroughSurrogate
        from map_bo.surrogates.rehearsal import is_foreign, rehearse

        used = [self.surrogate]
        if isinstance(self.sampler, SeesThroughSurrogate) and self.sampler.surrogate:
            used.append(self.sampler.surrogate)
        for surrogate in used:
            if is_foreign(surrogate):
                rehearse(surrogate, space, tuple(metrics))

    def check_reference(self, names: Sequence[str]) -> None:
        """Refuse a reference point that does not give one value for each of the metrics.

        Raises:
            ConfigError: When it does not.
        """
        given = self.reference
        if given is not None and set(given) != set(names):
            raise ConfigError(
                f"the reference point must give one finite value per metric, got {dict(given)}",
                hint=f"metrics are {', '.join(sorted(names))}",
            )

    @classmethod
    def checked(cls, **values: Any) -> Settings:
        """Return settings from keyword arguments, with a clear error for an unknown one."""
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(
                f"there is no setting {unknown[0]!r}", hint=did_you_mean(unknown[0], known)
            )
        return cls(**values)

    @property
    def run_surrogate(self) -> Surrogate:
        """The surrogate as the run uses it: without outliers, unless these are kept."""
        return self._fitted(self.surrogate)

    @property
    def run_sampler(self) -> Sampler:
        """The sampler as the run uses it: through the run's surrogate, unless it has its own."""
        from map_bo.samplers.sampler import SeesThroughSurrogate, looking_through

        sampler = self.sampler
        if isinstance(sampler, SeesThroughSurrogate) and sampler.surrogate is not None:
            own = self._fitted(sampler.surrogate)
            return sampler if own is sampler.surrogate else sampler.with_surrogate(own)
        return looking_through(sampler, self.run_surrogate)

    def _fitted(self, surrogate: Surrogate) -> Surrogate:
        from map_bo.surrogates.outliers import screened

        return surrogate if self.outliers == "keep" else screened(surrogate)

    @property
    def verifications(self) -> int:
        """How many front points are measured at the end."""
        return min(8, self.budget // 10) if self.verify is None else self.verify

    @property
    def search(self) -> int:
        """How many evaluations the search has."""
        return self.budget if self.verify_extra else self.budget - self.verifications

    def is_asynchronous(self, workers: int) -> bool:
        """Return whether proposals are made one by one, with so many workers."""
        return workers > 1 if self.asynchronous is None else self.asynchronous
