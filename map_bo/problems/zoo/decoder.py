"""The decoder zoo: a pretrained language model fine-tuned on domains of text, scored by perplexity.

The domains are the text sets without their labels; see :mod:`map_bo.problems.zoo.text_sets`. What
is measured on each is the mean negative log-likelihood per token, the logarithm of perplexity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from map_bo.evaluators.perplexity import Perplexity
from map_bo.merging.vectors.operator import MergeOperator
from map_bo.merging.vectors.storage import StorageDtype
from map_bo.problems.rebuilding import rebuilt
from map_bo.problems.zoo.expert_training import (
    BatchLoss,
    TunedProblem,
    TunedZoo,
    held_out,
    tuned_problem,
)
from map_bo.problems.zoo.pretrained import (
    Kind,
    decoder_folder,
    load_tokenizer,
)
from map_bo.problems.zoo.text_sets import TextSelection, check_sets
from map_bo.problems.zoo.token_batches import Tokens, token_losses

__all__ = ["DEFAULT_DOMAINS", "DecoderZoo", "decoder_problem"]

DEFAULT_DOMAINS = ("banking77", "sst2")
"""The domains of a zoo that names none."""

SIZE = 32
MOST_TOKENS = 48


@dataclass(frozen=True)
class DecoderZoo(TunedZoo):
    """One language model per domain; see `TunedZoo`."""

    sets: tuple[str, ...] = DEFAULT_DOMAINS
    tuning: str = "lora"
    seed: int = 0
    epochs: int = 1
    root: str | Path | None = None
    model: str | Path | None = None

    name: ClassVar[str] = "decoder"
    model_name: ClassVar[str] = "SmolLM2-135M-Instruct"
    kind: ClassVar[Kind] = "decoder"
    version: ClassVar[int] = 1
    train_examples: ClassVar[int] = 192
    size: ClassVar[int] = SIZE
    batch: ClassVar[int] = 8
    rates: ClassVar[Mapping[str, float]] = {"full": 5e-5, "lora": 1e-3}
    metric: ClassVar[str] = "mean negative log-likelihood per token in nats, to minimise"

    def base(self, cache_dir: str | Path | None = None) -> Path:
        """Return the folder of the decoder."""
        return decoder_folder(self.model, cache_dir)

    def prepare(self, part: TextSelection, folder: Path, base: Path) -> None:
        """A domain needs nothing beside its expert."""

    def loss(self, part: TextSelection, folder: Path, base: Path) -> BatchLoss:
        """Return the mean negative log-likelihood per token."""
        tokens = _tokens(base, part.train)

        def loss(model: nn.Module, rows: Sequence[int]) -> Tensor:
            return token_losses(model, *tokens.padded(rows)).mean()

        return loss

    def evaluator(self, folder: Path, base: Path, size: int) -> Perplexity:
        """Return what measures the loss per token on ``size`` held-out texts."""
        return Perplexity(data=held_out(folder, size), tokenizer=str(base), unit="document")


@rebuilt
def decoder_problem(
    root: str | Path | None = None,
    *,
    model: str | Path | None = None,
    sets: Sequence[str] = DEFAULT_DOMAINS,
    tuning: str = "lora",
    seed: int = 0,
    epochs: int = 1,
    size: int = SIZE,
    lower: float = 0.0,
    upper: float = 1.0,
    fixed: Mapping[str, float] | None = None,
    operator: MergeOperator | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = False,
    dtype: StorageDtype = torch.float32,
    max_memory: int | str | None = None,
    cache: bool = True,
) -> TunedProblem:
    """Return the problem of merging language models fine-tuned on domains of text.

    One metric per domain: the mean over ``size`` held-out texts of the negative log-likelihood per
    token, in nats (to minimise), named like the domain. Missing experts are trained first, in some
    minutes each; where that was interrupted, it goes on.

    Args:
        root: Folder of the sets; None takes it from the environment variable ``MAP_BO_DATA``.
        model: Folder of a language model of transformers with its tokenizer; None takes
            SmolLM2-135M.
        sets: Which domains, two or more of the text sets.
        tuning: ``"lora"`` for adapters of rank 8, or ``"full"``.
        seed: Seed of the training (not of any search).
        epochs: Passes of an expert over its 192 training texts.
        size: How many held-out texts an evaluation uses per domain, the same every time.
        lower: Lower bound of every coefficient.
        upper: Upper bound of every coefficient.
        fixed: Coefficients that are not searched, by expert; see `MergedModelProblem`.
        operator: How to merge; task arithmetic when None.
        cache_dir: Where trained experts are kept; see :func:`map_bo.problems.cache.cache_root`.
        progress: Show a progress bar while training.
        dtype: Storage of the task vectors; see `MergedModelProblem`.
        max_memory: Cap of the memory for task vectors; see `MergedModelProblem`.
        cache: Whether measurements are kept for later runs; see `MergedModelProblem`.

    Raises:
        CheckpointError: When the language model cannot be read.
        DataError: When the folder or a set is not there, a setting is not possible, or the cache
            cannot be written.
        MissingDependencyError: When an optional package is missing.
    """
    zoo = DecoderZoo(check_sets(sets), tuning, seed, epochs, root, model)
    return tuned_problem(
        zoo,
        size,
        cache_dir=cache_dir,
        progress=progress,
        max_memory=max_memory,
        cache=cache,
        operator=operator,
        lower=lower,
        upper=upper,
        fixed=fixed,
        dtype=dtype,
    )


@lru_cache(maxsize=64)
def _tokens(base: Path, texts: tuple[str, ...]) -> Tokens:
    """Return texts as tokens: begun, where the tokenizer has one, by its token of the beginning."""
    tokenizer: Any = load_tokenizer(base, "decoder")
    encode: Callable[..., Mapping[str, list[list[int]]]] = tokenizer
    begin = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    encoded = encode(
        list(texts), truncation=True, max_length=MOST_TOKENS - len(begin), add_special_tokens=False
    )
    return Tokens(tuple((*begin, *text) for text in encoded["input_ids"]))
