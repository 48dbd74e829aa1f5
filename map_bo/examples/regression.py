"""Means over all examples of a set from the outcomes of some: regression estimates, their noise.

What a row's examples say is compared with what those of other rows say that cover more of them.
The rows are taken in *groups* that cover the same examples, those with the most first (monotone
missing data; Anderson, *Maximum likelihood estimates for a multivariate normal distribution when
some observations are missing*, JASA 52, 1957). With the outcomes ``y_G`` of a group on its ``n``
examples, and those ``y_A`` of rows before it on the same ones, the group's metrics on the whole
set are the regression estimates

    mu_G = mean_n(y_G) + B' (mu_A - mean_n(y_A))

(Särndal, Swensson & Wretman, *Model Assisted Survey Sampling*, 1992, section 6.4). Were the
anchors lucky on these ``n`` examples, the group was probably lucky as well, and is marked down.

**Coefficients.** A group has as few as ten examples and as many as fifty rows to regress on, so
``B`` is shrunk towards what rows of such coefficients have in common as a rule. That rule is a
covariance of outcomes ``S0 = s_i s_j (a + b k(x_i, x_j) + (1 - a - b) [i = j])`` with a Gaussian or
exponential ``k``, fitted to all pairs of rows. With an inverse Wishart prior of mean ``S0`` that
weighs as much as ``nu`` examples, the posterior mean is

    B = (Z'Z + nu S0_AA)^-1 (Z'y + nu S0_AG),     Z = y_A less its means

where ``nu`` is the one of a grid with the smallest errors when one example is left out and its
outcomes are predicted from the others, all groups together.

**Noise.** The errors of leaving one example out, ``E`` (``n`` rows), have what estimating ``B``
costs in them. The covariance of the group's residuals is ``R = (E'E + 10 S0_G|A) / (n + 10)``, and

    V_GG = B' V_AA B + (1 - n/M) / n  R (n + 1)/(n - 2),     V_GA = B' V_AA

is the covariance of the errors of all estimates: what the examples of a group leave, the rest of
what its covariates do not know of themselves, and the correction for a finite set of ``M``
examples. The last factor is for intervals of 1.96 standard errors where ``n`` is small (Student's
``t``, a little wider). ``V`` is positive semi-definite by the way that it is built. Where nothing
is regressed on, ``V_ij = S_ij (1/max(n_i, n_j) - 1/M)`` for sets that nest: see :func:`nested`.

Examples are taken for a random sample. In a stratified order means vary less than this says.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["ScoredExamples", "errors_of_means", "nested", "regressed"]

_FEWEST = 4  # examples, below which a group says nothing of its regression
_COVARIATES = 64  # most rows that a group is regressed on
_COVERED = 0.9  # share of a group's examples that a covariate must have
_STRENGTHS = (2.0, 5.0, 12.0, 30.0, 75.0, 180.0, 450.0)  # of the prior, in examples
_JUDGES = 12  # groups, those with the most rows, that decide on it
_PRIOR = 10.0  # examples that the prior covariance of residuals counts for
_CLOSEST = 0.98  # largest correlation of the outcomes of two rows, by the rule
_LENGTHS = (0.03, 0.1, 0.2, 0.4, 0.8, 1.6, 4.0)  # squared, in medians of squared distances


@dataclass(frozen=True, eq=False)
class ScoredExamples:
    """The outcomes of a metric by row and example.

    Attributes:
        X: ``r x d`` coefficients.
        outcomes: ``r x E`` outcomes, NaN where an example was not scored, or failed; ``E`` are
            those that any row has.
        scored: ``r x E`` booleans: which examples were scored, the failed ones among them.
        variance: ``r`` variances of outcomes over examples; positive.
        size: How many examples there are in all, ``M``.
        there: ``r x E`` booleans: which examples have an outcome.
        counts: ``r`` numbers of outcomes.
        means: ``r`` means of the outcomes.
        values: ``r x E`` outcomes less the row's mean, 0 where there is none.
    """

    X: Tensor
    outcomes: Tensor
    scored: Tensor
    variance: Tensor
    size: int
    there: Tensor = field(init=False)
    counts: Tensor = field(init=False)
    means: Tensor = field(init=False)
    values: Tensor = field(init=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "there", self.outcomes.isfinite())
        put(self, "counts", self.there.sum(-1).double())
        outcomes = torch.where(self.there, self.outcomes, 0.0)
        put(self, "means", outcomes.sum(-1) / self.counts)
        put(self, "values", (outcomes - self.means.unsqueeze(-1)) * self.there)

    @property
    def whole(self) -> Tensor:
        """``r`` booleans: which rows cover all examples."""
        return self.scored.sum(-1) >= self.size

    @property
    def left(self) -> Tensor:
        """``r`` shares of the examples that were not scored."""
        return 1 - self.scored.sum(-1).double() / self.size


def nested(covariance: Tensor, scored: Tensor, size: int) -> Tensor:
    """Return the covariance of the errors of means over parts of a finite set, ``n x n``.

    Of one random sample without replacement, row ``i`` has the mean over its part ``s_i`` of the
    sample. Its error against the mean over all ``M`` examples is a sum over them with the weights
    ``[t in s_i] / n_i - 1/M``, so that

        Cov_ij = S_ij (|s_i and s_j| / (n_i n_j) - 1/M),

    which is ``S_ij (1/max(n_i, n_j) - 1/M)`` for parts that nest (Särndal, Swensson & Wretman,
    *Model Assisted Survey Sampling*, 1992, sections 3.3 and 5.4). The second factor is a Gram
    matrix, so the product is positive semi-definite where ``S`` is (Schur).

    Args:
        covariance: ``n x n`` covariance ``S`` of the outcomes of two rows over the examples.
        scored: ``n x E`` booleans: which examples each row has; ``E`` of the ``M``.
        size: How many examples there are in all, ``M``.
    """
    there = scored.double()
    counts = there.sum(-1)
    both = there @ there.mT / counts.unsqueeze(-1) / counts
    return covariance * (both - 1 / size)


def errors_of_means(one: ScoredExamples, covariance: Tensor) -> Tensor:
    """Return :func:`nested` with failed examples left out, ``r x r``."""
    more = (one.scored.sum(-1) / one.counts).sqrt()
    return nested(covariance, one.scored, one.size) * more.unsqueeze(-1) * more


def regressed(one: ScoredExamples) -> tuple[Tensor, Tensor, Tensor]:
    """Return estimates of the means over all examples, and how they err.

    Args:
        one: The outcomes.

    Returns:
        ``r`` estimates, the ``r x r`` covariance of their errors, and the ``r x r`` covariance of
        the outcomes of two rows over the examples. Both are positive semi-definite.
    """
    scale = one.variance.sqrt()
    rule = _rule(one, scale) * scale.unsqueeze(-1) * scale
    groups: list[_Group] = []
    done = torch.zeros(0, dtype=torch.long)
    for rows in _by_examples(one.scored):
        groups.append(_Group(one, rule, rows, _covariates(one, rule, rows, done)))
        done = torch.cat([done, rows])
    judges = sorted(groups, key=lambda group: -len(group.rows))[:_JUDGES]
    losses = torch.stack([group.losses() for group in judges]).sum(0)
    strength = _STRENGTHS[int(losses.argmin())]
    means, errors = one.means.clone(), torch.zeros_like(rule)
    outcomes = torch.zeros_like(rule)
    for group in groups:
        rows, on = group.rows, group.on
        B, residuals = group.fit(strength)
        means[rows] += B.mT @ (means[on] - group.seen)
        for matrix, own in ((errors, group.scaled(residuals)), (outcomes, residuals)):
            matrix[rows] = B.mT @ matrix[on]
            matrix[:, rows] = matrix[rows].mT
            inner = B.mT @ matrix[on.unsqueeze(-1), on] @ B + own
            matrix[rows.unsqueeze(-1), rows] = (inner + inner.mT) / 2
    return means, errors, outcomes


class _Group:
    """Rows that cover the same examples, and their regression on rows before them.

    Attributes:
        rows: Which ``g`` rows.
        on: Which ``a`` rows they are regressed on.
        seen: ``a`` means of those on the group's examples.
    """

    def __init__(self, one: ScoredExamples, rule: Tensor, rows: Tensor, on: Tensor) -> None:
        self.rows, self.on = rows, on
        self._counts, self._left = one.counts[rows], one.left[rows]
        items = one.scored[rows[0]]
        there = one.there[on][:, items]
        Z = one.values[on][:, items]
        centre = Z.sum(-1, keepdim=True) / there.sum(-1, keepdim=True)
        self.seen = one.means[on] + centre.squeeze(-1)
        self._y = one.values[rows][:, items].mT
        self._n = len(self._y)
        # Covariates are whitened by the rule, so that its part of the prior is the identity.
        self._root = torch.linalg.cholesky(rule[on.unsqueeze(-1), on])
        self._white = self._solve((Z - centre) * there)
        self._prior = self._solve(rule[on.unsqueeze(-1), rows])
        self._rest = rule[rows.unsqueeze(-1), rows] - self._prior.mT @ self._prior

    def losses(self) -> Tensor:
        """Return for each strength of the prior how badly examples are predicted from the others.

        Half the logarithm of the mean squared error of each row, an expected square among them,
        times the number of examples.
        """
        if self._n < _FEWEST:
            return torch.zeros(len(_STRENGTHS), dtype=torch.float64)
        squares, axes = torch.linalg.eigh(self._white @ self._white.mT)
        along = self._white.mT @ axes
        prior, moments = axes.mT @ self._prior, along.mT @ self._y
        found = []
        for strength in _STRENGTHS:
            shrunk = 1 / (squares.clamp_min(0.0) + strength)
            weights = shrunk.unsqueeze(-1) * (moments + strength * prior)
            errors = self._left_out(self._y - along @ weights, along.square() @ shrunk)
            found.append((errors.square().sum(0) + self._rest.diagonal()).log().sum())
        return 0.5 * self._n * torch.stack(found)

    def fit(self, strength: float) -> tuple[Tensor, Tensor]:
        """Return coefficients (``a x g``) and the covariance of residuals (``g x g``).

        Args:
            strength: Of the prior, in examples.
        """
        weights, residuals = self._prior, self._rest
        if self._n >= _FEWEST:
            squares = self._white @ self._white.mT
            root = torch.linalg.cholesky(
                squares + strength * torch.eye(len(squares), dtype=torch.float64)
            )
            moments = self._white @ self._y + strength * self._prior
            weights = torch.cholesky_solve(moments, root)
            reach = torch.linalg.solve_triangular(root, self._white, upper=False).square().sum(0)
            errors = self._left_out(self._y - self._white.mT @ weights, reach)
            residuals = (errors.mT @ errors + _PRIOR * self._rest) / (self._n + _PRIOR)
        return torch.linalg.solve_triangular(self._root.mT, weights, upper=True), residuals

    def scaled(self, residuals: Tensor) -> Tensor:
        """Return the covariance of the errors of mean residuals, ``g x g``."""
        n = self._counts
        each = (self._left / n * (n + 1) / (n - 2).clamp_min(0.5)).sqrt()
        return residuals * each.unsqueeze(-1) * each

    def _solve(self, given: Tensor) -> Tensor:
        solved: Tensor = torch.linalg.solve_triangular(self._root, given, upper=False)
        return solved

    def _left_out(self, residuals: Tensor, reach: Tensor) -> Tensor:
        """Return the errors of predicting each example's outcomes from the others, ``n x g``.

        Args:
            residuals: ``n x g`` residuals of the fit to all.
            reach: ``n`` leverages, the mean's left out.
        """
        kept: Tensor = 1 - (reach + 1 / self._n).clamp_max(0.99)
        return residuals / kept.unsqueeze(-1)


def _by_examples(scored: Tensor) -> list[Tensor]:
    """Return the rows that have the same examples, those with the most first.

    Args:
        scored: ``r x E`` booleans.
    """
    groups: dict[bytes, list[int]] = {}
    for row, items in enumerate(scored):
        groups.setdefault(items.numpy().tobytes(), []).append(row)
    counts = scored.sum(-1)
    found = sorted(groups.values(), key=lambda rows: -int(counts[rows[0]]))
    return [torch.tensor(rows) for rows in found]


def _covariates(one: ScoredExamples, rule: Tensor, rows: Tensor, done: Tensor) -> Tensor:
    """Return the rows to regress a group on, of those that are ``done``.

    Where there are many, those that the rule says to correlate most with the group.
    """
    items = one.scored[rows[0]]
    covered = one.there[done][:, items].double().mean(-1)
    on = done[covered >= _COVERED]
    if len(on) <= _COVARIATES:
        return on
    close = rule[on.unsqueeze(-1), rows].mean(-1) / rule[on, on].sqrt()
    return on[close.argsort(descending=True, stable=True)[:_COVARIATES].sort().values]


def _rule(one: ScoredExamples, scale: Tensor) -> Tensor:
    """Return the correlation of outcomes of two rows as a function of their coefficients.

    ``a + b k(x_i, x_j)`` off the diagonal with ``a, b >= 0`` and ``a + b <= .98``, so it is
    positive definite. The fit is by least squares to the correlations of all pairs, each weighted
    by the examples that both rows have.

    Args:
        one: The outcomes.
        scale: ``r`` standard deviations of them.
    """
    r = len(scale)
    X = one.X - one.X.mean(0)
    X = X / X.square().mean(0).sqrt().clamp_min(1e-9)
    distances = torch.cdist(X, X, compute_mode="donot_use_mm_for_euclid_dist").square()
    first, second = torch.triu_indices(r, r, 1)
    there = one.there.double()
    common = (there @ there.mT)[first, second]
    values = one.values / scale.unsqueeze(-1)
    found = (values @ values.mT)[first, second] / common.clamp_min(1.0)
    weight = torch.where(common >= _FEWEST, common, 0.0)
    apart = distances[first, second]
    middle = apart[apart > 0].median() if bool((apart > 0).any()) else apart.new_ones(())
    best, rule = torch.inf, torch.eye(r, dtype=torch.float64)
    for length in _LENGTHS:
        for power in (1.0, 0.5):
            kernel = (-(distances / (length * middle)).pow(power)).exp()
            a, b = _two_shares(kernel[first, second], found, weight)
            loss = float((weight * (found - a - b * kernel[first, second]).square()).sum())
            if loss < best:
                own = (1 - a - b) * torch.eye(r, dtype=torch.float64)
                best, rule = loss, a + b * kernel + own
    return rule


def _two_shares(kernel: Tensor, found: Tensor, weight: Tensor) -> tuple[float, float]:
    """Return ``a`` and ``b`` of ``found ~ a + b kernel``, not negative and at most .98 together."""

    def mean(values: Tensor) -> float:
        return float((weight * values).sum() / weight.sum().clamp_min(1e-300))

    k, c, kk, kc = mean(kernel), mean(found), mean(kernel.square()), mean(kernel * found)
    spread = kk - k * k
    b = (kc - k * c) / spread if spread > 1e-9 else 0.0
    a = c - b * k
    if a < 0:
        a, b = 0.0, kc / kk if kk > 0 else 0.0
    if b < 0:
        a, b = c, 0.0
    a, b = max(a, 0.0), max(b, 0.0)
    over = max(1.0, (a + b) / _CLOSEST)
    return a / over, b / over
