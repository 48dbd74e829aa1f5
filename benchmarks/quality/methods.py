"""What is compared: every way of choosing evaluations and of turning them into an answer, by name.

A method is built when it is run, so that one whose module or library is missing is reported as
unavailable and stops nobody else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

from map_bo.errors import ConfigError, MapBoError
from map_bo.pareto.solver import FrontSolver
from map_bo.samplers.sampler import Sampler, looking_through
from map_bo.surrogates.surrogate import Surrogate

__all__ = [
    "CORE",
    "METHODS",
    "PROPOSALS",
    "TIERS",
    "Method",
    "Parts",
    "matching",
    "method",
    "unavailable",
]

Tier = Literal["core", "ablation", "sampler", "surrogate", "proposals", "truth"]
TIERS: tuple[Tier, ...] = ("truth", "core", "ablation", "sampler", "surrogate", "proposals")
VERSION = 1
"""Raise it when a part of the package behaves otherwise under the same settings; answers that were
worked out with a surrogate then no longer count. Older ones must not be mixed with newer."""
BUDGET = "budget"  # stands for the number of evaluations in the arguments of a part


@dataclass(frozen=True)
class Parts:
    """What a method runs with; parts that its answer does not use are ``None``."""

    sampler: Sampler | None = None
    surrogate: Surrogate | None = None
    solver: FrontSolver | None = None
    guard: bool = True

    @property
    def run_sampler(self) -> Sampler | None:
        """The sampler as a run uses it: through the surrogate, unless it has its own."""
        if self.sampler is None or self.surrogate is None:
            return self.sampler
        return looking_through(self.sampler, self.surrogate)


@dataclass(frozen=True)
class Method:
    """One entry of the comparison.

    Attributes:
        name: What tables call it.
        make: Builds its parts for a number of evaluations.
        tier: Which comparison it belongs to, and so how early it is run.
        answer: What it hands over: ``"front"``, the surrogate's front; ``"observed"``, the
            observations that no other dominates; ``"blend"`` and ``"expert"``, the uniform blend
            and the best expert; ``"direct"``, all of a direct search on the truth.
        anytime: Whether one sequence of evaluations serves all budgets. Otherwise the design
            depends on the budget and the method starts anew for each.
        box: ``"wide"`` searches in [-3, 3] where a case has such a problem.
        noise: ``"ignored"`` hides variances and counts from sampler and surrogate;
            ``"independent"`` hides that evaluations share their examples.
        refine: Whether the surrogate is also solved for each preference, as ``Result.choose``
            does.
        needs: Libraries that must be importable.
        most_metrics: Most metrics that it can take.
        most_dimensions: Most coefficients.
        most_budget: Evaluations beyond which it is not run, because of its cost.
    """

    name: str
    make: Callable[[int], Parts]
    tier: Tier
    answer: Literal["front", "observed", "blend", "expert", "direct"] = "front"
    anytime: bool = True
    box: Literal["unit", "wide"] = "unit"
    noise: Literal["known", "ignored", "independent"] = "known"
    refine: bool = True
    needs: tuple[str, ...] = ()
    most_metrics: int | None = None
    most_dimensions: int | None = None
    most_budget: int | None = None

    def describe(self) -> dict[str, Any]:
        """Return what decides its outcome, as plain data, built parts and their defaults too.

        It is described for a fixed number of evaluations: all its budgets belong to one cell.
        """
        parts = self.make(12)
        told = {name: _told(getattr(parts, name)) for name in ("surrogate", "solver")}
        told["sampler"] = _told(parts.run_sampler)
        plain = {"answer", "anytime", "box", "noise", "refine"}
        if VERSION > 1 and self.answer == "front":
            told["version"] = str(VERSION)
        return {**told, "guard": parts.guard, **{name: getattr(self, name) for name in plain}}


def _told(part: object) -> str:
    if type(part).__repr__ is object.__repr__:
        return f"{type(part).__module__}.{type(part).__qualname__}"
    return repr(part)


def part(path: str, budget: int, **arguments: Any) -> Any:
    """Return an instance of ``map_bo.path:Class`` with arguments, :data:`BUDGET` filled in."""
    module, name = path.split(":")
    root = "" if module.startswith("benchmarks.") else "map_bo."
    given = {key: budget if value is BUDGET else value for key, value in arguments.items()}
    return getattr(import_module(root + module), name)(**given)


def default(budget: int) -> Parts:
    """Return what ``map_bo.optimize`` runs with when nothing is chosen."""
    settings = import_module("map_bo.loop.settings").Settings(budget=max(budget, 12))
    return Parts(settings.sampler, settings.surrogate, settings.solver, settings.guard)


def sampled(path: str, budget: int, **arguments: Any) -> Parts:
    """Return the default's way to a front after another sampler."""
    return dataclasses.replace(default(budget), sampler=part(path, budget, **arguments))


def observing(path: str, budget: int, **arguments: Any) -> Parts:
    """Return a sampler alone."""
    return Parts(sampler=part(path, budget, **arguments))


def reference(
    budget: int, sampler: str = "samplers.published.public_code:PublishedDesign"
) -> Parts:
    """Return the published design, fit and solver."""
    points = {"points": BUDGET} if sampler.endswith("PublishedDesign") else {}
    return Parts(
        part(sampler, budget, **points),
        part("surrogates.published:PublishedQuadratic", budget),
        part("pareto.evolution:NSGA3", budget, population=100, generations=25),
        guard=False,
    )


def everywhere(thing: Any, **values: Any) -> Any:
    """Return a dataclass with fields of these names set, in it and in all it is made of."""
    if not dataclasses.is_dataclass(thing) or isinstance(thing, type):
        return thing
    new: dict[str, Any] = {}
    for field in dataclasses.fields(thing):
        old = getattr(thing, field.name)
        if field.name in values:
            new[field.name] = values[field.name]
        elif isinstance(old, tuple):
            new[field.name] = tuple(
                tuple(everywhere(inner, **values) for inner in item)
                if isinstance(item, tuple)
                else everywhere(item, **values)
                for item in old
            )
        else:
            new[field.name] = everywhere(old, **values)
    same = all(new[name] is getattr(thing, name) for name in new)
    return thing if same else dataclasses.replace(thing, **new)


def ablated(budget: int, **values: Any) -> Parts:
    """Return the default with a setting changed wherever it occurs.

    Raises:
        ConfigError: When it occurs nowhere, so that the default itself would be measured.
    """
    before = default(budget)
    if "likelihood" in values:
        before = dataclasses.replace(before, surrogate=_candidates())
    after: Parts = everywhere(before, **values)
    if repr(after) == repr(before):
        raise ConfigError(f"no part of the default has a setting among {sorted(values)}")
    return after


def _candidates() -> Surrogate:
    """Return the choosing surrogate with its candidates written out, so that they can change."""
    homes = {
        "quadratic": "surrogates.quadratic:Quadratic",
        "hybrid": "surrogates.processes.hybrid:Hybrid",
        "gp": "surrogates.processes.gp:GP",
    }
    made = tuple((name, part(home, 0)) for name, home in homes.items())
    surrogate: Surrogate = part("surrogates.auto:Auto", 0, candidates=made)
    return surrogate


def swapped(budget: int, **paths: str) -> Parts:
    """Return the default with whole parts exchanged, each named as ``module:class``."""
    return dataclasses.replace(
        default(budget), **{name: part(path, budget) for name, path in paths.items()}
    )


def unguarded(budget: int) -> Parts:
    """Return the default without its guard."""
    return dataclasses.replace(default(budget), guard=False)


def unprior(budget: int) -> Parts:
    """Return the default with the published, unregularised fit for the front alone."""
    before = default(budget)
    published = part("surrogates.published:PublishedQuadratic", budget)
    return dataclasses.replace(before, sampler=before.run_sampler, surrogate=published)


def matched(sampler: str, surrogate: str, budget: int) -> Parts:
    """Return a posterior-driven sampler and a front that rest on the same kind of surrogate."""
    model = part(surrogate, budget)
    chosen = part(sampler, budget)
    names = {field.name for field in dataclasses.fields(chosen)}
    if "surrogate" in names:
        chosen = dataclasses.replace(chosen, surrogate=model)
    return dataclasses.replace(default(budget), sampler=chosen, surrogate=model)


def proposing(surrogate: str, budget: int) -> Parts:
    """Return the default whose sampler is given a surrogate of its own, and the front ``auto``.

    Both are named, so that nothing here depends on what a sampler takes when it is given none.
    """
    acquisition = part(
        "samplers.front_uncertainty:FrontUncertainty", budget, surrogate=part(surrogate, budget)
    )
    sampler = part("samplers.adaptive:Adaptive", budget, acquisition=acquisition)
    return dataclasses.replace(
        default(budget), sampler=sampler, surrogate=part(PROPOSALS["proposals-auto"], budget)
    )


_SAMPLERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # name: class, arguments, limits
    "sobol": ("samplers.designs.space_filling:Sobol", {}, {}),
    "uniform": ("samplers.designs.space_filling:Uniform", {}, {}),
    "dirichlet": ("samplers.designs.space_filling:Dirichlet", {}, {}),
    "latin-hypercube": ("samplers.designs.latin_hypercube:LatinHypercube", {}, {}),
    "d-optimal": ("samplers.designs.optimal:OptimalDesign", {"criterion": "d"}, {}),
    "i-optimal": ("samplers.designs.optimal:OptimalDesign", {"criterion": "i"}, {}),
    "bins": ("samplers.published.bins:Bins", {}, {}),
    "bins-reference": ("samplers.published.public_code:PublishedBins", {}, {"most_dimensions": 12}),
    "tied-sobol": ("samplers.designs.blocks:TiedSobol", {}, {}),
    "qlognehvi": ("samplers.posterior.hypervolume:QLogNEHVI", {}, {"most_metrics": 4}),
    "qlogehvi": ("samplers.posterior.hypervolume:QLogEHVI", {}, {"most_metrics": 4}),
    "qlognparego": ("samplers.posterior.scalarised:QLogNParEGO", {}, {}),
    "hypervolume-scalarised": ("samplers.posterior.scalarised:HypervolumeScalarised", {}, {}),
    "ucb": ("samplers.posterior.scalarised:ScalarisedUCB", {}, {}),
    "thompson-fronts": ("samplers.posterior.thompson:ThompsonFronts", {}, {}),
    "integrated-variance": ("samplers.posterior.variance:IntegratedVariance", {}, {}),
    "front-uncertainty": ("samplers.posterior.front_uncertainty:FrontUncertainty", {}, {}),
}
_POSTERIOR = ("qlognehvi", "hypervolume-scalarised", "front-uncertainty", "bins")
_SURROGATES = {
    "quadratic": "surrogates.quadratic:Quadratic",
    "gp": "surrogates.processes.gp:GP",
    "hybrid": "surrogates.processes.hybrid:Hybrid",
    "sparse": "surrogates.processes.sparse:Sparse",
}
PROPOSALS = {
    "proposals-auto": "surrogates.auto:Auto",
    "proposals-quadratic": "surrogates.quadratic:Quadratic",
    "proposals-hybrid": "surrogates.hybrid:Hybrid",
    "proposals-gp": "surrogates.gp:GP",
}
"""Name of a method -> the surrogate that its proposals rest on; all solve their front on auto."""
_EXTERNAL: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ax": ("samplers.baselines.ax:AxSampler", {}, {"needs": ("ax",), "most_budget": 48}),
    "optuna-tpe": ("benchmarks.quality.optuna_baselines:TPE", {}, {"needs": ("optuna",)}),
    "optuna-nsga3": ("benchmarks.quality.optuna_baselines:NSGA3", {}, {"needs": ("optuna",)}),
    "nsga2": ("samplers.baselines.evolutionary:NSGA2Sampler", {}, {}),
    "nsga3": ("samplers.baselines.evolutionary:NSGA3Sampler", {}, {}),
    "random": ("samplers.designs.space_filling:Uniform", {"anchors": False}, {}),
}


def _core() -> list[Method]:
    published = {"answer": "front", "anytime": False, "refine": False, "tier": "core"}
    found = [
        Method("default", default, "core"),
        Method("reference", reference, box="wide", **published),  # type: ignore[arg-type]
        Method("reference-kind-box", reference, **published),  # type: ignore[arg-type]
    ]
    for name, (path, given, limits) in _EXTERNAL.items():
        make = partial(_late, observing, path, given)
        found.append(Method(name, make, "core", answer="observed", **limits))
    plain = partial(_late, sampled, "samplers.designs.space_filling:Uniform", {"anchors": False})
    return [
        *found,
        Method("random+surrogate", plain, "core"),
        Method("uniform-blend", lambda budget: Parts(), "core", answer="blend"),
        Method("best-expert", lambda budget: Parts(), "core", answer="expert"),
    ]


def _late(maker: Callable[..., Parts], path: str, given: dict[str, Any], budget: int) -> Parts:
    return maker(path, budget, **given)


def _ablations() -> list[Method]:
    prefix = "default, "
    settings: dict[str, dict[str, Any]] = {
        "without anchors": {"anchors": False},
        "identity link": {"link": "identity"},
        "gaussian likelihood": {"likelihood": "gaussian"},
        "no weighted sums": {"sums": 0.0},
        "100 points": {"points": 100},
    }
    found = [
        Method(prefix + name, partial(ablated, **values), "ablation")
        for name, values in settings.items()
    ]
    swaps = {
        "quadratic": {"surrogate": _SURROGATES["quadratic"]},
        "gp": {"surrogate": _SURROGATES["gp"]},
        "hybrid": {"surrogate": _SURROGATES["hybrid"]},
        "solver nsga2": {"solver": "pareto.evolution:NSGA2"},
        "solver nsga3": {"solver": "pareto.evolution:NSGA3"},
        "sampler sobol": {"sampler": "samplers.designs.space_filling:Sobol"},
        "sampler uniform": {"sampler": "samplers.designs.space_filling:Uniform"},
    }
    for name, paths in swaps.items():
        swap: Callable[[int], Parts] = partial(swapped, **paths)  # type: ignore[arg-type]
        found.append(Method(prefix + name, swap, "ablation"))
    acquisition = partial(swapped, sampler="samplers.posterior.hypervolume:QLogNEHVI")
    front = partial(swapped, sampler="samplers.posterior.front_uncertainty:FrontUncertainty")
    return [
        *found,
        Method(prefix + "sampler qlognehvi", acquisition, "ablation", most_metrics=4),
        Method(prefix + "sampler front_uncertainty", front, "ablation"),
        Method(prefix + "no known noise", default, "ablation", noise="ignored"),
        Method(prefix + "independent noise", default, "ablation", noise="independent"),
        Method(prefix + "without prior", unprior, "ablation"),
        Method(prefix + "without guard", unguarded, "ablation"),
    ]


def _others() -> list[Method]:
    found = [
        Method(name, partial(_late, sampled, path, given), "sampler", **limits)
        for name, (path, given, limits) in _SAMPLERS.items()
    ]
    published = partial(reference, sampler="samplers.published.public_code:PublishedBins")
    found.append(
        Method("bins-reference as published", published, "sampler", refine=False, box="wide")
    )
    path, given, limits = _EXTERNAL["ax"]
    found.append(Method("ax+surrogate", partial(_late, sampled, path, given), "sampler", **limits))
    cma = partial(_late, observing, "samplers.baselines.cma:CMAES", {})
    found.append(Method("cmaes", cma, "sampler", answer="observed"))
    for kind, surrogate in _SURROGATES.items():
        for name in ("sobol", *_POSTERIOR):
            path, _, limits = _SAMPLERS[name]
            make = partial(matched, path, surrogate)
            found.append(Method(f"{name}/{kind}", make, "surrogate", **limits))
    return found


def _proposals() -> list[Method]:
    return [
        Method(name, partial(proposing, surrogate), "proposals")
        for name, surrogate in PROPOSALS.items()
    ]


METHODS: dict[str, Method] = {
    entry.name: entry
    for entry in [
        Method("direct", lambda budget: Parts(), "truth", answer="direct"),
        *_core(),
        *_ablations(),
        *_others(),
        *_proposals(),
    ]
}
CORE: tuple[str, ...] = tuple(name for name, entry in METHODS.items() if entry.tier == "core")


def method(name: str) -> Method:
    """Return the method of this name.

    Raises:
        ConfigError: When there is none; the hint names the nearest.
    """
    if name in METHODS:
        return METHODS[name]
    near = get_close_matches(name, [*METHODS, *TIERS], n=3, cutoff=0.4)
    raise ConfigError(
        f"there is no method {name!r}",
        hint=f"did you mean {', '.join(map(repr, near))}?" if near else "see --list",
    )


def matching(words: Sequence[str]) -> list[Method]:
    """Return the methods named, tiers (``core``, ``ablation`` ...) and ``all`` spelt out.

    Raises:
        ConfigError: On an unknown name.
    """
    found: dict[str, Method] = {}
    for word in words:
        if word in TIERS or word == "all":
            found |= {n: m for n, m in METHODS.items() if word in (m.tier, "all")}
        else:
            found[word] = method(word)
    return list(found.values())


def unavailable(
    entry: Method, *, metrics: int | None = None, d: int | None = None, built: bool = False
) -> str | None:
    """Return why a method cannot be run (on so many metrics and coefficients), or None.

    Args:
        entry: The method.
        metrics: Metrics of the case.
        d: Its coefficients.
        built: Whether it is known that its parts can be built.
    """
    for size, most, what in (
        (metrics, entry.most_metrics, "metrics"),
        (d, entry.most_dimensions, "coefficients"),
    ):
        if size is not None and most is not None and size > most:
            return f"takes up to {most} {what}, and there are {size}"
    if built:
        return None
    missing = [name for name in entry.needs if find_spec(name) is None]
    if missing:
        return f"needs {', '.join(missing)}, which is not installed"
    try:
        entry.make(12)
    except (ImportError, AttributeError, TypeError, ValueError, MapBoError) as error:
        return f"{type(error).__name__}: {error}"
    return None
