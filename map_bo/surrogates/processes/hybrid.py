"""The hybrid: a Bayesian quadratic whose misfit is a Gaussian process."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from map_bo.data import Observations
from map_bo.space import CoefficientSpace
from map_bo.surrogates.links import links_for
from map_bo.surrogates.processes.gp import GPModel, ProcessPrior, fit_processes

__all__ = ["Hybrid"]

_HYBRID_PRIOR = ProcessPrior(
    trend="quadratic",
    trend_variance=2.4,
    trend_spread=1.0,
    # Small until the data say otherwise: at few points the quadratic is all there is to learn.
    scale=(-2.0, 1.5),
    lengthscale=(math.log(0.5), 1.0),
)


@dataclass(frozen=True)
class Hybrid:
    """Settings of the hybrid: quadratic kernel plus squared-exponential with ARD.

    The quadratic carries the trend, also outside the data, with one prior variance for each of
    constant, linear, square and cross features; the squared-exponential part follows what
    a quadratic cannot. Both are one Gaussian process, fitted jointly by its marginal likelihood.
    In a space with a choice both are hierarchies over its options
    (:mod:`map_bo.surrogates.features`). A covariance of the evaluations' noise enters as it does in
    the :class:`~map_bo.surrogates.processes.gp.GP`.

    Attributes:
        link: ``"auto"`` (logit, log, identity by the metric's kind) or ``"identity"``.
        importance: Power of the space's importances that inputs, and so the features of the
            quadratic, are scaled by; see :class:`~map_bo.surrogates.quadratic.Quadratic`.
    """

    link: Literal["auto", "identity"] = "auto"
    importance: float = 0.5
    leaves_one_out: ClassVar[bool] = True
    takes_partial_rows: ClassVar[bool] = True
    takes_choice: ClassVar[bool] = True

    def __post_init__(self) -> None:
        links_for((), kind=self.link)

    def fit(self, seen: Observations, space: CoefficientSpace) -> GPModel:
        """Fit to the evaluations that succeeded (two or more).

        Raises:
            SurrogateError: When fewer than two succeeded.
        """
        space = space.stretched(self.importance)
        return fit_processes(seen, space, link=self.link, prior=_HYBRID_PRIOR)
