"""Linear merging tensor by tensor, for models that need not fit into memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.adapter_checkpoint import adapter_over
from map_bo.merging.checkpoint import Checkpoint
from map_bo.merging.layout import is_variance
from map_bo.merging.messages import listed
from map_bo.merging.recipe import Weights
from map_bo.merging.vocabulary import require_shapes

__all__ = ["aligned_names", "merge_streamed"]


def merge_streamed(
    base: Checkpoint, experts: Mapping[str, Checkpoint], weights: Weights
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

    Yields:
        Name and merged tensor (on the CPU), canonical names in sorted order.

    Raises:
        MergeError: Before anything is merged, when an expert has missing or further tensors, or
            other shapes or kinds of dtype; while merging, for a weight that is not finite or of
            an unknown expert, and for an expert in which tied tensors of the base differ.
    """
    names = {
        expert: aligned_names(base, checkpoint, expert) for expert, checkpoint in experts.items()
    }
    return _merge(base, experts, weights, names)


def _merge(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    weights: Weights,
    names: Mapping[str, Mapping[str, str]],
) -> Iterator[tuple[str, Tensor]]:
    aliases: dict[str, list[str]] = {}
    for alias, canonical in sorted(base.ties.items()):
        aliases.setdefault(canonical, []).append(alias)
    for name in base.names:
        if name in base.ties:
            continue
        merged = base.load(name)
        dtype = merged.dtype
        if dtype.is_floating_point or dtype.is_complex:
            wide = dtype if dtype.is_complex or dtype == torch.float64 else torch.float32
            pre = merged.to(wide)
            total = pre.clone()
            given = _checked(weights(name), name, experts)
            least = pre if is_variance(name) else None
            for expert, checkpoint in experts.items():
                weight = given.get(expert, 0.0)
                if weight == 0 and least is None:
                    continue
                adapter = adapter_over(base, checkpoint) if least is None else None
                if adapter is not None:  # the base is not read again for what it leaves alone
                    delta = adapter.delta(name)
                    if delta is not None:
                        total.add_(delta, alpha=weight)
                    continue
                tuned = checkpoint.load(names[expert][name])
                _require_tied(name, aliases.get(name, []), tuned, expert, checkpoint)
                if least is not None:
                    least = torch.minimum(least, tuned.to(wide))
                if weight != 0:
                    total.add_(tuned.to(wide) - pre, alpha=weight)
            merged = (total if least is None else torch.maximum(total, least)).to(dtype)
        yield name, merged
        for alias in aliases.get(name, []):
            yield alias, merged


def _checked(
    weights: Mapping[str, float], name: str, experts: Mapping[str, Checkpoint]
) -> dict[str, float]:
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
    name: str, aliases: list[str], tuned: Tensor, expert: str, checkpoint: Checkpoint
) -> None:
    for alias in aliases:
        if alias not in checkpoint.names or alias in checkpoint.ties:
            continue
        if not torch.equal(checkpoint.load(alias), tuned):
            raise MergeError(
                f"{name!r} and {alias!r} are one tensor in the base but differ in {expert!r}",
                hint="untie the base's weights, or use an expert that keeps them tied",
            )


def aligned_names(base: Checkpoint, expert: Checkpoint, label: str) -> dict[str, str]:
    """Return, for each canonical name of the base, the expert's name of the same tensor."""
    of_expert = set(expert.names)
    names: dict[str, str] = {}
    groups: dict[str, list[str]] = {name: [name] for name in base.names if name not in base.ties}
    for alias, canonical in sorted(base.ties.items()):
        groups[canonical].append(alias)
    for canonical, group in groups.items():
        present = [name for name in group if name in of_expert]
        if present:
            names[canonical] = present[0]
    missing = sorted(set(groups) - set(names))
    known = set(base.names)
    extra = sorted(
        name
        for name in of_expert - known
        if expert.ties.get(name) not in known  # an alias of a tensor that the base has is no more
    )
    hint = "experts must be fine-tuned from this base, with the same architecture"
    if missing:
        raise MergeError(
            f"expert {label!r} lacks {len(missing)} of the base's tensors: {listed(missing)}",
            hint=hint,
        )
    if extra:
        raise MergeError(
            f"expert {label!r} has {len(extra)} tensors that the base lacks: {listed(extra)}",
            hint=hint,
        )
    require_shapes(base, expert, label, names)
    kinds = [
        f"{name} {expert.dtype(own)} against {base.dtype(name)}"
        for name, own in names.items()
        if _kind(expert.dtype(own)) != _kind(base.dtype(name))
    ]
    if kinds:
        raise MergeError(
            f"expert {label!r} has other kinds of dtype than the base: {listed(kinds)}", hint=hint
        )
    return names


def _kind(dtype: torch.dtype) -> str:
    return "complex" if dtype.is_complex else "float" if dtype.is_floating_point else "other"
