"""What evaluators of texts share: reading and tokenising once, and outputs under a head."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from map_bo.errors import ConfigError, EvaluationError, MapBoError, did_you_mean, first_line
from map_bo.evaluators.data import Data, Examples
from map_bo.evaluators.evaluator import evaluating, logits_of
from map_bo.evaluators.examples import ExampleEvaluator
from map_bo.evaluators.text.heads import FitMethod, Head, fit_head, read_head
from map_bo.evaluators.text.pooling import (
    Pooling,
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
from map_bo.values import real_number, whole_number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["HeadSettings", "TextEvaluator", "by_length", "chosen_metrics", "trial"]


def chosen_metrics(given: str | Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """Return names of metrics that were asked for.

    Raises:
        ConfigError: When one does not exist or comes twice, or there are none.
    """
    names = (given,) if isinstance(given, str) else tuple(given)
    for name in names:
        if name not in known:
            raise ConfigError(
                f"there is no metric {name!r} here",
                hint=did_you_mean(name, known),
            )
    if not names or len(set(names)) < len(names):
        raise ConfigError(
            f"metrics must be different names, got {list(names)}",
            hint=f"choose from {', '.join(known)}",
        )
    return names


@dataclass(frozen=True, eq=False)
class _Ready:
    """What `prepare` found.

    Attributes:
        tokens: The texts.
        targets: ``n`` classes, as rows of the head, or numbers.
        head: The frozen head; None for the model's own.
        pooling: How hidden states are pooled below a frozen head.
        digest: A digest of all that.
    """

    tokens: Tokens
    targets: Tensor
    head: Head | None
    pooling: Pooling
    digest: str


@dataclass(frozen=True)
class HeadSettings:
    """Which head texts are scored with.

    Attributes:
        head: None for the model's own, a safetensors file of a linear layer, or ``"fit"``.
        train: The training split that a head is fitted on.
        pooling: How hidden states are pooled below a frozen head; None for what the tokenizer's
            folder says, else ``mean``.
        fit: How a head is fitted.
        penalty: How strongly its weights are drawn to 0.

    Raises:
        ConfigError: When settings contradict each other or are of a wrong kind.
    """

    head: str | None
    train: Data | None
    pooling: Pooling | None
    fit: FitMethod
    penalty: float

    @classmethod
    def of(
        cls,
        head: str | Path | None,
        train: Data | Mapping[str, Any] | str | None,
        pooling: str | None,
        fit: str,
        penalty: float,
    ) -> HeadSettings:
        """Check the settings."""
        if head is not None and not (isinstance(head, str | Path) and str(head).strip()):
            raise ConfigError(
                f"head must be a file or 'fit', got {head!r}",
                hint="leave it out for the model's own head",
            )
        if head == "fit" and train is None:
            raise ConfigError(
                "head='fit' needs the data that the head is fitted on",
                hint="give train, such as train={'path': ..., 'split': 'train'}",
            )
        if head != "fit" and train is not None:
            raise ConfigError(
                f"train was given, and head is {head!r}, which is not fitted",
                hint="give head='fit', or leave train out",
            )
        if fit not in get_args(FitMethod):
            raise ConfigError(
                f"fit must be one of {', '.join(get_args(FitMethod))}, got {fit!r}",
                hint=did_you_mean(fit, get_args(FitMethod)),
            )
        method: FitMethod = "ridge" if fit == "ridge" else "logistic"
        return cls(
            head=None if head is None else str(head),
            train=None if train is None else Data.of(train),
            pooling=check_pooling(pooling),
            fit=method,
            penalty=real_number("penalty", penalty, above=0.0),
        )


class TextEvaluator(ExampleEvaluator):
    """Texts, or pairs of texts, whose outputs under a head are scored one by one.

    Args:
        data: The examples; see :class:`~map_bo.evaluators.data.Data`.
        roles: Roles of their texts: one, or two for pairs.
        target: Role of what is predicted.
        labelled: Whether that is read; a head may be fitted to it in any case.
        head: Which head.
        tokenizer: Its folder or hub id, or a tokenizer.
        max_length: Longer texts are cut to so many tokens.
        batch_size: Texts per forward pass.
        cache_dir: Folder above what is kept on disk.
    """

    def __init__(
        self,
        *,
        data: Data | Mapping[str, Any] | str,
        roles: tuple[str, ...],
        target: str,
        labelled: bool = True,
        head: HeadSettings,
        tokenizer: object,
        max_length: int | None,
        batch_size: int,
        cache_dir: str | Path | None,
    ) -> None:
        super().__init__(batch_size=batch_size)
        self.data = Data.of(data)
        self.roles, self.target, self.labelled = roles, target, labelled
        self.head = head
        self.tokenizer = tokenizer
        self.max_length = (
            None if max_length is None else whole_number("max_length", max_length, least=2)
        )
        self.cache_dir = cache_dir
        self._state: _Ready | None = None

    @property
    def ready(self) -> _Ready:
        """What `prepare` found.

        Raises:
            EvaluationError: Before `prepare`.
        """
        return self.require_ready(self._state, "the texts have not been read")

    @property
    def reads_head(self) -> bool:
        """Whether the model's own head is scored, and not a frozen one."""
        return self.head.head is None

    @property
    def size(self) -> int:
        """The number of examples."""
        return len(self.ready.tokens)

    @property
    def digest(self) -> str:
        """A digest of tokens, targets, head and metrics."""
        return self.ready.digest

    @abstractmethod
    def targets_of(
        self, examples: Examples, outputs: int, head: Head | None, model: nn.Module
    ) -> Tensor:
        """Return what the outputs are compared with, ``n``; refuse a head that does not fit.

        Args:
            examples: The examples.
            outputs: How many outputs the head has.
            head: The frozen head; None for the model's own.
            model: The model.

        Raises:
            EvaluationError: When examples and head do not fit.
        """

    @abstractmethod
    def fitted_to(self, examples: Examples) -> tuple[list[float], tuple[str, ...] | None, int]:
        """Return what a head is fitted to.

        Returns:
            One class index or number per example, the names of the classes, and how many there
            are: 0 for numbers.

        Raises:
            EvaluationError: When no head can be fitted to them.
        """

    def prepare(self, model: nn.Module) -> None:
        """Read and tokenise the texts, fit the head, and refuse what does not fit.

        Args:
            model: The model with the weights of the base, and with the task's head if it has one.

        Raises:
            EvaluationError: When data, tokenizer, head and model do not fit each other.
            MissingDependencyError: Without a package that is needed.
        """
        examples = self._read()
        tokenizer = load_tokenizer(self.tokenizer, model)
        check_vocabulary(tokenizer, model)
        longest = longest_text(tokenizer, model, self.max_length)
        tokens = self._tokens(examples, tokenizer, longest, model)
        pooling: Pooling = self.head.pooling or "mean"
        if self.head.head is not None and self.head.pooling is None:
            pooling = pooling_of_folder(self.tokenizer)
        head: Head | None = None
        with evaluating(model):
            if self.head.head is None:
                outputs = len(trial(model, tokens, None, pooling))
            else:
                width = len(trial(model, tokens, Head(torch.empty(0, 0), torch.empty(0)), pooling))
                if self.head.train is None:
                    head = read_head(self.head.head)
                else:
                    head = self._fitted(model, self.head.train, tokenizer, longest, pooling)
                if head.weight.shape[1] != width:
                    raise EvaluationError(
                        f"the head {self.head.head} is for {head.weight.shape[1]} features, and "
                        f"{type(model).__name__} has {width}",
                        hint="give a head of this model",
                    )
                outputs = len(head.weight)
        targets = self.targets_of(examples, outputs, head, model)
        content = [
            tokens.digest,
            targets.tolist(),
            head and [head.digest, pooling],
            [metric.name for metric in self.metrics],
        ]
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        self._state = _Ready(tokens, targets, head, pooling, digest)

    def check_data(self) -> None:
        """Read the texts, and those that a head is fitted on; see `ExampleEvaluator`."""
        self._read()
        if self.head.train is not None:
            self.head.train.read((*self.roles, self.target))

    def score(self, model: nn.Module, items: Tensor) -> Tensor:
        """Return the outcome of each of some examples; see `ExampleEvaluator.score`.

        Those of like lengths make a batch, so that little is filled up.
        """
        return by_length(super().score, self.ready.tokens, model, items)

    def outputs(self, model: nn.Module, items: Tensor) -> Tensor:
        """Return what a model says of one batch, ``b x k``, float32, on the CPU.

        Args:
            model: The model, in evaluation mode.
            items: ``b`` indices of examples.
        """
        ready = self.ready
        return _outputs(model, ready.tokens, items, ready.head, ready.pooling)

    def _read(self) -> Examples:
        return self.data.read((*self.roles, self.target) if self.labelled else self.roles)

    def _tokens(
        self,
        examples: Examples,
        tokenizer: PreTrainedTokenizerBase,
        longest: int,
        model: nn.Module,
    ) -> Tokens:
        return tokenise(
            tokenizer,
            *(examples.texts(role) for role in self.roles),
            model=model,
            max_length=longest,
            where=examples.where,
            rows=examples.rows,
            cache_dir=self.cache_dir,
        )

    def _fitted(
        self,
        model: nn.Module,
        train: Data,
        tokenizer: PreTrainedTokenizerBase,
        longest: int,
        pooling: Pooling,
    ) -> Head:
        examples = train.read((*self.roles, self.target))
        targets, names, classes = self.fitted_to(examples)
        head = fit_head(
            model,
            self._tokens(examples, tokenizer, longest, model),
            targets,
            classes=classes or None,
            method=self.head.fit,
            penalty=self.head.penalty,
            pooling=pooling,
            batch_size=self.batch_size,
            cache_dir=self.cache_dir,
        )
        return replace(head, labels=names)


def by_length(
    score: Callable[[nn.Module, Tensor], Tensor], tokens: Tokens, model: nn.Module, items: Tensor
) -> Tensor:
    """Return what ``score`` returns, called with the longest texts first.

    Args:
        score: `ExampleEvaluator.score`, which refuses indices that are not possible.
        tokens: The texts.
        model: The model.
        items: Indices of texts.
    """
    items = torch.as_tensor(items, device="cpu")
    usual = items.dim() == 1 and len(items) > 0 and not items.is_floating_point()
    if not usual or int(items.min()) < 0 or int(items.max()) >= len(tokens):
        return score(model, items)
    order = tokens.lengths[items].argsort(descending=True, stable=True)
    outcomes = score(model, items[order])
    return torch.empty_like(outcomes).index_copy_(0, order, outcomes)


def trial(model: nn.Module, tokens: Tokens, head: Head | None, pooling: Pooling) -> Tensor:
    """Return the outputs, or below a frozen head the features, of the longest text.

    Raises:
        EvaluationError: When the model cannot be called on texts, or returns something else.
    """
    item = tokens.lengths.argmax().reshape(1)
    try:
        with torch.inference_mode():
            if head is None:
                return _outputs(model, tokens, item, None, pooling)[0]
            return features(model, tokens, item, pooling)[0]
    except MapBoError:
        raise
    except Exception as error:  # of whatever module it is
        raise EvaluationError(
            f"{type(model).__name__} cannot be called on a text: {type(error).__name__}: "
            f"{first_line(error)}",
            hint="give a model that takes input_ids and attention_mask, as those of transformers",
        ) from error


def _outputs(
    model: nn.Module, tokens: Tokens, items: Tensor, head: Head | None, pooling: Pooling
) -> Tensor:
    if head is not None:
        return head(features(model, tokens, items, pooling)).cpu()
    with _padding_known(model, tokens.pad):
        output = model(**tokens.batch(items, model))
    try:
        logits = logits_of(output).float().cpu()
    except EvaluationError as error:
        raise EvaluationError(
            f"{type(model).__name__} has no head: it returned a {type(output).__name__} without "
            "logits",
            hint="call the task like the expert whose head it needs, or say whose: "
            "heads={task: expert}; or give a frozen head: head='fit' or a file",
        ) from error
    if logits.dim() != 2:
        raise EvaluationError(
            f"{type(model).__name__} returned outputs of shape {list(logits.shape)}, not one row "
            "per text",
            hint="give a model with a classification head, or a frozen one: head='fit' or a file",
        )
    return logits


@contextmanager
def _padding_known(model: nn.Module, pad: int) -> Iterator[None]:
    """Tell a decoder with a head which token to skip at the end, where it was not told."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        yield
        return
    settings = vars(model.config.get_text_config())
    if settings.get("pad_token_id", pad) is not None:
        yield
        return
    settings["pad_token_id"] = pad
    try:
        yield
    finally:
        settings["pad_token_id"] = None
