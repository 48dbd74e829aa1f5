"""Synthetic problems whose Pareto sets are known, to measure everything else against.

All live in the unit cube ``[0, 1]^d`` with coefficients ``c1 .. cd``, and all their metrics
``f1 .. fm`` are to be maximised. Their definition follows from the settings alone: the same
settings are the same functions everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Generator, Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import DataError
from map_bo.evaluators.isolation.world import known_numerics
from map_bo.pareto.dominance import non_dominated
from map_bo.rng import child, make_generator
from map_bo.scale import widths
from map_bo.space import CoefficientSpace
from map_bo.values import real_number, whole_number

__all__ = ["ConcaveQuadratics", "MultiBump", "SigmoidQuadratics", "noisy"]

_MARGIN = 0.1
_SHARPNESS = 4.0
_DENSE = 4000
_PRIME = 1_000_003
_MOST = 1_000_000  # of anything: a file can ask for more than any machine has
_ENTRIES = 100_000_000  # of the matrices of curvature


def noisy(
    X: Tensor, Y: Tensor, metrics: tuple[Metric, ...], noise: float, generator: Generator
) -> Observations:
    """Return ``Y`` with independent Gaussian noise of known standard deviation ``noise``.

    Args:
        X: ``n x d`` coefficients.
        Y: ``n x m`` true values.
        metrics: The ``m`` metrics.
        noise: Standard deviation, in the metrics' units; with 0 the values are exact.
        generator: Only its seed is used, so the same generator gives the same noise.
    """
    if noise > 0:
        draws = torch.randn(Y.shape, generator=child(generator, "noise"), dtype=torch.float64)
        Y = Y + noise * draws
    return Observations(X, Y, metrics, Yvar=torch.full_like(Y, noise**2))


def _check(settings: dict[str, int], *, noise: float = 0.0) -> None:
    for name, value in settings.items():
        if whole_number(name, value, least=1, error=DataError) > _MOST:
            raise DataError(
                f"{name} must be at most {_MOST}, got {value}", hint="give a smaller number"
            )
    hint = "give a standard deviation, or 0 for none"
    real_number("noise", noise, least=0, error=DataError, hint=hint)


def _cube(d: int) -> CoefficientSpace:
    return CoefficientSpace.box(tuple(f"c{i + 1}" for i in range(d)))


def _simplex(n: int, m: int, generator: Generator) -> Tensor:
    """Return ``n x m`` weights, uniform on the simplex; first its ``m`` corners."""
    draws = -torch.rand(n, m, generator=generator, dtype=torch.float64).clamp_min(1e-300).log()
    return torch.cat([torch.eye(m, dtype=torch.float64), draws / draws.sum(-1, keepdim=True)])[:n]


@dataclass(frozen=True)
class ConcaveQuadratics:
    r"""``f_i(c) = 1 - (c - c_i)' A_i (c - c_i)`` with ``A_i`` positive definite.

    As all ``f_i`` are strictly concave, every Pareto optimum maximises a weighted sum and every
    weighted sum has one maximiser, ``c(w) = (sum w_i A_i)^-1 sum w_i A_i c_i``. So the Pareto
    set is the image of the simplex of weights. With equal ``A_i`` it is the convex hull of the
    centres. The centres are drawn at random and then shrunk towards the middle of the cube
    until the whole set lies inside; it shrinks in proportion with them.

    Attributes:
        d: Number of coefficients.
        m: Number of metrics.
        seed: Seed of centres and curvatures.
        noise: Standard deviation of Gaussian measurement noise; known through ``Yvar``.
        conditioning: Largest over smallest eigenvalue of each ``A_i``, whose axes are random;
            with 1 all ``A_i`` are the identity.

    Raises:
        DataError: When one of the settings is not possible.
    """

    d: int = 3
    m: int = 3
    seed: int = 0
    noise: float = 0.0
    conditioning: float = 4.0

    def __post_init__(self) -> None:
        _check({"d": self.d, "m": self.m}, noise=self.noise)
        if self.m * self.d**2 > _ENTRIES:
            raise DataError(
                f"{self.m} metrics of {self.d} coefficients have curvatures of "
                f"{self.m * self.d**2} numbers",
                hint=f"lower d or m: {_ENTRIES} are the most",
            )
        if not 1 <= self.conditioning < float("inf"):
            raise DataError(
                f"conditioning must be finite and at least 1, got {self.conditioning}",
                hint="it is the ratio of the largest to the smallest eigenvalue",
            )

    @property
    def space(self) -> CoefficientSpace:
        """The unit cube."""
        return _cube(self.d)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """``f1 .. fm``, unbounded, to maximise; the best possible value of each is 1."""
        return tuple(Metric(f"f{i + 1}", kind="unbounded") for i in range(self.m))

    @cached_property
    def curvatures(self) -> Tensor:
        """The matrices ``A_i``, ``m x d x d``."""
        generator = child(make_generator(self.seed), "curvatures")
        draws = torch.randn(self.m, self.d, self.d, generator=generator, dtype=torch.float64)
        axes = torch.linalg.qr(draws)[0]
        spread = torch.linspace(-0.5, 0.5, self.d, dtype=torch.float64)
        if self.d == 1:
            spread = torch.zeros(1, dtype=torch.float64)
        values = torch.diag(torch.exp(spread * math.log(self.conditioning)))
        curvatures: Tensor = axes @ values @ axes.transpose(-1, -2)
        return curvatures

    @cached_property
    def centres(self) -> Tensor:
        """The best point of each metric, ``m x d``."""
        generator = child(make_generator(self.seed), "centres")
        offsets = torch.rand(self.m, self.d, generator=generator, dtype=torch.float64) - 0.5
        weights = _simplex(8192, self.m, child(make_generator(self.seed), "margin"))
        reach = max(float(offsets.abs().max()), float(self._optima(weights, offsets).abs().max()))
        # The set is sampled, not bounded: hence a margin of a tenth of the cube at each side.
        return 0.5 + offsets * ((0.5 - _MARGIN) / reach)

    def _optima(self, weights: Tensor, centres: Tensor) -> Tensor:
        """Return ``c(w)``, ``n x d``, for weights ``n x m``."""
        matrix = torch.einsum("nm,mij->nij", weights, self.curvatures)
        right = torch.einsum("nm,mij,mj->ni", weights, self.curvatures, centres)
        optima: Tensor = torch.linalg.solve(matrix, right)
        return optima

    def true_values(self, X: Tensor) -> Tensor:
        """Return the metrics without noise, ``n x m``, at ``X`` (``n x d``)."""
        gap = X.double().unsqueeze(-2) - self.centres
        return 1 - torch.einsum("nmi,mij,nmj->nm", gap, self.curvatures, gap)

    @known_numerics()
    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        """Measure every metric at every row of ``X`` (``n x d``), with noise if there is any.

        Raises:
            SpaceError: When a row lies outside the cube.
        """
        X = self.space.check(X)
        return noisy(X, self.true_values(X), self.metrics, self.noise, generator)

    def pareto_set(self, n: int, *, generator: Generator) -> Tensor:
        """Return ``n x d`` Pareto-optimal points, for weights drawn uniformly from the simplex.

        The first ``m`` of them are the centres.
        """
        return self._optima(_simplex(n, self.m, generator), self.centres)

    def pareto_front(self, n: int, *, generator: Generator) -> Tensor:
        """Return ``n x m`` values of the true front: those of :meth:`pareto_set`."""
        return self.true_values(self.pareto_set(n, generator=generator))


@dataclass(frozen=True)
class SigmoidQuadratics:
    """Proportions ``sigmoid(4 (q_i(c) - 1/2))`` of :class:`ConcaveQuadratics` ``q_i``.

    A monotone transform of each metric leaves the Pareto set as it is. The best value of each
    metric is ``sigmoid(2)``, about .88.

    Attributes:
        d: Number of coefficients.
        m: Number of metrics.
        seed: Seed of the quadratics.
        count: When given, each proportion is measured on that many examples: a binomial draw,
            with ``Observations.counts`` set. By default the values are exact.
        conditioning: As of :class:`ConcaveQuadratics`.

    Raises:
        DataError: When one of the settings is not possible.
    """

    d: int = 3
    m: int = 3
    seed: int = 0
    count: int | None = None
    conditioning: float = 4.0

    def __post_init__(self) -> None:
        if self.count is not None:
            _check({"count": self.count})
        ConcaveQuadratics(self.d, self.m, self.seed, conditioning=self.conditioning)

    @cached_property
    def quadratics(self) -> ConcaveQuadratics:
        """The quadratics below the sigmoid."""
        return ConcaveQuadratics(self.d, self.m, self.seed, conditioning=self.conditioning)

    @property
    def space(self) -> CoefficientSpace:
        """The unit cube."""
        return _cube(self.d)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """``f1 .. fm``, proportions, to maximise."""
        return tuple(Metric(f"f{i + 1}") for i in range(self.m))

    def true_values(self, X: Tensor) -> Tensor:
        """Return the metrics without noise, ``n x m``, at ``X`` (``n x d``)."""
        return torch.sigmoid(_SHARPNESS * (self.quadratics.true_values(X) - 0.5))

    @known_numerics()
    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        """Measure every metric at every row of ``X`` (``n x d``).

        The variance of a counted proportion is that of a binomial share, smoothed by half an
        example each way as for every counted metric, so that it is never 0.

        Raises:
            SpaceError: When a row lies outside the cube.
        """
        X = self.space.check(X)
        truth = self.true_values(X)
        if self.count is None:
            return noisy(X, truth, self.metrics, 0.0, generator)
        counts = torch.full_like(truth, float(self.count))
        right = torch.binomial(counts, truth, generator=child(generator, "noise"))
        smooth = (right + 0.5) / (counts + 1)
        return Observations(
            X,
            right / counts,
            self.metrics,
            Yvar=smooth * (1 - smooth) / (counts + 1),
            counts=counts,
        )

    def pareto_set(self, n: int, *, generator: Generator) -> Tensor:
        """Return ``n x d`` Pareto-optimal points; see :meth:`ConcaveQuadratics.pareto_set`."""
        return self.quadratics.pareto_set(n, generator=generator)

    def pareto_front(self, n: int, *, generator: Generator) -> Tensor:
        """Return ``n x m`` values of the true front: those of :meth:`pareto_set`."""
        return self.true_values(self.pareto_set(n, generator=generator))


@dataclass(frozen=True)
class MultiBump:
    """Sums of Gaussian bumps ``sum_k h_ik exp(-|c - c_ik|^2 / (2 s^2))``: several local optima.

    The Pareto set has no closed form and may be in several pieces. :attr:`dense_front` finds
    it by a dense search that is the same every time and runs once for an instance: 2^15 Sobol
    points, then rounds that perturb the non-dominated ones with ever smaller steps. It is
    meant for few coefficients (up to about 4); beyond it is a good approximation only.

    Attributes:
        d: Number of coefficients.
        m: Number of metrics.
        seed: Seed of the bumps.
        noise: Standard deviation of Gaussian measurement noise; known through ``Yvar``.
        bumps: Bumps of each metric; the first has height 1, the others from .3 to .9.
        width: Standard deviation ``s`` of a bump.

    Raises:
        DataError: When one of the settings is not possible.
    """

    d: int = 2
    m: int = 2
    seed: int = 0
    noise: float = 0.0
    bumps: int = 3
    width: float = 0.2

    def __post_init__(self) -> None:
        _check({"d": self.d, "m": self.m, "bumps": self.bumps}, noise=self.noise)
        if not 0 < self.width < float("inf"):
            raise DataError(
                f"width must be finite and positive, got {self.width}",
                hint="give a positive number",
            )

    @property
    def space(self) -> CoefficientSpace:
        """The unit cube."""
        return _cube(self.d)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """``f1 .. fm``, unbounded, to maximise."""
        return tuple(Metric(f"f{i + 1}", kind="unbounded") for i in range(self.m))

    @cached_property
    def centres(self) -> Tensor:
        """The middles of the bumps, ``m x bumps x d``, in ``[.1, .9]^d``."""
        generator = child(make_generator(self.seed), "bumps")
        draws = torch.rand(self.m, self.bumps, self.d, generator=generator, dtype=torch.float64)
        return _MARGIN + (1 - 2 * _MARGIN) * draws

    @cached_property
    def heights(self) -> Tensor:
        """The heights of the bumps, ``m x bumps``."""
        generator = child(make_generator(self.seed), "heights")
        draws = torch.rand(self.m, self.bumps, generator=generator, dtype=torch.float64)
        heights = 0.3 + 0.6 * draws
        heights[:, 0] = 1.0
        return heights

    def true_values(self, X: Tensor) -> Tensor:
        """Return the metrics without noise, ``n x m``, at ``X`` (``n x d``)."""
        gap = X.double().unsqueeze(-2).unsqueeze(-2) - self.centres
        squares = gap.square().sum(-1)
        return (self.heights * torch.exp(-squares / (2 * self.width**2))).sum(-1)

    @known_numerics()
    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        """Measure every metric at every row of ``X`` (``n x d``), with noise if there is any.

        Raises:
            SpaceError: When a row lies outside the cube.
        """
        X = self.space.check(X)
        return noisy(X, self.true_values(X), self.metrics, self.noise, generator)

    @cached_property
    def dense_front(self) -> tuple[Tensor, Tensor]:
        """The Pareto set (``k x d``) and front (``k x m``), by dense search; see the class."""
        engine = torch.quasirandom.SobolEngine(self.d, scramble=False)  # type: ignore[no-untyped-call]
        X = engine.draw(2**15, dtype=torch.float64)
        generator = child(make_generator(self.seed), "dense front")
        X, Y = self._kept(X)
        for step in torch.logspace(-1.3, -4, 12, dtype=torch.float64):
            shape = (8, *X.shape)
            moves = step * torch.randn(shape, generator=generator, dtype=torch.float64)
            X, Y = self._kept(torch.cat([X, (X + moves).clamp(0, 1).flatten(0, 1)]))
        return X, Y

    def _kept(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Return the non-dominated rows and their values; when many, a part that covers all."""
        Y = self.true_values(X)
        rows = non_dominated(Y).nonzero().flatten()
        X, Y = X[rows], Y[rows]
        if len(Y) <= _DENSE:
            return X, Y
        unit = (Y - Y.amin(0)) / widths(Y.amin(0), Y.amax(0))
        first = torch.empty(0, dtype=torch.long)
        # One point a cell of a grid, of the finest grid that leaves few enough.
        for power in range(14, -1, -1):
            # A hash of each row of cell numbers (it may wrap): sorting numbers is much faster.
            key = ((unit * 2**power).long() * _PRIME ** torch.arange(self.m)).sum(-1)
            cells, cell = torch.unique(key, return_inverse=True)
            if len(cells) <= _DENSE:
                first = torch.full((len(cells),), len(Y)).scatter_reduce(
                    0, cell, torch.arange(len(Y)), "amin"
                )
                break
        first = torch.unique(torch.cat([Y.argmax(0), first]))
        return X[first], Y[first]

    def pareto_set(self, n: int, *, generator: Generator) -> Tensor:
        """Return Pareto-optimal points (``n x d``): a random part of the dense search's result.

        There are at most as many as that found, a few thousand.
        """
        X, _ = self.dense_front
        return X[torch.randperm(len(X), generator=generator)[:n]]

    def pareto_front(self, n: int, *, generator: Generator) -> Tensor:
        """Return the values (``n x m``) of :meth:`pareto_set`."""
        return self.true_values(self.pareto_set(n, generator=generator))
