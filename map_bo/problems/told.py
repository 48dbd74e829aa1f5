"""A problem whose evaluations are made elsewhere: one's own cluster, a service, people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn

from torch import Generator, Tensor

from map_bo.data import Metric, check_metrics
from map_bo.errors import ConfigError, DataError, did_you_mean
from map_bo.space import CoefficientSpace

__all__ = ["ToldProblem", "told_problem"]


@dataclass(frozen=True, eq=False)
class ToldProblem:
    """Coefficients and metrics alone: a run asks for rows, and is told what was measured there.

    In Python :meth:`map_bo.loop.run.Run.ask` and :meth:`~map_bo.loop.run.Run.tell`, on the command
    line ``map-bo ask`` and ``map-bo tell``. Front points cannot be measured either, so the runs of
    such a problem leave out the verification (``verify=0``).

    Attributes:
        space: The coefficients.
        metrics: The ``m`` metrics.
        about: Plain data by which the problem is recognised, such as the digests of its models.

    Raises:
        DataError: When there are no metrics, or two of one name.
    """

    space: CoefficientSpace
    metrics: tuple[Metric, ...]
    about: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "metrics", check_metrics(self.metrics))

    def describe(self) -> dict[str, Any]:
        """Return plain data by which the same problem is recognised."""
        return {"kind": "told"} if self.about is None else dict(self.about)

    def evaluate(self, X: Tensor, *, generator: Generator) -> NoReturn:
        """Refuse to evaluate.

        Raises:
            ConfigError: Always, with what to do instead.
        """
        raise ConfigError(
            "this problem is evaluated elsewhere, so the run cannot measure a point itself",
            hint="ask for rows and tell their outcomes (`map-bo ask RUN`, `map-bo tell RUN ROW`, "
            "or run.ask and run.tell) until the search is complete, with verify=0",
        )


def told_problem(
    experts: Sequence[str],
    metrics: Sequence[str] | Mapping[str, Mapping[str, Any] | None],
    lower: float = 0.0,
    upper: float = 1.0,
    sum_at_most: float | None = None,
    fixed: Mapping[str, float | str] | None = None,
) -> ToldProblem:
    """Return the problem of merging experts that are evaluated elsewhere, from names alone.

    Args:
        experts: Names of the ``N`` coefficients.
        metrics: Names of the metrics, which are proportions of which more is better; or name ->
            fields of :class:`map_bo.data.Metric`.
        lower: Lower bound of every coefficient.
        upper: Upper bound of every coefficient.
        sum_at_most: Bound on the sum of the coefficients.
        fixed: Coefficients that are not searched.

    Raises:
        ConfigError: When a metric has an unknown field.
        DataError: When a metric is not possible, or there is none.
        SpaceError: When the space is not possible.
    """
    for what, given in (("experts", experts), ("metrics", metrics)):
        if isinstance(given, str) or not given:
            raise ConfigError(
                f"problem.{what} must be a list of names, got {given!r}",
                hint=f"write it as problem.{what}=[math,code]",
            )
    told = metrics if isinstance(metrics, Mapping) else dict.fromkeys(metrics)
    return ToldProblem(
        CoefficientSpace.box(
            [str(name) for name in experts],
            lower=lower,
            upper=upper,
            sum_at_most=sum_at_most,
            fixed=fixed,
        ),
        tuple(_metric(str(name), content) for name, content in told.items()),
    )


def _metric(name: str, content: Mapping[str, Any] | None) -> Metric:
    known = [field.name for field in fields(Metric) if field.name != "name"]
    if content is not None and not isinstance(content, Mapping):
        raise ConfigError(
            f"problem.metrics.{name} must be a mapping, got {content!r}",
            hint="write it as problem.metrics={loss: {direction: min, kind: loss}}",
        )
    for key in content or {}:
        if key not in known:
            raise ConfigError(
                f"metric {name!r} has no field {key!r}", hint=did_you_mean(key, known)
            )
    try:
        return Metric(name, **(content or {}))
    except TypeError as error:
        raise DataError(f"metric {name!r} is not possible: {error}") from error
