"""What logits say of examples: whether they are right, how surely, and how undecided they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from map_bo.data import Metric

__all__ = ["LOGIT_METRICS", "need_labels", "outcomes_of_logits", "prediction_entropy"]

LOGIT_METRICS: Mapping[str, Metric] = {
    "accuracy": Metric("accuracy"),
    "loss": Metric("loss", direction="min", kind="loss"),
    "probability": Metric("probability"),
    "entropy": Metric("entropy", direction="min", kind="loss"),
}
"""What is measured of logits: whether the largest is the right one; cross-entropy in nats; the
probability of the right class; and, without knowing it, the entropy of the prediction in nats."""


def need_labels(names: Sequence[str]) -> bool:
    """Return whether any of these metrics needs to know the right classes."""
    return set(names) != {"entropy"}


def prediction_entropy(logits: Tensor) -> Tensor:
    """Return the entropy of each prediction in nats, from 0 to the logarithm of the classes.

    Its mean over unlabelled examples is what AdaMerging minimises (Yang et al., 2024, arXiv
    2310.02575).

    Args:
        logits: ``b x classes``, finite.

    Returns:
        ``b``, float64.
    """
    logs = logits.double().log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


def outcomes_of_logits(names: Sequence[str], logits: Tensor, labels: Tensor | None) -> Tensor:
    """Return outcomes: ``b``, or ``b x m`` with several metrics, float64.

    Args:
        names: Metrics, of `LOGIT_METRICS`.
        logits: ``b x classes``; where they are not finite, the outcome is NaN.
        labels: ``b`` class indices; None where no metric needs them.
    """
    logits = logits.double()
    found: dict[str, Tensor] = {}
    if "entropy" in names:
        found["entropy"] = prediction_entropy(logits)
    if labels is not None:
        labels = labels.to(logits.device)
        loss = nn.functional.cross_entropy(logits, labels, reduction="none")
        found["accuracy"] = (logits.argmax(-1) == labels).double()
        found["loss"], found["probability"] = loss, (-loss).exp()
    table = torch.stack([found[name] for name in names], -1)
    # Of NaN there is a largest class too.
    table[~torch.isfinite(logits).all(-1)] = torch.nan
    return table.squeeze(-1) if len(names) == 1 else table
