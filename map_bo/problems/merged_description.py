"""A merged-model problem as plain data, by which a run recognises it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from map_bo.data import Metric
from map_bo.merging.checkpoint import Checkpoint
from map_bo.merging.operator import MergeOperator
from map_bo.space import CoefficientSpace

__all__ = ["described"]


def described(
    *,
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    operator: MergeOperator,
    space: CoefficientSpace,
    metrics: Sequence[Metric],
    dtype: torch.dtype,
    **switches: bool,
) -> dict[str, Any]:
    """Return the description; it holds the digests of all checkpoints, so they are read once.

    What is off or was not needed (``switches``, the fitting of an expert) is left out, so that
    records made before it existed stay equal.
    """

    def origin(checkpoint: Checkpoint) -> dict[str, Any]:
        fitting = {"fitting": dict(checkpoint.fitting)} if checkpoint.fitting else {}
        return {"source": checkpoint.source, "digest": checkpoint.digest(), **fitting}

    return {
        "kind": "merged_model",
        "base": origin(base),
        "experts": {name: origin(expert) for name, expert in experts.items()},
        "operator": operator.describe(),
        "space": space.describe(),
        "metrics": [
            {
                "name": metric.name,
                "direction": metric.direction,
                "kind": metric.kind,
                "lower": metric.lower,
                "upper": metric.upper,
            }
            for metric in metrics
        ],
        "dtype": str(dtype).removeprefix("torch."),
        **{name: True for name, on in switches.items() if on},
    }
