"""Experts whose vocabulary is not the base's: embeddings with more, fewer or moved rows.

Tokens that fine-tuning added, and padding of the embedding to a multiple of 64, change the
number of rows of the input embedding and of the output head. Such an expert is refused unless a
rule is asked for; then it is presented in the base's shapes, and all else stays as it is. Tokens
are matched by the vocabularies of the tokenizers, which are read as plain JSON.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from map_bo.errors import CheckpointError, MergeError, first_line, listed
from map_bo.foreign import read_json, read_text, understood
from map_bo.merging.checkpoints.checkpoint import Checkpoint
from map_bo.merging.checkpoints.read_sharded import require_inside
from map_bo.merging.checkpoints.tensors import Layout, buffer_for

__all__ = [
    "VocabularyRule",
    "fit_vocabulary",
    "is_output_layer",
    "require_shapes",
    "token_ids",
]

VocabularyRule = Literal["base", "tokens"]
"""How rows of an expert's embeddings are matched to the base's: by position, or by token."""

_EMBEDDING = re.compile(
    r"(^|\.)("
    r"((embed_tokens|embed_in|wte|word_embeddings?|tok_embeddings?|token_embeddings?"
    r"|embed|embeddings?|shared)\.weight)"
    r"|((lm_head|embed_out|output_embeddings?|predictions\.decoder|lm_head\.decoder)"
    r"\.(weight|bias))"
    r"|predictions\.bias)$"
)
_OUTPUT = re.compile(
    r"(^|\.)(lm_head|embed_out|output_embeddings?|predictions\.decoder|lm_head\.decoder)\."
    r"(weight|bias)$"
)
_ACROSS = re.compile(r"(^|\.)final_logits_bias$")  # 1 x vocabulary, in BART and its kin
_ARCHITECTURE = "experts must be fine-tuned from this base, with the same architecture"

_FETCH = "fetch the tokenizer's files again, or merge without a vocabulary rule"


def is_output_layer(name: str, *, inputs: bool = False) -> bool:
    """Return whether a tensor of this name is of the output layer over a vocabulary.

    Args:
        name: The name.
        inputs: Whether the embeddings of the input count too.
    """
    return bool((_EMBEDDING if inputs else _OUTPUT).search(name))


def fit_vocabulary(
    expert: Checkpoint, base: Checkpoint, rule: VocabularyRule, *, label: str = "expert"
) -> Checkpoint:
    """Present an expert in the shapes of a base with another vocabulary.

    Only tensors of the vocabulary are touched: the input embedding, the output head and its
    bias. These are the floating matrices and vectors whose rows number the vocabulary in base
    and expert, which is ``vocab_size`` of ``config.json``, or the rows of tensors with a usual
    name (``embed_tokens``, ``wte``, ``word_embeddings``, ``lm_head``, ``predictions.decoder``
    and so on). Where that number is a width of the model too, names alone decide. Every other
    difference in shape stays for the merge to refuse.

    - ``"base"``: row ``i`` is row ``i``. Rows beyond the base's are dropped; rows that the
      expert lacks are the base's own, so that its task vector is zero there. Where both have a
      tokenizer, a token with different ids is refused.
    - ``"tokens"``: rows are matched by the token that they stand for, also where shapes agree.
      Rows of tokens that the expert lacks are the base's own; rows of tokens that the base
      lacks are dropped; rows without a token in both (padding) are matched by position.

    Args:
        expert: The expert as given. Its digest, source and folder stay what they are.
        base: The base.
        rule: How rows are matched.
        label: The expert's name, for errors.

    Returns:
        The expert itself where nothing has to change. Else a checkpoint whose
        ``vocabulary_changes`` say what was done, and which reads the expert and the base as its
        tensors are loaded.

    Raises:
        MergeError: For an unknown rule; when tokens have moved under ``"base"``; when a
            tokenizer or an embedding cannot be found under ``"tokens"``.
        CheckpointError: When a tokenizer's file is damaged.
    """
    if rule not in get_args(VocabularyRule):
        raise MergeError(
            f"the vocabulary rule must be 'base' or 'tokens', got {rule!r}",
            hint="'base' matches rows by position, 'tokens' by token",
        )
    if isinstance(expert, _Fitted):
        return expert
    tensors = dict(_vocabulary(expert, base))
    if rule == "tokens":
        match = _by_token(expert, base, label, found=bool(tensors))
    else:
        _require_ids(expert, base, label)
        match = _by_position
    rows = {
        name: _Rows.of(expert, base, name, other, axis, match)
        for name, (other, axis) in tensors.items()
    }
    changed = {name: part for name, part in rows.items() if not part.is_identity}
    return _Fitted(expert, base, changed, rule) if changed else expert


def require_shapes(
    base: Checkpoint, expert: Checkpoint, label: str, own: Mapping[str, str]
) -> None:
    """Refuse an expert with other shapes than the base.

    Args:
        base: The base.
        expert: The expert.
        label: The expert's name.
        own: Name in the base -> name of the same tensor in the expert.

    Raises:
        MergeError: With all that differs, and, where only the vocabulary does, the way on.
    """
    different = {n: mine for n, mine in own.items() if expert.shape(mine) != base.shape(n)}
    if not different:
        return
    words = {name for name, _ in _vocabulary(expert, base)}
    others = [name for name, mine in different.items() if mine not in words]
    # What no rule can fix comes first.
    texts = [
        f"{name} {list(expert.shape(different[name]))} against {list(base.shape(name))}"
        for name in (*others, *(name for name in different if name not in others))
    ]
    message = f"expert {label!r} has other shapes than the base: {listed(texts)}"
    if others:
        raise MergeError(message, hint=_ARCHITECTURE)
    raise MergeError(
        f"{message}; only its vocabulary differs",
        hint="vocabulary='base' fits it to the base by position (further rows are dropped, "
        "missing ones stay the base's), vocabulary='tokens' by token; on the command line "
        "problem.vocabulary=base",
    )


@dataclass(frozen=True)
class _Rows:
    """Which rows of one tensor come from the expert: row ``target[k]`` is its ``source[k]``."""

    base_name: str
    axis: int
    source: Tensor
    target: Tensor
    here: int  # rows of the expert
    there: int  # rows of the base

    @classmethod
    def of(
        cls, expert: Checkpoint, base: Checkpoint, name: str, other: str, axis: int, match: _Match
    ) -> _Rows:
        here, there = expert.shape(name)[axis], base.shape(other)[axis]
        source, target = match(here, there)
        return cls(other, axis, source, target, here, there)

    @property
    def is_identity(self) -> bool:
        same = self.here == self.there == len(self.source)
        return same and torch.equal(self.source, self.target)

    def plain(self) -> dict[str, int]:
        kept = len(self.source)
        return {"kept": kept, "dropped": self.here - kept, "unchanged": self.there - kept}


class _Match:
    """Expert's rows, base's rows -> source and target rows, both ascending in the target."""

    def __call__(self, here: int, there: int) -> tuple[Tensor, Tensor]:
        rows = torch.arange(min(here, there))
        return rows, rows


_by_position = _Match()


class _TokenMatch(_Match):
    def __init__(self, of_expert: Mapping[str, int], of_base: Mapping[str, int]) -> None:
        self._pairs = {number: of_expert[t] for t, number in of_base.items() if t in of_expert}
        self._named = (frozenset(of_expert.values()), frozenset(of_base.values()))

    def __call__(self, here: int, there: int) -> tuple[Tensor, Tensor]:
        pairs = {t: s for t, s in self._pairs.items() if 0 <= t < there and 0 <= s < here}
        for row in range(min(here, there)):
            if not any(row in named for named in self._named):
                pairs[row] = row
        target = sorted(pairs)
        return torch.tensor([pairs[t] for t in target], dtype=torch.long), torch.tensor(
            target, dtype=torch.long
        )


def _by_token(expert: Checkpoint, base: Checkpoint, label: str, *, found: bool) -> _Match:
    if not found:
        raise MergeError(
            f"no embedding was found in the base and expert {label!r} to match by token",
            hint="the vocabulary rule knows usual names such as embed_tokens, wte and lm_head, and "
            "vocab_size of config.json; leave the rule out where the model has no vocabulary",
        )
    ids = []
    for checkpoint, what in ((expert, f"expert {label!r}"), (base, "the base")):
        known = token_ids(checkpoint.directory)
        if known is None:
            raise MergeError(
                f"{what} ({checkpoint.source}) has no tokenizer to match rows by token",
                hint="put tokenizer.json or vocab.json beside the weights and config.json, or use "
                "vocabulary='base' where ids have not moved",
            )
        ids.append(known)
    return _TokenMatch(*ids)


def _require_ids(expert: Checkpoint, base: Checkpoint, label: str) -> None:
    own, pre = token_ids(expert.directory), token_ids(base.directory)
    if own is None or pre is None:
        return
    moved = [token for token, number in pre.items() if own.get(token, number) != number]
    if moved:
        texts = [f"{token!r} is {own[token]} against {pre[token]}" for token in moved]
        raise MergeError(
            f"expert {label!r} has other ids than the base for {len(moved)} tokens: "
            f"{listed(texts, 3)}",
            hint="vocabulary='tokens' matches the rows by token",
        )


def _vocabulary(expert: Checkpoint, base: Checkpoint) -> Iterator[tuple[str, tuple[str, int]]]:
    """Yield the expert's name, the base's name and the axis of every tensor of the vocabulary."""
    sizes, own_sizes = _sizes(base), _sizes(expert)
    for name, other in _counterparts(expert, base).items():
        mine, theirs = expert.layout(name), base.layout(other)
        across = bool(_ACROSS.search(other)) and theirs.shape[:-1] == (1,)
        axis = 1 if across else 0
        if not (mine.dtype.is_floating_point and theirs.dtype.is_floating_point):
            continue
        if len(mine.shape) != len(theirs.shape) or len(theirs.shape) not in (1, 2):
            continue
        if len(theirs.shape) == 2 and mine.shape[1 - axis] != theirs.shape[1 - axis]:
            continue
        by_name = across or bool(_EMBEDDING.search(other))
        by_size = theirs.shape[0] in sizes and (not own_sizes or mine.shape[0] in own_sizes)
        if by_name or by_size:
            yield name, (other, axis)


def _sizes(checkpoint: Checkpoint) -> set[int]:
    """Return the sizes of the vocabulary that tell its tensors from others."""
    sizes = set(_configured_sizes(checkpoint.directory))
    widths: set[int] = set()
    for name in checkpoint.names:
        shape = checkpoint.shape(name)
        if len(shape) == 2 and _EMBEDDING.search(name):
            sizes.add(shape[0])
        if len(shape) >= 2 and not _ACROSS.search(name):
            widths.update(shape[1:])
    return sizes - widths


def _configured_sizes(directory: Path | None) -> Iterator[int]:
    """Yield each ``vocab_size`` of a configuration, those of its parts included."""
    try:
        config = {} if directory is None else read_json(directory / "config.json")
    except (OSError, ValueError):
        return  # whoever needs the configuration says so; names still tell embeddings
    for part in (config, *config.values()) if isinstance(config, dict) else ():
        size = part.get("vocab_size") if isinstance(part, dict) else None
        if isinstance(size, int):
            yield size


def _counterparts(expert: Checkpoint, base: Checkpoint) -> dict[str, str]:
    """Return the base's name for each of the expert's tensors that the base has."""
    known = set(base.names)
    groups: dict[str, list[str]] = {}
    for name in expert.names:
        groups.setdefault(expert.ties.get(name, name), []).append(name)
    return {
        name: name if name in known else present[0]
        for group in groups.values()
        if (present := [name for name in group if name in known])
        for name in group
    }


class _FittedReader:
    """The expert's tensors, those of the vocabulary in the base's shapes."""

    def __init__(self, expert: Checkpoint, base: Checkpoint, rows: Mapping[str, _Rows]) -> None:
        self._expert, self._base, self._rows = expert, base, rows
        self.layouts: Mapping[str, Layout] = {
            name: self._layout(name) if name in rows else expert.layout(name)
            for name in expert.names
        }

        def of_base(name: str) -> str:
            other = rows[name].base_name
            return base.ties.get(other, other)

        # A tie of tensors that the base keeps apart ends where rows of the base come in.
        self.ties: Mapping[str, str] = {
            alias: kept
            for alias, kept in expert.ties.items()
            if alias not in rows or of_base(alias) == of_base(kept)
        }

    def _layout(self, name: str) -> Layout:
        part, own = self._rows[name], self._expert.layout(name)
        given = self._base.layout(part.base_name)
        # Rows of the base must come out as they are: rounded, their task vector is not zero.
        if 1 in (own.dtype.itemsize, given.dtype.itemsize):
            return Layout(given.shape, torch.float32)
        return Layout(given.shape, torch.promote_types(own.dtype, given.dtype))

    def load(self, name: str) -> Tensor:
        if name not in self._rows:
            return self._expert.load(name)
        shape = self.layouts[name].shape
        return self.read(name, 0, shape.numel()).view(shape)

    def read(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return the row-major elements ``start`` to ``stop`` of one tensor, in ``out`` if given.

        Of an embedding no more is read than the rows that the piece touches, and, where tokens
        moved, those between the first and the last of them in the expert.
        """
        if name not in self._rows:
            return self._expert.read(name, start, stop, out=out)
        piece = self._gather(name, start, stop)
        return piece if out is None else buffer_for(len(piece), piece.dtype, out).copy_(piece)

    def _gather(self, name: str, start: int, stop: int) -> Tensor:
        part, layout = self._rows[name], self.layouts[name]
        width = max(1, layout.shape.numel() // max(1, part.there))
        first, last = start // width, -(-stop // width)
        pre = self._base.read(part.base_name, first * width, last * width)
        rows = pre.detach().to(layout.dtype, copy=True).view(last - first, width)
        begin, end = torch.searchsorted(part.target, torch.tensor([first, last])).tolist()
        source = part.source[begin:end]
        if len(source):
            low, high = int(source.min()), int(source.max()) + 1
            tuned = self._expert.read(name, low * width, high * width).detach()
            chosen = tuned.view(high - low, width)[source - low]
            rows[part.target[begin:end] - first] = chosen.to(layout.dtype)
        return rows.view(-1)[start - first * width : stop - first * width]

    def version(self) -> object | None:
        return None


class _Fitted(Checkpoint):
    """An expert in the base's shapes, with the digest of the expert as given."""

    def __init__(
        self, expert: Checkpoint, base: Checkpoint, rows: Mapping[str, _Rows], rule: str
    ) -> None:
        super().__init__(
            _FittedReader(expert, base, rows), source=expert.source, directory=expert.directory
        )
        self._given = expert
        self._changes = {
            "vocabulary": rule,
            "rows": {name: part.plain() for name, part in rows.items()},
        }

    @property
    def vocabulary_changes(self) -> Mapping[str, Any]:
        return {**self._given.vocabulary_changes, **self._changes}

    @property
    def original(self) -> Checkpoint:
        return self._given

    @property
    def configuration(self) -> Mapping[str, Any] | None:
        return self._given.configuration

    def digest(self) -> str:
        return self._given.digest()


def token_ids(folder: Path | None) -> dict[str, int] | None:
    """Return token -> id of the tokenizer in a folder, added tokens included.

    Read are, in this order, the first that there is: ``tokenizer.json`` (its ``model.vocab``,
    whether a mapping or the list of a unigram model), ``vocab.json``, ``vocab.txt`` (one token a
    line). Added tokens come from ``added_tokens`` of ``tokenizer.json``, from
    ``added_tokens.json`` and from ``added_tokens_decoder`` of ``tokenizer_config.json``. A
    sentencepiece ``tokenizer.model`` alone is not read.

    Args:
        folder: The folder, or None for a checkpoint without one.

    Returns:
        The ids, or None where there is none of these files.

    Raises:
        CheckpointError: When a file is damaged.
    """
    if folder is None:
        return None
    with understood(CheckpointError, f"the vocabulary in {folder}", hint=_FETCH):
        return _ids_in(folder)


def _ids_in(folder: Path) -> dict[str, int] | None:
    ids = _fast_tokenizer_ids(folder)
    if ids is None:
        ids = _mapping_ids(folder / "vocab.json")
    if ids is None:
        ids = _line_ids(folder / "vocab.txt")
    if ids is None:
        return None
    ids |= _mapping_ids(folder / "added_tokens.json") or {}
    further = (_read_json(folder / "tokenizer_config.json") or {}).get("added_tokens_decoder")
    if isinstance(further, Mapping):
        for number, token in further.items():
            if isinstance(token, Mapping) and str(number).isdecimal():
                ids[str(token.get("content"))] = int(number)
    return ids


def _fast_tokenizer_ids(folder: Path) -> dict[str, int] | None:
    file = folder / "tokenizer.json"
    content = _read_json(file)
    if content is None:
        return None
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    try:
        if isinstance(vocabulary, Mapping):
            ids = {str(token): int(number) for token, number in vocabulary.items()}
        elif isinstance(vocabulary, list):  # unigram: pairs of token and score, by id
            ids = {str(pair[0]): number for number, pair in enumerate(vocabulary)}
        else:
            raise TypeError("it has no model.vocab")
        added = content.get("added_tokens") or []
        return ids | {str(token["content"]): int(token["id"]) for token in added}
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise _damage_error(file, error) from error


def _mapping_ids(file: Path) -> dict[str, int] | None:
    content = _read_json(file)
    if content is None:
        return None
    try:
        return {str(token): int(number) for token, number in content.items()}
    except (TypeError, ValueError) as error:
        raise _damage_error(file, error) from error


def _line_ids(file: Path) -> dict[str, int] | None:
    if not file.is_file():
        return None
    require_inside(file)
    try:
        # Not splitlines: a token may be any other separator of lines.
        lines = read_text(file).removesuffix("\n").split("\n")
    except (OSError, ValueError) as error:
        raise _damage_error(file, error) from error
    return {token.removesuffix("\r"): number for number, token in enumerate(lines)}


def _read_json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    require_inside(file)
    try:
        content = read_json(file)
    except (OSError, ValueError) as error:
        raise _damage_error(file, error) from error
    if not isinstance(content, dict):
        raise _damage_error(file, TypeError("it is no JSON object"))
    return content


def _damage_error(file: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"{file} cannot be read as a vocabulary: {first_line(error)}",
        hint=_FETCH,
    )
