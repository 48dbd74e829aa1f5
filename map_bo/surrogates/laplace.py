"""Counted proportions: the binomial likelihood by Laplace's approximation.

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

import torch
from torch import Tensor

from map_bo.surrogates.evidence import Hyperprior, maximise_evidence, regression

__all__ = ["binomial_working_responses"]

_FARTHEST = 15.0  # logits beyond this are not told apart by any count


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

    def working(g: Tensor) -> tuple[Tensor, Tensor]:
        f = (shift + scale * g).clamp(-_FARTHEST, _FARTHEST)
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
