"""Which metrics belong to which expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from map_bo.data import Metric
from map_bo.errors import ConfigError
from map_bo.nested.tree import Group

__all__ = ["Tasks"]


@dataclass(frozen=True)
class Tasks:
    """The metrics of every expert.

    Attributes:
        metrics: Names of all metrics, in the problem's order.
        of: Expert -> names of its metrics. A metric may be that of several experts; one that is
            nobody's is measured at the root alone.
    """

    metrics: tuple[str, ...]
    of: Mapping[str, tuple[str, ...]]

    @classmethod
    def given(
        cls,
        experts: Sequence[str],
        metrics: Sequence[Metric],
        named: Mapping[str, Sequence[str]],
    ) -> Tasks:
        """Return the tasks that were named, or else those that have their expert's name.

        Raises:
            ConfigError: When an expert has none, or a name is unknown.
        """
        names = tuple(metric.name for metric in metrics)
        unknown = sorted(set(named) - set(experts))
        if unknown:
            raise ConfigError(
                f"nested.tasks names unknown experts: {', '.join(unknown)}",
                hint=f"experts are {', '.join(experts)}",
            )
        found: dict[str, tuple[str, ...]] = {}
        for expert in experts:
            own = tuple(named.get(expert, (expert,) if expert in names else ()))
            wrong = [name for name in own if name not in names]
            if wrong:
                raise ConfigError(
                    f"nested.tasks gives expert {expert} the unknown metrics {', '.join(wrong)}",
                    hint=f"metrics are {', '.join(names)}",
                )
            if not own:
                raise ConfigError(
                    f"expert {expert} has no task: there is no metric of that name",
                    hint=f"say which metrics are its own: nested.tasks.{expert}=[...] out of "
                    f"{', '.join(names)}",
                )
            found[expert] = own
        return cls(names, found)

    def below(self, node: Group | str) -> tuple[str, ...]:
        """Return the metrics of an expert, or of all experts below a node, in order."""
        leaves = (node,) if isinstance(node, str) else node.leaves
        wanted = {name for leaf in leaves for name in self.of[leaf]}
        return tuple(name for name in self.metrics if name in wanted)

    def check_preference(self, weights: Mapping[str, float], number: int) -> None:
        """Refuse a preference that does not name every metric.

        Raises:
            ConfigError: With what is missing or unknown.
        """
        missing = [name for name in self.metrics if name not in weights]
        unknown = sorted(set(weights) - set(self.metrics))
        bad = [name for name, weight in weights.items() if not 0 <= float(weight) < float("inf")]
        if missing or unknown or bad or not any(weights.values()):
            what = (
                f"does not name {', '.join(missing)}"
                if missing
                else f"names {', '.join(unknown)}, which no metric is called"
                if unknown
                else f"has weights that are no finite numbers from 0 on: {', '.join(bad)}"
                if bad
                else "has no weight above 0"
            )
            raise ConfigError(
                f"preference {number} of nested.preferences {what}",
                hint=f"give each of {', '.join(self.metrics)} a weight; 0 leaves a task out",
            )
