"""The Bayesian quadratic: MAP's surrogate with a prior, links, and an honest posterior.

The method fits one quadratic a task (Li et al., *MAP*, arXiv 2406.07529, section on quadratic
approximation), unregularised. Here the same quadratic is a Bayesian linear model in its
``D = (d + 1)(d + 2) / 2`` coefficients, on the link scale of each metric, with prior and misfit
variances set by the evidence. So it fits from two evaluations on, and knows what it does not
know.

Counted proportions: the binomial likelihood by Laplace's approximation.

Model: ``k_i ~ Binomial(n_i, sigmoid(f_i))``, ``f = Phi w + e`` with ``e_i ~ N(0, t)``: a
logistic regression with one random effect a row, which takes up what the quadratic cannot say
(and overdispersed counts). At the mode the binomial is replaced by a Gaussian with the same
gradient and curvature, the *working responses* ``z = f + (k - n p) / W`` with variance ``1 / W``,
``W = n p (1 - p)`` (Rasmussen and Williams, *Gaussian Processes for Machine Learning*, 2006,
section 3.4; Breslow and Clayton, *Approximate inference in generalized linear mixed models*,
JASA 88, 1993). The variances are those of highest evidence for the working responses.

Near 1 this knows what a Gaussian on the logit scale does not: that 100 of 100 says "high", and
nothing about how high.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import SurrogateError
from map_bo.space import CoefficientSpace
from map_bo.surrogates.evidence import (
    Hyperprior,
    InWeightSpace,
    Rotation,
    Whitened,
    maximise_evidence,
    regression,
)
from map_bo.surrogates.features import (
    centred,
    feature_groups,
    group_sizes,
    quadratic_features,
    space_features,
    space_groups,
)
from map_bo.surrogates.gradients import (
    GradientRows,
    WithGradients,
    feature_derivatives,
    fit_with_gradients,
    gradient_prior,
    gradient_rows,
    gradient_scale,
)
from map_bo.surrogates.links import (
    Link,
    LogitLink,
    as_fitted,
    check_enough,
    correlated,
    covariance_on_link,
    links_for,
    observed_on_link,
    target_units,
)
from map_bo.surrogates.quadratic_model import QuadraticModel

__all__ = ["Quadratic", "QuadraticModel", "binomial_working_responses", "noise_on_link"]

_FARTHEST = 15.0  # logits beyond this are told apart by counts of millions only


def binomial_working_responses(
    Phi: Tensor,
    successes: Tensor,
    counts: Tensor,
    shift: Tensor,
    scale: Tensor,
    groups: Tensor,
    hyper: Hyperprior,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the working responses at the mode, their variances, and the log variances.

    Args:
        Phi: ``n x D`` features.
        successes: ``m x n`` numbers of successes (any real number in ``[0, counts]``).
        counts: ``m x n`` numbers of examples.
        shift: ``m`` prior mean of the logits.
        scale: ``m`` unit in which the logits are standardised.
        groups: ``D`` index of each feature's group.
        hyper: Priors on the variances.

    Returns:
        ``m x n`` standardised working responses, ``m x n`` variances of their binomial noise,
        ``m x (1 + G)`` log variances (nugget, then groups).
    """
    shift, scale = shift.unsqueeze(-1), scale.unsqueeze(-1)

    # No count tells apart probabilities that are a hundred times smaller than one example.
    farthest = float((100 * counts.amax()).log().clamp_min(_FARTHEST))

    def working(g: Tensor) -> tuple[Tensor, Tensor]:
        f = (shift + scale * g).clamp(-farthest, farthest)
        p = torch.sigmoid(f)
        weight = counts * p * torch.sigmoid(-f)
        return (f + (successes - counts * p) / weight - shift) / scale, 1 / (weight * scale**2)

    def latent(z: Tensor, v: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        # The mode of f under Gaussian responses (z, v): its regression part and random effects.
        line, penalty = regression(Phi, z, v, groups).fitted(theta)
        t = theta[:, :1].exp()
        effect = t / (v + t) * (z - line)
        return line + effect, penalty + (effect.square() / t).sum(-1)

    def log_density(g: Tensor) -> Tensor:
        f = shift + scale * g
        return (successes * f - counts * torch.nn.functional.softplus(f)).sum(-1)

    smoothed = (successes + 0.5) / (counts + 1)
    z = (torch.logit(smoothed) - shift) / scale
    v = 1 / ((counts + 1) * smoothed * (1 - smoothed) * scale**2)
    theta = maximise_evidence(regression(Phi, z, v, groups), hyper)
    g, penalty = latent(z, v, theta)
    for _ in range(6):
        z, v = working(g)
        theta = maximise_evidence(regression(Phi, z, v, groups), hyper, start=theta, steps=2)
        g, penalty = latent(z, v, theta)
    # Now with the variances held: the exact mode, by Newton with halved steps where needed.
    for _ in range(30):
        z, v = working(g)
        goal, goal_penalty = latent(z, v, theta)
        move = goal - g
        if float(move.abs().max()) < 1e-9:
            break
        length = torch.ones(len(g), 1, dtype=g.dtype)
        now = log_density(g) - penalty / 2
        for _ in range(8):
            # The penalty is convex: along the step it stays under its chord.
            chord = penalty + length.squeeze(-1) * (goal_penalty - penalty)
            worse = log_density(g + length * move) - chord / 2 < now - 1e-12 * now.abs()
            if not bool(worse.any()):
                break
            length = torch.where(worse.unsqueeze(-1), length / 2, length)
        g = g + length * move
        penalty = penalty + length.squeeze(-1) * (goal_penalty - penalty)
    z, v = working(g)
    return z, v, theta


# (mean, spread) of the log nugget of standardised targets. Where noise is unknown the nugget is
# that noise; where it is known, what is left is the misfit of the quadratic.
_NOISE_PRIOR = (-4.0, 1.0)
_MISFIT_PRIOR = (-6.0, 2.0)
_NO_MISFIT = (-16.0, 1e-3)
# Prior variance that a group of features has in all, and the spread of its logarithm.
_GROUP_VARIANCE = 2.4
_GROUP_SPREAD = 1.0


@dataclass(frozen=True)
class Quadratic:
    """Settings of the Bayesian quadratic.

    Where a metric has observed gradients they are further rows of its regression
    (:mod:`map_bo.surrogates.gradients`), with their own noise and their own fitted nugget, and its
    likelihood is the Gaussian on the link scale. Leaving an evaluation out leaves out its
    gradient too.

    In a space with a choice it is a hierarchy of quadratics, one that all options share and the
    shrunken deviation of each (:mod:`map_bo.surrogates.features`).

    Where the noise of the evaluations has a covariance, the likelihood is the Gaussian on the link
    scale with all of it (:func:`noise_on_link`); of metrics with gradients only its diagonal is
    used.

    Attributes:
        link: ``"auto"`` (logit, log, identity by the metric's kind) or ``"identity"``.
        likelihood: ``"auto"`` takes the binomial likelihood, by Laplace's approximation, for
            proportions on the logit scale whose every row is counted, and a Gaussian on the
            link scale else; ``"gaussian"`` always takes the latter.
        misfit: Fit a misfit variance on top of known noise. Without it known noise alone
            decides how sure the model is, and a truth that is not a quadratic makes it too sure.
        importance: Power of the space's importances that features are scaled by, where the
            space has any, see :meth:`~map_bo.space.CoefficientSpace.stretched`: 0 takes all
            coefficients to matter alike, 1 follows from isotropic gradients. On block-wise merges
            both .5 and 1 had less regret than 0, and .5 was the more even of the two.
    """

    link: Literal["auto", "identity"] = "auto"
    likelihood: Literal["auto", "gaussian"] = "auto"
    misfit: bool = True
    importance: float = 0.5
    leaves_one_out: ClassVar[bool] = True
    takes_partial_rows: ClassVar[bool] = True
    takes_choice: ClassVar[bool] = True

    def __post_init__(self) -> None:
        links_for((), kind=self.link)
        if self.likelihood not in ("auto", "gaussian"):
            raise SurrogateError(
                f"there is no likelihood {self.likelihood!r}",
                hint="likelihoods are 'auto' and 'gaussian'",
            )

    def fit(self, seen: Observations, space: CoefficientSpace) -> QuadraticModel:
        """Fit each metric to the evaluations that have it (two or more).

        Raises:
            SurrogateError: When fewer than two have it.
        """
        check_enough(seen, "a quadratic")
        good, space = as_fitted(seen), space.stretched(self.importance)
        patterns = good.patterns()
        if len(patterns) == 1:
            return self._fit(good, space)
        parts = [
            self._fit(good.columns(columns, rows), space).at_rows(rows)
            for columns, rows in patterns
        ]
        return QuadraticModel.side_by_side(parts, [columns for columns, _ in patterns])

    def _fit(self, seen: Observations, space: CoefficientSpace) -> QuadraticModel:
        """Fit to evaluations that all have all of their metrics."""
        links = links_for(seen.metrics, kind=self.link)
        Z, variance = (value.mT for value in observed_on_link(seen, links))
        shift, scale = Z.mean(-1), Z.std(-1)
        rows_of_gradients = gradient_rows(seen, links, space)
        if rows_of_gradients is not None:
            scale = torch.maximum(scale, gradient_scale(rows_of_gradients))
        scale = target_units(shift, scale, links)
        y = (Z - shift.unsqueeze(-1)) / scale.unsqueeze(-1)
        v = variance / scale.unsqueeze(-1).square()
        unknown = v.isnan().any(-1)
        v = v.nan_to_num(nan=0.0)
        covariance = noise_on_link(seen, links, space)
        turned = None
        if covariance is not None:
            turned = Rotation.of(covariance / scale[:, None, None].square())
        Phi, groups, sizes = space_features(seen.X, space), space_groups(space), group_sizes(space)
        theta = y.new_empty(len(y), 1 + len(sizes))
        binomial = torch.tensor([*map(self._is_binomial, seen.metrics, links, seen.counts.mT)])
        fits: list[WithGradients] = []
        plain = torch.ones_like(binomial)
        if rows_of_gradients is not None:
            fits = self._fit_gradients(rows_of_gradients, (y, v, unknown), scale, seen.X, space)
            plain[[j for fit in fits for j in fit.columns]] = False
        for rows, counted in ((~binomial & plain, False), (binomial & plain, True)):
            if not bool(rows.any()):
                continue
            hyper = self._hyperprior(unknown[rows], sizes)
            if counted:
                p = torch.sigmoid(Z[rows])
                n = seen.counts.mT[rows]
                y[rows], v[rows], theta[rows] = binomial_working_responses(
                    Phi, p * (n + 1) - 0.5, n, shift[rows], scale[rows], groups, hyper
                )
            else:
                noisy = _noisy_rows(turned, rows, Phi, y[rows], v[rows])
                theta[rows] = maximise_evidence(regression(*noisy, groups), hyper)
        parts = [_with_gradients(fit, y, (shift, scale), unknown) for fit in fits]
        if bool(plain.all()) and turned is None:
            state = InWeightSpace(Phi, y, v, groups).solve(theta)
            tensors = _tensors(state, y, theta, (shift, scale), unknown)
        else:
            if bool(plain.any()):
                noisy = _noisy_rows(turned, plain, Phi, y[plain], v[plain])
                state = InWeightSpace(*noisy, groups).solve(theta[plain])
                standard = shift[plain], scale[plain]
                axes = None if turned is None else turned.axes[plain]
                parts.append(
                    _tensors(state, y[plain], theta[plain], standard, unknown[plain], axes)
                )
            order = [j for fit in fits for j in fit.columns] + plain.nonzero().flatten().tolist()
            back = torch.tensor(order).argsort()
            tensors = {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}
        if covariance is not None:
            matrix = torch.diag_embed(tensors["_target_variance"])
            nugget = (tensors["log_variances"][:, 0].exp() * scale.square())[:, None, None]
            own = nugget * torch.eye(len(seen), dtype=y.dtype)
            matrix[plain] = (covariance + own)[plain]
            tensors["_noise_matrix"] = matrix
        return QuadraticModel(seen.metrics, tuple(links), space, tensors)

    def _fit_gradients(
        self,
        rows: GradientRows,
        values: tuple[Tensor, Tensor, Tensor],
        scale: Tensor,
        X: Tensor,
        space: CoefficientSpace,
    ) -> list[WithGradients]:
        """Fit the metrics that have gradients, those with the same pattern of them together."""
        y, v, unknown = values
        groups, sizes = feature_groups(space.d), group_sizes(space)
        features = quadratic_features(centred(X, space)), groups
        derivatives = feature_derivatives(X, space)
        fits = []
        for columns, where in rows.patterns():
            unit = scale[columns].view(-1, 1, 1)
            target = rows.gradients[:, columns].transpose(0, 1) / unit
            noise = rows.variance[:, columns].transpose(0, 1) / unit.square()
            loose = noise[:, where].isnan().any(-1)
            hyper = self._hyperprior(unknown[columns], sizes)
            steep = self._hyperprior(loose, sizes)
            both = Hyperprior(
                torch.cat(
                    [hyper.mean[:, :1], gradient_prior(steep.mean[:, :1]), hyper.mean[:, 1:]], -1
                ),
                torch.cat([hyper.spread[:, :1], steep.spread[:, :1], hyper.spread[:, 1:]], -1),
            )
            fits.append(
                fit_with_gradients(
                    columns,
                    where,
                    (y[columns], v[columns]),
                    (target, noise.nan_to_num(nan=0.0)),
                    features,
                    derivatives,
                    both,
                    ~(unknown[columns] | loose),
                )
            )
        return fits

    def _is_binomial(self, metric: Metric, link: Link, counts: Tensor) -> bool:
        return (
            self.likelihood == "auto"
            and metric.kind == "proportion"
            and isinstance(link, LogitLink)
            and bool(torch.isfinite(counts).all())
        )

    def _hyperprior(self, unknown: Tensor, sizes: Tensor) -> Hyperprior:
        known = _MISFIT_PRIOR if self.misfit else _NO_MISFIT
        nugget = torch.where(
            unknown.unsqueeze(-1),
            torch.tensor(_NOISE_PRIOR, dtype=torch.float64),
            torch.tensor(known, dtype=torch.float64),
        )
        # The more features share a group, the smaller each: a group as a whole is expected to
        # explain about as much in two dimensions as in twenty.
        weights = (_GROUP_VARIANCE / sizes).log().expand(len(unknown), -1)
        return Hyperprior(
            torch.cat([nugget[:, :1], weights], -1),
            torch.cat([nugget[:, 1:], torch.full_like(weights, _GROUP_SPREAD)], -1),
        )


_MANY = 600  # features: beyond, the first fit is to constant and linear ones


def noise_on_link(
    seen: Observations, links: Sequence[Link], space: CoefficientSpace
) -> Tensor | None:
    """Return the covariance of the noise among rows on the link scale, ``m x n x n``.

    What was expected of the rows is what a quadratic with independent noise makes of them; see
    :func:`~map_bo.surrogates.links.covariance_on_link`. A second such step changes little.

    Args:
        seen: Rows that have all of their metrics, as fitted.
        links: One link per metric.
        space: The space.

    Returns:
        None where the noise of the rows is independent.
    """
    if seen.covariance is None or not bool(correlated(seen.covariance).any()):
        return covariance_on_link(seen, links)
    Z, variance = (value.mT for value in observed_on_link(seen, links))
    shift = Z.mean(-1)
    scale = target_units(shift, Z.std(-1), links)
    shift, scale = shift.unsqueeze(-1), scale.unsqueeze(-1)
    Phi, groups, sizes = space_features(seen.X, space), space_groups(space), group_sizes(space)
    if Phi.shape[-1] > _MANY:
        few = groups < 2
        Phi, groups, sizes = Phi[:, few], groups[few], sizes[:2]
    known = (variance / scale.square()).nan_to_num(nan=0.0)
    problem = regression(Phi, (Z - shift) / scale, known, groups)
    hyper = Quadratic()._hyperprior(variance.isnan().any(-1), sizes)
    line, _ = problem.fitted(maximise_evidence(problem, hyper))
    return covariance_on_link(seen, links, (shift + scale * line).mT)


def _noisy_rows(
    turned: Rotation | None, outputs: Tensor, Phi: Tensor, y: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return features, targets and known variances of rows whose noise is independent.

    Args:
        turned: How the rows are turned to that end; None where it is.
        outputs: ``m`` booleans: which ``k`` of the outputs.
        Phi: ``n x D`` features.
        y: ``k x n`` targets.
        v: ``k x n`` known variances.
    """
    return (Phi, y, v) if turned is None else turned.select(outputs).rows(Phi, y)


def _tensors(
    state: Whitened,
    y: Tensor,
    theta: Tensor,
    standard: tuple[Tensor, Tensor],
    unknown: Tensor,
    axes: Tensor | None = None,
) -> dict[str, Tensor]:
    """Turn a standardised fit into a model's tensors, in the units of the link scale.

    Args:
        state: The solution, of rows that may be turned.
        y: ``m x n`` targets of the rows themselves.
        theta: ``m x (1 + G)`` log variances.
        standard: ``m`` means and ``m`` units of the targets.
        unknown: ``m`` booleans: whose noise is unknown.
        axes: ``m x n x n``: how the rows of ``state`` are turned, see
            :class:`~map_bo.surrogates.evidence.Rotation`.
    """
    shift, scale = standard
    eye = torch.eye(state.design.shape[-1], dtype=y.dtype)
    inverse = torch.linalg.solve_triangular(state.cholesky, eye, upper=False)
    unit = scale[:, None]
    root = (unit * state.scale).unsqueeze(-1) * inverse.mT
    weights = unit * state.scale * state.weights
    weights[:, 0] += shift
    factor = state.cholesky / (unit * state.scale).unsqueeze(-1)
    precision = factor @ factor.mT
    half = state.design @ inverse.mT
    # Leave-one-out: removing row i from the posterior multiplies its variance s_i there by
    # 1 / (1 - s_i / v_i) and its residual by the same.
    if axes is None:
        own, noise, residual = half.square().sum(-1), state.noise, state.residual
    else:
        own, noise, residual = _own_parts(state, half, axes)
    keep = (1 - own / noise).clamp_min(1e-9)
    nugget = theta[:, 0].exp() * scale.square()
    noise = noise * unit.square()
    targets = y * unit + shift[:, None]
    return {
        "weights": weights,
        "root": root,
        "shift": shift,
        "scale": scale,
        "log_variances": theta,
        "_precision": precision,
        "_information": (precision @ weights.unsqueeze(-1)).squeeze(-1),
        "_noise": noise.median(-1).values,
        "_misfit": torch.where(unknown, torch.zeros_like(nugget), nugget),
        "_targets": targets,
        "_target_variance": noise,
        "_loo_mean": targets - unit * residual / keep,
        "_loo_variance": own * unit.square() / keep,
    }


def _own_parts(state: Whitened, half: Tensor, axes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a row adds where the noise of the rows has a covariance ``N``.

    Given the noise of all others, that of row ``i`` is ``[N^-1]_ii^-1`` in variance: noise of its
    own, which is independent of all else. With it, the function plus what the others tell of the
    row's noise takes the place of the function, and rows can be left out as if their noise were
    independent: with ``P = (A A' + N)^-1 = N^-1 - N^-1 A B^-1 A' N^-1`` an observation has the
    variance ``1 / P_ii`` given all others and the residual ``[P y]_i / P_ii`` (Rasmussen and
    Williams, 2006, equations 5.10-5.12), of which ``[N^-1]_ii^-1`` is its own noise.

    Args:
        state: The solution of the turned rows.
        half: ``m x n x D``: a root of the posterior covariance at these.
        axes: ``m x n x n``: how the rows are turned.

    Returns:
        ``m x n`` posterior variances of what is left without the own noise, variances of that
        noise, and residuals.
    """
    noise = (axes.square() @ state.noise.reciprocal().unsqueeze(-1)).squeeze(-1).reciprocal()
    taken = (axes @ (half / state.noise.unsqueeze(-1))).square().sum(-1)
    weights = (axes @ (state.residual / state.noise).unsqueeze(-1)).squeeze(-1)  # P y
    return taken * noise.square(), noise, weights * noise


def _with_gradients(
    fit: WithGradients, y: Tensor, standard: tuple[Tensor, Tensor], unknown: Tensor
) -> dict[str, Tensor]:
    """Return the tensors of a fit to values and gradients; its rows there are the values."""
    shift, scale = (value[fit.columns] for value in standard)
    unit = scale[:, None]
    y, n = y[fit.columns], y.shape[-1]
    nugget = fit.log_variances[:, 0].exp()
    values = dataclasses.replace(
        fit.state,
        design=fit.state.design[:, :n],
        noise=fit.state.noise[:, :n] + (fit.misfit - nugget).unsqueeze(-1),
        residual=fit.state.residual[:, :n],
    )
    theta = torch.cat([fit.misfit.log().unsqueeze(-1), fit.log_variances[:, 2:]], -1)
    tensors = _tensors(values, y, theta, (shift, scale), unknown[fit.columns])
    return tensors | {
        "_loo_mean": tensors["_targets"] - unit * fit.left_out,
        "_loo_variance": fit.left_out_variance * unit.square(),
    }
