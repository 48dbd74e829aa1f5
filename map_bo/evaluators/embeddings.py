"""Sentence embeddings: similarity of pairs, and retrieval.

The model is an encoder whose hidden states are pooled, as those of sentence-transformers are
(Reimers and Gurevych 2019); it is the model itself that is scored, in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from map_bo.data import Metric
from map_bo.errors import ConfigError, EvaluationError, did_you_mean
from map_bo.evaluators.data import Data, Examples
from map_bo.evaluators.evaluator import Measurement, evaluating
from map_bo.evaluators.examples import ExampleEvaluator
from map_bo.evaluators.text.evaluator import by_length, trial
from map_bo.evaluators.text.heads import Head
from map_bo.evaluators.text.measures import correlation
from map_bo.evaluators.text.pooling import (
    Pooling,
    all_features,
    check_pooling,
    features,
    pooling_of_folder,
)
from map_bo.evaluators.text.tokens import (
    Tokens,
    check_vocabulary,
    load_tokenizer,
    longest_text,
    tokenise,
)
from map_bo.values import whole_number

__all__ = ["EmbeddingTask", "Embeddings"]

EmbeddingTask = Literal["similarity", "retrieval"]
"""What embeddings are used for."""


@dataclass(frozen=True, eq=False)
class _Ready:
    """What `prepare` found.

    Attributes:
        first: ``n`` first texts of pairs, or queries.
        second: ``n`` second texts, or ``d`` documents.
        truth: ``n`` scores of pairs, or ``r x 2`` pairs of a query and a document that answers it.
        pooling: How hidden states are pooled.
        digest: A digest of all that.
    """

    first: Tokens
    second: Tokens
    truth: Tensor
    pooling: Pooling
    digest: str


class Embeddings(ExampleEvaluator):
    """Embeddings of texts, compared by their cosine; in a configuration ``kind: embeddings``.

    ``task="similarity"`` measures Spearman's correlation between the cosines of pairs and their
    scores, as on STS-B. ``task="retrieval"`` measures for each query whether one of its documents
    is among the ``k`` nearest of all documents.

    Args:
        data: For similarity the roles ``first``, ``second`` and ``score``. For retrieval ``query``
            and ``document``, one row per document that answers a query; equal texts are one.
        task: ``similarity`` or ``retrieval``.
        at: One or several ``k`` for retrieval.
        corpus: Further documents that answer none of the queries (role ``document``), if any.
        query_prefix: Text that is put before each query, as some encoders expect.
        document_prefix: Text that is put before each document.
        tokenizer: Folder or hub id of a tokenizer, or a tokenizer; by default that of the folder
            which the model was made from.
        pooling: ``mean``, ``cls`` or ``last``; by default what the tokenizer's folder says
            (``1_Pooling/config.json``), else ``mean``.
        max_length: Longer texts are cut to so many tokens.
        batch_size: Texts per forward pass.
        cache_dir: Folder above ``tokens``; see `map_bo.cached.cache_root`.

    Raises:
        ConfigError: For settings that are not possible.
    """

    def __init__(
        self,
        *,
        data: Data | Mapping[str, Any] | str,
        task: EmbeddingTask = "similarity",
        at: int | Sequence[int] | None = None,
        corpus: Data | Mapping[str, Any] | str | None = None,
        query_prefix: str = "",
        document_prefix: str = "",
        tokenizer: object = None,
        pooling: Pooling | None = None,
        max_length: int | None = None,
        batch_size: int = 32,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size)
        if task not in get_args(EmbeddingTask):
            raise ConfigError(
                f"task must be one of {', '.join(get_args(EmbeddingTask))}, got {task!r}",
                hint=did_you_mean(task, get_args(EmbeddingTask)),
            )
        only = {"at": at, "corpus": corpus, "query_prefix": query_prefix}
        only |= {"document_prefix": document_prefix}
        given = [name for name, value in only.items() if value not in (None, "")]
        if task == "similarity" and given:
            raise ConfigError(
                f"{given[0]} was given, and the task is similarity",
                hint="give task='retrieval', or leave it out",
            )
        self.data = Data.of(data)
        self.task = task
        ks = [1] if at is None else [at] if isinstance(at, int) else list(at)
        self.at = tuple(whole_number("at", k, least=1) for k in ks)
        if not self.at or len(set(self.at)) < len(self.at):
            raise ConfigError(
                f"at must be different numbers, got {list(self.at)}", hint="such as at=[1, 5]"
            )
        self.corpus = None if corpus is None else Data.of(corpus)
        self.prefixes = (query_prefix, document_prefix)
        self.tokenizer = tokenizer
        self.pooling = check_pooling(pooling)
        self.max_length = (
            None if max_length is None else whole_number("max_length", max_length, least=2)
        )
        self.cache_dir = cache_dir
        self._state: _Ready | None = None
        self._documents: Tensor | None = None  # embeddings, while a model is scored

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """``spearman``, or ``accuracy_at_k`` for each ``k``."""
        if self.task == "similarity":
            return (Metric("spearman", kind="unbounded", lower=-1.0, upper=1.0),)
        return tuple(Metric(f"accuracy_at_{k}") for k in self.at)

    @property
    def ready(self) -> _Ready:
        """What `prepare` found.

        Raises:
            EvaluationError: Before `prepare`.
        """
        return self.require_ready(self._state, "the texts have not been read")

    @property
    def size(self) -> int:
        """The number of pairs, or of queries."""
        return len(self.ready.first)

    @property
    def means(self) -> tuple[bool, ...]:
        """Accuracies of retrieval; the outcomes of a correlation are cosines."""
        return (self.task == "retrieval",) * len(self.metrics)

    @property
    def digest(self) -> str:
        """A digest of tokens, scores or answers, and settings."""
        return self.ready.digest

    def prepare(self, model: nn.Module) -> None:
        """Read and tokenise the texts, and refuse what does not fit.

        Raises:
            EvaluationError: When data, tokenizer and model do not fit each other.
            MissingDependencyError: Without a package that is needed.
        """
        if self.task == "similarity":
            examples = self.data.read(("first", "second", "score"))
            texts = examples.texts("first"), examples.texts("second")
            truth = torch.tensor(examples.numbers("score"), dtype=torch.float64)
            if len(truth) < 2 or bool((truth == truth[0]).all()):
                raise EvaluationError(
                    f"all scores of {examples.where} are {float(truth[0]):g}, and nothing "
                    "correlates with them",
                    hint="choose pairs whose scores differ",
                )
        else:
            examples = self.data.read(("query", "document"))
            texts, truth = self._retrieval(examples)
        tokenizer = load_tokenizer(self.tokenizer, model)
        check_vocabulary(tokenizer, model)
        longest = longest_text(tokenizer, model, self.max_length)
        first, second = (
            tokenise(
                tokenizer,
                part,
                model=model,
                max_length=longest,
                where=examples.where,
                rows=range(len(part)),
                cache_dir=self.cache_dir,
            )
            for part in texts
        )
        pooling = self.pooling or pooling_of_folder(self.tokenizer)
        with evaluating(model):
            trial(model, first, Head(torch.empty(0, 0), torch.empty(0)), pooling)
        content = [first.digest, second.digest, truth.tolist(), pooling, self.task, self.at]
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        self._state = _Ready(first, second, truth, pooling, digest)

    def check_data(self) -> None:
        """Read the texts; see `ExampleEvaluator`."""
        similar = self.task == "similarity"
        self.data.read(("first", "second", "score") if similar else ("query", "document"))
        if self.corpus is not None:
            self.corpus.read(("document",))

    def score(self, model: nn.Module, items: Tensor) -> Tensor:
        """Return the outcome of each of some pairs or queries; see `ExampleEvaluator.score`.

        All documents are embedded first, once.
        """
        ready = self.ready
        if self.task == "similarity":
            return by_length(super().score, ready.first, model, items)
        self._documents = _unit(all_features(model, ready.second, ready.pooling, self.batch_size))
        try:
            return by_length(super().score, ready.first, model, items)
        finally:
            self._documents = None

    def outcomes(self, model: nn.Module, items: Tensor) -> Tensor:
        """Return the cosines of pairs, ``b``; or whether queries are answered, ``b`` or ``b x m``.

        Args:
            model: The model, in evaluation mode.
            items: ``b`` indices of pairs or queries.
        """
        ready = self.ready
        own = _unit(features(model, ready.first, items, ready.pooling).cpu())
        if self.task == "similarity":
            other = _unit(features(model, ready.second, items, ready.pooling).cpu())
            return (own * other).sum(1)
        documents = self._documents
        if documents is None:
            documents = _unit(all_features(model, ready.second, ready.pooling, self.batch_size))
        cosines = own @ documents.T
        answers = torch.zeros(cosines.shape, dtype=torch.bool)
        queries, found = ready.truth.unbind(1)
        # A query may be asked for twice, as when examples are drawn anew.
        places, pairs = (queries == items.unsqueeze(-1)).nonzero(as_tuple=True)
        answers[places, found[pairs]] = True
        best = cosines.masked_fill(~answers, -torch.inf).amax(1, keepdim=True)
        # Documents that answer do not compete with each other; ties count against the query.
        before = ((cosines >= best) & ~answers).sum(1)
        table = torch.stack([(before < k).double() for k in self.at], -1)
        table[~torch.isfinite(cosines).all(1)] = torch.nan
        return table.squeeze(-1) if len(self.at) == 1 else table

    def summary(self, outcomes: Tensor, items: Tensor | None = None) -> dict[str, Measurement]:
        """Return Spearman's correlation, or the share of queries that are answered.

        Args:
            outcomes: As `score` returns them.
            items: Which examples they are of; by default all, in their order.

        Raises:
            EvaluationError: When all pairs have the same cosine.
        """
        if self.task == "retrieval":
            return super().summary(outcomes)
        truth = self.ready.truth if items is None else self.ready.truth[items]
        return {"spearman": correlation(outcomes, truth, "spearman")}

    def _retrieval(self, examples: Examples) -> tuple[tuple[list[str], list[str]], Tensor]:
        """Return queries and documents, each once, and which documents answer which query."""
        asked, told = examples.texts("query"), examples.texts("document")
        queries = {text: i for i, text in enumerate(dict.fromkeys(asked))}
        more = [] if self.corpus is None else self.corpus.read(("document",)).texts("document")
        documents = {text: i for i, text in enumerate(dict.fromkeys([*told, *more]))}
        if len(documents) <= max(self.at):
            raise EvaluationError(
                f"{examples.where} has {len(documents)} different documents, among which the "
                f"nearest {max(self.at)} are all",
                hint="give more documents (corpus), or a smaller at",
            )
        pairs = {(queries[q], documents[d]) for q, d in zip(asked, told, strict=True)}
        before, ahead = self.prefixes
        return (
            [before + text for text in queries],
            [ahead + text for text in documents],
        ), torch.tensor(sorted(pairs))


def _unit(vectors: Tensor) -> Tensor:
    """Return vectors of length 1, float64, on the CPU; of a zero vector there is none, so NaN."""
    vectors = vectors.double()
    unit: Tensor = vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return unit
