"""How much of the sampling noise of a metric differs from one evaluation to the next.

An accuracy of ``p`` on ``n`` examples has the binomial variance ``p (1 - p) / n`` about the
accuracy on all possible examples. Two evaluations on examples of their own err independently, and
that is the noise which a surrogate has to average out. Two evaluations on the *same* examples err
together: with a correlation ``rho`` between what two merged models get right, the share ``rho`` of
the noise raises or lowers every evaluation alike, and all trade-offs between models stay as they
are. What differs from one evaluation to the next, and so is noise to a surrogate, is the share
``1 - rho``. To take it for the whole makes the surrogate smooth away what it could have learnt: on
experts that hardly conflict, it then overlooks that more than a whole sum of task vectors is too
much.

``rho`` of merged models is about .9 between coefficients .1 apart and between .3 and .7, by the
case, for any two (``python -m benchmarks.quality.correlation``); so the share lies between .1 and
.7, and :data:`DIFFERS` is about the middle of that on a logarithmic scale. Shares of 1, .3, .1 and
.03 were also tried on some of the cases of the quality study, and .3 was the most even.
"""

from __future__ import annotations

import dataclasses

import torch

from map_bo.data import Observations

__all__ = ["DIFFERS", "as_fitted"]

DIFFERS = 0.3
"""Share of the sampling variance that differs between evaluations on the same examples."""


def as_fitted(seen: Observations) -> Observations:
    """Return the rows that did not fail, with the noise that a surrogate has to average out.

    For a metric whose every evaluation is on the same examples, variances are :data:`DIFFERS`
    times those recorded, and counts ``1 / DIFFERS`` times: so many independent examples would
    leave as much noise. Everything else stays as it is.
    """
    good = seen.succeeded()
    share = torch.tensor(
        [DIFFERS if metric.examples == "same" else 1.0 for metric in good.metrics],
        dtype=torch.float64,
    )
    return dataclasses.replace(good, Yvar=good.Yvar * share, counts=good.counts / share)
