"""botorch's multi-objective test functions as problems."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property

import botorch.test_functions.multi_objective as functions
import torch
from botorch.test_functions.base import ConstrainedBaseTestProblem, MultiObjectiveTestProblem
from torch import Generator, Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import ConfigError, DataError
from map_bo.evaluators.isolation.world import known_numerics
from map_bo.problems.synthetic import noisy
from map_bo.space import CoefficientSpace
from map_bo.values import whole_number

__all__ = ["BotorchProblem", "function_names"]

_DEFAULT_DIM = 6
_MOST_DIM = 10_000  # a larger one is built for minutes
_MOST_METRICS = 100


def function_names() -> tuple[str, ...]:
    """Return the names of the test functions that there are; those with constraints are not."""
    return tuple(
        name
        for name, kind in sorted(vars(functions).items())
        if inspect.isclass(kind)
        and issubclass(kind, MultiObjectiveTestProblem)
        and not issubclass(kind, ConstrainedBaseTestProblem)
        and not inspect.isabstract(kind)
    )


@dataclass(frozen=True)
class BotorchProblem:
    """One of botorch's multi-objective test functions, in its own units and directions.

    botorch minimises these functions by default, so each metric's direction is ``"min"``;
    nothing is negated.

    Attributes:
        name: ``"ZDT1"``, ``"DTLZ2"``, ``"BraninCurrin"``, ``"VehicleSafety"`` ...
        dim: Number of coefficients. By default that of the function; for a function of any
            number, 6, or two more than the objectives when these are more than 4.
        num_objectives: Number of metrics, by default the function's own.
        noise_std: Standard deviation of Gaussian measurement noise; known through ``Yvar``.

    Raises:
        ConfigError: When there is no such function.
        DataError: When it does not come in these numbers of coefficients and metrics.
    """

    name: str
    dim: int | None = None
    num_objectives: int | None = None
    noise_std: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in function_names():
            raise ConfigError(
                f"botorch has no unconstrained test function {self.name!r}",
                hint=f"there are {', '.join(function_names())}",
            )
        for setting, most in (("dim", _MOST_DIM), ("num_objectives", _MOST_METRICS)):
            asked = getattr(self, setting)
            if asked is not None:
                whole_number(setting, asked, least=1, most=most, error=DataError)
        if not 0 <= self.noise_std < float("inf"):
            raise DataError(
                f"noise_std must be finite and not negative, got {self.noise_std}",
                hint="give a standard deviation, or 0 for none",
            )
        found = {"dim": self.function.dim, "num_objectives": self.function.num_objectives}
        for setting, actual in found.items():
            asked = getattr(self, setting)
            if asked not in (None, actual):
                raise DataError(
                    f"{self.name} has {setting} {actual}, not {asked}",
                    hint=f"leave {setting} out, or choose another function",
                )

    @cached_property
    def function(self) -> MultiObjectiveTestProblem:
        """The test function itself."""
        kind = getattr(functions, self.name)
        takes = inspect.signature(kind).parameters
        settings: dict[str, int] = {}
        if "dim" in takes:
            settings["dim"] = self.dim or max(_DEFAULT_DIM, (self.num_objectives or 2) + 2)
        if "num_objectives" in takes and self.num_objectives is not None:
            settings["num_objectives"] = self.num_objectives
        try:
            made: MultiObjectiveTestProblem = kind(**settings)
        except Exception as error:
            raise DataError(
                f"{self.name} cannot be made with {settings}: {error}",
                hint="change dim or num_objectives",
            ) from error
        return made

    @property
    def _bounds(self) -> Tensor:
        return torch.as_tensor(self.function.bounds)

    @property
    def space(self) -> CoefficientSpace:
        """The function's bounds, with coefficients ``x1 .. xd``."""
        low, high = self._bounds.tolist()
        return CoefficientSpace(tuple(f"x{i + 1}" for i in range(len(low))), low, high)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """``f1 .. fm``, unbounded, to minimise."""
        return tuple(
            Metric(f"f{i + 1}", direction="min", kind="unbounded")
            for i in range(self.function.num_objectives)
        )

    @property
    def reference_point(self) -> Tensor:
        """``m`` values, in the metrics' own units and directions, as botorch proposes them."""
        return torch.as_tensor(self.function.ref_point).double()

    @property
    def max_hv(self) -> float | None:
        """Hypervolume of the true front beyond :attr:`reference_point`; None if not known."""
        try:
            return float(self.function.max_hv)
        except NotImplementedError:
            return None

    def true_values(self, X: Tensor) -> Tensor:
        """Return the metrics without noise, ``n x m``, at ``X`` (``n x d``)."""
        low, high = self._bounds
        if len(X) == 0:
            return torch.zeros(0, self.function.num_objectives, dtype=torch.float64)
        # The space forgives a leave of 1e-6, which botorch does not.
        with torch.no_grad():
            return self.function.evaluate_true(X.double().clamp(low, high)).double()

    @known_numerics()
    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        """Measure every metric at every row of ``X`` (``n x d``), with noise if there is any.

        Raises:
            SpaceError: When a row lies outside the bounds.
        """
        X = self.space.check(X)
        return noisy(X, self.true_values(X), self.metrics, self.noise_std, generator)
