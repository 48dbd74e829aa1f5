r"""Measure where it settles the front: our own sampler.

A run is judged by its choices: for a preference ``w`` (weights on the simplex) the user gets the
point whose *predicted* utility is best, and regrets what it falls short of the truly best point.
Hypervolume rewards points of the front, whether or not a choice between them was ever in doubt;
integrated variance lowers the doubt everywhere, also where nothing good can lie. Here a
measurement is worth what it tells about the points that are plausibly somebody's best.

*Where the front plausibly is.* A preference and a function drawn from the posterior have one best
point. Over preferences uniform on the simplex and draws of all metrics jointly, these best points
are a sample of the posterior distribution of the Pareto front (of its convex part, which is all
that weighted preferences can ask for). The ``p`` points are the targets. No hypervolume, no
threshold, no limit on the number of metrics.

*What a measurement tells.* On the link scale the posterior is Gaussian. Measuring metric ``i`` at
``x`` with noise variance ``v_i`` moves its mean at a target ``t`` by ``s_i(t, x) z_i`` with
``z_i ~ N(0, 1)`` and

    s_i(t, x) = Cov[f_i(t), f_i(x)] / sqrt(Var[f_i(x)] + v_i),

and so the utility there, to first order, by ``sum_i w_i g_i'(t) s_i(t, x) z_i`` with ``g'`` the
slope of gains over link values.

* ``criterion="regret"``: the expected drop of the preference regret by one measurement,

      E_w E_z [ max_t (U_w(t) + sum_i w_i g_i'(t) s_i(t, x) z_i) ] - E_w [ max_t U_w(t) ].

  It is the knowledge gradient (Frazier, Powell and Dayanik, *The Knowledge-Gradient Policy for
  Correlated Normal Beliefs*, 2009) of the mean best utility over all preferences at once: the
  regret after the measurement falls by exactly this much in expectation, because what is best
  under the truth does not change. The ``z`` come in pairs ``z, -z``, so the estimate is never
  negative. Where no single measurement could change a choice it is zero, and a thousandth of the
  other criterion decides.
* ``criterion="variance"``: the expected drop of the variance of utilities at the targets,

      sum_t E_w sum_i (w_i g_i'(t))^2 s_i(t, x)^2,

  which is integrated variance reduction (Cohn, *Neural Network Exploration Using Optimal
  Experiment Design*, 1996) with the distribution of the front in place of the uniform one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from botorch.acquisition.acquisition import AcquisitionFunction
from botorch.utils.transforms import t_batch_mode_transform
from torch import Generator, Tensor

from map_bo.errors import SamplerError
from map_bo.pareto.gradient import ascend
from map_bo.pareto.indicators import preference_weights
from map_bo.rng import child, child_seed
from map_bo.samplers.designs.space_filling import is_repeat
from map_bo.samplers.posterior.acquisition import AcquisitionDriven, Weighted, of_each_option
from map_bo.samplers.posterior.driven import Situation
from map_bo.samplers.posterior.variance import VarianceReduction, gain_slopes
from map_bo.space import CoefficientSpace
from map_bo.surrogates.feasibility import EdgeDoubt, Feasibility

__all__ = ["FrontUncertainty", "PreferenceGain", "plausible_optima", "utility_weights"]

Criterion = Literal["regret", "variance"]

_POOL = 256  # points that the search for optima starts from, or is made over
_ASCENT = 25  # steps from there
_SAME = 0.01  # of a coefficient's range: nearer targets are one
_TIE = 1e-3  # share of the variance criterion that decides between equal regrets


@dataclass(frozen=True)
class FrontUncertainty(AcquisitionDriven):
    """Chooses the measurements that most reduce the doubt about the front; see the module.

    Any number of metrics. Pending points count as measured: what they will tell is taken off, by
    where they are. The phases and what happens on failures: :class:`PosteriorDriven`;
    ``mc_samples`` are the outcomes ``z`` that a measurement is imagined to have under
    ``"regret"``. By default the first fit comes right after the anchors.

    Attributes:
        criterion: ``"variance"`` or ``"regret"``, which takes several times as long.
        preferences: Weights drawn for each proposal.
        draws: Functions drawn from the posterior for each proposal.
    """

    criterion: Criterion = "variance"
    preferences: int = 32
    draws: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.criterion not in ("regret", "variance"):
            raise SamplerError(
                f"there is no criterion {self.criterion!r}",
                hint="criteria are 'regret' and 'variance'",
            )
        for name in ("preferences", "draws"):
            if getattr(self, name) < 1:
                raise SamplerError(
                    f"{name} is {getattr(self, name)}", hint=f"{name} must be at least 1"
                )

    def initial_points(self, space: CoefficientSpace) -> int:
        """Return how many evaluations come before the first fit."""
        return (
            len(space.experts) + 1 + len(space.by_option) if self.initial is None else self.initial
        )

    def weighted(
        self, acquisition: AcquisitionFunction, situation: Situation
    ) -> AcquisitionFunction:
        """Return the acquisition with feasibility in it; see :class:`Informative`."""
        worth = situation.worth
        if worth is None or worth.region is None or not isinstance(acquisition, PreferenceVariance):
            return super().weighted(acquisition, situation)
        targets = acquisition.targets
        slopes = utility_slopes(situation, targets, acquisition.preferences)
        waiting = acquisition.pending[situation.failed :]
        return Informative(acquisition, worth, worth.region.doubt(targets, slopes, waiting))

    def acquisition(
        self, situation: Situation, pending: Tensor, generator: Generator
    ) -> AcquisitionFunction:
        """Return the expected gain of one measurement."""
        m = len(situation.good.metrics)
        W = preference_weights(self.preferences, m, generator=child(generator, "preferences"))
        W = situation.scale.weights(W)
        targets = plausible_optima(situation, W, self.draws, generator=generator)
        if self.criterion == "variance":
            return PreferenceVariance(situation, targets, W, pending)
        half = torch.quasirandom.SobolEngine(  # type: ignore[no-untyped-call]
            m, scramble=True, seed=child_seed(generator, "outcomes")
        ).draw(max(1, self.mc_samples // 2), dtype=torch.float64)
        z = torch.special.ndtri(half.clamp(1e-6, 1 - 1e-6))
        return PreferenceGain(situation, targets, W, torch.cat([z, -z]), pending)


class PreferenceVariance(VarianceReduction):
    """Logarithm of the drop of the variance of utilities at the targets by one measurement.

    Args:
        situation: What is known.
        targets: ``p x d`` points that are plausibly best for some preference.
        preferences: ``k x m`` weights.
        pending: ``q x d`` points that count as measured.
    """

    def __init__(
        self, situation: Situation, targets: Tensor, preferences: Tensor, pending: Tensor
    ) -> None:
        self.preferences = preferences
        super().__init__(
            situation, targets, utility_weights(situation, targets, preferences), pending
        )


class Informative(Weighted):
    """A drop of variance times the probability of being feasible, and what the edge gains.

    An evaluation that fails measures nothing, but says where the edge of the working region is.

    Args:
        acquisition: The logarithm of a drop of variance of utilities.
        feasibility: How likely points are feasible.
        edge: The doubt about the edge, in the same unit.
    """

    def __init__(
        self, acquisition: AcquisitionFunction, feasibility: Feasibility, edge: EdgeDoubt
    ) -> None:
        super().__init__(acquisition, feasibility)
        self.edge = edge

    def forward(self, X: Tensor) -> Tensor:
        """Return the value at each of ``b`` points (``b x 1 x d``)."""
        return torch.logaddexp(super().forward(X), (self.edge.drop(X.squeeze(-2)) + 1e-30).log())


class PreferenceGain(VarianceReduction):
    """Logarithm of what one more measurement takes off the preference regret; see the module.

    Args:
        situation: What is known.
        targets: ``p x d`` points that are plausibly best for some preference.
        preferences: ``k x m`` weights.
        outcomes: ``z x m`` standard normal outcomes, closed under change of sign.
        pending: ``q x d`` points that count as measured.
    """

    def __init__(
        self,
        situation: Situation,
        targets: Tensor,
        preferences: Tensor,
        outcomes: Tensor,
        pending: Tensor,
    ) -> None:
        super().__init__(
            situation, targets, utility_weights(situation, targets, preferences), pending
        )
        self.preferences, self.outcomes = preferences, outcomes
        # Minimised metrics lose their sign, which does not matter: outcomes are symmetric.
        self.slopes = gain_slopes(situation, targets)
        with torch.no_grad():
            self.utilities = situation.mean_gains(targets) @ preferences.T  # p x k

    @t_batch_mode_transform(expected_q=1)  # type: ignore[arg-type]  # as botorch's own classes
    def forward(self, X: Tensor) -> Tensor:
        """Return the value at each of ``b`` points (``b x 1 x d``)."""
        moves = self.moves(X.squeeze(-2))
        # b x z x p x k: utilities of all targets after each outcome, for each preference.
        step = self.slopes.T.unsqueeze(1) * moves
        change = torch.einsum("zi,ibp,ki->bzpk", self.outcomes, step, self.preferences)
        after = (self.utilities + change).amax(-2).mean((-1, -2))
        gained = (after - self.utilities.amax(0).mean()).clamp_min(0.0)
        return (gained + _TIE * self.drop(moves) + 1e-30).log()


def utility_slopes(situation: Situation, X: Tensor, preferences: Tensor) -> Tensor:
    """Return the derivatives of the utilities by the mean, ``n x k x d``.

    Args:
        situation: What is known.
        X: ``n x d`` points.
        preferences: ``k x m`` weights.
    """
    Z = X.detach().requires_grad_()
    with torch.enable_grad():
        gains = situation.mean_gains(Z).sum(0)
        parts = [
            torch.autograd.grad(gain, Z, retain_graph=True)[0]
            if gain.requires_grad
            else torch.zeros_like(Z)
            for gain in gains
        ]
    return torch.einsum("km,nmd->nkd", preferences, torch.stack(parts, 1))


def utility_weights(situation: Situation, targets: Tensor, preferences: Tensor) -> Tensor:
    """Return the weights (``p x m``) by which link variances add up to the utilities' variance.

    The mean over targets (``p x d``) and preferences (``k x m``) of ``(w_i g_i')^2``.
    """
    slopes = gain_slopes(situation, targets)
    return slopes.square() * preferences.square().mean(0) / len(targets)


def plausible_optima(
    situation: Situation, weights: Tensor, draws: int, *, generator: Generator
) -> Tensor:
    """Return points that are best for some preference under the mean or under a posterior draw.

    They are the best of those that are likely to be feasible.

    Draws in closed form are optimised by gradient ascent; others are drawn over a pool of points,
    which includes the optima of the mean.

    Args:
        situation: What is known.
        weights: ``k x m`` preferences.
        draws: How many functions to draw.
        generator: Source of all randomness; read, never advanced.

    Returns:
        ``p x d`` points, no two of them close, at most ``k (1 + draws)``.
    """
    space, model = situation.space, situation.model
    pool = torch.cat(
        [
            situation.good.X,
            space.project(space.anchors().X),
            space.sample(_POOL, generator=child(generator, "pool")),
        ]
    )

    def best(gains: Tensor) -> Tensor:  # ... x n x m -> ... x k
        return (gains @ weights.T).argmax(-2)

    mean_gains = situation.allowed(situation.mean_gains)
    parts = [pool[rows] for _, rows in of_each_option(pool, space)]
    with torch.no_grad():
        starts = [part[best(mean_gains(part))] for part in parts if len(part)]

    def utility(Z: Tensor) -> Tensor:
        return (mean_gains(Z) * weights).sum(-1)

    climbed = [ascend(utility, space, X, steps=_ASCENT, learning_rate=0.05) for X in starts]
    certain = _best_of(climbed, utility)
    pool = torch.cat([*climbed, pool])
    gains = situation.gains()
    source = child(generator, "draws")
    functions = model.sample_functions(draws, generator=source)
    with torch.no_grad():
        allowed = situation.allowed(lambda Z: gains(functions(Z), None))
        # s k x d of every option, where they are climbed, else of all together
        parts = [pool[rows] for _, rows in of_each_option(pool, space)]
        parts = [part for part in parts if len(part)] if functions.explicit else [pool]
        drawn_best = [part[best(allowed(part)).flatten()] for part in parts]
    if functions.explicit:
        which = torch.arange(draws).repeat_interleave(len(weights))
        wanted = weights.repeat(draws, 1)

        each = situation.allowed(lambda Z: gains(functions.each(Z, which), None))

        def drawn(Z: Tensor) -> Tensor:
            return (each(Z) * wanted).sum(-1)

        drawn_best = [
            ascend(drawn, space, X, steps=_ASCENT, learning_rate=0.05) for X in drawn_best
        ]
        found = _best_of(drawn_best, drawn)
    else:
        found = drawn_best[0]
    points = torch.cat([certain, found])
    kept = points[:1]
    for point in points[1:]:
        if not bool(is_repeat(point.unsqueeze(0), kept, space, tolerance=_SAME)):
            kept = torch.cat([kept, point.unsqueeze(0)])
    return kept


def _best_of(options: list[Tensor], value: Callable[[Tensor], Tensor]) -> Tensor:
    """Return, row by row, the best of several tensors ``n x d`` by ``value`` (to ``n``)."""
    if len(options) == 1:
        return options[0]
    with torch.no_grad():
        which = torch.stack([value(X) for X in options]).argmax(0)
    return torch.stack(options)[which, torch.arange(len(which))]
