"""How one cell is run: evaluations one after the other, and an answer at every checkpoint.

The sampler runs once up to the largest budget, in batches of 1 up to 24 evaluations, 4 up to 64
and 8 beyond; at 6, 8, 12, 16, 24, 32, 48, 64, 96 and 120 evaluations an answer is worked out from
what was seen so far. A method whose design follows the budget starts anew for each of these. The
truth is asked for scores alone; no method sees it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.quality.cells import Checkpoint, Record
from benchmarks.quality.methods import Method, Parts
from benchmarks.quality.scoring import choices, coverage, measures, representatives, weights_of
from map_bo.data import Observations, to_maximisation
from map_bo.errors import ConfigError, SurrogateError
from map_bo.pareto.dominance import non_dominated
from map_bo.pareto.gradient import ascend
from map_bo.pareto.trust import Coverage, guard
from map_bo.problems.problem import Preparable, Problem
from map_bo.rng import child, make_generator
from map_bo.scale import Scale
from map_bo.space import CoefficientSpace
from map_bo.surrogates.prediction import predict, predicted_mean
from map_bo.surrogates.surrogate import SurrogateModel
from map_bo.workers.evaluation import evaluate_row

__all__ = ["CHECKPOINTS", "Case", "answer_after", "batch_at", "checkpoints", "direct", "run"]

CHECKPOINTS = (6, 8, 12, 16, 24, 32, 48, 64, 96, 120)
# How much more a solved preference must promise than the best point of the front; as in
# `map_bo.loop.result`.
_NOTICEABLE = 2e-3


class Case(Protocol):
    """A problem with its truth; see ``benchmarks.quality.cases``."""

    @property
    def family(self) -> str:
        """What kind of case it is."""
        ...

    @property
    def problem(self) -> Problem:
        """What methods see."""
        ...

    @property
    def low(self) -> Tensor:
        """``m`` values of gain 0, turned to maximisation."""
        ...

    @property
    def high(self) -> Tensor:
        """``m`` values of gain 1."""
        ...

    @property
    def known_front(self) -> Tensor | None:
        """Gains of a front that is known."""
        ...

    @property
    def real_models(self) -> bool:
        """Whether it merges trained models."""
        ...

    def truth(self, X: Tensor) -> Tensor:
        """Return the noise-free metrics, ``n x m``, own units."""
        ...

    def gains(self, Y: Tensor) -> Tensor:
        """Return metrics scaled to 0 at the reference and 1 at the best expert."""
        ...

    def wide(self) -> Problem | None:
        """Return the same problem in [-3, 3]."""
        ...

    def direct(self, evaluations: int, seed: int) -> Tensor:
        """Return the gains of all evaluations of a direct search."""
        ...


def batch_at(n: int) -> int:
    """Return how many points are proposed at once after ``n`` evaluations."""
    return 1 if n < 24 else 4 if n < 64 else 8


def checkpoints(budget: int) -> tuple[int, ...]:
    """Return the checkpoints up to a budget.

    Raises:
        ConfigError: When it is below the first.
    """
    found = tuple(n for n in CHECKPOINTS if n <= budget)
    if not found:
        raise ConfigError(
            f"a budget of {budget} has no checkpoint", hint=f"give {CHECKPOINTS[0]} or more"
        )
    return found


def run(
    case: Case, entry: Method, seed: int, budget: int, previous: Record | None = None
) -> Iterator[Record]:
    """Yield the record of a cell after each checkpoint that ``previous`` does not have.

    Args:
        case: The case.
        entry: The method; not ``"direct"``.
        seed: Seed of all randomness.
        budget: Evaluations.
        previous: What an earlier run of the same cell has reached.
    """
    problem = (case.wide() if entry.box == "wide" else None) or case.problem
    if isinstance(problem, Preparable):
        problem.prepare()
    space, metrics = problem.space, problem.metrics
    record = previous or Record({}, Observations.empty(space.d, metrics))
    for n in checkpoints(budget):
        if n in record.checkpoints:
            continue
        parts = entry.make(n)
        start = record.seen if entry.anytime and record.seen is not None else None
        start = Observations.empty(space.d, metrics) if start is None else start
        seen, seconds = start, record.proposing.get(len(start), 0.0)
        if entry.answer in ("front", "observed"):
            seen, seconds = _search(problem, parts, entry, seed, n, start, seconds)
        elif entry.answer == "expert" and not len(start):
            seen = _measure(problem, _anchors(space, "expert"), seed, start)
        answer = _answered(case, entry, parts, problem, seen, n, seed)
        numbers = {**answer.numbers, "propose_s": seconds}
        record = dataclasses.replace(
            record,
            about={**record.about, "budget": n, "d": space.d, "m": len(metrics)},
            seen=seen if entry.anytime else None,
            proposing={**record.proposing, len(seen): seconds},
            checkpoints={**record.checkpoints, n: dataclasses.replace(answer, numbers=numbers)},
        )
        yield record


def answer_after(case: Case, entry: Method, seen: Observations, seed: int) -> Checkpoint:
    """Return the scored answer of a method to evaluations that were made in any way.

    Args:
        case: The case.
        entry: The method.
        seen: All evaluations.
        seed: Seed of the preferences and of the solver.
    """
    n = len(seen)
    return _answered(case, entry, entry.make(n), case.problem, seen, n, seed)


def direct(case: Case, seed: int, evaluations: int) -> Record:
    """Return the record of a direct search on the truth: what ``evaluations`` of it find.

    Its points are cut to 100 like every answer; its choices are made among all it ever saw.
    """
    gains = case.direct(evaluations, seed % 3).double()
    kept = gains[non_dominated(gains)]
    real = kept[representatives(kept)]
    weights = weights_of(seed, gains.shape[-1])
    chosen = kept[choices(kept, weights)]
    numbers = {"points": float(len(kept)), **measures(real, real, chosen, None, weights)}
    answer = Checkpoint(numbers, real, real, chosen)
    about = {"budget": evaluations, "d": case.problem.space.d, "m": gains.shape[-1]}
    return Record(about, checkpoints={evaluations: answer}, front=case.known_front)


def shown(seen: Observations, entry: Method) -> Observations:
    """Return the observations as a method sees them."""
    if entry.noise == "ignored":
        return hidden(seen)
    if entry.noise == "independent":
        metrics = tuple(dataclasses.replace(m, resampling="fresh") for m in seen.metrics)
        return dataclasses.replace(seen, metrics=metrics)
    return seen


def hidden(seen: Observations) -> Observations:
    """Return the observations without what is known of their noise."""
    unknown = torch.full_like(seen.Y, torch.nan)
    return dataclasses.replace(seen, Yvar=unknown, counts=unknown)


def _search(
    problem: Problem,
    parts: Parts,
    entry: Method,
    seed: int,
    stop: int,
    seen: Observations,
    seconds: float,
) -> tuple[Observations, float]:
    """Return all observations up to ``stop`` and the seconds spent on proposals."""
    root = make_generator(seed)
    sampler = parts.run_sampler
    assert sampler is not None
    while len(seen) < stop:
        count = min(batch_at(len(seen)), stop - len(seen))
        known = shown(seen, entry)
        start = time.perf_counter()
        X = sampler.propose(known, problem.space, count, generator=child(root, "propose"))
        X = problem.space.check(X)
        seconds += time.perf_counter() - start
        seen = _measure(problem, X, seed, seen)
    return seen, seconds


def _measure(problem: Problem, X: Tensor, seed: int, seen: Observations) -> Observations:
    root = make_generator(seed)
    for x in X:
        source = child(root, "evaluate", len(seen), 0)
        outcome = evaluate_row(problem, x, timeout=None, generator=source)
        seen = seen.append(outcome)
    return seen


def _anchors(space: CoefficientSpace, kind: str) -> Tensor:
    anchors = space.anchors()
    X = anchors.X[[k == kind for k in anchors.kinds]]
    if not len(X):
        raise SurrogateError(f"the space has no {kind} among its anchors")
    return X


@dataclass(frozen=True, eq=False)
class _Answer:
    """What a method hands over, before it is scored; ``n x d`` and ``n x m`` in own units."""

    X: Tensor
    mean: Tensor
    lower: Tensor | None = None
    upper: Tensor | None = None
    seconds: tuple[float, float] = (0.0, 0.0)
    solve: Callable[[Tensor, Tensor], Tensor] | None = None


def _answered(
    case: Case,
    entry: Method,
    parts: Parts,
    problem: Problem,
    seen: Observations,
    n: int,
    seed: int,
) -> Checkpoint:
    """Return the scored answer; one that cannot be worked out is recorded with its reason."""
    none = torch.zeros(0, len(problem.metrics), dtype=torch.float64)
    try:
        answer = _answer(case, entry, parts, problem, seen, seed)
        return _scored(case, problem, answer, seed)
    except (SurrogateError, ArithmeticError, RuntimeError, ValueError) as error:
        return Checkpoint({}, none, none, none, failure=f"{type(error).__name__}: {error}")


def _answer(
    case: Case, entry: Method, parts: Parts, problem: Problem, seen: Observations, seed: int
) -> _Answer:
    good = seen.succeeded()
    if entry.answer == "blend":
        X = _anchors(problem.space, "blend")
        return _Answer(X, case.truth(X))
    if not len(good):
        raise SurrogateError("no evaluation succeeded")
    if entry.answer == "expert":
        rows = case.gains(good.Y).mean(-1).argmax().unsqueeze(0)
        return _Answer(good.X[rows], good.Y[rows])
    if entry.answer == "observed":
        rows = non_dominated(to_maximisation(good.Y, good.metrics))
        return _Answer(good.X[rows], good.Y[rows])
    known = shown(seen, entry)
    return _front(case, parts, known, problem.space, seed, refine=entry.refine)


def _front(
    case: Case,
    parts: Parts,
    seen: Observations,
    space: CoefficientSpace,
    seed: int,
    *,
    refine: bool,
) -> _Answer:
    """Return the front that ``map_bo.loop.recommend`` finds, without what it adds to it."""
    assert parts.surrogate is not None
    assert parts.solver is not None
    start = time.perf_counter()
    model = parts.surrogate.fit(seen, space)
    fitted = time.perf_counter()
    trusted = Coverage.of(seen.succeeded().X, space) if parts.guard else None
    searched = predicted_mean(model)
    if trusted is not None:
        width = Scale.of(seen, space).width  # what the run itself measured, not the truth
        searched = guard(searched, trusted, scale=width)
    root = make_generator(seed)
    X = parts.solver.solve(searched, space, generator=child(root, "solve"))
    if trusted is not None:
        X = trusted.shrink(X)
    X = X[non_dominated(predicted_mean(model)(X).detach())]
    solved = time.perf_counter()
    told = predict(model, X)

    def solve(starts: Tensor, weights: Tensor) -> Tensor:
        return _refined(case, model, searched, trusted, space, starts, weights)

    seconds = (fitted - start, solved - fitted)
    return _Answer(X, told.mean, told.lower, told.upper, seconds, solve if refine else None)


def _refined(
    case: Case,
    model: SurrogateModel,
    searched: Callable[[Tensor], Tensor],
    trusted: Coverage | None,
    space: CoefficientSpace,
    starts: Tensor,
    weights: Tensor,
) -> Tensor:
    """Solve the surrogate for each preference, as ``Result.choose`` does, all at once.

    Args:
        case: Gives the scale.
        model: The surrogate.
        searched: What the front was solved from.
        trusted: Where the data support the surrogate.
        space: The space.
        starts: ``w x d`` best front points.
        weights: ``w x m`` preferences.
    """

    def gain(X: Tensor) -> Tensor:
        scaled: Tensor = (searched(X) - case.low) / (case.high - case.low)
        return (weights * scaled).sum(-1)

    X = ascend(gain, space, starts)
    X = X if trusted is None else trusted.shrink(X)
    with torch.no_grad():
        better = gain(X) > gain(starts) + _NOTICEABLE
    return torch.where(better.unsqueeze(-1), X, starts)


def _scored(case: Case, problem: Problem, answer: _Answer, seed: int) -> Checkpoint:
    predicted = case.gains(answer.mean)
    weights = weights_of(seed, predicted.shape[-1])
    rows = representatives(predicted)
    values = case.truth(answer.X[rows])
    real = case.gains(values)
    wanted = choices(predicted, weights)
    unique, place = torch.unique(wanted, return_inverse=True)
    chosen = case.gains(case.truth(answer.X[unique]))[place]
    solved = None
    if answer.solve is not None:
        solved = case.gains(case.truth(answer.solve(answer.X[wanted], weights)))
    fit, solve = answer.seconds
    numbers = {"points": float(len(predicted)), "fit_s": fit, "solve_s": solve}
    numbers |= measures(predicted[rows], real, chosen, solved, weights)
    if answer.lower is not None and answer.upper is not None:
        measured = _measured(problem, answer.X[rows], values, seed)
        numbers["coverage"] = coverage(measured, answer.lower[rows], answer.upper[rows])
    return Checkpoint(numbers, predicted[rows], real, chosen, solved)


def _measured(problem: Problem, X: Tensor, values: Tensor, seed: int) -> Tensor:
    """Return what one more evaluation of each row (``k x d``) gives, ``k x m`` in own units.

    That is what an interval of a prediction is about. On the same examples every time it is the
    truth (``values``); otherwise it is measured anew.
    """
    if any(metric.resampling == "same" for metric in problem.metrics):
        return values
    source = child(make_generator(seed), "measured again")
    return problem.evaluate(X, generator=source).Y
