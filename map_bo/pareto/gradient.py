"""The front of a differentiable surrogate by batched gradient ascent on many scalarisations.

Every point of a Pareto front is the optimum of some weighted Chebyshev scalarisation, and the
surrogate is cheap, differentiable and evaluates thousands of points in one call. So all
scalarisations are solved at once: one row of a tensor each, one projected Adam over all rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.quasirandom import SobolEngine

from map_bo.errors import ConfigError, SurrogateError
from map_bo.pareto.dominance import non_dominated
from map_bo.rng import child, child_seed
from map_bo.scale import farthest_rows, widths
from map_bo.space import CoefficientSpace

__all__ = ["GradientSolver", "ascend", "simplex_directions", "thin"]

_FLOOR = 1e-2  # smallest entry of a direction: keeps 1 / direction, and so the gradients, finite
_BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class GradientSolver:
    """Projected Adam on annealed smooth Chebyshev scalarisations, all of them in one batch.

    With ideal point ``z`` and range ``s`` of each metric, estimated by ascent on each metric
    alone, row ``k`` minimises ``max_i w_ki (z_i - mean_i(x)) / s_i`` with ``w_k = 1 / lambda_k``
    and directions ``lambda_k`` that fill the simplex. The maximum is smoothed by a log-sum-exp
    whose temperature falls geometrically (smooth Chebyshev scalarisation: Lin et al.,
    arXiv 2402.19078, eq. 8), plus a small linear term that breaks ties towards efficiency.
    Three times on the way every row may restart from the row whose values suit its scalarisation
    best, which is what keeps non-concave surrogates from trapping it. The box and linear
    constraints are kept by projection after every step.

    From four metrics on a share of the rows maximises weighted sums instead, with weights uniform
    on the simplex. In many metrics Chebyshev directions put most points where some metric is
    given up almost wholly; the optima of sums lie where preferences usually fall.

    Attributes:
        points: Largest number of points returned.
        steps: Adam steps for the front.
        learning_rate: First step length, as a share of the width of the box.
        starts: Ascents for each metric alone that look for its best value.
        surplus: Scalarisations for each point asked for; above 1, because some of them end in
            the same or in a dominated point.
        sums: Share of the scalarisations that are weighted sums, from four metrics on.

    Raises:
        ConfigError: When a setting is not positive.
    """

    points: int = 500
    steps: int = 75
    learning_rate: float = 0.1
    starts: int = 8
    surplus: float = 1.2
    sums: float = 0.5

    def __post_init__(self) -> None:
        for name in ("points", "steps", "learning_rate", "starts", "surplus"):
            if not getattr(self, name) > 0:
                raise ConfigError(
                    f"{name} of the gradient solver must be positive, got {getattr(self, name)}",
                    hint="raise it, or leave it out for the default",
                )
        if not 0 <= self.sums <= 1:
            raise ConfigError(
                f"sums of the gradient solver must be between 0 and 1, got {self.sums}",
                hint="give the share of scalarisations that are weighted sums, such as 0.5",
            )

    def solve(
        self,
        mean: Callable[[Tensor], Tensor],
        space: CoefficientSpace,
        *,
        generator: Generator,
    ) -> Tensor:
        """Return up to ``points`` distinct points (``k x d``, ``k >= 1``) of the front.

        They are mutually non-dominated under ``mean``. With a single metric the one point
        returned is its maximiser.

        Args:
            mean: Maps ``n x d`` to ``n x m``, larger is better in every column, differentiable.
            space: Where to search.
            generator: Source of all randomness; read, never advanced.

        Raises:
            SurrogateError: When ``mean`` is NaN or infinite wherever it was asked.
        """
        count = math.ceil(self.surplus * self.points)
        pool = space.sample(max(4 * count, 512), generator=child(generator, "starts"))
        pool = torch.cat([space.project(space.anchors().X), pool])
        Y = _values(mean, pool)
        finite = torch.isfinite(Y).all(-1)
        if not bool(finite.any()):
            raise SurrogateError(
                "the predictions are NaN or infinite everywhere, so they have no front",
                hint="fit the surrogate to more or to other evaluations",
            )
        pool, Y = pool[finite], Y[finite]
        tops = self._maximise_each(mean, space, pool, Y)
        best = _values(mean, tops)
        X, Y = torch.cat([pool, tops]), torch.cat([Y, best])
        if Y.shape[-1] == 1:
            return X[Y[:, 0].argmax()].unsqueeze(0)
        rows = self._scalarise(mean, space, X, Y, best, count, generator)
        return thin(*_front(mean, torch.cat([rows, tops]), fallback=X), self.points)

    def _maximise_each(
        self, mean: Callable[[Tensor], Tensor], space: CoefficientSpace, pool: Tensor, Y: Tensor
    ) -> Tensor:
        """Return, metric by metric, the best point that ascent on this metric alone finds."""
        m = Y.shape[-1]
        tops = Y.topk(min(self.starts, len(Y)), dim=0).indices  # starts x m
        X = pool[tops.T.flatten()]
        which = torch.arange(m).repeat_interleave(len(tops)).unsqueeze(-1)
        spread = widths(Y.amin(0), Y.amax(0))

        def loss(Z: Tensor, _: float) -> Tensor:
            total: Tensor = (mean(Z) / spread).gather(1, which).sum()
            return -total

        ascent = _Descent(space, X, self.learning_rate)
        for step in range(self.steps // 2):
            ascent.step(loss, 2 * step / self.steps)
        Z = torch.cat([X, ascent.X])
        own = _values(mean, Z).gather(1, which.repeat(2, 1)).nan_to_num(nan=-math.inf)
        own = own.view(2, m, -1).transpose(0, 1).reshape(m, -1)
        return (
            Z.view(2, m, -1, Z.shape[-1])
            .transpose(0, 1)
            .flatten(1, 2)[torch.arange(m), own.argmax(-1)]
        )

    def _scalarise(
        self,
        mean: Callable[[Tensor], Tensor],
        space: CoefficientSpace,
        X: Tensor,
        Y: Tensor,
        best: Tensor,
        count: int,
        generator: Generator,
    ) -> Tensor:
        m = Y.shape[-1]
        ideal = Y.amax(0)
        spread = widths(best.amin(0), ideal)
        summed = round(self.sums * count) if m > 3 else 0
        directions = simplex_directions(count - summed, m, seed=child_seed(generator, "directions"))
        W = 1 / directions.clamp_min(_FLOOR)
        W = W / W.sum(-1, keepdim=True)
        V = simplex_directions(summed, m, seed=child_seed(generator, "sums"))

        def loss(Z: Tensor, progress: float) -> Tensor:
            temperature = 0.1 * 0.01**progress / m
            losses = (ideal - mean(Z)) / spread
            U = W * losses[: len(W)]
            smooth: Tensor = temperature * torch.logsumexp(U / temperature, -1)
            return smooth.sum() + 1e-3 * U.sum() + (V * losses[len(W) :]).sum()

        def best_rows(losses: Tensor) -> Tensor:
            sums = (V @ losses.T).nan_to_num(nan=math.inf).argmin(-1)
            return torch.cat([_best_rows(W, losses), sums])

        descent = _Descent(space, X[best_rows((ideal - Y) / spread)], self.learning_rate)
        exchange = {self.steps * k // 4 for k in (1, 2, 3)} - {0}
        for step in range(self.steps):
            if step in exchange:
                descent.restart(best_rows((ideal - _values(mean, descent.X)) / spread))
            descent.step(loss, step / self.steps)
        return descent.X


class _Descent:
    """Projected Adam on the rows of ``X`` with a learning rate that falls along a cosine."""

    def __init__(self, space: CoefficientSpace, X: Tensor, learning_rate: float) -> None:
        self.space, self.X = space, X
        self.first, self.second = torch.zeros_like(X), torch.zeros_like(X)
        self.age = torch.zeros(len(X), 1, dtype=X.dtype)
        self.learning_rate = learning_rate
        self.width = space.bounds[1] - space.bounds[0]
        equalities = [c.weights for c in space.constraints if c.equality]
        self.normals: Tensor | None = None
        if equalities:
            self.normals = torch.linalg.qr(torch.tensor(equalities, dtype=X.dtype).T).Q
        if space.constraints:
            # A Euclidean projection undoes a step along a constraint's normal only when all
            # coordinates are scaled alike; otherwise the iteration rests at the wrong point.
            self.width = self.width[self.width > 0].min().expand_as(self.width)

    def step(self, loss: Callable[[Tensor, float], Tensor], progress: float) -> None:
        Z = self.X.clone().requires_grad_()
        with torch.enable_grad():
            value = loss(Z, progress)
        if not value.requires_grad:  # every metric is constant
            return
        (gradient,) = torch.autograd.grad(value, Z)
        gradient = gradient.nan_to_num(0.0, 0.0, 0.0) * self.width
        if self.normals is not None:
            gradient = gradient - (gradient @ self.normals) @ self.normals.T
        size = gradient.square()
        if self.space.constraints:
            size = size.mean(-1, keepdim=True)
        slow, fast = _BETAS
        self.first = slow * self.first + (1 - slow) * gradient
        self.second = fast * self.second + (1 - fast) * size
        self.age = self.age + 1
        first = self.first / (1 - slow**self.age)
        second = self.second / (1 - fast**self.age)
        rate = self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress)) + 1e-4
        move = rate * self.width * first / (second.sqrt() + 1e-12)
        self.X = self.space.project(self.X - move)

    def restart(self, source: Tensor) -> None:
        """Put every row where row ``source`` is; rows that move forget their momentum."""
        moved = (source != torch.arange(len(source))).unsqueeze(-1)
        self.X = self.X[source]
        self.first = self.first.masked_fill(moved, 0.0)
        self.second = self.second.masked_fill(moved, 0.0)
        self.age = self.age.masked_fill(moved, 0.0)


def ascend(
    gain: Callable[[Tensor], Tensor],
    space: CoefficientSpace,
    X: Tensor,
    *,
    steps: int = 100,
    learning_rate: float = 0.02,
) -> Tensor:
    """Return where projected Adam leads from each row of ``X`` (``n x d``) uphill on ``gain``.

    Args:
        gain: Maps ``n x d`` to ``n`` values, larger is better, differentiable.
        space: Where to search.
        X: The starts.
        steps: Adam steps.
        learning_rate: First step length, as a share of the width of the box.
    """
    descent = _Descent(space, X.clone(), learning_rate)
    for step in range(steps):
        descent.step(lambda Z, _: -gain(Z).sum(), step / steps)
    return descent.X


def simplex_directions(n: int, m: int, *, seed: int) -> Tensor:
    """Return ``n x m`` non-negative rows that sum to 1 and fill the simplex, faces included.

    A direction is how much of each metric is given up, counted from the ideal point. The first
    ``m`` rows give up nothing of one metric, the next ``m`` (of three metrics or more) nothing of
    all others.
    Of the rest one row in six is uniform on a face of lower dimension, which a uniform draw
    never reaches; the others are uniform on the simplex (scrambled Sobol points, sorted).

    Args:
        n: Number of rows.
        m: Number of metrics.
        seed: Of the Sobol scramble.
    """
    corners = torch.eye(m, dtype=torch.float64)
    opposite = (1 - corners) / max(m - 1, 1)
    fixed = torch.cat([opposite, corners]) if m > 2 else corners
    rest = max(n - len(fixed), 0)
    if m == 1 or rest == 0:
        return fixed[:n] if m > 1 else torch.ones(n, 1, dtype=torch.float64)
    engine = SobolEngine(2 * m, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
    U = engine.draw(rest, dtype=torch.float64)
    inner = torch.cat([torch.zeros(rest, 1), U[:, : m - 1].sort(-1).values, torch.ones(rest, 1)], 1)
    directions = inner.diff(dim=-1)
    if m > 2:
        size = (2 + (U[:, m] * (m - 2)).long()).clamp_max(m - 1).unsqueeze(-1)  # of the face
        face = U[:, m:].argsort(-1).argsort(-1) < size
        faces = (-U[:, :m].clamp_min(1e-12).log()) * face
        faces = faces / faces.sum(-1, keepdim=True).clamp_min(1e-12)
        on_face = (torch.arange(rest) % 6 == 0).unsqueeze(-1)
        directions = torch.where(on_face, faces, directions)
    return torch.cat([fixed, directions])


def thin(X: Tensor, Y: Tensor, points: int) -> Tensor:
    """Return at most ``points`` rows of ``X`` (``n x d``), spread evenly over ``Y`` (``n x m``).

    The best row of each metric comes first, then :func:`map_bo.scale.farthest_rows`, metrics
    scaled to their ranges.
    """
    if len(X) <= points:
        return X
    Z = (Y - Y.amin(0)) / widths(Y.amin(0), Y.amax(0))
    return X[sorted(farthest_rows(Z, points, first=Y.argmax(0).tolist()))]


def _front(
    mean: Callable[[Tensor], Tensor], X: Tensor, *, fallback: Tensor
) -> tuple[Tensor, Tensor]:
    Y = _values(mean, X)
    if not bool(torch.isfinite(Y).all(-1).any()):
        X, Y = fallback, _values(mean, fallback)
    finite = torch.isfinite(Y).all(-1)
    X, Y = X[finite], Y[finite]
    mask = non_dominated(Y)
    return X[mask], Y[mask]


def _values(mean: Callable[[Tensor], Tensor], X: Tensor) -> Tensor:
    with torch.no_grad():
        return mean(X).detach()


def _best_rows(W: Tensor, losses: Tensor) -> Tensor:
    """Return for each scalarisation (``k x m`` weights) its best row of ``losses`` (``n x m``)."""
    worst = W[:, :1] * losses[:, 0]
    for i in range(1, W.shape[-1]):
        worst = torch.maximum(worst, W[:, i : i + 1] * losses[:, i])
    return worst.nan_to_num(nan=math.inf).argmin(-1)
