"""Texts as tokens: which tokenizer, whether it is the model's, and batches of what it returns."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from map_bo.cached import cache_root, kept
from map_bo.errors import EvaluationError, first_line, require
from map_bo.evaluators.evaluator import device_of
from map_bo.evaluators.isolation.quiet import quiet
from map_bo.merging.checkpoints.checkpoint import read_object
from map_bo.merging.checkpoints.hub import hub_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Tokens", "check_vocabulary", "load_tokenizer", "longest_text", "tokenise"]

logger = logging.getLogger(__name__)

_COSTLY = 1_000_000  # characters from which tokens are kept on disk
_NO_LIMIT = 1_000_000  # transformers says 1e30 for a tokenizer that has none
_FULLEST, _PADDING = 0.75, 2400  # least share of rows in use, and most rows that pad any model
_SAME = 0.9  # share of tokens that another version of a model's tokenizer keeps
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_SHIFTED = ("roberta", "camembert", "longformer", "data2vec-text", "mpnet", "esm")
_HINT = "give the folder or hub id of the model's tokenizer: tokenizer='path/or/id'"


@dataclass(frozen=True, eq=False)
class Tokens:
    """Texts as tokens, one after the other.

    Attributes:
        ids: All token numbers, int32.
        types: To which text of a pair each belongs, int32; empty where the tokenizer does not say.
        ends: ``n`` ends of the texts within ``ids``, int64.
        pad: The token that short texts are filled up with.
    """

    ids: Tensor
    types: Tensor
    ends: Tensor
    pad: int = 0

    def __len__(self) -> int:
        return len(self.ends)

    @cached_property
    def lengths(self) -> Tensor:
        """``n`` numbers of tokens, int64."""
        return self.ends.diff(prepend=self.ends.new_zeros(1))

    @cached_property
    def digest(self) -> str:
        """A digest of all tokens."""
        total = hashlib.sha256(str(self.pad).encode())
        for tensor in (self.ids, self.types, self.ends):
            total.update(tensor.numpy().tobytes() + b"|")
        return total.hexdigest()

    def batch(self, items: Tensor, model: nn.Module) -> dict[str, Tensor]:
        """Return what a model is called with, on its device: texts filled up on the right.

        Args:
            items: ``b`` indices of texts.
            model: The model; what its ``forward`` does not know is left out.
        """
        lengths = self.lengths[items]
        places = torch.arange(int(lengths.max()))
        mask = places < lengths.unsqueeze(-1)
        at = ((self.ends[items] - lengths).unsqueeze(-1) + places)[mask]
        shape = mask.shape
        found = {
            "input_ids": torch.full(shape, self.pad).masked_scatter_(mask, self.ids[at].long()),
            "attention_mask": mask.long(),
        }
        if len(self.types) and "token_type_ids" in inspect.signature(model.forward).parameters:
            types = torch.zeros(shape, dtype=torch.int64)
            found["token_type_ids"] = types.masked_scatter_(mask, self.types[at].long())
        device = device_of(model)
        return {name: tensor.to(device) for name, tensor in found.items()}


def load_tokenizer(given: object, model: nn.Module) -> PreTrainedTokenizerBase:
    """Return a tokenizer: the one that was given, of a folder or the hub, or the model's own.

    Args:
        given: A tokenizer, the folder or hub id of one, or None for those of the model.
        model: The model.

    Raises:
        EvaluationError: When there is none.
        MissingDependencyError: Without transformers.
    """
    require("transformers", by="an evaluator of texts", extra="huggingface")
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    if isinstance(given, PreTrainedTokenizerBase):
        return given
    if not isinstance(given, str | Path | None):
        raise EvaluationError(
            f"tokenizer must be a folder, a hub id or a tokenizer, got a {type(given).__name__}",
            hint=_HINT,
        )
    source = _source_of(model) if given is None else str(Path(given).expanduser())
    if not source:
        raise EvaluationError(
            "the model does not say which folder it is of, so its tokenizer is not known",
            hint=_HINT,
        )
    if not Path(source).expanduser().exists() and hub_model(source) is None and "/" in source:
        raise EvaluationError(f"there is no folder {source} with a tokenizer", hint=_HINT)
    try:
        with quiet("transformers", "huggingface_hub", "httpx"):
            found = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    # It raises whatever a missing, foreign or damaged file makes of the code that reads it.
    except Exception as error:
        raise EvaluationError(
            f"the tokenizer of {source} cannot be loaded: {first_line(error)}", hint=_HINT
        ) from error
    if not isinstance(found, PreTrainedTokenizerBase):
        raise EvaluationError(f"{source} holds no tokenizer", hint=_HINT)
    return found


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> None:
    """Refuse a tokenizer of another vocabulary than the model's.

    A model may have more rows than its tokenizer has tokens (they are padded to round numbers), but
    never fewer, nor thousands more. Where the model was loaded from a folder with a tokenizer, the
    numbers of its tokens are compared too.

    Raises:
        EvaluationError: When it is one.
    """
    rows, tokens = _embedded(model), len(tokenizer)
    if rows is not None and (
        tokens > rows or (tokens < _FULLEST * rows and rows - tokens > _PADDING)
    ):
        raise EvaluationError(
            f"the tokenizer has {tokens} tokens, and the model embeds {rows}", hint=_HINT
        )
    source = _source_of(model)
    if not source or not any((Path(source) / name).is_file() for name in _FILES):
        return
    own, given = load_tokenizer(source, model).get_vocab(), tokenizer.get_vocab()
    same = sum(own.get(token) == number for token, number in given.items())
    if same < _SAME * min(len(own), len(given)):
        raise EvaluationError(
            f"{same} of the tokenizer's {len(given)} tokens have the number that they have in the "
            f"tokenizer of {source}",
            hint=_HINT,
        )


def longest_text(tokenizer: PreTrainedTokenizerBase, model: nn.Module, given: int | None) -> int:
    """Return the number of tokens that longer texts are cut to.

    Args:
        tokenizer: The tokenizer.
        model: The model.
        given: What the user asks for; by default as many as model and tokenizer take, and as the
            tokenizer's folder says where it is one of sentence-transformers.

    Raises:
        EvaluationError: When more is asked for than the model has positions.
    """
    positions = _positions(model)
    if given is not None and positions is not None and given > positions:
        raise EvaluationError(
            f"max_length is {given}, and the model reads at most {positions} tokens",
            hint=f"give max_length={positions} or less, or leave it out",
        )
    if given is not None:
        return given
    known = [tokenizer.model_max_length, *([] if positions is None else [positions])]
    folder = tokenizer.name_or_path or _source_of(model)
    said = read_object(Path(folder) / "sentence_bert_config.json") if folder else None
    if said is not None and isinstance(said.get("max_seq_length"), int):
        known.append(max(said["max_seq_length"], 2))
    return int(min([_NO_LIMIT, *known]))


def tokenise(
    tokenizer: PreTrainedTokenizerBase,
    first: Sequence[str],
    second: Sequence[str] | None = None,
    *,
    model: nn.Module,
    max_length: int,
    where: str,
    rows: Sequence[int],
    cache_dir: str | Path | None = None,
) -> Tokens:
    """Return texts, or pairs of texts, as tokens.

    Many are kept on disk, by a digest of texts and tokenizer.

    Args:
        tokenizer: The tokenizer.
        first: ``n`` texts.
        second: ``n`` texts that make pairs with them.
        model: The model.
        max_length: Longer texts, or pairs, are cut to so many tokens.
        where: What they were read from, for errors.
        rows: Where each stands there, from 0.
        cache_dir: Folder above that of the tokens; see `map_bo.cached.cache_root`.

    Raises:
        EvaluationError: For a text of which no token is left, where texts cannot be cut, and where
            the tokenizer knows none of their words.
    """

    def make() -> dict[str, Tensor]:
        texts = (list(first),) if second is None else (list(first), list(second))
        with quiet("transformers"):
            found = tokenizer(*texts, truncation=True, max_length=max_length, verbose=False)
        ids = found["input_ids"]
        types = found.get("token_type_ids") or []
        ends = torch.tensor([len(one) for one in ids]).cumsum(0)
        return {
            "ids": torch.tensor([i for one in ids for i in one], dtype=torch.int32),
            "types": torch.tensor([i for one in types for i in one], dtype=torch.int32),
            "ends": ends,
        }

    if sum(map(len, first)) + sum(map(len, second or ())) < _COSTLY:
        made = make()
    else:
        key = hashlib.sha256(
            json.dumps([first, second, max_length, _identity(tokenizer)]).encode()
        ).hexdigest()
        made = kept(cache_root(cache_dir) / "tokens" / f"{key}.safetensors", make)
    tokens = Tokens(**made, pad=_pad(tokenizer, model))
    empty = (tokens.lengths == 0).nonzero().flatten().tolist()
    if empty:
        raise EvaluationError(
            f"row {rows[empty[0]] + 1} of {where} is a text without any token",
            hint="leave blank texts out",
        )
    if int(tokens.lengths.max()) > max_length:
        raise EvaluationError(
            f"max_length is {max_length}, which leaves no room beside what the tokenizer adds",
            hint="raise max_length",
        )
    _check_known(tokenizer, tokens, where)
    full = int((tokens.lengths >= max_length).sum())
    if full:
        logger.info(
            "%d of %d texts of %s have %d tokens, and are cut if they had more",
            full,
            len(tokens),
            where,
            max_length,
        )
    return tokens


def _check_known(tokenizer: PreTrainedTokenizerBase, tokens: Tokens, where: str) -> None:
    """Refuse texts of which a tokenizer knows nothing, and warn where it knows less than half."""
    unknown = tokenizer.unk_token_id
    if not isinstance(unknown, int):
        return
    added = torch.tensor([one for one in tokenizer.all_special_ids if one != unknown])
    words = tokens.ids[~torch.isin(tokens.ids, added)]
    lost = int((words == unknown).sum())
    if lost and lost == len(words):
        raise EvaluationError(
            f"the tokenizer knows no word of {where}: all {lost} tokens are "
            f"{tokenizer.unk_token!r}",
            hint="give the tokenizer that the model was trained with, and texts in its language",
        )
    if lost > len(words) / 2:
        logger.warning(
            "the tokenizer knows less than half of %s: %d of %d tokens are %r",
            where,
            lost,
            len(words),
            tokenizer.unk_token,
        )


def _source_of(model: nn.Module) -> str:
    """Return the folder or hub id that a model of transformers was made from; else nothing."""
    inner = _of_transformers(model)
    return "" if inner is None else str(inner.name_or_path or "")


def _of_transformers(model: nn.Module) -> PreTrainedModel | None:
    """Return a model of transformers, also one that is part of a larger module, if there is one."""
    from transformers import PreTrainedModel

    return next((one for one in model.modules() if isinstance(one, PreTrainedModel)), None)


def _embedded(model: nn.Module) -> int | None:
    """Return how many tokens a model embeds; of a module of one's own its largest embedding."""
    inner = _of_transformers(model)
    if inner is not None:
        try:
            weight: Any = inner.get_input_embeddings().weight
        except (NotImplementedError, AttributeError):  # of a model that is not of texts
            return None
        return int(weight.shape[0])
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    return max(sizes, default=None)


def _positions(model: nn.Module) -> int | None:
    """Return how many tokens a model can read at once; None where it does not say."""
    settings = settings_of(model)
    if "relative_attention_num_buckets" in settings:
        return None  # T5 and its kin read texts of any length
    for name in _POSITIONS:
        size = settings.get(name)
        if isinstance(size, int) and size > 0:
            kind = str(settings.get("model_type", ""))
            shifted = any(one in kind for one in _SHIFTED)
            padding = settings.get("pad_token_id")
            # These count positions from the number of the padding token on.
            return size - (int(padding) + 1 if shifted and isinstance(padding, int) else 0)
    return None


def settings_of(model: nn.Module) -> Mapping[str, Any]:
    """Return the configuration of a model of transformers as plain data; empty for others."""
    inner = _of_transformers(model)
    if inner is None:
        return {}
    found: dict[str, Any] = inner.config.get_text_config().to_dict()
    return found


def _identity(tokenizer: PreTrainedTokenizerBase) -> list[object]:
    """Return what tells a tokenizer from others."""
    from transformers import PreTrainedTokenizerFast

    if isinstance(tokenizer, PreTrainedTokenizerFast):
        # Not all of it is in the file of the tokenizer itself.
        about = [tokenizer.truncation_side, list(tokenizer.model_input_names)]
        return [type(tokenizer).__name__, tokenizer.backend_tokenizer.to_str(), *about]
    known = sorted(tokenizer.get_vocab().items())
    return [type(tokenizer).__name__, known, repr(tokenizer.init_kwargs)]


def _pad(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> int:
    """Return the token to fill up with: the model's own, by which decoders find a text's end."""
    own = settings_of(model).get("pad_token_id")
    for candidate in (own, tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(candidate, int) and candidate >= 0:
            return candidate
    return 0
