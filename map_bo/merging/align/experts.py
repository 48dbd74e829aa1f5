"""Whether experts fit their base, in bounded memory, and reading them beside it.

What must fit: names, shapes and kinds of dtype; tensors that are one in the model; tensors that are
not merged; and the weights themselves, which tell whether an expert was fine-tuned from this base.
"""

from __future__ import annotations

import logging
import math
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from map_bo.errors import MergeError, listed
from map_bo.merging.adapters.adapter import Adapter, adapter_over
from map_bo.merging.align.layout import FlatLayout
from map_bo.merging.align.vocabulary import require_shapes
from map_bo.merging.checkpoints.checkpoint import Checkpoint
from map_bo.merging.checkpoints.skeleton import says_tied
from map_bo.merging.checkpoints.tensors import all_finite

__all__ = [
    "BaseSimilarity",
    "ExpertReader",
    "align_names",
    "fixed_tensors",
    "is_the_base",
    "not_finite",
    "note_untied",
    "pieces_of",
    "require_alike",
    "require_distinct",
    "require_finite",
    "require_same_fixed",
    "require_tied",
    "same_values",
    "same_weights",
]

logger = logging.getLogger(__name__)

_HINT = "experts must be fine-tuned from this base, with the same architecture"
_OUTPUT = re.compile(r"(^|\.)(lm_head|embed_out|output_projection|predictions\.decoder)\.weight$")
_INPUT = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|shared)\.weight$"
)
_MISSING = (
    "; missing='base' leaves such tensors as they are in the base (on the command line "
    "problem.missing=base)"
)
_PIECE = 1 << 20  # numbers
# Measured on MLPs for digits: trained from its random start for 2000 steps at a learning rate of
# .01, a model keeps a cosine of .34 with that start; two trainings from different starts have .02.
_UNRELATED = 0.1
_FAR = 0.5
_SAMPLED_TENSORS = 8
_SAMPLED_NUMBERS = 1 << 18
_ENOUGH = 1000  # numbers from which a cosine between unrelated weights is reliably below .1


def align_names(
    base: Checkpoint, expert: Checkpoint, label: str, ties: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return, for each canonical name of the base, the expert's name of the same tensor.

    Args:
        base: The base.
        expert: The expert; of the names of one tensor it may leave out all but one.
        label: The expert's name, for errors.
        ties: Alias -> canonical name of the tensors that are one; by default the base's own.

    Raises:
        MergeError: When the expert has missing or further tensors, or other shapes or kinds of
            dtype.
    """
    ties = base.ties if ties is None else ties
    of_expert, known = set(expert.names), set(base.names)
    groups: dict[str, list[str]] = {name: [name] for name in base.names if name not in ties}
    for name in base.names:
        if name in ties:
            groups[ties[name]].append(name)
    names = {
        canonical: present[0]
        for canonical, group in groups.items()
        if (present := [name for name in group if name in of_expert])
    }
    missing = sorted(set(groups) - set(names))
    # An alias of a tensor that the base has is not a further tensor.
    extra = sorted(name for name in of_expert - known if expert.ties.get(name) not in known)
    if missing:
        raise MergeError(
            f"expert {label!r} lacks {len(missing)} of the base's tensors: {listed(missing)}",
            hint=_HINT + _MISSING,
        )
    if extra:
        raise MergeError(
            f"expert {label!r} has {len(extra)} tensors that the base lacks: {listed(extra)}",
            hint=_HINT,
        )
    require_shapes(base, expert, label, names)
    kinds = [
        f"{name} {expert.dtype(own)} against {base.dtype(name)}"
        for name, own in names.items()
        if _kind(expert.dtype(own)) != _kind(base.dtype(name))
    ]
    if kinds:
        raise MergeError(
            f"expert {label!r} has other kinds of dtype than the base: {listed(kinds)}",
            hint="expand quantised weights before merging",
        )
    return names


def _kind(dtype: torch.dtype) -> str:
    return "complex" if dtype.is_complex else "float" if dtype.is_floating_point else "other"


def pieces_of(count: int) -> Iterator[tuple[int, int]]:
    """Yield first and last index of the pieces in which so many numbers are read."""
    for start in range(0, count, _PIECE):
        yield start, min(start + _PIECE, count)


def same_values(one: Checkpoint, name: str, two: Checkpoint, other: str) -> bool:
    """Return whether two tensors have the same shape and values; dtypes may differ.

    Raises:
        CheckpointError: When a file cannot be read.
    """
    if one.shape(name) != two.shape(other):
        return False
    return all(
        torch.equal(_wide(one.read(name, start, stop)), _wide(two.read(other, start, stop)))
        for start, stop in pieces_of(one.shape(name).numel())
    )


def _wide(piece: Tensor) -> Tensor:
    """Return a piece that can be compared, which float8 cannot."""
    return piece.float() if piece.is_floating_point() and piece.element_size() == 1 else piece


def require_tied(checkpoint: Checkpoint, ties: Mapping[str, str], label: str) -> None:
    """Refuse a checkpoint in which tensors that are one in the model differ.

    Args:
        checkpoint: The checkpoint.
        ties: Alias -> canonical name, under the checkpoint's own names.
        label: What to call it.

    Raises:
        MergeError: When they differ.
    """
    for alias, canonical in ties.items():
        if alias not in checkpoint.names or alias == canonical:
            continue
        if checkpoint.ties.get(alias, alias) == checkpoint.ties.get(canonical, canonical):
            continue
        if not same_values(checkpoint, alias, checkpoint, canonical):
            raise MergeError(
                f"{canonical!r} and {alias!r} are one tensor in the model but differ in {label}",
                hint="use checkpoints that keep them tied, or untie them in the base and model",
            )


def note_untied(base: Checkpoint) -> list[str]:
    """Say where a configuration ties an output layer to the embedding, and their weights differ.

    Returns:
        Sentences, which were logged; empty where there is nothing to say.
    """
    if not says_tied(base):
        return []
    heads = [name for name in base.names if _OUTPUT.search(name)]
    inputs = [name for name in base.names if _INPUT.search(name)]
    notes = [
        f"The base's config.json says tie_word_embeddings, and {head} differs from {name} in its "
        "files: which of them a library loads is its own affair. Set tie_word_embeddings to false "
        "to keep both."
        for head in heads
        for name in inputs
        if head not in base.ties
        and name not in base.ties
        and base.shape(head) == base.shape(name)
        and not same_values(base, head, base, name)
    ]
    for note in notes:
        logger.warning("%s", note)
    return notes


def require_same_fixed(
    base: Checkpoint, name: str, expert: Checkpoint, own: str, label: str
) -> None:
    """Refuse an expert that differs in a tensor that is not merged, by more than a counter.

    Args:
        base: The base.
        name: The tensor.
        expert: The expert.
        own: What the expert calls it.
        label: The expert's name.

    Raises:
        MergeError: When a tensor of more than one element differs.
    """
    masked = name in base.masks
    if (base.shape(name).numel() <= 1 and not masked) or same_values(base, name, expert, own):
        return
    if masked:
        raise MergeError(
            f"tensor {name!r} of the base holds NaN or infinity: it has -inf, and differs in "
            f"expert {label!r}, where a mask would be the same",
            hint="give the expert the base's mask; where this is a weight, the base diverged",
        )
    raise MergeError(
        f"tensor {name!r} ({base.dtype(name)}) differs between the base and expert {label!r}, "
        "and only floating tensors can be merged",
        hint="quantised weights are expanded before merging; index tables must be those of the "
        "base",
    )


def require_distinct(
    base: Checkpoint, experts: Mapping[str, Checkpoint], ties: Mapping[str, str]
) -> None:
    """Refuse an expert that is the base, an adapter without effect, and one expert given twice.

    Whole models are read as far as the first number that differs; the rule is that of
    `TaskVectors.load`.

    Args:
        base: The base.
        experts: Name -> checkpoint, aligned with the base.
        ties: Alias -> canonical name of the base's tensors that are one.

    Raises:
        MergeError: When there is one, or names and shapes do not fit the base.
    """
    whole: dict[str, dict[str, str]] = {}
    adapters: dict[str, str] = {}
    require_tied(base, ties, "the base")
    for label, expert in experts.items():
        names = align_names(base, expert, label, ties)
        adapter = adapter_over(base, expert)
        if adapter is None:
            own = {alias: names[kept] for alias, kept in ties.items() if kept in names}
            require_tied(expert, own, f"expert {label!r}")
            if not _differ(base, {name: name for name in names}, expert, names):
                raise is_the_base(label)
            whole[label] = names
            continue
        if not any(_changes(adapter, name) for name in adapter.names):
            raise is_the_base(label)
        other = adapters.setdefault(adapter.digest(), label)
        if other != label:
            raise same_weights(other, label)
    for (label, names), (other, others) in combinations(whole.items(), 2):
        if not _differ(experts[label], names, experts[other], others):
            raise same_weights(label, other)


def _differ(
    one: Checkpoint, names: Mapping[str, str], two: Checkpoint, others: Mapping[str, str]
) -> bool:
    return any(
        not same_values(one, own, two, others[name])
        for name, own in names.items()
        if one.dtype(own).is_floating_point or one.dtype(own).is_complex
    )


def _changes(adapter: Adapter, name: str) -> bool:
    """Return whether an adapter changes a tensor at all."""
    change, value = adapter.low_rank(name), adapter.dense(name)
    factors = change is not None and bool(change.scale and change.B.any() and change.A.any())
    return factors or (value is not None and bool(value.any()))


def is_the_base(label: str) -> MergeError:
    """Return the error for an expert without a task vector."""
    return MergeError(
        f"expert {label!r}: its task vector is zero: it is the base",
        hint="leave it out; the base is coefficient 0 of every expert",
    )


def same_weights(first: str, second: str) -> MergeError:
    """Return the error for one expert that was given twice."""
    return MergeError(
        f"experts {first!r} and {second!r} have the same weights",
        hint="leave one of them out, or check the paths",
    )


class BaseSimilarity:
    """The cosine of base and expert, and their distance, gathered piece by piece.

    Over tensors of two or more dimensions: two unrelated trainings have a cosine near 0 and a
    difference longer than the base.

    Args:
        label: Name of the expert.
        sums: What was gathered before, as `sums` returned it.
    """

    def __init__(self, label: str, sums: Sequence[float] = (0, 0.0, 0.0, 0.0, 0.0)) -> None:
        self.label = label
        self._adding = threading.Lock()
        self._size, self._pre, self._tuned, self._both, self._gap = sums

    @property
    def sums(self) -> tuple[float, ...]:
        """What was gathered so far: five numbers, to go on with or to judge by later."""
        return (self._size, self._pre, self._tuned, self._both, self._gap)

    def add(self, pre: Tensor, delta: Tensor) -> None:
        """Take in a piece of the base and of the expert's task vector (``n`` each)."""
        pre, delta = pre.flatten(), delta.flatten()
        inner, square, gap = float(pre @ delta), float(pre @ pre), float(delta @ delta)
        with self._adding:  # tensors are compared in several threads
            self._size += pre.numel()
            self._pre += square
            self._both += square + inner
            self._tuned += square + 2 * inner + gap
            self._gap += gap

    def judge(self) -> None:
        """Refuse an expert that does not look fine-tuned from the base, and warn of a doubtful one.

        Below 1000 numbers, where chance could decide, and for a base of zeros nothing is refused.
        A warning is logged where the expert is more than half the norm of the base away from it:
        fine-tuning seldom moves a model that far.

        Raises:
            MergeError: When the cosine is below 0.1 and the difference longer than the base.
        """
        if self._size < _ENOUGH or not self._pre:
            return
        cosine = self._both / math.sqrt(self._pre * self._tuned) if self._tuned > 0 else 0.0
        reach = math.sqrt(self._gap / self._pre)
        if cosine < _UNRELATED and reach > 1:
            raise MergeError(
                f"expert {self.label!r} does not look fine-tuned from this base: the cosine "
                f"similarity of their weights is {cosine:.3f}, and they differ by {reach:.2f} "
                "times the norm of the base",
                hint="fine-tuning leaves the similarity near 1; give the base that the expert "
                "was trained from, or pass check_base=False",
            )
        if reach > _FAR:
            logger.warning(
                "expert %r differs from the base by %.2f times the base's norm (cosine %.3f), "
                "which is far for fine-tuning: is it of this base?",
                self.label,
                reach,
                cosine,
            )


def require_alike(
    base: Checkpoint, expert: Checkpoint, names: Mapping[str, str], label: str
) -> None:
    """Refuse an expert that does not look fine-tuned from the base, by a sample of its weights.

    The sample is the beginning of the largest tensors of two or more dimensions.

    Args:
        base: The base.
        expert: The expert.
        names: The base's name -> the expert's name of the same tensor.
        label: The expert's name.

    Raises:
        MergeError: See `BaseSimilarity.judge`.
    """
    floating = [name for name in names if base.dtype(name).is_floating_point]
    matrices = [name for name in floating if len(base.shape(name)) >= 2]
    matrices.sort(key=lambda name: (-base.shape(name).numel(), name))
    similarity = BaseSimilarity(label)
    for name in matrices[:_SAMPLED_TENSORS]:
        count = min(base.shape(name).numel(), _SAMPLED_NUMBERS)
        pre = base.read(name, 0, count).to(torch.float32)
        similarity.add(pre, expert.read(names[name], 0, count).to(torch.float32) - pre)
    similarity.judge()


class ExpertReader:
    """One expert, read piece by piece beside the base.

    Args:
        base: The base.
        expert: The expert.
        label: What to call it in an error.
        layout: The layout of the base.

    Raises:
        MergeError: When names, shapes or kinds of dtype do not fit the base.
    """

    def __init__(self, base: Checkpoint, expert: Checkpoint, label: str, layout: FlatLayout):
        self.label = label
        self.expert = expert
        self.own = align_names(base, expert, label, layout.ties)
        self.moved = False
        self.similarity = BaseSimilarity(label)
        require_tied(expert, {a: self.own[c] for a, c in layout.ties.items()}, f"expert {label!r}")

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return a piece of the expert's tensor of a canonical name (1-D); it is finite."""
        piece = self.expert.read(self.own[name], start, stop)
        return require_finite(piece, name, f"expert {self.label!r}")

    def compare(self, pre: Tensor, tuned: Tensor) -> Tensor:
        """Return the delta of a piece (1-D), and note whether there is one.

        What `judge` needs besides, of tensors of two or more dimensions, goes to ``similarity``.
        """
        wide = torch.float64 if torch.float64 in (pre.dtype, tuned.dtype) else torch.float32
        delta = tuned.to(wide) - pre.to(wide)
        if bool(delta.any()):  # set and never unset: tensors are compared in several threads
            self.moved = True
        return delta

    def judge(self, check_base: bool) -> None:
        """Refuse, after all tensors were compared, an expert that is the base or unrelated.

        Raises:
            MergeError: When it is; unrelated ones only with ``check_base``.
        """
        if not self.moved:
            raise is_the_base(self.label)
        if check_base:
            self.similarity.judge()


def require_finite(tensor: Tensor, name: str, label: str) -> Tensor:
    """Return a tensor, float8 widened, that holds neither NaN nor infinity.

    Raises:
        MergeError: When it does.
    """
    widened = tensor.float() if tensor.element_size() == 1 else tensor
    if not all_finite(widened):
        raise not_finite(widened, name, label)
    return widened.detach()


def not_finite(values: Tensor, name: str, label: str) -> MergeError:
    """Return the error for numbers that are not all finite, which says what they are."""
    if bool(values.isnan().any()):
        return MergeError(
            f"tensor {name!r} of {label} holds NaN or infinity: it has NaN",
            hint="this model diverged in training or its file is damaged; leave it out",
        )
    return MergeError(
        f"tensor {name!r} of {label} holds NaN or infinity: it has infinite numbers and no NaN",
        hint="a weight diverged or overflowed its dtype, so leave the model out; a mask with -inf "
        "is taken from the base where the base has it at its beginning or end",
    )


def fixed_tensors(
    base: Checkpoint, readers: Sequence[ExpertReader], layout: FlatLayout
) -> dict[str, Tensor]:
    """Return the tensors that are not merged, from the base.

    Raises:
        MergeError: When an expert differs from the base in more than a counter.
    """
    result: dict[str, Tensor] = {}
    for name in layout.fixed:
        if name in layout.ties:
            continue
        for reader in readers:
            require_same_fixed(base, name, reader.expert, reader.own[name], reader.label)
        result[name] = base.load(name).detach().clone()
    return result
