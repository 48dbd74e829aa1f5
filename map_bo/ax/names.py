"""What coefficients and metrics are called in Ax, which reads their names in expressions."""

from __future__ import annotations

import builtins
import keyword
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from map_bo.data import Metric
from map_bo.space import CoefficientSpace

__all__ = ["Names", "names_for"]

_COLUMNS = frozenset(
    ("trial_index", "arm_name", "trial_status", "status_reason", "generation_node", "baseline")
)
"""Names that Ax uses for itself, in its table of trials and in constraints."""


@dataclass(frozen=True)
class Names:
    """Names in Ax.

    Attributes:
        parameters: ``d`` names of the coefficients.
        metrics: ``m`` names of the metrics.
    """

    parameters: tuple[str, ...]
    metrics: tuple[str, ...]


def names_for(space: CoefficientSpace, metrics: Sequence[Metric]) -> Names:
    """Return the names that an export uses.

    A coefficient is ``c_`` and its name, for expert and metric often share one and Ax shows both
    in one table. A metric keeps its name, or gets ``m_`` before it where the name means something
    else in an expression. Characters other than letters, digits and underscores become underscores.
    """
    import sympy

    reserved = {*dir(sympy), *dir(builtins), *keyword.kwlist, *_COLUMNS}
    parameters: list[str] = []
    for name in space.names:
        parameters.append(_unused(f"c_{_plain(name)}", parameters))
    chosen: list[str] = []
    for metric in metrics:
        name = _plain(metric.name)
        if name in reserved or not name.isidentifier():
            name = f"m_{name}"
        chosen.append(_unused(name, [*parameters, *chosen]))
    return Names(tuple(parameters), tuple(chosen))


def _plain(name: str) -> str:
    # Ax writes punctuation as `__dot__` and the like, and reads it back.
    return re.sub(r"_{2,}", "_", re.sub(r"\W", "_", name, flags=re.ASCII))


def _unused(name: str, taken: Collection[str]) -> str:
    number, found = 2, name
    while found in taken:
        number, found = number + 1, f"{name}_{number}"
    return found
