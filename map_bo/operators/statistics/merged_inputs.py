"""Inner products of what layers take in within the merged model, for RegMean++.

Nguyen et al., *RegMean++: Enhancing Effectiveness and Generalization of Regression Mean for Model
Merging*, arXiv 2508.03121: the inputs ``X_n`` of a block come from the merged blocks before it,
``X_n^(l) = f_M^(l-1)(X_n^(l-1))``, within the block from the expert's own layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from map_bo.errors import MergeError, listed
from map_bo.merging.checkpoints.checkpoint import CheckpointSource, open_checkpoint
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.live import LiveModel, model_ties
from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.operators.statistics.input_products import (
    collect_products,
    is_transposed,
    linear_layers,
)
from map_bo.operators.statistics.regmean import RegMeanPlusPlus
from map_bo.operators.statistics.statistics import Statistics, finish_statistics

__all__ = ["block_of", "merged_grams"]


def block_of(name: str) -> str:
    """Return the block that a tensor belongs to: its name up to the first number, or its module's.

    ``"model.layers.3.mlp.up_proj.weight"`` is in ``"model.layers.3"``, ``"head.weight"`` in
    ``"head"``.
    """
    found = re.match(r"(?:[^.]*\.)*?\d+(?=\.|$)", name)
    return found[0] if found else name.rpartition(".")[0]


def merged_grams(
    model: nn.Module,
    base: CheckpointSource,
    experts: Mapping[str, CheckpointSource],
    batches: Mapping[str, Iterable[Any]],
    forward: Callable[[nn.Module, Any], Any] | None = None,
    *,
    coefficients: Mapping[str, float] | None = None,
    alpha: float = 0.9,
    ridge: float = 1e-6,
    only: str | None = None,
    limit: int | None = None,
    data: str = "",
) -> dict[str, Statistics]:
    """Merge block after block and return, for each expert, the products of its layers' inputs.

    Blocks (`block_of`) follow each other in the order in which the model calls them. For each of
    them the data of every expert go through the merged blocks before it and the expert's own from
    it on; then its linear layers are merged by `RegMean`'s formula and everything else in it is
    averaged. What is in no block with a layer (embeddings, say) is averaged from the start. So
    there are as many passes over the data as there are blocks. Which layers count is said at
    `grams`.

    Args:
        model: A model of this architecture, on the device to compute on; left as it was found.
        base: The base checkpoint.
        experts: Name -> checkpoint of the ``N`` experts.
        batches: Name -> batches of that expert's data, as for `grams`; gone through once for each
            block, so that an iterator will not do.
        forward: As for `grams`.
        coefficients: What to merge with: name -> coefficient from 0 on; by default ``1 / N`` each.
        alpha: See `RegMean`.
        ridge: See `RegMean`.
        only: As for `grams`; other layers are averaged.
        limit: Use so many examples of each expert's data at most.
        data: What to call the data in the record.

    Returns:
        Name -> statistics of the kind ``"merged_grams"``, for `RegMeanPlusPlus`.

    Raises:
        MergeError: When an expert has no batches, batches are an iterator, there are no linear
            layers, coefficients are not possible, or base and experts do not fit each other.
        CheckpointError: When a checkpoint cannot be read.
    """
    missing = [name for name in experts if name not in batches]
    if missing:
        raise MergeError(
            f"there are no batches for {listed(missing)}", hint="give batches={EXPERT: LOADER, ...}"
        )
    used_up = [name for name in experts if isinstance(batches[name], Iterator)]
    if used_up:
        raise MergeError(
            f"the batches for {listed(used_up)} are an iterator, which can be gone through once",
            hint="give a list or a DataLoader: there is a pass over them for each block",
        )
    layers = {n: m for n, m in linear_layers(model).items() if only is None or re.search(only, n)}
    if not layers:
        raise MergeError(
            "the model has no linear layers" if only is None else f"no layer's weight has {only!r}",
            hint="RegMean++ is for models of nn.Linear, Conv1D and nn.Conv2d",
        )
    opened = {name: open_checkpoint(source) for name, source in experts.items()}
    where = next(model.parameters()).device
    ties = model_ties(model)
    vectors = TaskVectors.load(open_checkpoint(base), opened, device=where, ties=ties)
    c = _coefficients(coefficients, vectors.experts)
    merged = torch.empty(vectors.layout.size, device=where)
    TaskArithmetic().prepare(vectors).write(c, merged)
    found: dict[str, dict[str, Tensor]] = {name: {} for name in experts}
    rows: dict[str, dict[str, int]] = {name: {} for name in experts}
    examples: dict[str, int] = {}
    with LiveModel(model, vectors.layout, fixed=vectors.fixed) as live:
        first = next(iter(experts))
        live.write(_Given(merged), c)
        order, seen = collect_products(model, layers, batches[first], forward, 1)
        _require_examples(first, seen)
        blocks = list(dict.fromkeys(block_of(name) for name in order.sums))
        for step, block in enumerate(blocks):
            inside = {n: layers[n] for n in order.sums if block_of(n) == block}
            for index, name in enumerate(experts):
                mixed = _with_own_blocks(vectors, merged, index, set(blocks[step:]))
                live.write(_Given(mixed), c)
                products, examples[name] = collect_products(
                    model, inside, batches[name], forward, limit
                )
                _require_examples(name, examples[name])
                found[name] |= products.means()
                rows[name] |= products.rows
            transposed = [n for n in inside if is_transposed(layers[n])]
            known = {
                name: Statistics(
                    "merged_grams",
                    open_checkpoint({n: found[name][n] for n in inside}),
                    settings={"transposed": transposed},
                    ties=ties,
                )
                for name in experts
            }
            step_merged = torch.empty_like(merged)
            operator = RegMeanPlusPlus(statistics=known, alpha=alpha, ridge=ridge)
            operator.prepare(vectors).write(c, step_merged)
            for slot in vectors.layout.slots:
                if block_of(slot.name) == block:
                    slot.of(merged).copy_(slot.of(step_merged))
    told = {
        "only": only,
        "transposed": [n for n in order.sums if is_transposed(layers[n])],
        "alpha": alpha,
        "ridge": ridge,
        "coefficients": dict(zip(vectors.experts, c.tolist(), strict=True)),
        "experts": {name: expert.digest() for name, expert in opened.items()},
    }
    return {
        name: finish_statistics(
            "merged_grams",
            found[name],
            model=opened[name].digest(),
            examples=examples[name],
            settings={**told, "rows": rows[name]},
            data=data,
            ties=ties,
        )
        for name in experts
    }


def _require_examples(expert: str, examples: int) -> None:
    if not examples:
        raise MergeError(
            f"there were no batches for {expert}", hint="give at least one for each expert"
        )


def _coefficients(given: Mapping[str, float] | None, experts: tuple[str, ...]) -> Tensor:
    if given is None:
        return torch.full((len(experts),), 1.0 / len(experts), dtype=torch.float64)
    if set(given) != set(experts):
        raise MergeError(
            f"coefficients must be given for {listed(experts)}, got {listed(given) or 'none'}",
            hint="give one for each expert, or leave them out",
        )
    c = torch.tensor([float(given[name]) for name in experts], dtype=torch.float64)
    if not bool(torch.isfinite(c).all() & (c >= 0).all() & c.any()):
        raise MergeError(
            f"coefficients must be finite, not negative and not all 0, got {c.tolist()}",
            hint="give those that you would merge with, such as 1 / N each",
        )
    return c


def _with_own_blocks(vectors: TaskVectors, merged: Tensor, expert: int, blocks: set[str]) -> Tensor:
    """Return merged numbers (``P``) with those of an expert in some blocks."""
    mixed = merged.clone()
    for index, slot in enumerate(vectors.layout.slots):
        if block_of(slot.name) in blocks:
            rows = vectors.read(index, 0, slot.numel)
            mixed[slot.offset : slot.stop] = rows[0] + rows[1 + expert]
    return mixed


@dataclass(frozen=True, eq=False)
class _Given:
    """A merge that is known already."""

    flat: Tensor

    def write(self, c: Tensor, out: Tensor) -> None:
        del c
        out.copy_(self.flat)
