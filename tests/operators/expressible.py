"""Merges of two experts that mergekit can express, and small language models to merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.operator import MergeOperator
from map_bo.operators.averages import Slerp, WeightedAverage
from map_bo.operators.nearswap import NearSwap
from map_bo.operators.sce import Sce
from map_bo.operators.shared_regions import Ram
from map_bo.operators.sparse import Breadcrumbs, Magnitude, Ties
from map_bo.operators.spherical import MultiSlerp, NuSlerp
from map_bo.operators.stock import ModelStock
from map_bo.rng import make_generator

LAYERS = {"early": r"\.0\.", "late": r"\.1\.", "rest": "*"}
THEIRS: dict[str, Any] = {"density": 0.25, "trim": "tensor", "election": "weighted_mass"}
SOME, OTHERS = [0.3, 0.9], [0.7, 0.2, 0.1, 0.4, 0.0, 0.8]

# Operator, and coefficients in the order of its space.
CASES: dict[str, tuple[MergeOperator, list[float]]] = {
    "task_arithmetic": (TaskArithmetic(), SOME),
    "task_arithmetic_blocks": (TaskArithmetic(blocks=LAYERS), OTHERS),
    "average": (WeightedAverage(), SOME),
    "average_blocks": (WeightedAverage(blocks=LAYERS), OTHERS),
    "average_base": (WeightedAverage(blocks=LAYERS), [0.7, 0.0, 0.1, 0.4, 0.0, 0.8]),
    "slerp": (Slerp(of="weights", norms="own"), [0.3, 0.7]),
    "slerp_blocks": (
        Slerp(of="weights", norms="own", blocks=LAYERS),
        [0.3, 0.6, 1.0, 0.7, 0.4, 0.0],
    ),
    "nuslerp": (Slerp(of="deltas", norms="own"), [0.3, 0.7]),
    "nuslerp_blocks": (
        Slerp(of="deltas", norms="own", blocks=LAYERS),
        [0.3, 0.6, 1.0, 0.7, 0.4, 0.0],
    ),
    "karcher": (Slerp(of="weights"), [0.5, 0.5]),
    "multislerp": (Slerp(of="deltas"), [0.5, 0.5]),
    "multislerp_shares": (MultiSlerp(), [0.3, 0.7]),
    "multislerp_blocks": (MultiSlerp(blocks=LAYERS), [0.3, 0.6, 1.0, 0.7, 0.4, 0.0]),
    "multislerp_weights": (MultiSlerp(of="weights"), [0.3, 0.7]),
    "nuslerp_rows": (NuSlerp(), [0.3, 0.7]),
    "nuslerp_columns": (NuSlerp(along="column", of="weights"), [0.6, 0.4]),
    "nuslerp_tensors": (NuSlerp(along="tensor"), [0.6, 0.4]),
    "nearswap": (NearSwap(strength=0.08, unit="absolute"), [0.0, 1.0]),
    "model_stock": (ModelStock(), [0.5, 0.5]),
    "model_stock_rows": (ModelStock(each="row"), [0.5, 0.5]),
    "sce": (Sce(density=0.25), [1.0, 1.0]),
    "sce_all": (Sce(density=1.0), [1.0, 1.0]),
    "ram": (Ram(threshold=0.1, rescale=0.0), [1.0, 1.0]),
    "ram_plus": (Ram(threshold=0.1, over="tensor", rescale=0.5, most=2.0), [1.0, 1.0]),
    "ties": (Ties(**THEIRS, normalisation="weights", scale=0.8), SOME),
    "ties_blocks": (Ties(**THEIRS, normalisation="weights", blocks=LAYERS), OTHERS),
    "ties_sum_of_agreeing": (Ties(**THEIRS, normalisation="none"), SOME),
    "ties_paper": (Ties(density=0.25, trim="tensor"), [0.6, 0.6]),
    "ties_paper_blocks": (
        Ties(density=0.25, trim="tensor", blocks=LAYERS),
        [0.6, 0.2, 0.0, 0.6, 0.2, 0.0],
    ),
    "ties_searched_scale": (
        Ties(**THEIRS, normalisation="weights", search=["scale"]),
        [0.3, 0.9, 1.3],
    ),
    "magnitude": (Magnitude(density=0.25, trim="tensor", scale=1.2), SOME),
    "breadcrumbs": (Breadcrumbs(density=0.25, gamma=0.125), SOME),
    "breadcrumbs_blocks": (Breadcrumbs(density=0.25, gamma=0.125, blocks=LAYERS), OTHERS),
    "breadcrumbs_ties": (
        Breadcrumbs(**THEIRS, gamma=0.125, joining="elect", normalisation="none"),
        SOME,
    ),
}


def language_model(kind: str) -> nn.Module:
    """Return an untrained Llama or GPT-2 of a few thousand weights."""
    transformers = pytest.importorskip("transformers")
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
        )
        result: nn.Module = transformers.LlamaForCausalLM(config)
        return result
    config = transformers.GPT2Config(
        vocab_size=40,
        n_positions=8,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    result = transformers.GPT2LMHeadModel(config)
    return result


def save_family(folder: Path, kind: str) -> dict[str, Path]:
    """Save a base and two experts as Hugging Face directories."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    generator = make_generator(3)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model: Any = language_model(kind)
    pre = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for weight in pre.values():  # no zero vectors, of which mergekit has other angles
        weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    # A common part, so that no angle between experts is above a right one.
    common = {
        name: 0.2 * torch.randn(weight.shape, generator=generator) for name, weight in pre.items()
    }
    found = {}
    for label in ("base", "math", "code"):
        for name, weight in model.named_parameters():
            own = 0.1 * torch.randn(weight.shape, generator=generator)
            weight.data = pre[name] + (0.0 if label == "base" else 1.0) * (common[name] + own)
        model.save_pretrained(folder / label)
        found[label] = folder / label
    return found
