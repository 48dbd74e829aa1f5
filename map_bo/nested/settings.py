"""How experts are merged in stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from map_bo.errors import ConfigError, did_you_mean

__all__ = ["Nested"]

Order = Literal["given", "score", "similarity", "conflict"]
HandUp = Literal["point", "points", "surrogate"]
Split = Literal["equal", "by_size", "adaptive"]
Measured = Literal["tasks", "children"]

_CHOICES = {
    "order": ("given", "score", "similarity", "conflict"),
    "hand_up": ("point", "points", "surrogate"),
    "budget_split": ("equal", "by_size", "adaptive"),
    "measure": ("tasks", "children"),
}


@dataclass(frozen=True)
class Nested:
    """Settings of merging in stages.

    Which experts are merged together comes from ``tree``, or from ``group_size``, or from
    ``stages``; which stand side by side from ``order``.

    Attributes:
        stages: Number of stages ``S`` of a balanced tree: 1 merges all experts at once,
            ``ceil(log2 N)`` merges pairs; between them groups have about ``N ** (1 / S)`` members.
        group_size: Largest group, in place of ``stages``.
        tree: The tree itself, as nested lists of the experts' names.
        order: How experts are ordered before they are grouped: ``"given"``; ``"score"``, by how
            well each does its own task, as published (measures each expert once); ``"similarity"``,
            such that those with the most similar task vectors stand together (one pass over the
            flat matrix); ``"conflict"``, such that those that disturb each other most stand
            together, as surrogates fitted to ``probe`` evaluations of all tasks predict.
        hand_up: What a node gives to the one above. ``"point"``: one merge for each preference, as
            published. ``"points"``: a few merges that stand for its front, so that the preference
            is chosen when the tree is done. ``"surrogate"``: all its experts, and what it learnt
            about them.
        preferences: Preferences (weight by metric name) that ``"point"`` merges for; none is the
            one that weighs all metrics alike.
        points: How many merges ``"points"`` hands up; at most one more than the node has
            coefficients.
        inform: Whether nodes also use what was measured below them and for other preferences; by
            default with ``"surrogate"``, and with several preferences.
        measure: What a node looks at: the metrics of all tasks below it, or as published one number
            a child, the mean of its tasks' metrics weighted by the preference.
        budget_split: How the budget is split over the nodes, in measurements of one task at one
            point: ``"equal"`` numbers of evaluations; ``"by_size"``, what each node needs at least
            and the rest in proportion to its coefficients and two more; or ``"adaptive"``, the
            same, but a node stops when little is still expected to be gained, and leaves the rest
            to those above.
        tolerance: Expected gain at which ``"adaptive"`` stops, as in :class:`Stop` by regret.
        stage_budgets: Evaluations of each node, by stage, in place of a split.
        budgets: Evaluations of single nodes by name (``root``, ``0``, ``0.1``), before all else.
        refine: Evaluations in the full space at the end, which the nested result seeds. They come
            out of the same budget.
        tasks: Names of the metrics of each expert; by default the metric that has its name.
        probe: Evaluations of all tasks that the ``"conflict"`` order is fitted to; by default the
            base, the experts and ``N`` more. They come out of the same budget.
        memory: Gigabytes that merged models of operators that are not linear may take in memory;
            more go to safetensors files in the run directory.

    Raises:
        ConfigError: On a value that is not possible.
    """

    stages: int | None = None
    group_size: int | None = None
    tree: Any = None
    order: Order = "given"
    hand_up: HandUp = "points"
    preferences: tuple[Mapping[str, float], ...] = ()
    points: int = 3
    inform: bool | None = None
    measure: Measured = "tasks"
    budget_split: Split = "by_size"
    tolerance: float = 0.005
    stage_budgets: tuple[int, ...] = ()
    budgets: Mapping[str, int] = field(default_factory=dict)
    refine: int = 0
    tasks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    probe: int | None = None
    memory: float = 4.0

    def __post_init__(self) -> None:
        put = object.__setattr__
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"nested.{name} is {value!r}", hint=did_you_mean(value, known))
        least_of = {"stages": 1, "group_size": 2, "points": 1, "refine": 0, "probe": 1}
        for name, least in least_of.items():
            value = getattr(self, name)
            if value is None and name in ("stages", "group_size", "probe"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(
                    f"nested.{name} is {value!r}", hint=f"give a whole number from {least} on"
                )
        given = [n for n in ("stages", "group_size", "tree") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ConfigError(
                f"nested.{' and nested.'.join(given)} were both given", hint="give one of them"
            )
        if not given:
            put(self, "stages", 2)
        put(self, "preferences", tuple(dict(one) for one in self.preferences))
        if self.preferences and self.hand_up != "point":
            raise ConfigError(
                f"nested.preferences mean nothing with nested.hand_up={self.hand_up}",
                hint="a front is kept, and the preference is chosen at the end; or set "
                "nested.hand_up=point",
            )
        if self.measure == "children" and self.hand_up != "point":
            raise ConfigError(
                f"nested.measure=children needs a preference, and nested.hand_up={self.hand_up} "
                "has none",
                hint="set nested.hand_up=point, or nested.measure=tasks",
            )
        put(self, "budgets", {str(k): int(v) for k, v in dict(self.budgets).items()})
        put(self, "stage_budgets", tuple(int(n) for n in self.stage_budgets))
        tasks = {
            name: (of,) if isinstance(of, str) else tuple(of)
            for name, of in dict(self.tasks).items()
        }
        put(self, "tasks", tasks)
        if not self.tolerance > 0 or not self.memory >= 0:
            raise ConfigError(
                f"nested.tolerance is {self.tolerance} and nested.memory {self.memory}",
                hint="give a tolerance above 0 and a memory of 0 or more gigabytes",
            )

    @property
    def informed(self) -> bool:
        """Whether nodes use what was measured elsewhere."""
        if self.inform is not None:
            return self.inform
        return self.hand_up == "surrogate" or len(self.preferences) > 1
