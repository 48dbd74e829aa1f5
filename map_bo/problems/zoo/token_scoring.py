"""What is measured on the text and decoder zoos: accuracy under a frozen head, loss per token.

Both score examples one by one (`score`), so that a metric can be taken over any part of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from map_bo.errors import DataError, EvaluationError
from map_bo.evaluators.evaluator import Measurement

__all__ = ["HeadAccuracy", "TokenEvaluator", "TokenLoss", "Tokens", "features", "token_losses"]

BATCH = 32


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

    def batches(self, rows: Sequence[int], size: int = BATCH) -> Iterator[list[int]]:
        """Yield places in ``rows``, at most ``size`` at once, with texts of like lengths together.

        It takes the least padding, and the longest come first: what memory is needed shows at once.
        """
        order = sorted(range(len(rows)), key=lambda i: (-len(self.ids[rows[i]]), rows[i]))
        for start in range(0, len(order), size):
            yield order[start : start + size]


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


@dataclass(frozen=True, eq=False)
class TokenEvaluator:
    """Texts that a model is scored on.

    Attributes:
        tokens: ``n`` texts.
    """

    tokens: Tokens

    def __call__(self, model: nn.Module) -> Measurement:
        """Return the mean outcome over all texts."""
        return self.summary(self.score(model, torch.arange(self.size)))

    def summary(self, outcomes: Tensor) -> Measurement:
        """Return the measurement that some outcomes (``k``) make."""
        raise NotImplementedError

    @property
    def size(self) -> int:
        """Number of texts."""
        return len(self.tokens)

    def score(self, model: nn.Module, items: Tensor) -> Tensor:
        """Return the outcome of each of some texts (``k``, float64).

        Args:
            model: The model.
            items: ``k`` numbers of texts, from 0.

        Raises:
            EvaluationError: When the model's outputs are not finite.
        """
        rows = [int(item) for item in items]
        device = next(iter(model.parameters())).device
        outcomes = torch.empty(len(rows), dtype=torch.float64)
        with _evaluating(model), torch.inference_mode():
            for places in self.tokens.batches(rows):
                batch = [rows[place] for place in places]
                ids, mask = self.tokens.padded(batch)
                values = self._outcomes(model, batch, ids.to(device), mask.to(device))
                if not bool(torch.isfinite(values).all()):
                    raise EvaluationError(
                        "the model's outputs hold NaN or infinity",
                        hint="these coefficients break the model; narrow the bounds if many do",
                    )
                outcomes[places] = values.double().cpu()
        return outcomes

    def _outcomes(self, model: nn.Module, rows: list[int], ids: Tensor, mask: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class HeadAccuracy(TokenEvaluator):
    """The share of texts that an encoder and a frozen head classify right.

    Attributes:
        tokens: ``n`` texts.
        labels: ``n`` classes.
        weight: The head's weights, ``classes x width``.
        bias: Its biases, ``classes``.
    """

    labels: Tensor
    weight: Tensor
    bias: Tensor

    def summary(self, outcomes: Tensor) -> Measurement:
        """Return the accuracy in [0, 1] with the number of texts."""
        return Measurement(float(outcomes.mean()), count=len(outcomes))

    def _outcomes(self, model: nn.Module, rows: list[int], ids: Tensor, mask: Tensor) -> Tensor:
        logits = F.linear(features(model, ids, mask), self.weight.to(ids.device)).float()
        logits = logits + self.bias.to(ids.device)
        right = (logits.argmax(-1).cpu() == self.labels[rows]).double()
        # A head that is given NaN has an argmax all the same.
        return torch.where(torch.isfinite(logits).all(-1).cpu(), right, torch.nan)


@dataclass(frozen=True, eq=False)
class TokenLoss(TokenEvaluator):
    """The mean over texts of a decoder's negative log-likelihood per token, in nats.

    Give the problem ``Metric(name, direction="min", kind="loss")`` with it.

    Raises:
        DataError: When a text has fewer than two tokens, so that there is nothing to predict.
    """

    def __post_init__(self) -> None:
        if short := [i for i, text in enumerate(self.tokens.ids) if len(text) < 2]:
            raise DataError(
                f"{len(short)} texts have fewer than two tokens, the first of them is text "
                f"{short[0]}",
                hint="leave such texts out: no token is predicted in them",
            )

    def summary(self, outcomes: Tensor) -> Measurement:
        """Return the mean, the variance of that mean, and the number of texts."""
        n = len(outcomes)
        variance = float(outcomes.var()) / n if n > 1 else None
        return Measurement(float(outcomes.mean()), variance=variance, count=n)

    def _outcomes(self, model: nn.Module, rows: list[int], ids: Tensor, mask: Tensor) -> Tensor:
        return token_losses(model, ids, mask)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
