"""What the operators with statistics share: whose statistics they have, and whether they fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

from torch import Tensor

from map_bo.errors import MergeError, listed
from map_bo.merging.align.layout import FlatLayout
from map_bo.merging.checkpoints.checkpoint import Checkpoint
from map_bo.merging.checkpoints.tensors import all_finite
from map_bo.operators.statistics.statistics import Statistics, StatisticsSource, statistics_of
from map_bo.plain import to_plain

__all__ = [
    "NeedsStatistics",
    "check_experts",
    "describe",
    "load_statistic",
    "match_statistics",
    "recipe",
    "refuse_negative",
    "require_statistics",
    "statistics_by_expert",
    "with_told",
]


@runtime_checkable
class NeedsStatistics(Protocol):
    """An operator that merges by statistics of the experts."""

    @property
    def statistics(self) -> Mapping[str, StatisticsSource]:
        """Expert -> where its statistics are; empty when they are not given yet."""
        ...

    @property
    def statistics_kind(self) -> str:
        """The kind it needs: ``"fisher"`` or ``"grams"``."""
        ...

    def with_statistics(self, statistics: Mapping[str, StatisticsSource]) -> Self:
        """Return the same operator with these statistics."""
        ...

    def check_experts(self, experts: Mapping[str, Checkpoint]) -> None:
        """Check that the statistics belong to these weights.

        Raises:
            MergeError: For those of another model.
        """
        ...


def require_statistics(
    name: str, kind: str, statistics: Mapping[str, Any], experts: tuple[str, ...]
) -> None:
    """Refuse experts without statistics, before anything is read.

    Raises:
        MergeError: Naming them.
    """
    missing = [expert for expert in experts if expert not in statistics]
    if missing:
        raise MergeError(
            f"{name} has no statistics for {listed(missing)}",
            hint=f"compute them with `{kind}(model, loader)`, keep them with `save_statistics` and "
            "give statistics={EXPERT: FILE, ...} "
            f"(on the command line +operator.statistics.{missing[0]}=FILE)",
        )


def statistics_by_expert(
    statistics: Mapping[str, StatisticsSource], experts: tuple[str, ...], kind: str
) -> dict[str, Statistics]:
    """Return the statistics of the experts, in their order, opened.

    Raises:
        CheckpointError: When a file cannot be read.
        MergeError: When an expert has none, or they are of another kind.
    """
    missing = [expert for expert in experts if expert not in statistics]
    if missing:
        raise MergeError(
            f"there are no statistics for {listed(missing)}",
            hint=f"statistics were given for {listed(statistics) or 'no expert'}",
        )
    return {expert: statistics_of(statistics[expert], kind) for expert in experts}


def check_experts(
    statistics: Mapping[str, StatisticsSource], experts: Mapping[str, Checkpoint], kind: str
) -> None:
    """Check the digests; those of bare tensors are not known and pass.

    Raises:
        MergeError: When statistics belong to other weights.
    """
    for expert, known in statistics_by_expert(statistics, tuple(experts), kind).items():
        if known.model:
            known.check(model=experts[expert].digest())


def describe(statistics: Mapping[str, StatisticsSource], kind: str) -> dict[str, Any]:
    """Return what tells the statistics of all experts, wherever their files are, as plain data."""
    told = ("model", "examples", "data", "content")
    return {
        expert: {key: statistics_of(source, kind).describe()[key] for key in told}
        for expert, source in statistics.items()
    }


def recipe(statistics: Mapping[str, StatisticsSource], kind: str) -> dict[str, Any]:
    """Return `describe` with the files that the statistics are in, where they are in files."""
    told = describe(statistics, kind)
    for expert, source in statistics.items():
        file = statistics_of(source, kind).tensors.source
        if Path(file).is_absolute():
            told[expert]["source"] = file
    return told


def with_told(operator: NeedsStatistics, told: Mapping[str, Any]) -> dict[str, Any]:
    """Return an operator as plain data, with what is told of its statistics in their place."""
    data: dict[str, Any] = to_plain(operator.with_statistics({}))
    return {**data, "fields": {**data["fields"], "statistics": to_plain(told)}}


def match_statistics(
    layout: FlatLayout, statistics: Mapping[str, Statistics]
) -> dict[int, list[str]]:
    """Return, for each tensor that has statistics, their name for each expert.

    Args:
        layout: The layout of the merge.
        statistics: ``N`` experts' statistics.

    Returns:
        Index of the slot -> ``N`` names.

    Raises:
        MergeError: When some experts have one for a tensor and others have not, or one for a
            tensor that the model has not.
    """
    aliases: dict[str, list[str]] = {}
    for alias, name in layout.ties.items():
        aliases.setdefault(name, []).append(alias)
    result: dict[int, list[str]] = {}
    used: dict[str, set[str]] = {expert: set() for expert in statistics}
    for index, slot in enumerate(layout.slots):
        found: dict[str, str] = {}
        for expert, known in statistics.items():
            for name in (slot.name, *aliases.get(slot.name, ())):
                if (own := known.find(name)) is not None:
                    found[expert] = own
                    used[expert].add(own)
                    break
        if found and len(found) < len(statistics):
            without = [expert for expert in statistics if expert not in found]
            raise MergeError(
                f"the statistics of {listed(without)} lack the tensor {slot.name!r}, which those "
                f"of {listed(found)} have",
                hint="compute them for all experts with the same settings",
            )
        if found:
            result[index] = list(found.values())
    for expert, known in statistics.items():
        unknown = sorted(set(known.tensors.names) - used[expert])
        if unknown:
            raise MergeError(
                f"the statistics of {expert!r} are of another model: the merged one has no "
                f"{listed(unknown)}",
                hint=f"its tensors are called {listed(slot.name for slot in layout.slots)}",
            )
    return result


def load_statistic(known: Statistics, expert: str, name: str) -> Tensor:
    """Return a statistic in float32, checked.

    Raises:
        MergeError: When it holds NaN or infinity.
    """
    tensor = known.tensors.load(name)
    if not all_finite(tensor):
        raise MergeError(
            f"the statistics of {expert!r} hold NaN or infinity in {name!r}",
            hint="compute them again",
        )
    return tensor.float()


def refuse_negative(c: Tensor) -> None:
    """Refuse negative coefficients.

    Raises:
        MergeError: When there is one.
    """
    if bool((c < 0).any()):
        raise MergeError(
            f"coefficients must not be negative, got {c.tolist()}",
            hint="give coefficients from 0 on",
        )
