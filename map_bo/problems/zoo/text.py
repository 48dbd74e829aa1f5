"""The text zoo: a pretrained sentence encoder fine-tuned on real text sets, with frozen heads.

A linear head per set is fitted on the features of the base and kept as it is; each expert then
fine-tunes the encoder, all but its embeddings, under its own set's head. So the task vectors are
those of an encoder, and a merged model is scored under every set's head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from map_bo.evaluators.text.classification import TextClassification
from map_bo.merging.vectors.operator import MergeOperator
from map_bo.merging.vectors.storage import StorageDtype
from map_bo.problems.cache import read_network, write_network
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
    encoder_folder,
    load_pretrained,
    load_tokenizer,
)
from map_bo.problems.zoo.text_sets import TEXT_SETS, TextSelection, check_sets
from map_bo.problems.zoo.token_batches import BATCH, Tokens, features

__all__ = ["DEFAULT_SETS", "TextZoo", "text_problem"]

DEFAULT_SETS = TEXT_SETS[:4]
"""The sets of a zoo that names none."""

SIZE = 300
MOST_TOKENS = 64
_PENALTY = 0.1


@dataclass(frozen=True)
class TextZoo(TunedZoo):
    """One encoder per text set, and the frozen head of each; see `TunedZoo`."""

    sets: tuple[str, ...] = DEFAULT_SETS
    tuning: str = "full"
    seed: int = 0
    epochs: int = 2
    root: str | Path | None = None
    model: str | Path | None = None

    name: ClassVar[str] = "text"
    model_name: ClassVar[str] = "all-MiniLM-L6-v2"
    kind: ClassVar[Kind] = "encoder"
    version: ClassVar[int] = 1
    train_examples: ClassVar[int] = 960
    size: ClassVar[int] = SIZE
    batch: ClassVar[int] = 16
    rates: ClassVar[Mapping[str, float]] = {"full": 1e-4, "lora": 1e-3}
    extra_files: ClassVar[tuple[str, ...]] = ("head",)
    metric: ClassVar[str] = "accuracy, to maximise"

    def base(self, cache_dir: str | Path | None = None) -> Path:
        """Return the folder of the encoder."""
        return encoder_folder(self.model)

    def prepare(self, part: TextSelection, folder: Path, base: Path) -> None:
        """Write a set's head, where it is missing: logistic regression on the base's features."""
        file = folder / "head.safetensors"
        if read_network(file) is None:
            tokens = _tokens(base, part.train)
            write_network(file, fit_head(load_pretrained(base, self.kind), tokens, part))

    def loss(self, part: TextSelection, folder: Path, base: Path) -> BatchLoss:
        """Return the cross-entropy under the set's head."""
        tokens, labels = _tokens(base, part.train), torch.tensor(part.train_labels)
        weight, bias = _head(folder)

        def loss(model: nn.Module, rows: Sequence[int]) -> Tensor:
            logits = F.linear(features(model, *tokens.padded(rows)), weight, bias)
            return F.cross_entropy(logits, labels[list(rows)])

        return loss

    def evaluator(self, folder: Path, base: Path, size: int) -> TextClassification:
        """Return what measures the accuracy under the set's head on ``size`` held-out texts."""
        return TextClassification(
            data=held_out(folder, size),
            tokenizer=str(base),
            head=folder / "head.safetensors",
            pooling="mean",
            max_length=MOST_TOKENS,
            batch_size=BATCH,
        )


@rebuilt
def text_problem(
    root: str | Path | None = None,
    *,
    model: str | Path | None = None,
    sets: Sequence[str] = DEFAULT_SETS,
    tuning: str = "full",
    seed: int = 0,
    epochs: int = 2,
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
    """Return the problem of merging encoders fine-tuned on real text sets, under frozen heads.

    One metric per set: the accuracy on ``size`` held-out texts under the set's own head (to
    maximise), named like the set. Missing experts are trained first, in some minutes each; where
    that was interrupted, it goes on.

    Args:
        root: Folder of the sets; None takes it from the environment variable ``MAP_BO_DATA``.
        model: Folder of an encoder of transformers with its tokenizer; None takes
            all-MiniLM-L6-v2 (22.7 M weights).
        sets: Which sets, two or more of ``TEXT_SETS``.
        tuning: ``"full"``, or ``"lora"`` for adapters of rank 8.
        seed: Seed of the training (not of any search).
        epochs: Passes of an expert over its 960 training texts.
        size: How many held-out texts an evaluation uses per set, the same every time.
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
        CheckpointError: When the encoder cannot be read.
        DataError: When the folder or a set is not there, a setting is not possible, or the cache
            cannot be written.
        MissingDependencyError: When an optional package is missing.
    """
    zoo = TextZoo(check_sets(sets), tuning, seed, epochs, root, model)
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


def fit_head(model: nn.Module, tokens: Tokens, part: TextSelection) -> dict[str, Tensor]:
    """Return ``weight`` (``classes x width``) and ``bias`` (``classes``) of a set's linear head.

    Logistic regression with a penalty on the squared weights, on the model's features of the
    training texts.
    """
    from sklearn.linear_model import LogisticRegression

    rows = torch.tensor([len(text) for text in tokens.ids]).argsort(stable=True)
    with torch.inference_mode():
        parts = [
            features(model, *tokens.padded(batch.tolist())).double()
            for batch in torch.split(rows, BATCH)
        ]
    found = torch.cat(parts)[rows.argsort()]
    # Tight enough that the result does not hang on the number of iterations.
    fit = LogisticRegression(C=_PENALTY, max_iter=5000, tol=1e-6)
    fit.fit(found.numpy(), list(part.train_labels))
    weight, bias = torch.from_numpy(fit.coef_), torch.from_numpy(fit.intercept_)
    if len(weight) == 1:  # of two classes there is the difference alone
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return {"weight": weight.float().contiguous(), "bias": bias.float().contiguous()}


def _head(folder: Path) -> tuple[Tensor, Tensor]:
    weights = read_network(folder / "head.safetensors")
    assert weights is not None
    return weights["weight"], weights["bias"]


@lru_cache(maxsize=64)
def _tokens(base: Path, texts: tuple[str, ...]) -> Tokens:
    tokenizer: Callable[..., Mapping[str, list[list[int]]]] = load_tokenizer(base, "encoder")
    encoded = tokenizer(list(texts), truncation=True, max_length=MOST_TOKENS)
    return Tokens(tuple(tuple(text) for text in encoded["input_ids"]))
