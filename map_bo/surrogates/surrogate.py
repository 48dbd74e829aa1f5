"""What a surrogate is: settings with a ``fit`` that returns a botorch model with links."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from botorch.models.model import Model
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.space import CoefficientSpace

if TYPE_CHECKING:
    from map_bo.surrogates.links import Link

__all__ = ["Surrogate", "SurrogateModel"]


class SurrogateModel(Model):
    """A botorch model of all metrics on their link scales, each in its own direction.

    ``posterior(X)`` is the Gaussian posterior on the link scale (logit for a proportion, log for
    a loss, identity else), so every botorch acquisition works with it; the links belong in the
    acquisition's objective and in prediction.

    Attributes:
        metrics: The ``m`` metrics, in the order of the outputs.
        links: One link a metric.
    """

    metrics: tuple[Metric, ...]
    links: tuple[Link, ...]

    @abstractmethod
    def link_mean(self, X: Tensor) -> Tensor:
        """Return the posterior mean on the link scale, ``n x m`` for ``n x d``.

        It equals ``posterior(X).mean``, is differentiable in ``X``, and is computed in closed
        form from cached quantities (no covariance, no solve), so that a front solver can call it
        hundreds of times.
        """


@runtime_checkable
class Surrogate(Protocol):
    """Settings of a surrogate; frozen, so that the same settings can fit many data sets."""

    def fit(self, seen: Observations, space: CoefficientSpace) -> SurrogateModel:
        """Fit to the evaluations that succeeded.

        Raises:
            SurrogateError: When too few evaluations succeeded to fit anything.
        """
        ...
