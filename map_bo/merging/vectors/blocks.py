"""Blocks of tensors that share a coefficient: given by patterns, or found from names and norms.

A word such as ``layers:4`` becomes patterns once the tensors of a model are known.

How far a coefficient moves the model is the norm of the block that it scales: a linear merge
``theta(c) = theta_base + sum_{n,b} c_nb v_nb`` moves it by ``|v_nb|`` per unit of ``c_nb``. Blocks
differ in that by orders of magnitude (a matrix against a bias), which a surrogate can know before
the first evaluation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor

from map_bo.errors import MergeError, listed
from map_bo.merging.align.experts import align_names
from map_bo.merging.align.layout import FlatLayout, join_ties
from map_bo.merging.checkpoints.checkpoint import Checkpoint

__all__ = [
    "Blocks",
    "HasBlocks",
    "balanced_blocks",
    "block_norms",
    "blocks_of",
    "depth_blocks",
    "kind_blocks",
    "layer_blocks",
    "named_blocks",
    "relative_importance",
    "with_known_blocks",
]

_REST = "*"
# Parts of models with more than one modality, by the dotted parts of a name. What joins a tower to
# the language model is told first, since it may stand within the tower.
_TOWERS = (
    (
        "connector",
        r"projector|connector|\bmerger|resampler|\bqformer|perceiver|image_newline|"
        r"(?:visual|vision|text|audio|image)_projection|embed_(?:vision|audio)\b|aligner|"
        r"query_tokens|language_projection",
    ),
    ("vision", r"vision_|\bvisual\b|image_encoder|\bvision\b|img_encoder|vpm\b"),
    ("audio", r"audio_|\baudio\b"),
)
# Mixtures of experts. A router may be called gate, which is also a part of a gated layer.
_MIXTURES = (
    (
        "router",
        r"router|shared_expert_gate|e_score_correction_bias|"
        r"(?:mlp|moe|ffn|feed_forward|block_sparse_moe)\.gate\.",
    ),
    ("shared_experts", r"shared_experts?\b|shared_mlp"),
    (
        "experts",
        r"\bexperts?(?:_\d+)?\b|block_sparse_moe\.(?:in|out)put_linear|\bmoe\.(?:in|out)put_linear",
    ),
)
_LANGUAGE = ("attention", "embedding")  # what a language model has beside towers, and no head has
# What comes before the layers, whatever else its name says; and what comes after them.
_BEFORE = (
    r"embed|\bwte\b|\bwpe\b|position|patch|(?:cls|class)_token|\bstem\b|pre_|ln_pre|pre_?layer"
)
_AFTER = (
    r"\bhead\b|_head\b|classifier|pooler|\bscore\b|project|\bproj\b|logit|^fc\b|"
    r"norm|\bln_\w+\b|merger|\bout\b"
)
# Tried in this order: attention and embeddings have norms, a head has layers like any other, and
# attention has embeddings of positions.
_KINDS = (
    ("norm", r"norm|\bln_?\w*\b|\bbn\w*\b"),
    ("head", r"\bhead\b|classifier|pooler|\bscore\b|output_projection"),
    ("attention", r"att(entio)?n|\b[qkvo]_?proj\b|\bqkv\b|\bquery\b|\bkey\b|\bvalue\b"),
    ("embedding", r"embed|\bwte\b|\bwpe\b|position|patch|\bcls_token\b|^shared\b"),
    ("mlp", r"mlp|ffn|feed_?forward|\bfc\w*\b|dense|experts|intermediate|\bw[123]\b|proj"),
)
# A block that an expert left as it was still has a coefficient, and a logarithm is taken of its
# importance.
_LEAST = 1e-2
_DIGITS = 4  # of a norm: sums in another order must not make another problem of the same one

Operator = TypeVar("Operator")

_HINT = "K is a number of blocks; a mapping is {block: regular expression on tensor names}"
_ORDER = (
    "vision",
    "audio",
    "connector",
    "embedding",
    "norm",
    "attention",
    "mlp",
    "router",
    "shared_experts",
    "experts",
    "head",
    "other",
)


@dataclass(frozen=True)
class Blocks:
    r"""Named groups of tensors; every tensor belongs to exactly one.

    Attributes:
        patterns: Block name -> regular expression that is searched for in tensor names (for
            example ``r"layers\.[0-5]\."``); ``"*"`` takes the tensors that no other pattern
            takes. None is one block of all tensors. A word such as ``"layers:4"`` waits for the
            names of the tensors (:func:`blocks_for`); until then nothing can be asked.

    Raises:
        MergeError: When a pattern is no regular expression, or there are no blocks.
    """

    patterns: Mapping[str, str] | str | None = None

    def __post_init__(self) -> None:
        if self.patterns is None or isinstance(self.patterns, str):
            return
        if not isinstance(self.patterns, Mapping):
            raise MergeError(
                f"blocks must be a mapping or a word, got a {type(self.patterns).__name__}",
                hint="give {block name: regular expression on tensor names}",
            )
        object.__setattr__(self, "patterns", dict(self.patterns))
        if not self.patterns:
            raise MergeError(
                "there are no blocks", hint="leave out blocks for one coefficient per expert"
            )
        for block, pattern in self.patterns.items():
            if pattern == _REST:
                continue
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise MergeError(
                    f"the pattern {pattern!r} of block {block!r} is not a regular expression: "
                    f"{error}",
                    hint="write a Python regular expression, or '*' for all other tensors",
                ) from None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the blocks; none where there is one block of all tensors."""
        return tuple(self._known or ())

    def __len__(self) -> int:
        return len(self._known or (0,))

    @property
    def _known(self) -> Mapping[str, str] | None:
        if isinstance(self.patterns, str):
            raise MergeError(
                f"the blocks {self.patterns!r} are not known before the tensors are",
                hint="a merged-model problem finds them in its checkpoints; elsewhere call "
                "map_bo.merging.vectors.blocks.blocks_of",
            )
        return self.patterns

    @cached_property
    def _compiled(self) -> list[re.Pattern[str] | None]:
        patterns = (self._known or {}).values()
        return [None if pattern == _REST else re.compile(pattern) for pattern in patterns]

    def of(self, name: str) -> int:
        """Return the index of the block of a tensor; 0 where there are no patterns.

        Raises:
            MergeError: When no pattern matches the name, or several do.
        """
        if self._known is None:
            return 0
        found = [i for i, p in enumerate(self._compiled) if p is not None and p.search(name)]
        found = found or [i for i, pattern in enumerate(self._compiled) if pattern is None]
        if len(found) != 1:
            taken = listed(self.names[i] for i in found)
            raise MergeError(
                f"tensor {name!r} belongs to the blocks {taken}"
                if found
                else f"tensor {name!r} belongs to no block",
                hint="make the patterns exclude each other; the pattern '*' takes the tensors "
                "that no other pattern takes",
            )
        return found[0]

    def table(self, layout: FlatLayout) -> tuple[int, ...]:
        """Return the block of every slot of a layout.

        Raises:
            MergeError: When a tensor belongs to no block or to several, or a block has none.
        """
        blocks = tuple(self.of(slot.name) for slot in layout.slots)
        empty = [block for i, block in enumerate(self.names) if i not in blocks]
        if empty:
            raise MergeError(
                f"no floating tensor belongs to the blocks {listed(empty)}",
                hint=f"tensors are called, for example, "
                f"{listed(slot.name for slot in layout.slots)}",
            )
        return blocks


@runtime_checkable
class HasBlocks(Protocol):
    """An operator that has a coefficient for each expert and block of tensors."""

    @property
    def blocks(self) -> Mapping[str, str] | str | None:
        """Patterns, a word that waits for the tensors, or None; see `Blocks`."""
        ...

    def with_blocks(self, patterns: Mapping[str, str]) -> Self:
        """Return the same operator with these blocks."""
        ...


def named_blocks(groups: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Return patterns for blocks that are given by the names of their tensors."""
    return {
        block: "^(?:" + "|".join(re.escape(name) for name in sorted(names)) + ")$"
        for block, names in groups.items()
    }


def layer_blocks(names: Sequence[str], groups: int) -> dict[str, str]:
    """Return patterns for ``groups`` runs of neighbouring layers, and one for all other tensors.

    A layer is what a number among the dotted parts of a name says (``model.layers.7.mlp.weight``
    is of layer 7); where a name holds several numbers the first counts. Models whose parts count
    their layers apart (an encoder and a decoder) are told apart by what stands before the number,
    in the order of the names; a part with one number (``classifier.1.weight``) beside
    others is not a layer.

    Args:
        names: Names of the tensors to merge.
        groups: How many blocks to make of the layers, as equal in layers as can be.

    Raises:
        MergeError: When there are fewer layers than groups.
    """
    stacks: dict[str, dict[int, list[str]]] = {}
    for name in names:
        found = re.match(r"(.*?)(?:^|\.)(\d+)\.", name)
        if found:
            stacks.setdefault(found.group(1), {}).setdefault(int(found.group(2)), []).append(name)
    order = [
        members
        for stack in stacks.values()
        if len(stack) > 1 or len(stacks) == 1
        for _, members in sorted(stack.items())
    ]
    layered = {name for members in order for name in members}
    rest = [name for name in names if name not in layered]
    if not 1 <= groups <= len(order):
        raise MergeError(
            f"the model has {len(order)} numbered layers and {groups} blocks of them were asked "
            "for",
            hint=f"ask for 1 to {len(order)}, or give patterns"
            if order
            else "give patterns: {block: regular expression on tensor names}",
        )
    edges = [round(k * len(order) / groups) for k in range(groups + 1)]
    blocks = {
        f"layers{k + 1}": [n for members in order[edges[k] : edges[k + 1]] for n in members]
        for k in range(groups)
    }
    return named_blocks({**blocks, **({"rest": rest} if rest else {})})


def depth_blocks(names: Sequence[str]) -> dict[str, str]:
    """Return patterns for blocks of equal depth, by their positions from 0 (first) to 1 (last).

    A layer is what the first number among the dotted parts of a name says, as in `layer_blocks`;
    where the part before it ends with a number (``layer3.0.conv1`` of a ResNet) that number counts
    first. Each stack of layers (an encoder, a decoder, a vision tower) goes from 0 to 1. Of the
    tensors outside, embeddings are at 0, and norms, projections and heads that follow the layers
    at 1; what is not known stands at 0.

    Args:
        names: Names of the tensors to merge.

    Returns:
        Position, such as ``"0"`` or ``"0.5"``, -> pattern, in ascending order.
    """
    stacks: dict[str, dict[tuple[int, int], list[str]]] = {}
    for name in names:
        found = re.match(r"(.*?)(?:^|\.)(\d+)\.", name)
        if found:
            stem, stage = re.fullmatch(r"(.*?)(\d*)", found.group(1)).groups()  # type: ignore[union-attr]
            layer = (int(stage or 0), int(found.group(2)))
            stacks.setdefault(stem, {}).setdefault(layer, []).append(name)
    positions: dict[str, float] = {}
    for stack in stacks.values():
        if len(stack) > 1 or len(stacks) == 1:
            last = max(len(stack) - 1, 1)
            for k, layer in enumerate(sorted(stack)):
                positions |= dict.fromkeys(stack[layer], k / last)
    groups: dict[float, list[str]] = {}
    for name in names:
        before, after = (re.search(p, name.lower()) for p in (_BEFORE, _AFTER))
        outside = float(after is not None and before is None)
        groups.setdefault(positions.get(name, outside), []).append(name)
    return named_blocks({f"{place:.9g}": groups[place] for place in sorted(groups)})


def kind_blocks(names: Sequence[str]) -> dict[str, str]:
    """Return patterns for kinds of modules, of those that occur, read from common names.

    They are embedding, norm, attention, mlp, head and other; of mixtures of experts router,
    shared_experts and experts; and of models with several modalities vision and audio for whole
    towers, and connector for what joins them to the language model. A model that is a tower alone,
    with a head or without, has the kinds of its modules.
    """
    towers = {name: _first_kind(_TOWERS, name.lower()) for name in names}
    modules = {name: _module_kind(name) for name in names}
    language = any(towers[name] is None and modules[name] in _LANGUAGE for name in names)
    kinds: dict[str, list[str]] = {}
    for name in names:
        kind = (towers[name] if language else None) or modules[name]
        kinds.setdefault(kind, []).append(name)
    return named_blocks({kind: kinds[kind] for kind in _ORDER if kind in kinds})


def _module_kind(name: str) -> str:
    text = name.lower().replace("_", ".") + "." + name.lower()
    return _first_kind(_MIXTURES, name.lower()) or _first_kind(_KINDS, text) or "other"


def _first_kind(patterns: Iterable[tuple[str, str]], text: str) -> str | None:
    return next((kind for kind, pattern in patterns if re.search(pattern, text)), None)


def balanced_blocks(squares: Mapping[str, float], blocks: int) -> dict[str, str]:
    """Return patterns for runs of neighbouring tensors with task vectors of like norm.

    The order of the tensors is kept and the largest sum of a block is as small as can be (the
    linear partition problem, solved exactly), so that every coefficient moves the model about as
    far.

    Args:
        squares: Tensor name -> squared norm of the task vectors there, summed over experts, in
            the order of the tensors.
        blocks: How many blocks.

    Raises:
        MergeError: When there are fewer tensors than blocks.
    """
    names, sizes = list(squares), [float(size) for size in squares.values()]
    if not 1 <= blocks <= len(names):
        raise MergeError(
            f"{blocks} blocks were asked for of {len(names)} tensors",
            hint=f"ask for 1 to {len(names)}",
        )
    sums = [0.0]
    for size in sizes:
        sums.append(sums[-1] + size)
    count = len(names)
    best = [[float("inf")] * (count + 1) for _ in range(blocks + 1)]
    cut = [[0] * (count + 1) for _ in range(blocks + 1)]
    best[0][0] = 0.0
    for k in range(1, blocks + 1):
        for stop in range(k, count - (blocks - k) + 1):
            # The last block grows and the ones before shrink with an earlier cut, so the search
            # ends where the last block alone is worse than what was found.
            for start in range(stop - 1, k - 2, -1):
                last = sums[stop] - sums[start]
                worst = max(best[k - 1][start], last)
                if worst < best[k][stop]:
                    best[k][stop], cut[k][stop] = worst, start
                if last >= best[k][stop]:
                    break
    edges = [count]
    for k in range(blocks, 0, -1):
        edges.append(cut[k][edges[-1]])
    edges.reverse()
    return named_blocks({f"part{k + 1}": names[edges[k] : edges[k + 1]] for k in range(blocks)})


def block_norms(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    block: Callable[[str], int],
    blocks: int,
    *,
    ties: Mapping[str, str] | None = None,
) -> Tensor:
    """Return the Euclidean norms ``N x B`` of all task vectors' blocks, reading tensor by tensor.

    One pass over all checkpoints; tied tensors count once, tensors that are not floating not at
    all.

    Args:
        base: The base checkpoint.
        experts: Name -> checkpoint, with the same tensors as the base.
        block: Canonical tensor name -> index of its block.
        blocks: Number of blocks ``B``.
        ties: Alias -> canonical name of the tensors that are one; by default the base's own.

    Raises:
        MergeError: When an expert has missing or further tensors, or other shapes.
    """
    ties = base.ties if ties is None else ties
    names = {
        expert: align_names(base, checkpoint, expert, ties)
        for expert, checkpoint in experts.items()
    }
    squares = torch.zeros(len(experts), blocks, dtype=torch.float64)
    for name in base.names:
        if name in ties or not base.dtype(name).is_floating_point:
            continue
        where, pre = block(name), base.load(name).double()
        for row, (expert, checkpoint) in enumerate(experts.items()):
            gap = checkpoint.load(names[expert][name]).double() - pre
            squares[row, where] += gap.square().sum()
    return squares.sqrt()


def relative_importance(norms: Tensor) -> tuple[float, ...]:
    """Return ``N x B`` norms as importances, expert by expert, root mean square 1.

    Rounded to four digits, and at least a hundredth, so that every coefficient keeps some.
    """
    flat = norms.flatten()
    size = flat.square().mean().sqrt()
    if not bool(size > 0) or not bool(torch.isfinite(size)):
        return ()  # the merge itself says what is wrong with such experts
    return tuple(float(f"{max(s, _LEAST):.{_DIGITS}g}") for s in (flat / size).tolist())


def blocks_of(
    spec: str,
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    *,
    ties: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the patterns of blocks that are said in a word.

    Args:
        spec: ``"layers:K"``, ``K`` runs of neighbouring layers and the rest (`layer_blocks`);
            ``"kinds"``, kinds of modules (`kind_blocks`); ``"depths"``, positions in depth
            (`depth_blocks`); ``"balanced:K"``, ``K`` runs of neighbouring tensors with task
            vectors of like norm (`balanced_blocks`), for which the checkpoints are read once.
        base: The base checkpoint.
        experts: Name -> checkpoint.
        ties: Further ties of the base.

    Raises:
        MergeError: When the word is unknown, or the model has too few layers or tensors.
    """
    found = re.fullmatch(r"(layers|balanced):(\d+)|kinds|depths", spec.strip())
    if found is None:
        raise MergeError(
            f"blocks must be layers:K, kinds, depths, balanced:K or a mapping, got {spec!r}",
            hint=_HINT,
        )
    layout = FlatLayout.of(base, join_ties(base, ties or {}))
    names = sorted((slot.name for slot in layout.slots), key=_natural)
    if found.group(1) is None:
        return kind_blocks(names) if spec.strip() == "kinds" else depth_blocks(names)
    count = int(found.group(2))
    if found.group(1) == "layers":
        return layer_blocks(names, count)
    index = {name: i for i, name in enumerate(names)}
    norms = block_norms(base, experts, index.__getitem__, len(names), ties=layout.ties)
    squares = norms.square().sum(0).tolist()
    return balanced_blocks(dict(zip(names, squares, strict=True)), count)


def with_known_blocks(
    operator: Operator, base: Checkpoint, experts: Mapping[str, Checkpoint]
) -> Operator:
    """Return the operator with patterns in place of a word, where its blocks are said in one."""
    if isinstance(operator, HasBlocks) and isinstance(operator.blocks, str):
        return operator.with_blocks(blocks_of(operator.blocks, base, experts))
    return operator


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Return a key in whose order layer 2 comes before layer 10."""
    parts = [part for part in re.split(r"(\d+)", name) if part]
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts]
