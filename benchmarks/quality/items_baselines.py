"""Runs that are driven by hand: what may be scored in place of all examples without an allocation.

Such a run is a list of rows, each with how many examples of every metric were scored; a row may be
scored further later. Its examples come in the same order as those of a run of the package with the
same seed, so what differs between methods is their choice alone.

BoTorch's acquisitions for several fidelities take the share of the examples for the fidelity. They
see what is scored as noisy measurements of a function of coefficients and share, and say which
coefficients to score on what share next:

* ``qMultiFidelityKnowledgeGradient`` (Wu et al. 2020, arXiv 1903.04703), per step for another
  random weighting of the metrics, as it has a single objective;
* ``MOMF``, expected hypervolume improvement with the share as a further objective (Irshad et al.
  2024, arXiv 2112.13901);
* ``qMultiFidelityHypervolumeKnowledgeGradient`` (Daulton et al. 2023).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Generator, Tensor

from benchmarks.quality.items_cases import ItemCase, observed
from benchmarks.quality.methods import METHODS
from benchmarks.quality.protocol import batch_at
from map_bo.data import Observations
from map_bo.examples.estimates import estimated
from map_bo.examples.sets import order_of
from map_bo.pareto.indicators import preference_weights
from map_bo.rng import child, child_seed, make_generator
from map_bo.samplers.sampler import proposed
from map_bo.scale import Scale

__all__ = ["Fidelities", "Fixed", "Ledger", "Policy", "Scoring", "Step", "play"]


@dataclass(frozen=True, eq=False)
class Scoring:
    """One action: a row is scored up to some position of every order.

    Attributes:
        stop: How many examples of every metric it then has.
        x: ``d`` coefficients of a new row; None for one that there is.
        row: Its number; None for a new one.
    """

    stop: int
    x: Tensor | None = None
    row: int | None = None


class Step(NamedTuple):
    """Where a run stands after an action.

    Attributes:
        cost: Examples scored, in evaluations of all of them.
        seen: All rows, with estimates for all examples from what was scored of them.
        seconds: Since the run began.
    """

    cost: float
    seen: Observations
    seconds: float


class Policy(Protocol):
    """What is scored next."""

    def choose(
        self, case: ItemCase, seen: Observations, stops: list[int], *, generator: Generator
    ) -> list[Scoring]:
        """Return what is scored next.

        Args:
            case: The case.
            seen: All rows, on what was scored of them.
            stops: How many examples of every metric each row has.
            generator: Source of all randomness; children of it are drawn from.
        """
        ...


class Ledger:
    """The rows of a run, what was scored of each, and what that cost.

    Args:
        case: The case.
        seed: What the orders are drawn by.
    """

    def __init__(self, case: ItemCase, seed: int) -> None:
        self.case = case
        self.orders = {
            name: order_of(one, seed, name) for name, one in case.problem.example_sets.items()
        }
        self.X = torch.zeros(0, case.problem.space.d, dtype=torch.float64)
        self.stops: list[int] = []
        self._right: list[Tensor] = []
        self._rows: list[Observations] = []

    @property
    def cost(self) -> float:
        """Examples scored, in evaluations of all of them."""
        return sum(self.stops) / self.case.size

    @property
    def seen(self) -> Observations:
        """All rows, on what was scored of them."""
        return Observations.joined(self._rows, self.X.shape[-1], self.case.problem.metrics)

    def take(self, scoring: Scoring) -> None:
        """Score what an action says."""
        row = scoring.row
        if row is None:
            assert scoring.x is not None
            row = len(self.stops)
            x = self.case.problem.space.check(scoring.x.unsqueeze(0))
            self.X = torch.cat([self.X, x])
            self.stops.append(0)
            self._right.append(self.case.networks.right(x))
            self._rows.append(Observations.empty(x.shape[-1], self.case.problem.metrics))
        self.stops[row] = max(self.stops[row], min(scoring.stop, self.case.size))
        items = {name: order[: self.stops[row]] for name, order in self.orders.items()}
        right = {name: self._right[row][:, j][:, items[name]] for j, name in enumerate(self.orders)}
        metrics = self.case.problem.metrics
        self._rows[row] = observed(self.X[row : row + 1], metrics, right, items, self.case.size)


def play(
    case: ItemCase, policy: Policy, seed: int, most: float, *, until: float = float("inf")
) -> Iterator[Step]:
    """Yield where a run stands after each action, up to a cost of ``most`` evaluations.

    Args:
        case: The case.
        policy: What chooses.
        seed: Of the orders and of all randomness.
        most: Where to stop; an action that would cost more is not taken.
        until: Time (of ``time.monotonic``) after which nothing is chosen.
    """
    ledger, root, start = Ledger(case, seed), make_generator(seed), time.perf_counter()
    while time.monotonic() < until:
        chosen = policy.choose(case, ledger.seen, list(ledger.stops), generator=root)
        for one in chosen:
            before = 0 if one.row is None else ledger.stops[one.row]
            more = (min(one.stop, case.size) - before) / case.size
            if more <= 0 or ledger.cost + more > most + 1e-9:
                return
            ledger.take(one)
            paused = time.perf_counter()
            yield Step(ledger.cost, estimated(ledger.seen), paused - start)
            start += time.perf_counter() - paused  # what is done meanwhile is no part of it
        if not chosen:
            return


@dataclass(frozen=True)
class Fixed:
    """The default sampler, every row on the same first examples.

    Attributes:
        count: How many; None for all.
        most_rows: Rows after which it ends, as a proposal takes ever longer.
    """

    count: int | None = None
    most_rows: int = 96

    def choose(
        self, case: ItemCase, seen: Observations, stops: list[int], *, generator: Generator
    ) -> list[Scoring]:
        """Return a batch of new rows; see `Policy`."""
        if len(seen) >= self.most_rows:
            return []
        sampler = METHODS["default"].make(12).run_sampler
        assert sampler is not None
        X, _ = proposed(
            sampler,
            estimated(seen),
            case.problem.space,
            batch_at(len(seen)),
            pending=None,
            generator=child(generator, "propose"),
        )
        return [Scoring(self.count or case.size, x) for x in X]


_LEAST = 50  # examples
_FIRST = 100


@dataclass(frozen=True)
class Fidelities:
    """One of BoTorch's acquisitions for several fidelities.

    It begins with the anchors on 100 examples each and the blend on all.

    Attributes:
        kind: ``"kg"``, ``"momf"`` or ``"hvkg"``; see the module.
        restarts: Restarts of its optimisation.
        raw: Random points to start them from.
    """

    kind: str
    restarts: int = 4
    raw: int = 64

    def choose(
        self, case: ItemCase, seen: Observations, stops: list[int], *, generator: Generator
    ) -> list[Scoring]:
        """Return a new row and how many of its examples to score; see `Policy`."""
        space = case.problem.space
        if not len(seen):
            anchors = space.anchors()
            first = [Scoring(_FIRST, x) for x in anchors.X]
            return [*first, Scoring(case.size, row=len(first) - 1)]
        source = child(generator, "fidelities", len(seen))
        share = torch.tensor(stops, dtype=torch.float64) / case.size
        inputs = torch.cat([space.normalise(seen.X), share.unsqueeze(-1)], -1)
        scale = Scale.of(seen, space)
        bounds = torch.zeros(2, space.d + 1, dtype=torch.float64)
        bounds[0, -1], bounds[1] = _LEAST / case.size, 1.0
        weights = preference_weights(1, seen.Y.shape[-1], generator=child(source, "weights"))[0]
        noise = seen.Yvar / scale.width**2
        values = scale.gains(seen.Y)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.default_generator.manual_seed(child_seed(source, "botorch") % 2**63)
            acquisition = _ACQUISITIONS[self.kind](inputs, values, noise, weights)
            best = self._optimised(acquisition, bounds)
        x = space.unnormalise(best[: space.d].clamp(0, 1))
        return [Scoring(max(_LEAST, round(float(best[-1]) * case.size)), x)]

    def _optimised(self, acquisition: Any, bounds: Tensor) -> Tensor:
        from botorch.optim.optimize import optimize_acqf

        found, _ = optimize_acqf(
            acquisition,
            bounds=bounds,
            q=1,
            num_restarts=self.restarts,
            raw_samples=self.raw,
            options={"batch_limit": 4, "maxiter": 50},
        )
        point: Tensor = found[0].detach()
        return point


def _models(inputs: Tensor, values: Tensor, noise: Tensor) -> Any:
    """Return one multi-fidelity process per metric; the fidelity is the last input."""
    from botorch.fit import fit_gpytorch_mll
    from botorch.models.gp_regression_fidelity import SingleTaskMultiFidelityGP
    from botorch.models.model_list_gp_regression import ModelListGP
    from botorch.models.transforms import Standardize
    from gpytorch.mlls import SumMarginalLogLikelihood

    model = ModelListGP(
        *(
            SingleTaskMultiFidelityGP(
                inputs,
                values[:, j : j + 1],
                noise[:, j : j + 1],
                data_fidelities=[inputs.shape[-1] - 1],
                outcome_transform=Standardize(1),
            )
            for j in range(values.shape[-1])
        )
    )
    fit_gpytorch_mll(SumMarginalLogLikelihood(model.likelihood, model))
    return model


def _costs(d: int) -> Any:
    """Return what a share costs: as much."""
    from botorch.acquisition.cost_aware import InverseCostWeightedUtility
    from botorch.models.cost import AffineFidelityCostModel

    cost = AffineFidelityCostModel(fidelity_weights={d: 1.0}, fixed_cost=0.001)
    return InverseCostWeightedUtility(cost_model=cost)


def _onto_all(X: Tensor) -> Tensor:
    """Return points with all examples in place of a share of them."""
    return torch.cat([X[..., :-1], torch.ones_like(X[..., -1:])], -1)


def _gradient(inputs: Tensor, values: Tensor, noise: Tensor, weights: Tensor) -> Any:
    from botorch.acquisition.analytic import PosteriorMean
    from botorch.acquisition.fixed_feature import FixedFeatureAcquisitionFunction
    from botorch.acquisition.knowledge_gradient import qMultiFidelityKnowledgeGradient
    from botorch.acquisition.objective import ScalarizedPosteriorTransform
    from botorch.optim.optimize import optimize_acqf

    d = inputs.shape[-1] - 1
    model = _models(inputs, values, noise)
    weighed = ScalarizedPosteriorTransform(weights)
    whole = FixedFeatureAcquisitionFunction(
        PosteriorMean(model, posterior_transform=weighed), d=d + 1, columns=[d], values=[1.0]
    )
    bounds = torch.stack([torch.zeros(d), torch.ones(d)]).double()
    _, now = optimize_acqf(whole, bounds=bounds, q=1, num_restarts=4, raw_samples=64)
    return qMultiFidelityKnowledgeGradient(
        model,
        num_fantasies=16,
        posterior_transform=weighed,
        current_value=now,
        cost_aware_utility=_costs(d),
        project=_onto_all,
    )


def _with_share(inputs: Tensor, values: Tensor, noise: Tensor, weights: Tensor) -> Any:
    from botorch.acquisition.multi_objective.multi_fidelity import MOMF
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.models.transforms import Standardize
    from botorch.utils.multi_objective.box_decompositions import FastNondominatedPartitioning
    from gpytorch.mlls import ExactMarginalLogLikelihood

    share = inputs[:, -1:]
    Y = torch.cat([values, share], -1)
    Yvar = torch.cat([noise, torch.full_like(share, 1e-6)], -1)
    model = SingleTaskGP(inputs, Y, Yvar, outcome_transform=Standardize(Y.shape[-1]))
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    reference = torch.zeros(Y.shape[-1], dtype=torch.float64)
    return MOMF(
        model,
        ref_point=reference,
        partitioning=FastNondominatedPartitioning(ref_point=reference, Y=Y),  # type: ignore[arg-type]
        cost_call=lambda X: X[..., -1:].clamp_min(1e-3),
    )


def _hypervolume(inputs: Tensor, values: Tensor, noise: Tensor, weights: Tensor) -> Any:
    from botorch.acquisition.fixed_feature import FixedFeatureAcquisitionFunction
    from botorch.acquisition.multi_objective.hypervolume_knowledge_gradient import (
        _get_hv_value_function,
        qMultiFidelityHypervolumeKnowledgeGradient,
    )
    from botorch.optim.optimize import optimize_acqf

    d, pareto = inputs.shape[-1] - 1, 5
    model = _models(inputs, values, noise)
    reference = torch.zeros(values.shape[-1], dtype=torch.float64)
    # What the best points promise now, as in BoTorch's tutorial of this acquisition.
    whole = FixedFeatureAcquisitionFunction(
        _get_hv_value_function(model=model, ref_point=reference, use_posterior_mean=True),
        d=d + 1,
        columns=[d],
        values=[1.0],
    )
    bounds = torch.stack([torch.zeros(d), torch.ones(d)]).double()
    _, now = optimize_acqf(whole, bounds=bounds, q=pareto, num_restarts=1, raw_samples=64)
    return qMultiFidelityHypervolumeKnowledgeGradient(
        model,
        ref_point=reference,
        target_fidelities={d: 1.0},
        num_fantasies=4,
        num_pareto=pareto,
        current_value=now,
        cost_aware_utility=_costs(d),
        project=_onto_all,
    )


_ACQUISITIONS: Mapping[str, Callable[[Tensor, Tensor, Tensor, Tensor], Any]] = {
    "kg": _gradient,
    "momf": _with_share,
    "hvkg": _hypervolume,
}
