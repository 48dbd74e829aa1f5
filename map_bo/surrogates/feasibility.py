r"""Where a run may go: what works and keeps the constraints.

Constraints are judged by the surrogate's posterior of their metrics (:func:`log_satisfied`). Where
evaluations work is learned by a classifier over coefficients, which is off until something failed.

A merge whose coefficients add up to too much diverges every time; another evaluation fails because
a machine was rebooted. The first says where not to look, the second says nothing. Which of the two
a failure was is a question of the evidence, so several explanations are weighed by theirs:

* *Chance.* Evaluations fail at one rate everywhere, with a Beta(9, 1) prior on that they work.
* *A region.* An evaluation works where a Gaussian process ``f`` over the unit cube is positive,
  but for chance: ``p(works | f) = (1 - e) Phi(f)``. The prior mean of ``f`` is .25 or 1
  deviations above 0 ("works"); its deviation is 2 or 5 (the larger, the sharper the edge); its
  kernel is linear, smooth (length .4 sqrt(d)), or linear and rough in equal parts (length
  .15 sqrt(d)); and the rate ``e`` of chance is .02 or .15.
  Each is fitted by Laplace's method (Rasmussen and Williams, *Gaussian Processes for Machine
  Learning*, 2006, section 3.4), with the expected information in place of the Hessian, which a
  likelihood with chance in it may have of either sign.

What is reported is the probability that a point works, chance set aside: a run whose evaluator
fails now and then closes no region, and one whose failures lie together closes theirs after a few.
Everything is deterministic, float64 and differentiable in the coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from map_bo.constraints import AtLeast, AtMost, Constraint
from map_bo.data import Observations
from map_bo.errors import ConfigError
from map_bo.space import CoefficientSpace
from map_bo.surrogates.features import inputs
from map_bo.surrogates.links import Link
from map_bo.surrogates.surrogate import PointCovariances, SurrogateModel

__all__ = [
    "EdgeDoubt",
    "Failures",
    "Feasibility",
    "Requirements",
    "WorkingRegion",
    "log_satisfied",
]

Failures = Literal["learn", "ignore"]

_PRIOR = (9.0, 1.0)  # of a Beta distribution: chance failures are few
_REGION = 0.5  # prior probability that failures have to do with the coefficients at all
_ABOVE = (0.25, 1.0)  # prior mean of f in deviations: 40 or 16 % of the space fails beforehand
_DEVIATIONS = (2.0, 5.0)
_CHANCES = (0.02, 0.15)
_SHORT, _LONG = 0.15, 0.4  # of the diagonal of the unit cube
_STEPS = 30  # of Newton's method at most
_ROWS = 200  # evaluations that are looked at: the last failures and the last successes
_NEGLIGIBLE = 1e-3  # posterior weight below which an explanation is left out
_LEAST = 1e-12
_FAR = 1e5  # deviations from a bound beyond which it makes no difference
_SURE = 0.85  # probability that a point of a front works, where a run knows what works for certain
_SPARE = 0.2  # of the way from the least probability to 1, in logarithms


@dataclass(frozen=True, eq=False)
class WorkingRegion:
    """The posterior probability that coefficients work; see the module.

    Attributes:
        space: The coefficients.
        chance: Estimated share of evaluations that fail by chance, wherever they are.
        weight: Posterior probability that failures have to do with the coefficients.
    """

    space: CoefficientSpace
    chance: float
    weight: float
    _fits: _Fits
    _shares: Tensor
    _worked: Tensor

    @classmethod
    def of(cls, seen: Observations, space: CoefficientSpace) -> WorkingRegion | None:
        """Return what the failures among ``seen`` say; None where nothing failed.

        Args:
            seen: All evaluations. Of more than 200 the last 100 failures are looked at, and
                the last successes.
            space: Their space.
        """
        if not bool(seen.failed_rows.any()):
            return None
        if bool(seen.incomplete.any()):  # what was not measured neither works nor fails
            seen = seen.select(~seen.incomplete)
        works = seen.ok
        bad, good = (~works).nonzero().flatten(), works.nonzero().flatten()
        bad = bad[-max(_ROWS // 2, _ROWS - len(good)) :]
        rows = torch.cat([bad, good[max(0, len(good) - (_ROWS - len(bad))) :]]).sort().values
        Z, y = inputs(seen.X[rows], space), works[rows]
        priors = _Priors.of(Z.shape[-1])
        fits = _Fits.of(Z, y, priors)
        a, b = _PRIOR[0] + float(y.sum()), _PRIOR[1] + float((~y).sum())
        by_chance = math.log(1 - _REGION) + _log_beta(a, b) - _log_beta(*_PRIOR)
        evidence = fits.evidence + math.log(_REGION / len(fits.evidence))
        shares = torch.cat([evidence.new_tensor([by_chance]), evidence]).softmax(0)
        chance = float(shares[0]) * b / (a + b) + float(shares[1:] @ priors.chance)
        kept = (shares[1:] > _NEGLIGIBLE).nonzero().flatten()
        return cls(
            space=space,
            chance=chance,
            weight=1 - float(shares[0]),
            _fits=fits.select(kept),
            _shares=shares[1:][kept],
            _worked=seen.X[rows][y],
        )

    def probability(self, X: Tensor) -> Tensor:
        """Return the probability that each row (``n x d``) works, chance set aside, ``n``.

        One evaluation succeeds with ``1 - chance`` times this.
        """
        mean, variance = self._fits.latent(inputs(X, self.space))
        fails: Tensor = self._shares @ torch.special.ndtr(-mean / (1 + variance).sqrt())
        return 1 - fails

    @cached_property
    def sure(self) -> float:
        """The probability that a point of a front should have, as far as the run can tell.

        It is .85 times the square of the highest probability at a point that worked. Where that
        is near 1 the edge is known: a little inside of it costs next to nothing, at it half of a
        front may fail. Where no point is sure to work, a fixed probability would leave the
        surroundings of a few evaluations, or not even these, and the best of what works outside.
        """
        if not len(self._worked):
            return 0.0
        with torch.no_grad():
            return float(_SURE * self.probability(self._worked).amax().square())

    def log_probability(self, X: Tensor) -> Tensor:
        """Return the logarithm of :meth:`probability`, which is finite."""
        return self.probability(X).clamp_min(_LEAST).log()

    def doubt(self, targets: Tensor, slopes: Tensor, pending: Tensor) -> EdgeDoubt:
        """Return what the unknown edge of the region costs at some targets.

        Args:
            targets: ``p x d`` points.
            slopes: ``p x k x d`` derivatives of ``k`` utilities there, over the coefficients.
            pending: ``q x d`` points that are being evaluated.
        """
        return EdgeDoubt(self, targets, slopes, pending)


class EdgeDoubt:
    """The doubt about where the edge of the working region is, as a variance of utilities.

    Where ``f`` is off by its deviation ``s``, the edge is off by ``s / |f'|``, and a utility with
    the derivative ``u'`` at a target on the edge by ``s u'f' / |f'|^2``. So the variance of ``f``
    weighs ``(u'f')^2 / |f'|^4``, times ``4 p (1 - p)`` for how likely the edge is there. An
    evaluation at ``x`` lowers that variance by ``Cov[f(t), f(x)]^2 / (Var[f(x)] + 1 / W)`` with
    ``W`` the information in whether it works.

    Args:
        region: Where evaluations work.
        targets: ``p x d`` points.
        slopes: ``p x k x d`` derivatives of ``k`` utilities there, over the coefficients.
        pending: ``q x d`` points that are being evaluated.
    """

    def __init__(
        self, region: WorkingRegion, targets: Tensor, slopes: Tensor, pending: Tensor
    ) -> None:
        self._region, self._fits = region, region._fits
        space, p = region.space, len(targets)
        slopes = slopes * (space.bounds[1] - space.bounds[0])
        Z = inputs(targets, space).detach().requires_grad_()
        if space.placed_choice is not None:  # nothing is gained along the columns of options
            rest = torch.arange(space.d) != space.placed_choice.column
            slopes = torch.nn.functional.pad(slopes[..., rest], (0, space.placed_choice.count))
        with torch.enable_grad():
            mean, variance = self._fits.latent(Z)
            edges = torch.stack(
                [torch.autograd.grad(one.sum(), Z, retain_graph=True)[0] for one in mean]
            )  # j x p x d
        size = edges.square().sum(-1)
        along = torch.einsum("pkd,jpd->jpk", slopes, edges).square().mean(-1)
        works = region.probability(targets).detach()
        likely = 4 * works * (1 - works)
        # No edge is worth more than one gain, the distance from the reference to the best.
        weights = along / size.square().clamp_min(_LEAST)
        weights = torch.minimum(weights, 1 / variance.detach().clamp_min(_LEAST))
        self._weights = region._shares.unsqueeze(-1) * weights * likely / p  # j x p
        self._points = torch.cat([Z.detach(), inputs(pending, space)])
        self._p = p
        joint = self._fits.covariance(self._points, self._points)
        block = joint[:, p:, p:] + torch.diag_embed(self._noise(self._points[p:]))
        self._inverse = torch.linalg.inv(block)  # j x q x q
        self._gain = joint[:, :p, p:] @ self._inverse

    def _noise(self, Z: Tensor) -> Tensor:
        """Return the variance of ``f`` that whether ``Z`` works is worth, ``j x b``."""
        mean, _ = self._fits.latent(Z)
        chance = self._fits.priors.chance.unsqueeze(-1)
        anything = torch.ones(len(Z), dtype=torch.bool)
        _, _, information = _likelihood(mean, anything, chance)
        return 1 / information.clamp_min(1e-9)

    def drop(self, X: Tensor) -> Tensor:
        """Return by how much an evaluation lowers the doubt, ``b`` for ``b x d``."""
        Z = inputs(X, self._region.space)
        cross = self._fits.covariance(Z, self._points)  # j x b x (p + q)
        _, variance = self._fits.latent(Z)
        toward = cross[..., self._p :]
        variance = (variance - (toward @ self._inverse * toward).sum(-1)).clamp_min(0.0)
        cross = cross[..., : self._p] - toward @ self._gain.mT
        moved = cross.square() / (variance + self._noise(Z)).unsqueeze(-1)
        total: Tensor = (self._weights.unsqueeze(1) * moved).sum((0, -1))
        return total


@dataclass(frozen=True)
class Requirements:
    """What the points of a run have to fulfil.

    Attributes:
        failures: ``"learn"`` to keep away from where evaluations fail, ``"ignore"`` not to.
        least: The least probability of being feasible that a point of the front may have.
        constraints: What metrics have to keep.

    Raises:
        ConfigError: On a value that is not possible.
    """

    failures: Failures = "learn"
    least: float = 0.5
    constraints: tuple[Constraint, ...] = ()

    def __post_init__(self) -> None:
        if self.failures not in ("learn", "ignore"):
            raise ConfigError(
                f"failures must be 'learn' or 'ignore', got {self.failures!r}",
                hint="'learn' keeps the run away from where evaluations fail",
            )
        least = self.least
        if isinstance(least, bool) or not isinstance(least, int | float) or not 0 < least < 1:
            raise ConfigError(
                f"least_feasible must be between 0 and 1, got {least!r}",
                hint="give the probability that a point of the front must have, such as 0.5",
            )

    def region(self, seen: Observations, space: CoefficientSpace) -> WorkingRegion | None:
        """Return where evaluations work; None where nothing failed or failures are ignored."""
        return WorkingRegion.of(seen, space) if self.failures == "learn" else None

    def given(
        self, seen: Observations, space: CoefficientSpace, model: SurrogateModel | None
    ) -> Feasibility | None:
        """Return how likely points are feasible, given ``seen``; None where all points are.

        Args:
            seen: All evaluations.
            space: The coefficients.
            model: The surrogate fitted to them; without one, constraints play no part.
        """
        region = self.region(seen, space)
        constraints = () if model is None else self.constraints
        if region is None and not constraints:
            return None
        return Feasibility(space, region, self.least, model, constraints)


@dataclass(frozen=True, eq=False)
class Feasibility:
    """How likely points are feasible: that their evaluations work and constraints hold.

    Attributes:
        space: The coefficients.
        region: Where evaluations work; None where all do.
        least: The least probability that a point of the front may have.
        model: The surrogate that constraints are judged by.
        constraints: What metrics have to keep.
    """

    space: CoefficientSpace
    region: WorkingRegion | None = None
    least: float = 0.5
    model: SurrogateModel | None = None
    constraints: tuple[Constraint, ...] = ()

    @cached_property
    def _variances(self) -> PointCovariances | None:
        if self.model is None or not self.constraints:
            return None
        return self.model.covariances_with(self.space.anchors().X[:1])

    def log_probability(self, X: Tensor) -> Tensor:
        """Return the logarithm of the probability, ``n`` for ``n x d``; differentiable."""
        total = X.new_zeros(len(X))
        if self.region is not None:
            total = total + self.region.log_probability(X)
        return total + self._log_keeps(X)

    def _log_keeps(self, X: Tensor) -> Tensor:
        if self.model is None or self._variances is None:
            return X.new_zeros(len(X))
        return log_satisfied(self.model, X, self.constraints, self._variances)

    def probability(self, X: Tensor) -> Tensor:
        """Return the probability that each row of ``X`` (``n x d``) is feasible, ``n``."""
        return self.log_probability(X).exp()

    def allows(self, X: Tensor) -> Tensor:
        """Return which rows (``n x d``) a front may hold."""
        with torch.no_grad():
            allowed = self.probability(X) >= self.least
            if self.region is not None:
                allowed &= self.region.probability(X) >= self.region.sure
        return allowed

    def excess(self, X: Tensor) -> Tensor:
        """Return by how much the log probability of each row (``n x d``) is too low, ``n``.

        It is 0 where a front may lie with a little to spare, so that what is kept by a penalty is
        allowed; differentiable, with a slope that sets in gradually, so that solvers come to rest.
        """
        total = X.new_zeros(len(X))
        works = total
        if self.region is not None:
            works = self.region.log_probability(X)
            total = total + _over(works, max(self.least, self.region.sure))
        if self.constraints:
            total = total + _over(works + self._log_keeps(X), self.least)
        return total


def _over(log_probability: Tensor, least: float) -> Tensor:
    limit = math.log(least)
    over = ((1 - _SPARE) * limit - log_probability).clamp_min(0.0)
    soft = -_SPARE * limit
    return torch.where(over < soft, over.square() / (2 * soft), over - soft / 2)


def log_satisfied(
    model: SurrogateModel,
    X: Tensor,
    constraints: Sequence[Constraint],
    covariances: PointCovariances | None = None,
) -> Tensor:
    """Return the log probability that ``X`` (``n x d``) keeps all constraints, ``n``.

    It is of the real metrics: the posterior with the misfit of the model and without measurement
    noise (:func:`map_bo.surrogates.prediction.holding_probability` is of what would be measured).
    Metrics are independent given the data. Finite and differentiable, also far from a bound.

    Args:
        model: The surrogate.
        X: Points.
        constraints: What metrics have to keep.
        covariances: ``model.covariances_with`` any points, to make them once.
    """
    total = X.new_zeros(len(X))
    if not constraints or not len(X):
        return total
    known = model.covariances_with(X[:1].detach()) if covariances is None else covariances
    mean = model.link_mean(X)
    _, variance = known.to(X)
    deviation = (variance.T.clamp_min(0.0) + model.misfit_variance()).clamp_min(1e-30).sqrt()
    low = {one.metric: one.bound for one in constraints if isinstance(one, AtLeast)}
    high = {one.metric: one.bound for one in constraints if isinstance(one, AtMost)}
    for j, (metric, link) in enumerate(zip(model.metrics, model.links, strict=True)):
        least, most = low.get(metric.name), high.get(metric.name)
        # A bound that no value can break; a link would move it inside.
        if least is not None and metric.lower is not None and least <= metric.lower:
            least = None
        if most is not None and metric.upper is not None and most >= metric.upper:
            most = None

        def away(bound: float, j: int = j, link: Link = link) -> Tensor:
            limit = link.forward(torch.tensor(bound, dtype=torch.float64))
            return ((limit - mean[:, j]) / deviation[:, j]).clamp(-_FAR, _FAR)

        if least is not None and most is not None:
            total = total + _log_between(away(least), away(most))
        elif least is not None:
            total = total + torch.special.log_ndtr(-away(least))
        elif most is not None:
            total = total + torch.special.log_ndtr(away(most))
    return total


def _log_between(a: Tensor, b: Tensor) -> Tensor:
    """Return the logarithm of ``Phi(b) - Phi(a)`` for ``a <= b``."""
    flipped = a + b > 0  # so that the interval lies mostly below 0, where nothing cancels
    a, b = torch.where(flipped, -b, a), torch.where(flipped, -a, b)
    upper, lower = torch.special.log_ndtr(b), torch.special.log_ndtr(a)
    inside: Tensor = upper + (-torch.expm1((lower - upper).clamp_max(-_LEAST))).log()
    return inside


@dataclass(frozen=True, eq=False)
class _Priors:
    """Priors of ``j`` explanations: ``j`` values each."""

    mean: Tensor
    variance: Tensor
    length: Tensor
    linear: Tensor  # share of the variance
    chance: Tensor

    @classmethod
    def of(cls, d: int) -> _Priors:
        kernels = ((_LONG, 1.0), (_LONG, 0.0), (_SHORT, 0.5))
        columns = [
            (above * deviation, deviation**2, length * math.sqrt(d), linear, chance)
            for above in _ABOVE
            for deviation in _DEVIATIONS
            for length, linear in kernels
            for chance in _CHANCES
        ]
        return cls(*torch.tensor(columns, dtype=torch.float64).T)

    def select(self, rows: Tensor) -> _Priors:
        return _Priors(*(getattr(self, one.name)[rows] for one in fields(self)))

    def covariance(self, Z: Tensor, others: Tensor) -> Tensor:
        """Return the covariances of ``b x d`` with ``n x d`` points, ``j x b x n``."""
        gaps = (Z.unsqueeze(1) - others).square().sum(-1)
        product = (12 / Z.shape[-1]) * (Z - 0.5) @ (others - 0.5).mT
        column = (slice(None), None, None)
        smooth = torch.exp(-gaps / (2 * self.length[column] ** 2))
        linear = self.linear[column]
        return self.variance[column] * ((1 - linear) * smooth + linear * product)

    def variances(self, Z: Tensor) -> Tensor:
        """Return the variances of ``b x d`` points, ``j x b``."""
        product = (12 / Z.shape[-1]) * (Z - 0.5).square().sum(-1)
        linear = self.linear.unsqueeze(-1)
        return self.variance.unsqueeze(-1) * (1 - linear + linear * product)


@dataclass(frozen=True, eq=False)
class _Fits:
    """Laplace's approximation of ``j`` explanations by a region, all in one batch."""

    priors: _Priors
    Z: Tensor
    pull: Tensor  # j x n: K^-1 (f - mean)
    whitened: Tensor  # j x n x n: square root of the information, by the Cholesky factor's inverse
    evidence: Tensor  # j

    @classmethod
    def of(cls, Z: Tensor, works: Tensor, priors: _Priors) -> _Fits:
        K = priors.covariance(Z, Z)
        mean, chance = priors.mean.unsqueeze(-1), priors.chance.unsqueeze(-1)
        eye = torch.eye(len(Z), dtype=torch.float64)

        def times(v: Tensor) -> Tensor:
            return (K @ v.unsqueeze(-1)).squeeze(-1)

        def reached(pull: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            f = times(pull)
            value, slope, information = _likelihood(mean + f, works, chance)
            return value.sum(-1) - (pull * f).sum(-1) / 2, slope, information

        pull = torch.zeros(len(K), len(Z), dtype=torch.float64)
        best, slope, information = reached(pull)
        size = torch.ones_like(best)
        for _ in range(_STEPS):
            root = information.sqrt()
            factor = torch.linalg.cholesky(eye + root.unsqueeze(-1) * K * root.unsqueeze(-2))
            b = information * times(pull) + slope
            inner = torch.cholesky_solve((root * times(b)).unsqueeze(-1), factor).squeeze(-1)
            tried = pull + size.unsqueeze(-1) * (b - root * inner - pull)
            value, new_slope, new_information = reached(tried)
            # The likelihood with chance in it is not concave: a step that leads down is shortened.
            better = value >= best
            gained = torch.where(better, value - best, 0.0)
            size = torch.where(better, (2 * size).clamp_max(1.0), size / 4)
            column = better.unsqueeze(-1)
            pull = torch.where(column, tried, pull)
            slope = torch.where(column, new_slope, slope)
            information = torch.where(column, new_information, information)
            best = torch.where(better, value, best)
            if bool((better & (gained < 1e-8) | (size < 1e-3)).all()):
                break
        root = information.sqrt()
        factor = torch.linalg.cholesky(eye + root.unsqueeze(-1) * K * root.unsqueeze(-2))
        whitened = torch.linalg.solve_triangular(factor, torch.diag_embed(root), upper=False)
        evidence = best - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return cls(priors, Z, pull, whitened, evidence)

    def select(self, rows: Tensor) -> _Fits:
        return _Fits(
            self.priors.select(rows),
            self.Z,
            self.pull[rows],
            self.whitened[rows],
            self.evidence[rows],
        )

    def covariance(self, Z: Tensor, others: Tensor) -> Tensor:
        """Return the covariances of ``f`` at ``b x d`` and ``q x d`` points, ``j x b x q``."""
        known = self.priors.covariance(Z, self.Z) @ self.whitened.mT
        theirs = self.priors.covariance(others, self.Z) @ self.whitened.mT
        return self.priors.covariance(Z, others) - known @ theirs.mT

    def latent(self, Z: Tensor) -> tuple[Tensor, Tensor]:
        """Return means and variances of ``f`` at ``Z`` (``b x d``), ``j x b`` each."""
        cross = self.priors.covariance(Z, self.Z)
        known = (cross @ self.whitened.mT).square().sum(-1)
        variance = (self.priors.variances(Z) - known).clamp_min(0.0)
        mean = self.priors.mean.unsqueeze(-1) + (cross @ self.pull.unsqueeze(-1)).squeeze(-1)
        return mean, variance


def _likelihood(f: Tensor, works: Tensor, chance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log likelihood, its derivative, and the expected information, ``j x n`` each."""
    outside = torch.special.ndtr(-f)
    density = torch.exp(-f.square() / 2) / math.sqrt(2 * math.pi)
    fails = chance + (1 - chance) * outside
    rate = (1 - chance) * density
    value = torch.where(works, torch.log1p(-chance) + torch.special.log_ndtr(f), fails.log())
    # The derivative of log Phi by its scaled complement, which stays finite far below 0.
    ratio = math.sqrt(2 / math.pi) / torch.special.erfcx(-f / math.sqrt(2))
    slope = torch.where(works, ratio, -rate / fails)
    information = ratio * rate / fails
    return value, slope, information


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
