"""Batches of tokens, and what the text and decoder zoos train on: features and losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BATCH", "Tokens", "features", "token_losses"]

BATCH = 32
"""Texts per forward pass."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """Texts as tokens.

    Attributes:
        ids: ``n`` sequences of token numbers, none of them empty.
    """

    ids: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.ids)

    def padded(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return token numbers and mask of some texts, both ``b x longest``, int64.

        Places behind the end of a text hold 0 in both.
        """
        chosen = [self.ids[row] for row in rows]
        longest = max(len(text) for text in chosen)
        ids = torch.zeros(len(chosen), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, text in enumerate(chosen):
            ids[i, : len(text)] = torch.tensor(text)
            mask[i, : len(text)] = 1
        return ids, mask


def features(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Return an encoder's features of texts: its last hidden states, averaged (``b x width``)."""
    hidden: Tensor = model(input_ids=ids, attention_mask=mask).last_hidden_state
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def token_losses(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Return a decoder's mean negative log-likelihood per token of each text (``b``), in nats.

    The first token of a text is given, not predicted.
    """
    logits: Tensor = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    losses = losses.view(len(ids), -1)
    predicted = mask[:, 1:].to(losses.dtype)
    return (losses * predicted).sum(1) / predicted.sum(1)
