"""How well a causal language model predicts documents: loss, perplexity, bits per byte."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from map_bo.data import Metric
from map_bo.errors import ConfigError, EvaluationError, did_you_mean
from map_bo.evaluators.data import Data
from map_bo.evaluators.evaluator import Measurement, device_of, logits_of
from map_bo.evaluators.examples import ExampleEvaluator, mean_of, ratio_estimate
from map_bo.evaluators.isolation.quiet import quiet
from map_bo.evaluators.language.models import (
    causal,
    longest_input,
    pad_id,
    plain_ids,
)
from map_bo.evaluators.text.tokens import check_vocabulary, load_tokenizer
from map_bo.values import switch, whole_number

__all__ = ["Perplexity", "Window", "windows"]

Measure = Literal["loss", "perplexity", "bits_per_byte"]
Unit = Literal["token", "document"]

_LONGEST = 2048  # tokens of a window where nothing else is said: logits of more fill the memory


@dataclass(frozen=True)
class Window:
    """A part of a document that the model reads at once.

    Attributes:
        start: Its first token.
        stop: One past its last.
        first: The first token in it that is scored; those before are its context.
    """

    start: int
    stop: int
    first: int


def windows(length: int, *, most: int, stride: int) -> list[Window]:
    """Cut a document so that each of its tokens but the very first is scored exactly once.

    The windows begin ``stride`` tokens apart. In each, the tokens are scored that none before has
    scored, so that every token past the first window has ``most - stride`` tokens of context or
    more.

    Args:
        length: Tokens of the document.
        most: Tokens of a window.
        stride: From 1 to ``most - 1``.
    """
    found: list[Window] = []
    start, done = 0, 1
    while done < length:
        stop = min(start + most, length)
        found.append(Window(start, stop, done))
        start, done = start + stride, stop
    return found


class Perplexity(ExampleEvaluator):
    """How well a causal language model predicts documents; smaller is better.

    The outcome of each document is its own loss, perplexity or number of bits per byte. By
    ``unit="token"`` each token counts the same: the measurement is that of the whole corpus, with
    the variance of the ratio estimator over documents (see `ratio_estimate`). By
    ``unit="document"`` each document counts the same, however long it is: the measurement is the
    mean of the outcomes.

    By default it measures the mean negative log-likelihood per token in nats. Perplexity is its
    exponential and orders models in the same way, but merges far from the experts reach millions,
    which no surrogate fits; the loss is close to a quadratic of the coefficients and its noise is
    even.

    Documents longer than a window are read in windows that overlap (see `windows`), so that every
    token is scored once. Batches are padded on the right and masked, which changes no outcome.

    Args:
        data: The documents, by the role ``text``: a data block, its settings, or a path.
        tokenizer: Folder or hub id of the tokenizer, or a tokenizer of transformers; None is the
            model's own.
        unit: What counts the same: every ``token`` or every ``document``.
        measure: ``loss`` (nats per token), ``perplexity`` (its exponential) or ``bits_per_byte``
            (of the text in UTF-8; comparable between tokenizers).
        max_length: Tokens of a window; None is what the model can read, at most 2048.
        stride: Tokens between the starts of windows; None is half a window. Small ones give more
            context and cost more; ``max_length - 1`` is the cheapest.
        bos: Whether each document begins with the tokenizer's token for the beginning; None is
            yes where there is one. Without it the first token of a document is not scored, as
            nothing comes before it.
        batch_size: Windows per forward pass.

    Raises:
        ConfigError: For a setting that is not possible.
    """

    def __init__(
        self,
        *,
        data: Data | Mapping[str, Any] | str,
        tokenizer: object = None,
        unit: Unit = "token",
        measure: Measure = "loss",
        max_length: int | None = None,
        stride: int | None = None,
        bos: bool | None = None,
        batch_size: int = 8,
    ) -> None:
        super().__init__(batch_size=batch_size)
        self.data = Data.of(data)
        self.tokenizer = tokenizer
        for name, value, known in (
            ("unit", unit, get_args(Unit)),
            ("measure", measure, get_args(Measure)),
        ):
            if value not in known:
                raise ConfigError(
                    f"{name} must be one of {', '.join(known)}, got {value!r}",
                    hint=did_you_mean(value, known),
                )
        self.unit: Unit = unit
        self.measure: Measure = measure
        self.max_length = max_length
        if max_length is not None:
            self.max_length = whole_number("max_length", max_length, least=2)
        self.stride = stride
        if stride is not None:
            most = None if self.max_length is None else self.max_length - 1
            self.stride = whole_number("stride", stride, least=1, most=most)
        self.bos = None if bos is None else switch("bos", bos)
        self._documents: _Documents | None = None

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The one metric, called like the measure; its direction is ``min``."""
        lower = 1.0 if self.measure == "perplexity" else 0.0
        return (Metric(self.measure, direction="min", kind="loss", lower=lower),)

    @property
    def size(self) -> int:
        """The number of documents."""
        return len(self._known.ids)

    @property
    def means(self) -> tuple[bool, ...]:
        """Only of documents that count alike; else it is a ratio of sums."""
        return (self.unit == "document",)

    @property
    def digest(self) -> str:
        """Digest of the documents' tokens and of the settings that decide what is measured."""
        return hashlib.sha256(f"{self._known.digest} {self.unit}".encode()).hexdigest()

    @property
    def tokens(self) -> Tensor:
        """How many tokens of each document are scored, ``size``."""
        return self._known.tokens.clone()

    @property
    def _known(self) -> _Documents:
        return self.require_ready(self._documents, "the documents have not been read")

    def prepare(self, model: nn.Module) -> None:
        """Read and tokenise the documents.

        Raises:
            EvaluationError: When there are none, one has no token to predict, the model is not a
                causal language model, or the tokenizer is of another vocabulary.
        """
        network = causal(model, by="perplexity")
        tokenizer = load_tokenizer(self.tokenizer, network)
        check_vocabulary(tokenizer, network)
        limit = longest_input(network)
        most = self.max_length or min(limit or _LONGEST, _LONGEST)
        if limit is not None and most > limit:
            raise EvaluationError(
                f"max_length is {most}, and the model reads {limit} tokens",
                hint=f"give at most {limit}",
            )
        stride = self.stride or max(most // 2, 1)
        if stride >= most:
            raise EvaluationError(
                f"stride is {stride}, and a window has {most} tokens",
                hint=f"give at most {most - 1}, so that every token has a context",
            )
        bos = tokenizer.bos_token_id
        if self.bos and bos is None:
            raise EvaluationError(
                "bos is true, and the tokenizer has no token for the beginning of a text",
                hint="leave bos out; the first token of each document is then not scored",
            )
        examples = self.data.read(["text"])
        texts = examples.texts("text")
        ids = plain_ids(tokenizer, texts)
        sizes = [len(text.encode()) for text in texts]
        if bos is not None and self.bos is not False:
            ids = [[bos, *one] for one in ids]
        else:  # nothing predicts the first token, so its bytes do not count either
            sizes = [
                size - len(str(tokenizer.decode(one[:1])).encode())
                for size, one in zip(sizes, ids, strict=True)
            ]
        short = [row for row, one in zip(examples.rows, ids, strict=True) if len(one) < 2]
        if short:
            raise EvaluationError(
                f"{len(short)} of {len(ids)} documents of {examples.where} have no token to "
                f"predict, such as row {short[0] + 1}",
                hint="leave empty documents out of the data",
            )
        self._documents = _Documents(
            tuple(torch.tensor(one) for one in ids),
            torch.tensor([len(one) - 1 for one in ids], dtype=torch.float64),
            torch.tensor(sizes, dtype=torch.float64).clamp(min=1),
            most=most,
            stride=stride,
            pad=pad_id(tokenizer),
            measure=self.measure,
        )

    def check_data(self) -> None:
        """Read the documents; see `ExampleEvaluator`."""
        self.data.read(["text"])

    def outcomes(self, model: nn.Module, items: Tensor) -> Tensor:
        """Return the measure of each document (``b``)."""
        known = self._known
        pieces = [
            (row, window)
            for row, item in enumerate(items.tolist())
            for window in windows(len(known.ids[item]), most=known.most, stride=known.stride)
        ]
        # Windows of one length together are padded little.
        pieces.sort(key=lambda piece: piece[1].start - piece[1].stop)
        totals = torch.zeros(len(items), dtype=torch.float64)
        with quiet("transformers"):
            for start in range(0, len(pieces), self.batch_size):
                batch = pieces[start : start + self.batch_size]
                named = [(int(items[row]), window) for row, window in batch]
                for (row, _), losses in zip(batch, self._losses(model, named), strict=True):
                    totals[row] += losses.double().sum().cpu()
        return self._outcome(totals, items)

    def token_losses(self, model: nn.Module, item: int) -> Tensor:
        """Return the losses of one document's scored tokens, in nats.

        Args:
            model: The model.
            item: Index of the document.

        Returns:
            As many as `tokens` says, in their order, float64.
        """
        known = self._known
        parts = windows(len(known.ids[item]), most=known.most, stride=known.stride)
        with quiet("transformers"), torch.inference_mode():
            found = [self._losses(model, [(item, window)])[0] for window in parts]
        return torch.cat(found).double().cpu().clone()

    def summary(self, outcomes: Tensor, items: Tensor | None = None) -> dict[str, Measurement]:
        """Return what outcomes make, with the variance over documents.

        Args:
            outcomes: As `score` returns them.
            items: The documents that they belong to; None is all, in their order.

        Raises:
            EvaluationError: When there are more or fewer outcomes than documents.
        """
        known, metric = self._known, self.metrics[0]
        items = torch.arange(self.size) if items is None else items
        if len(items) != len(outcomes):
            raise EvaluationError(
                f"there are {len(outcomes)} outcomes of {len(items)} documents",
                hint="say which documents they belong to: summary(outcomes, items)",
            )
        if self.unit == "document":
            return {metric.name: mean_of(outcomes, metric)}
        if self.measure == "bits_per_byte":
            sizes = known.bytes[items]
            value, variance = ratio_estimate(outcomes * sizes, sizes)
        else:
            sizes = known.tokens[items]
            losses = outcomes.log() if self.measure == "perplexity" else outcomes
            value, variance = ratio_estimate(losses * sizes, sizes)
            if self.measure == "perplexity":  # by the delta method
                value = math.exp(value)
                variance = None if variance is None else value**2 * variance
        return {metric.name: Measurement(value, variance=variance, count=len(items))}

    def _outcome(self, totals: Tensor, items: Tensor) -> Tensor:
        """Return the measure of documents by the losses of all their tokens (``b``)."""
        if self.measure == "bits_per_byte":
            return totals / math.log(2) / self._known.bytes[items]
        mean = totals / self._known.tokens[items]
        return mean.exp() if self.measure == "perplexity" else mean

    def _losses(self, model: nn.Module, pieces: list[tuple[int, Window]]) -> list[Tensor]:
        """Return the loss of each scored token, for windows of documents in one batch."""
        known, device = self._known, device_of(model)
        rows = [known.ids[item][window.start : window.stop] for item, window in pieces]
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), known.pad)
        mask = torch.zeros((len(rows), longest), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
        known_inputs = inspect.signature(model.forward).parameters
        # Keys and values of earlier tokens are of no use here, and fill the memory.
        settings = {"use_cache": False} if "use_cache" in known_inputs else {}
        output = model(input_ids=ids.to(device), attention_mask=mask.to(device), **settings)
        logits = logits_of(output)
        found = []
        for i, (row, (_, window)) in enumerate(zip(rows, pieces, strict=True)):
            first = window.first - window.start
            predicted = logits[i, first - 1 : len(row) - 1].float()
            found.append(
                nn.functional.cross_entropy(
                    predicted, row[first:].to(predicted.device), reduction="none"
                )
            )
        return found


@dataclass(frozen=True, eq=False)
class _Documents:
    """Tokenised documents and how they are read.

    Attributes:
        ids: Tokens of each document, with that for the beginning where it has one.
        tokens: How many of them are scored.
        bytes: How many bytes these tokens stand for.
        most: Tokens of a window.
        stride: Tokens between the starts of windows.
        pad: Token to pad with.
        measure: What the outcomes are.
    """

    ids: tuple[Tensor, ...]
    tokens: Tensor
    bytes: Tensor
    most: int
    stride: int
    pad: int
    measure: str

    @property
    def digest(self) -> str:
        found = hashlib.sha256(json.dumps([self.measure, self.most, self.stride]).encode())
        for ids, size in zip(self.ids, self.bytes.tolist(), strict=True):
            found.update(json.dumps([ids.tolist(), size]).encode())
        return found.hexdigest()
