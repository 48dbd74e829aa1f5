"""Blocks of tensors that share a coefficient: given by patterns, or found from names and norms."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from map_bo.errors import MergeError
from map_bo.merging.layout import FlatLayout
from map_bo.merging.messages import listed

__all__ = ["Blocks", "balanced_blocks", "kind_blocks", "layer_blocks", "named_blocks"]

_REST = "*"
# Tried in this order: attention and embeddings have norms, a head has layers like any other, and
# attention has embeddings of positions.
_KINDS = (
    ("norm", r"norm|\bln_?\w*\b|\bbn\w*\b"),
    ("head", r"\bhead\b|classifier|pooler|\bscore\b|output_projection"),
    ("attention", r"att(entio)?n|\b[qkvo]_?proj\b|\bqkv\b|\bquery\b|\bkey\b|\bvalue\b"),
    ("embedding", r"embed|\bwte\b|\bwpe\b|position|patch|\bcls_token\b|^shared\b"),
    ("mlp", r"mlp|ffn|feed_?forward|\bfc\w*\b|dense|experts|intermediate|\bw[123]\b|proj"),
)
_ORDER = ("embedding", "norm", "attention", "mlp", "head", "other")


@dataclass(frozen=True)
class Blocks:
    r"""Named groups of tensors; every tensor belongs to exactly one.

    Attributes:
        patterns: Block name -> regular expression that is searched for in tensor names (for
            example ``r"layers\.[0-5]\."``); ``"*"`` takes the tensors that no other pattern
            takes. None is one block of all tensors. A word such as ``"layers:4"`` waits for the
            names of the tensors, see `map_bo.merging.block_specs`; until then nothing can be asked.

    Raises:
        MergeError: When a pattern is no regular expression, or there are no blocks.
    """

    patterns: Mapping[str, str] | str | None = None

    def __post_init__(self) -> None:
        if self.patterns is None or isinstance(self.patterns, str):
            return
        if not isinstance(self.patterns, Mapping):
            raise MergeError(
                f"blocks are given as a {type(self.patterns).__name__}",
                hint="give {block name: regular expression on tensor names}",
            )
        object.__setattr__(self, "patterns", dict(self.patterns))
        if not self.patterns:
            raise MergeError(
                "there are no blocks", hint="leave out blocks for one coefficient an expert"
            )
        for block, pattern in self.patterns.items():
            if pattern == _REST:
                continue
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise MergeError(
                    f"the pattern {pattern!r} of block {block!r} is no regular expression: {error}",
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
                "map_bo.merging.block_specs.blocks_of",
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
    others is no layer.

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


def kind_blocks(names: Sequence[str]) -> dict[str, str]:
    """Return patterns for kinds of modules: embedding, norm, attention, mlp, head and others.

    The kind is read from common names of modules; a block is made of each kind that occurs.
    """
    kinds: dict[str, list[str]] = {}
    for name in names:
        text = name.lower().replace("_", ".") + "." + name.lower()
        kind = next((k for k, pattern in _KINDS if re.search(pattern, text)), "other")
        kinds.setdefault(kind, []).append(name)
    return named_blocks({kind: kinds[kind] for kind in _ORDER if kind in kinds})


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
