"""Settings of merging in stages."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from typing import Any, Literal

from map_bo.errors import ConfigError, did_you_mean
from map_bo.values import whole_number

__all__ = ["Nested"]

Order = Literal["given", "score", "similarity", "conflict"]
Promote = Literal["point", "points", "surrogate"]
Split = Literal["equal", "by_size", "adaptive"]
Measure = Literal["tasks", "children"]

_CHOICES = {
    "order": ("given", "score", "similarity", "conflict"),
    "promote": ("point", "points", "surrogate"),
    "budget_split": ("equal", "by_size", "adaptive"),
    "measure": ("tasks", "children"),
}


@dataclass(frozen=True)
class Nested:
    """Settings of merging in stages.

    ``tree``, ``group_size`` or ``stages`` decides which experts are merged together, and ``order``
    which of them are neighbours.

    Attributes:
        stages: Number of stages ``S`` of a balanced tree: 1 merges all experts at once,
            ``ceil(log2 N)`` merges pairs; in between, groups have about ``N ** (1 / S)`` members.
        group_size: Largest group, in place of ``stages``.
        tree: The tree itself, as nested lists of the experts' names.
        order: How experts are ordered before they are grouped: ``"given"``; ``"score"``, by how
            well each does its own task, as published (measures each expert once); ``"similarity"``,
            so that experts with the most similar task vectors are neighbours (one pass over the
            flat matrix); ``"conflict"``, so that experts that disturb each other most are
            neighbours, as predicted by surrogates fitted to ``probe`` evaluations of all tasks.
        promote: What a node promotes to its parent. ``"point"``: one merge for each preference, as
            published. ``"points"``: a few merges that represent its front, so that the preference
            is chosen when the tree is done. ``"surrogate"``: all its experts, and what it learnt
            about them.
        preferences: Preferences (weight by metric name) that ``"point"`` merges for; when empty,
            the one that weighs all metrics alike.
        points: How many merges ``"points"`` promotes; at most one more than the node has
            coefficients.
        inform: Whether nodes also use what was measured below them and for other preferences; by
            default they do with ``"surrogate"``, and with several preferences.
        measure: What a node measures: ``"tasks"``, the metrics of all tasks below it; or, as
            published, ``"children"``, one number per child: the mean of its tasks' metrics,
            weighted by the preference.
        budget_split: How the budget, counted in measurements of one task at one point, is split
            over the nodes: ``"equal"`` numbers of evaluations; ``"by_size"``, the minimum for each
            node and the rest in proportion to its number of coefficients plus two; or
            ``"adaptive"``, which is ``"by_size"`` except that a node stops when little more is
            expected to be gained, and leaves the rest to the nodes after it.
        tolerance: Expected gain at which ``"adaptive"`` stops, as in :class:`Stop` by regret.
        stage_budgets: Evaluations of each node, by stage, instead of a split.
        budgets: Evaluations of single nodes by name (``root``, ``0``, ``0.1``); these take
            precedence over everything else.
        refine: Evaluations in the full space at the end, which start from the nested result. They
            come out of the same budget.
        tasks: Names of the metrics of each expert; by default the metric that has its name.
        probe: Evaluations of all tasks that the ``"conflict"`` order is fitted to; by default the
            base, the experts and ``N`` more. They come out of the same budget.
        memory: Gigabytes of memory for the merged models of operators that are not linear; further
            models go to safetensors files in the run directory.
        hand_up: The name of ``promote`` in version 0.1; it goes in version 0.3.

    Raises:
        ConfigError: On a value that is not possible.
    """

    stages: int | None = None
    group_size: int | None = None
    tree: Any = None
    order: Order = "given"
    promote: Promote = "points"
    preferences: tuple[Mapping[str, float], ...] = ()
    points: int = 3
    inform: bool | None = None
    measure: Measure = "tasks"
    budget_split: Split = "by_size"
    tolerance: float = 0.005
    stage_budgets: tuple[int, ...] = ()
    budgets: Mapping[str, int] = field(default_factory=dict)
    refine: int = 0
    tasks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    probe: int | None = None
    memory: float = 4.0
    hand_up: InitVar[Promote | None] = None

    def __post_init__(self, hand_up: Promote | None) -> None:
        put = object.__setattr__
        if hand_up is not None:
            warnings.warn(
                "nested.hand_up is now nested.promote; the old name goes in version 0.3",
                DeprecationWarning,
                stacklevel=3,
            )
            put(self, "promote", hand_up)
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(
                    f"{value!r} is not a value of nested.{name}", hint=did_you_mean(value, known)
                )
        least_of = {"stages": 1, "group_size": 2, "points": 1, "refine": 0, "probe": 1}
        for name, least in least_of.items():
            value = getattr(self, name)
            if value is None and name in ("stages", "group_size", "probe"):
                continue
            hint = f"set nested.{name}={max(least, 2)}, or remove it for the default"
            put(self, name, whole_number(f"nested.{name}", value, least=least, hint=hint))
        given = [n for n in ("stages", "group_size", "tree") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ConfigError(
                f"nested.{' and nested.'.join(given)} were both given", hint="keep one of them"
            )
        if not given:
            put(self, "stages", 2)
        put(self, "preferences", tuple(dict(one) for one in self.preferences))
        if self.preferences and self.promote != "point":
            raise ConfigError(
                f"nested.preferences have no effect with nested.promote={self.promote}",
                hint="remove them and choose by preference at the end, or set nested.promote=point",
            )
        if self.measure == "children" and self.promote != "point":
            raise ConfigError(
                f"nested.measure=children needs a preference, and nested.promote={self.promote} "
                "has none",
                hint="set nested.promote=point, or nested.measure=tasks",
            )
        put(self, "budgets", {str(k): int(v) for k, v in dict(self.budgets).items()})
        put(self, "stage_budgets", tuple(int(n) for n in self.stage_budgets))
        tasks = {
            name: (of,) if isinstance(of, str) else tuple(of)
            for name, of in dict(self.tasks).items()
        }
        put(self, "tasks", tasks)
        if not self.tolerance > 0:
            raise ConfigError(
                f"nested.tolerance must be positive, got {self.tolerance}",
                hint="set an expected gain such as nested.tolerance=0.005",
            )
        if not self.memory >= 0:
            raise ConfigError(
                f"nested.memory must be at least 0, got {self.memory}",
                hint="set a number of gigabytes; 0 keeps every merged model in a file",
            )

    @property
    def informed(self) -> bool:
        """Whether nodes use what was measured elsewhere."""
        if self.inform is not None:
            return self.inform
        return self.promote == "surrogate" or len(self.preferences) > 1
