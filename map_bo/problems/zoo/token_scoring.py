"""What is measured on the text and decoder zoos: accuracy under a frozen head, loss per token.

Both score texts one by one; see :mod:`map_bo.evaluators.examples`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from map_bo.data import Metric
from map_bo.errors import EvaluationError
from map_bo.evaluators.examples import ExampleEvaluator

__all__ = [
    "BATCH",
    "HeadAccuracy",
    "TokenEvaluator",
    "TokenLoss",
    "Tokens",
    "features",
    "token_losses",
]

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


class TokenEvaluator(ExampleEvaluator):
    """Texts that a model is scored on; batches hold texts of like lengths, to pad little.

    Args:
        read: Returns ``n`` texts; it is called once, by `prepare`.
        batch_size: Texts per forward pass.
    """

    def __init__(self, read: Callable[[], Tokens], *, batch_size: int = BATCH) -> None:
        super().__init__(batch_size=batch_size)
        self._read = read
        self._tokens: Tokens | None = None

    @property
    def tokens(self) -> Tokens:
        """The texts.

        Raises:
            EvaluationError: Before `prepare`.
        """
        if self._tokens is None:
            raise EvaluationError(
                "the texts have not been read", hint="call prepare(model) of the evaluator first"
            )
        return self._tokens

    @property
    def size(self) -> int:
        """The number of texts."""
        return len(self.tokens)

    @property
    def digest(self) -> str:
        """A digest of the texts, and of the labels and the head where there are any."""
        return hashlib.sha256(json.dumps([self.tokens.ids, self._parts()]).encode()).hexdigest()

    def prepare(self, model: nn.Module) -> None:
        """Read the texts, once. A head was fitted when the zoo was trained."""
        if self._tokens is None:
            self._tokens = self._read()

    def score(self, model: nn.Module, items: Tensor) -> Tensor:
        """Return the outcome of each of some texts (``k``, float64); see `ExampleEvaluator`."""
        items = torch.as_tensor(items, device="cpu")
        if items.dim() != 1 or items.is_floating_point():
            return super().score(model, items)  # which refuses them
        lengths = torch.tensor([len(text) for text in self.tokens.ids])
        inside = (items >= 0) & (items < self.size)
        order = torch.where(inside, lengths[items.clamp(0, self.size - 1)], 0).argsort(
            descending=True, stable=True
        )
        outcomes = super().score(model, items[order])
        return torch.empty_like(outcomes).index_copy_(0, order, outcomes)

    def _batch(self, model: nn.Module, items: Tensor) -> tuple[Tensor, Tensor]:
        device = next(iter(model.parameters())).device
        ids, mask = self.tokens.padded(items.tolist())
        return ids.to(device), mask.to(device)

    def _parts(self) -> list[object]:
        return []


class HeadAccuracy(TokenEvaluator):
    """The share of texts that an encoder and a frozen head classify right.

    Args:
        read: Returns ``n`` texts; it is called once, by `prepare`.
        labels: ``n`` classes.
        weight: The head's weights, ``classes x width``.
        bias: Its biases, ``classes``.
        batch_size: Texts per forward pass.
    """

    def __init__(
        self,
        read: Callable[[], Tokens],
        labels: Tensor,
        weight: Tensor,
        bias: Tensor,
        *,
        batch_size: int = BATCH,
    ) -> None:
        super().__init__(read, batch_size=batch_size)
        self.labels, self.weight, self.bias = labels, weight, bias

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """One proportion, to maximise."""
        return (Metric("accuracy"),)

    def outcomes(self, model: nn.Module, items: Tensor) -> Tensor:
        """Return 1 for a text that is classified right and 0 for another, ``b``."""
        given = features(model, *self._batch(model, items))
        logits = F.linear(given, self.weight.to(given), self.bias.to(given)).float().cpu()
        right = (logits.argmax(-1) == self.labels[items]).double()
        # Of NaN there is an argmax too.
        return torch.where(torch.isfinite(logits).all(-1), right, torch.nan)

    def _parts(self) -> list[object]:
        return [self.labels.tolist(), self.weight.tolist(), self.bias.tolist()]


class TokenLoss(TokenEvaluator):
    """The mean over texts of a decoder's negative log-likelihood per token, in nats.

    Args:
        read: Returns ``n`` texts of two tokens or more; it is called once, by `prepare`.
        batch_size: Texts per forward pass.
    """

    def prepare(self, model: nn.Module) -> None:
        """Read the texts, once.

        Raises:
            EvaluationError: When a text has fewer than two tokens: there is nothing to predict.
        """
        super().prepare(model)
        if short := [i for i, text in enumerate(self.tokens.ids) if len(text) < 2]:
            raise EvaluationError(
                f"{len(short)} texts have fewer than two tokens, the first of them is text "
                f"{short[0]}",
                hint="leave such texts out: no token is predicted in them",
            )

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """One loss, to minimise."""
        return (Metric("loss", direction="min", kind="loss"),)

    def outcomes(self, model: nn.Module, items: Tensor) -> Tensor:
        """Return the mean negative log-likelihood per token of each text, ``b``."""
        return token_losses(model, *self._batch(model, items))
