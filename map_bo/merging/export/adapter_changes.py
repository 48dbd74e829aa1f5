"""The merged change of every tensor of a model's modules, as an adapter needs it.

Low rank where it can be, full values where it cannot. Checkpoints go by the names of files; what
comes out goes by those of modules, which may be put together from several tensors of the files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from map_bo.errors import MergeError, listed
from map_bo.merging.adapters.adapter import Adapter, Kind, adapter_over, wide
from map_bo.merging.adapters.low_rank import LowRank, approximate, cut_of, stack, truncate
from map_bo.merging.align.experts import align_names
from map_bo.merging.align.layout import is_variance
from map_bo.merging.checkpoints.checkpoint import Checkpoint
from map_bo.merging.checkpoints.saved_names import ModuleTensors, Saved
from map_bo.merging.export.bounded import check_weights
from map_bo.merging.vectors.operator import Weights
from map_bo.rng import make_generator

__all__ = ["AdapterChanges", "ChangeMerger", "whole_of"]

# By what share of a change rounding to float32 may move what was written.
_SLACK = 1e-3


def whole_of(base: Checkpoint, modules: ModuleTensors, name: str) -> Tensor:
    """Return a tensor of a module as the base has it, put together from its pieces."""
    parts = modules.parts[name]
    if len(parts) == 1 and parts[0][1].shape is None:
        return base.load(parts[0][0])
    whole = torch.zeros(modules.shapes[name], dtype=base.dtype(parts[0][0]))
    for own, part in parts:
        part.of(whole).copy_(base.load(own))
    return whole


@dataclass
class AdapterChanges:
    """The merged changes of the modules' tensors.

    Attributes:
        factors: Tensor -> its change; of a stack one for each matrix.
        values: Tensor -> its full value.
        kinds: Tensor -> kind of its module, for those with factors.
        norms: Tensor -> norms of what was cut off and of all, for those with factors.
        tied: Tensors that are one with another; all of them have the same value.
    """

    factors: dict[str, list[LowRank]] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    kinds: dict[str, Kind] = field(default_factory=dict)
    norms: dict[str, tuple[float, float]] = field(default_factory=dict)
    tied: set[str] = field(default_factory=set)


@dataclass
class _Sum:
    """The merged change of a module's tensor.

    Attributes:
        low: Index of a matrix of it, 0 but in stacks -> parts of low rank.
        rest: The sum of all others, in the tensor's shape, or None.
        fixed: Whether an adapter saved it whole.
    """

    low: dict[int, list[LowRank]] = field(default_factory=dict)
    rest: Tensor | None = None
    fixed: bool = False

    def __bool__(self) -> bool:
        return bool(self.low) or self.rest is not None

    def dense(self, shape: torch.Size, *, stacked: bool) -> Tensor:
        """Return the whole change."""
        total = torch.zeros(shape) if self.rest is None else self.rest.clone()
        for index, parts in self.low.items():
            matrix = total[index] if stacked else total
            matrix += stack(parts).dense().view(matrix.shape)
        return total


class ChangeMerger:
    """Merges the changes of every tensor of the model's modules."""

    def __init__(
        self,
        base: Checkpoint,
        experts: Mapping[str, Checkpoint],
        weights: Weights,
        rank: int | None,
        others: str,
        kinds: Mapping[str, Kind] | None,
        ties: Mapping[str, str],
        modules: ModuleTensors,
    ) -> None:
        self._ties, self._modules = ties, modules
        self._base, self._experts, self._weights = base, experts, weights
        self._rank, self._others, self._given = rank, others, kinds
        self._adapters = {name: adapter_over(base, expert) for name, expert in experts.items()}
        self._names = {
            name: align_names(base, expert, name)
            for name, expert in experts.items()
            if self._adapters[name] is None
        }
        self._kinds = dict(kinds or {})
        for adapter in self._adapters.values():
            for name, kind in (adapter.kinds if adapter is not None else {}).items():
                self._kinds.setdefault(name, kind)

    def find(self) -> AdapterChanges:
        """Return all changes.

        Raises:
            MergeError: When one cannot be expressed, or there is none.
        """
        result = AdapterChanges()
        seen: dict[str, str] = {}
        placed: set[str] = set()
        for name, parts in self._modules.parts.items():
            own = parts[0][0]
            if own in seen or own in self._base.ties:
                continue
            seen[own] = name
            placed |= {n for n, _ in parts}
            if not self._base.dtype(own).is_floating_point:
                continue
            total = self._sum(name, parts)
            if not total:
                continue
            others = self._others_of(name)
            if others:
                # Factors of both would change the one tensor twice when peft merges them.
                value = self._value(name, parts, total)
                result.values |= dict.fromkeys((name, *others), value)
                result.tied |= {name, *others}
                continue
            if total.rest is None or (not total.fixed and self._can_factor(name)):
                self._factor(name, total, result)
            else:
                result.values[name] = self._value(name, parts, total)
        self._refuse_unplaced(placed)
        if result.values and self._others == "refuse":
            raise MergeError(
                f"the merge changes {listed(sorted(result.values))}, which have no factors",
                hint='pass others="save" to save them as full values',
            )
        if not result.factors and not result.values:
            raise MergeError(
                "the merge is the base: its adapter would change nothing",
                hint="choose coefficients that are not all zero",
            )
        return result

    def compare(self, written: Adapter, found: AdapterChanges) -> float:
        """Return the relative error of a written adapter, over all tensors with factors.

        Every tensor of the base is compared: what the adapter changes in it, with what the merge
        does.

        Raises:
            MergeError: When it is further off than by what was cut, and rounding.
        """
        lost, all_of_it = 0.0, 0.0
        for name, parts in self._modules.parts.items():
            own = parts[0][0]
            if own in self._base.ties or not self._base.dtype(own).is_floating_point:
                continue
            gap, norm, rounding = 0.0, 0.0, 0.0
            for each, _ in parts:
                low, rest, _ = self._parts_of(each)
                meant = self._dense(each, low, rest)
                made = written.delta(each)
                if name in found.values:  # rounded to the base's dtype
                    pre = self._base.load(each)
                    eps = torch.finfo(pre.dtype).eps
                    rounding += float((pre.double().abs() + meant.double().abs()).norm()) * eps
                gap += float((meant if made is None else meant - made).double().square().sum())
                norm += float(meant.double().square().sum())
            gap, norm = math.sqrt(gap), math.sqrt(norm)
            cut = found.norms.get(name, (0.0, 0.0))[0]
            if name in found.norms:
                lost, all_of_it = lost + gap**2, all_of_it + norm**2
            if is_variance(name):
                continue  # kept above the least of the models
            if not gap <= (1 + _SLACK) * cut + _SLACK * norm + rounding:
                raise MergeError(
                    f"the adapter that was written changes {name!r} otherwise than the merge: its "
                    f"relative error is {gap / max(norm, gap):.3g}, and "
                    f"{cut / max(norm, gap):.3g} was cut off",
                    hint="export the merged model instead, and please report this",
                )
        return math.sqrt(lost / all_of_it) if all_of_it else 0.0

    def _others_of(self, name: str) -> tuple[str, ...]:
        """Return the other names of a tensor in the model.

        Raises:
            MergeError: When one is known by its name alone.
        """
        own = self._modules.parts[name][0][0]
        others = {
            other
            for other, parts in self._modules.parts.items()
            if self._base.ties.get(parts[0][0], parts[0][0]) == own
        }
        for alias, kept in self._ties.items():
            others |= {alias, kept} if {alias, kept} & {name, own, *others} else set()
        others -= {name} | ({own} - self._modules.parts.keys())
        unknown = sorted(others - self._modules.parts.keys())
        if unknown:
            raise MergeError(
                f"the merge changes {name!r}, which is tied to {listed(unknown)}, of a module that "
                "is not known",
                hint="pass model= with the model of these weights, or export the merged model",
            )
        return tuple(sorted(others))

    def _refuse_unplaced(self, placed: Set[str]) -> None:
        """Refuse a change of a tensor that no module has."""
        for name in self._base.names:
            if name in placed or name in self._base.ties:
                continue
            if self._base.dtype(name).is_floating_point and any(
                part is not None for part in self._parts_of(name)[:2] if part != []
            ):
                raise MergeError(
                    f"the merge changes {name!r}, which is not a tensor of the model's modules, "
                    "and an adapter goes by these",
                    hint="export the merged model instead, or give base and experts as models in "
                    "memory",
                )

    def _sum(self, name: str, parts: Sequence[tuple[str, Saved]]) -> _Sum:
        """Return the merged change of a module's tensor."""
        result, shape = _Sum(), self._modules.shapes[name]
        stacked = self._kinds.get(name) == "stack"
        for own, part in parts:
            low, rest, fixed = self._parts_of(own)
            result.fixed = result.fixed or fixed
            if part.shape is None:
                if low:
                    result.low.setdefault(0, []).extend(low)
                result.rest = rest
                continue
            matrix = shape[1:] if stacked else torch.Size((shape[0], shape[1:].numel()))
            index, offset = divmod(part.offset, max(1, matrix.numel()))
            cut = cut_of(matrix, part.shape, part.stride, offset)
            if low and cut is not None:
                result.low.setdefault(index, []).extend(each.put(cut, matrix) for each in low)
                low = []
            if low or rest is not None:
                delta = self._dense(own, low, rest)
                if result.rest is None:
                    result.rest = torch.zeros(shape, dtype=delta.dtype)
                part.of(result.rest).copy_(delta)
        return result

    def _parts_of(self, name: str) -> tuple[list[LowRank], Tensor | None, bool]:
        """Return the change of a tensor of the base: parts of low rank, and the sum of the others.

        And whether an adapter saved it whole.
        """
        given = check_weights(self._weights(name), name, self._experts)
        parts: list[LowRank] = []
        rest: Tensor | None = None
        fixed = False
        for expert, weight in given.items():
            if not weight:
                continue
            adapter = self._adapters[expert]
            if adapter is not None:
                part, delta = adapter.low_rank(name), adapter.dense(name)
                if part is not None:
                    parts.append(replace(part, scale=weight * part.scale))
                fixed = fixed or name in adapter.values or name in adapter.biases
            else:
                tuned = self._experts[expert].load(self._names[expert][name])
                pre = self._base.load(name)
                both = wide(torch.promote_types(tuned.dtype, wide(pre.dtype)))
                delta = tuned.to(both) - pre.to(both)
            if delta is not None and bool(delta.any()):
                rest = weight * delta if rest is None else rest + weight * delta
        return parts, rest, fixed

    def _dense(self, name: str, low: Sequence[LowRank], rest: Tensor | None) -> Tensor:
        shape = self._base.shape(name)
        total = torch.zeros(shape) if rest is None else rest
        return total + stack(low).dense().view(shape) if low else total

    def _can_factor(self, name: str) -> bool:
        if len(self._modules.shapes[name]) < 2:
            return False
        if self._given is None and name not in self._kinds:
            raise MergeError(
                f"whether {name!r} is the weight of a linear layer or of an embedding is unknown",
                hint="pass model= with the model of these weights",
            )
        return name in self._kinds

    def _factor(self, name: str, total: _Sum, result: AdapterChanges) -> None:
        shape, kind = self._modules.shapes[name], self._kinds.get(name, "linear")
        stacked = kind == "stack"
        matrix = shape[1:] if stacked else torch.Size((shape[0], shape[1:].numel()))
        found: list[LowRank] = []
        lost, norm = 0.0, 0.0
        for index in range(shape[0] if stacked else 1):
            low = total.low.get(index, [])
            if total.rest is None:
                parts = low or [LowRank(torch.zeros(matrix[0], 1), torch.zeros(1, matrix[1]))]
                change, cut, whole = truncate(stack(parts), self._rank)
            elif self._rank is None and not self._is_exact(name):
                raise MergeError(
                    f"whole models change {name!r}, and their exact change is not of low rank",
                    hint="give a rank, such as 16; the error that it makes is reported",
                )
            else:
                dense = (total.rest[index] if stacked else total.rest).reshape(matrix)
                dense = dense + stack(low).dense() if low else dense
                rank = min(matrix) if self._rank is None else self._rank
                # The draws of the sketch are fixed: the same merge is written the same again.
                change, cut, whole = approximate(dense, rank, generator=make_generator(0))
                if self._rank is None:
                    change, cut, whole = truncate(change, None)
            found.append(change)
            lost, norm = math.hypot(lost, cut), math.hypot(norm, whole)
        if norm:
            result.factors[name], result.kinds[name] = found, kind
            result.norms[name] = lost, norm

    def _is_exact(self, name: str) -> bool:
        """Return whether only factors of adapters change a tensor, multiplied out or not."""
        return all(
            adapter is not None or not self._weights(own).get(expert)
            for own, _ in self._modules.parts[name]
            for expert, adapter in self._adapters.items()
        )

    def _value(self, name: str, parts: Sequence[tuple[str, Saved]], total: _Sum) -> Tensor:
        pre = whole_of(self._base, self._modules, name)
        change = total.dense(self._modules.shapes[name], stacked=self._kinds.get(name) == "stack")
        value = change + pre.to(change.dtype)
        if is_variance(name):  # as `merge_linearly` does it, experts of weight zero included
            own = parts[0][0]
            least = pre.to(value.dtype)
            for expert, checkpoint in self._experts.items():
                theirs = self._names[expert][own] if expert in self._names else own
                least = torch.minimum(least, checkpoint.load(theirs).to(value.dtype))
            value = torch.maximum(value, least)
        return value.to(pre.dtype)
