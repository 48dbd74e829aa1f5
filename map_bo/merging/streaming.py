"""Linear merging tensor by tensor, for models that need not fit into memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.adapter_checkpoint import adapter_over
from map_bo.merging.checkpoint import Checkpoint
from map_bo.merging.expert_reader import finite
from map_bo.merging.layout import is_variance, joined_ties
from map_bo.merging.messages import listed
from map_bo.merging.names import aligned_names
from map_bo.merging.recipe import Weights

__all__ = ["checked_weights", "merge_streamed"]


def merge_streamed(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    weights: Weights,
    *,
    ties: Mapping[str, str] | None = None,
    check_finite: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Merge linearly, ``base + sum_n w_n (expert_n - base)``, one tensor at a time.

    Sums are in float32, in float64 for float64 tensors, and in the dtype of complex tensors;
    the result has the base's dtype. Tensors of other dtypes (counters, masks) are the base's.
    Variances (``running_var``) are raised to the least of base and experts, as
    `TaskVectors.keep_variances` does for resident merging, so that both give the same model.
    Otherwise an expert of weight zero is not read. A tied tensor is merged once, with the
    weights of its canonical name, and follows at once under its aliases.

    Args:
        base: The base checkpoint.
        experts: Name -> checkpoint, with the same tensors as the base.
        weights: Tensor name -> weight of each expert; an expert left out has weight zero.
        ties: Further ties of the base, alias -> canonical name.
        check_finite: Whether to refuse NaN and infinity; experts of weight zero are read too.

    Yields:
        Name and merged tensor (on the CPU), canonical names in sorted order.

    Raises:
        MergeError: Before anything is merged, when an expert has missing or further tensors, or
            other shapes or kinds of dtype; while merging, for a weight that is not finite or of
            an unknown expert, and for an expert in which tied tensors of the base differ.
    """
    joined = joined_ties(base, ties or {})
    names = {
        expert: aligned_names(base, checkpoint, expert, joined)
        for expert, checkpoint in experts.items()
    }
    return _merge(base, experts, weights, names, joined, check_finite)


def _merge(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    weights: Weights,
    names: Mapping[str, Mapping[str, str]],
    ties: Mapping[str, str],
    check_finite: bool,
) -> Iterator[tuple[str, Tensor]]:
    aliases: dict[str, list[str]] = {}
    for alias, canonical in sorted(ties.items()):
        aliases.setdefault(canonical, []).append(alias)

    def checked(value: Tensor, name: str, label: str) -> Tensor:
        return finite(value, name, label) if check_finite else value

    for name in base.names:
        if name in ties:
            continue
        merged = base.load(name)
        dtype = merged.dtype
        if dtype.is_floating_point or dtype.is_complex:
            wide = dtype if dtype.is_complex or dtype == torch.float64 else torch.float32
            pre = checked(merged, name, "the base").to(wide)
            _require_tied(name, aliases.get(name, []), merged, "the base", base)
            total = pre.clone()
            given = checked_weights(weights(name), name, experts)
            least = pre if is_variance(name) else None
            for expert, checkpoint in experts.items():
                weight = given.get(expert, 0.0)
                if weight == 0 and least is None and not check_finite:
                    continue
                adapter = adapter_over(base, checkpoint) if least is None else None
                if adapter is not None and set(aliases.get(name, ())) & set(adapter.names):
                    adapter = None  # whether it keeps the tie is seen below
                if adapter is not None:  # the base is not read again for what it leaves alone
                    delta = adapter.delta(name)
                    if delta is not None:
                        total.add_(delta, alpha=weight)
                    continue
                own, label = names[expert][name], f"expert {expert!r}"
                tuned = checkpoint.load(own)
                others = [alias for alias in (name, *aliases.get(name, [])) if alias != own]
                _require_tied(own, others, tuned, label, checkpoint)
                tuned = checked(tuned, name, label)
                if least is not None:
                    least = torch.minimum(least, tuned.to(wide))
                if weight != 0:
                    total.add_(tuned.to(wide) - pre, alpha=weight)
            merged = (total if least is None else torch.maximum(total, least)).to(dtype)
        yield name, merged
        for alias in aliases.get(name, []):
            yield alias, merged


def checked_weights(
    weights: Mapping[str, float], name: str, experts: Mapping[str, Checkpoint]
) -> dict[str, float]:
    """Return the weights of a tensor.

    Raises:
        MergeError: When one is not finite, or of an unknown expert.
    """
    unknown = [expert for expert in weights if expert not in experts]
    if unknown:
        raise MergeError(
            f"weights for the unknown experts {listed(unknown)}",
            hint=f"the experts are {', '.join(experts)}",
        )
    bad = [expert for expert, weight in weights.items() if not math.isfinite(weight)]
    if bad:
        raise MergeError(
            f"the weight of {listed(bad)} for tensor {name!r} is not finite",
            hint="coefficients are finite numbers",
        )
    return {expert: float(weight) for expert, weight in weights.items()}


def _require_tied(
    name: str, aliases: list[str], value: Tensor, label: str, checkpoint: Checkpoint
) -> None:
    for alias in aliases:
        if alias not in checkpoint.names:
            continue
        if checkpoint.ties.get(alias, alias) == checkpoint.ties.get(name, name):
            continue
        if not torch.equal(checkpoint.load(alias), value):
            raise MergeError(
                f"{name!r} and {alias!r} are one tensor in the model but differ in {label}",
                hint="use checkpoints that keep them tied, or untie them in the base and model",
            )
