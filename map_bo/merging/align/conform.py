"""Experts presented in the base's names: what is taken from the base, and what is kept apart.

The rules are in docs/checkpoints.md, one for each kind of tensor that models do not share.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from map_bo.errors import MergeError, listed
from map_bo.merging.adapters.adapter import AdapterCheckpoint
from map_bo.merging.align.experts import same_values
from map_bo.merging.align.metadata import check_metadata
from map_bo.merging.align.renaming import Renaming, leading_parts, match_names
from map_bo.merging.align.vocabulary import VocabularyRule, fit_vocabulary, is_output_layer
from map_bo.merging.checkpoints.checkpoint import Checkpoint
from map_bo.merging.checkpoints.tensors import Layout

__all__ = [
    "MissingRule",
    "align_experts",
    "changes_told",
    "head_tensors",
    "is_constant",
    "names_in_model",
]

logger = logging.getLogger(__name__)

_LOSSY = ("missing", "vocabulary")  # changes after which the expert may not be what it was

MissingRule = Literal["refuse", "base"]
"""Refuse an expert that lacks tensors of the base, or leave those as they are in the base."""

# Buffers that follow from the configuration: no training changes them, and many are not saved.
_CONSTANT = re.compile(
    r"(^|[._])(position_ids|token_type_ids|num_batches_tracked|masked_bias|(attn|attention|causal)?_?"
    r"mask|relative_position_index|relative_coords_table|freqs_cis|embed_positions\.weights|_float_tensor)$"
)
_ROTARY = re.compile(r"(^|\.)(\w*inv_freq|\w*(cos|sin)_cached|\w*(cos|sin)_cache)$")
_CAUSAL = re.compile(r"(^|\.)attn(ention)?\.bias$")  # GPT-2 and its kin: 1 x 1 x n x n
_HEAD = re.compile(
    r"(^|\.)(classifier|classification_head|pre_classifier|score|heads?|fc|cls|qa_outputs|"
    r"regressor|projector|out|output|output_layer|logits_proj|summary|linear|last_linear|"
    r"seq_relationship|\w+_head|head_\w+)(?=\.|$)"
)
_POSITIONS = re.compile(r"(^|[._])(embed_positions|position_embeddings?|pos_embed)(\.weight)?$")
_POOLER = re.compile(r"pooler|pooling|classifier|score|head|\w+_head|qa_outputs|lm_head")
_SMALL = 1 << 24  # numbers of a tensor that is compared whole
_CLOSE = 1e-2  # relative: bfloat16 keeps two to three digits


@dataclass
class _Plan:
    """How one expert's tensors are those of the base, and what is left over."""

    expert: Checkpoint
    renaming: Renaming
    names: dict[str, str]  # the base's name -> the expert's
    missing: list[str] = field(default_factory=list)  # canonical names of the base
    buffers: list[str] = field(default_factory=list)  # of the base, taken from it
    dropped: list[str] = field(default_factory=list)  # buffers that only the expert has
    copies: list[str] = field(default_factory=list)  # further copies of a tied tensor
    heads: dict[str, str] = field(default_factory=dict)  # name in a model -> the expert's
    other_width: set[str] = field(default_factory=set)  # modules of the base
    extra: dict[str, str] = field(default_factory=dict)  # what no rule is for


def align_experts(
    experts: Mapping[str, Checkpoint],
    base: Checkpoint,
    *,
    vocabulary: VocabularyRule | None = None,
    missing: MissingRule = "refuse",
    heads: Collection[str] = (),
) -> dict[str, Checkpoint]:
    """Present every expert in the base's names and shapes, and compare what configurations say.

    - Names: prefixes and wrappers of training loops are understood where the rest fits; see
      `map_bo.merging.align.renaming`.
    - Constant buffers (position ids, masks, rotary frequencies, counters) come from the base,
      whether or not an expert has them.
    - Modules that only experts have, and output layers of another width than the base's, are task
      heads: left out of the merge, and kept for `head_tensors`.
    - Tensors that an expert lacks are refused, or with ``missing="base"`` left as they are in the
      base, so that the expert's task vector is zero there.
    - Vocabularies: see `fit_vocabulary`. Settings and tokens: see `check_metadata`.

    What was done is logged, and told by the ``vocabulary_changes`` of each checkpoint.

    Args:
        experts: Name -> checkpoint as given; adapters are returned as they are.
        base: The base.
        vocabulary: How experts with another vocabulary are fitted; None leaves them as they are.
        missing: What to do with tensors that an expert lacks.
        heads: Modules of the base that are task heads in any case, such as ``classifier``.

    Raises:
        MergeError: When an expert does not fit, or its configuration gives its weights another
            meaning than the base's.
        CheckpointError: When a file cannot be read.
    """
    if missing not in get_args(MissingRule):
        raise MergeError(
            f"missing must be 'refuse' or 'base', got {missing!r}",
            hint="'base' leaves tensors that an expert lacks as they are in the base",
        )
    plans = {
        label: _plan(expert, base, label)
        for label, expert in experts.items()
        if not isinstance(expert, AdapterCheckpoint) and conformed_of(expert) is None
    }
    modules = {module for plan in plans.values() for module in plan.other_width} | set(heads)
    result: dict[str, Checkpoint] = {}
    for label, expert in experts.items():
        aligned = expert
        if label in plans:
            aligned = _conform(plans[label], base, label, modules, missing)
        if vocabulary is not None and not isinstance(expert, AdapterCheckpoint):
            aligned = fit_vocabulary(aligned, base, vocabulary, label=label)
        result[label] = aligned
        if aligned is not expert:
            changes = aligned.vocabulary_changes
            lossy = set(changes_told({key: changes.get(key) for key in _LOSSY}))
            for line in changes_told(changes):
                level = logging.WARNING if line in lossy else logging.INFO
                logger.log(level, "expert %r: %s", label, line)
    kept = {name for name in base.names if any(_under(name, module) for module in modules)}
    check_metadata(experts, base, vocabulary=vocabulary, heads=kept)
    return result


def is_constant(name: str, shape: torch.Size) -> bool:
    """Return whether a tensor of this name and shape follows from the configuration."""
    if _CAUSAL.search(name):
        return len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    return bool(_CONSTANT.search(name) or _ROTARY.search(name))


def _is_sinusoidal(checkpoint: Checkpoint, name: str) -> bool:
    """Return whether a tensor is a table of sines and cosines of positions, which nothing trains.

    Every row has the squared norm of half its length (Vaswani et al., arXiv 1706.03762, section
    3.5); that of a padding position is zero.
    """
    layout = checkpoint.layout(name)
    if not _POSITIONS.search(name) or len(layout.shape) != 2 or layout.shape[1] < 2:
        return False
    if not layout.dtype.is_floating_point or layout.shape.numel() > _SMALL:
        return False
    squares = checkpoint.load(name).double().square().sum(1) / (layout.shape[1] // 2)
    padding = squares == 0
    return bool(((squares - 1).abs() < _CLOSE).logical_or(padding).all()) and bool(
        padding.sum() <= 2 and len(squares) > padding.sum() + 2
    )


def names_in_model(names: Iterable[str], base: Checkpoint, shapes: Mapping[str, Any]) -> Renaming:
    """Return how the names of a model's tensors are those of the base.

    Args:
        names: The model's names.
        base: The base.
        shapes: Name in the model -> shape.
    """
    return match_names(
        list(names), base.names, lambda own, there: _alike(shapes[own], base.shape(there)), "model"
    )


def head_tensors(expert: Checkpoint) -> dict[str, Tensor]:
    """Return the task head of an expert: name in a model of the task -> tensor on the CPU.

    Raises:
        CheckpointError: When a file cannot be read.
    """
    conformed = conformed_of(expert)
    if conformed is None:
        return {}
    return {name: conformed.given.load(own) for name, own in conformed.heads.items()}


def conformed_of(expert: Checkpoint) -> Conformed | None:
    """Return what was done to an expert's names and heads, also under a fitted vocabulary."""
    inner: object = expert
    while isinstance(inner, Checkpoint):
        if isinstance(inner, Conformed):
            return inner
        inner = inner.original
    return None


def _alike(one: torch.Size, two: torch.Size) -> bool:
    """Return whether shapes can be those of one tensor: at most one side differs."""
    return len(one) == len(two) and sum(a != b for a, b in zip(one, two, strict=True)) <= 1


def _under(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _groups(base: Checkpoint) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {n: [n] for n in base.names if n not in base.ties}
    for alias, canonical in base.ties.items():
        groups[canonical].append(alias)
    return groups


def _plan(expert: Checkpoint, base: Checkpoint, label: str) -> _Plan:
    def fits(own: str, there: str) -> bool:
        return _alike(expert.shape(own), base.shape(there)) or is_constant(there, base.shape(there))

    renaming = match_names(expert.names, base.names, fits, f"expert {label!r}")
    plan = _Plan(expert, renaming, dict(renaming.names))
    for name, own in renaming.names.items():
        _place(plan, base, name, own, label)
    for canonical, group in _groups(base).items():
        if any(name in plan.names for name in group) or canonical in plan.buffers:
            continue
        layout = base.layout(canonical)
        if (
            is_constant(canonical, layout.shape)
            or not (layout.dtype.is_floating_point or layout.dtype.is_complex)
            or canonical in base.masks
            or _is_sinusoidal(base, canonical)
        ):
            plan.buffers.append(canonical)
        else:
            plan.missing.append(canonical)
    for own, shown in renaming.rest.items():
        _place_rest(plan, base, own, shown)
    _require_overlap(plan, base, label)
    return plan


def _place(plan: _Plan, base: Checkpoint, name: str, own: str, label: str) -> None:
    """Decide on a tensor that both have by name: the same, a constant buffer, or a head."""
    mine, given = plan.expert.layout(own), base.layout(name)
    floating = given.dtype.is_floating_point or given.dtype.is_complex
    if is_constant(name, given.shape) and floating:
        small = mine == given and mine.shape.numel() <= _SMALL
        if small and same_values(plan.expert, own, base, name):
            return
        if not _same_rotary(plan.expert, own, base, name):
            raise MergeError(
                f"expert {label!r} has another {name!r} than the base: it was trained with other "
                "rotary settings (rope_theta, its scaling, or the length of the context)",
                hint="merge experts that were tuned with the base's settings",
            )
        _take_buffer(plan, name)
    elif is_constant(name, given.shape) and (
        mine.shape != given.shape or mine.dtype.is_floating_point
    ):
        _take_buffer(plan, name)
    elif not floating and mine.dtype.is_floating_point and mine.shape == given.shape:
        if mine.shape.numel() <= _SMALL and _equal_numbers(plan.expert, own, base, name):
            _take_buffer(plan, name)
    elif floating and mine.shape != given.shape:
        module = _head_module(name)
        output = not is_output_layer(name) and mine.shape[1:] == given.shape[1:]
        if module is not None and output:
            plan.other_width.add(module)


def _take_buffer(plan: _Plan, name: str) -> None:
    plan.buffers.append(name)
    del plan.names[name]


def _same_rotary(expert: Checkpoint, own: str, base: Checkpoint, name: str) -> bool:
    shape = base.shape(name)
    if not _ROTARY.search(name) or "inv_freq" not in name:
        return True
    if shape != expert.shape(own):
        return False
    one, two = expert.load(own).double(), base.load(name).double()
    return bool(torch.allclose(one, two, rtol=_CLOSE, atol=0.0))


def _equal_numbers(one: Checkpoint, name: str, two: Checkpoint, other: str) -> bool:
    return torch.equal(one.load(name).double(), two.load(other).double())


def _head_module(name: str) -> str | None:
    """Return the module of a head that a tensor belongs to, outside all numbered layers."""
    found = _HEAD.search(name)
    if found is None or any(part.isdigit() for part in name[: found.start()].split(".")):
        return None
    return name[: found.end()]


def _place_rest(plan: _Plan, base: Checkpoint, own: str, shown: str) -> None:
    """Decide on a tensor that the base has not, or has in another shape."""
    expert = plan.expert
    layout = expert.layout(own)
    if expert.ties.get(own, own) in plan.names.values():
        return  # a further name of a tensor that both have
    if shown in base.names:  # with a head of other dimensions
        module = _head_module(shown)
        if module is not None and layout.shape[1:] == base.shape(shown)[1:]:
            plan.other_width.add(module)
            plan.names[shown] = own
            return
        plan.names[shown] = own  # `require_shapes` says what differs
        return
    if (
        is_constant(shown, layout.shape)
        or not layout.dtype.is_floating_point
        or _is_sinusoidal(expert, own)
    ):
        plan.dropped.append(own)
    elif is_output_layer(shown) and _is_copy(plan, own):
        plan.copies.append(own)
    elif _is_new_module(shown, base) and not (is_output_layer(shown) and _has_output(base)):
        plan.heads[shown] = own
    else:
        plan.extra[shown] = own


def _is_copy(plan: _Plan, own: str) -> bool:
    """Return whether a tensor has the values of another of the expert, which it is tied to."""
    expert = plan.expert
    alike = [n for n in plan.names.values() if expert.layout(n) == expert.layout(own)]
    return any(
        is_output_layer(n, inputs=True) and same_values(expert, own, expert, n) for n in alike
    )


def _has_output(base: Checkpoint) -> bool:
    """Return whether a base has an output layer over its vocabulary, perhaps a tied one."""
    if any(is_output_layer(name) for name in base.names):
        return True
    kinds = (base.configuration or {}).get("architectures")
    named = [str(kind) for kind in kinds] if isinstance(kinds, list) else []
    return not named or not all(kind.endswith("Model") for kind in named)


def _is_new_module(name: str, base: Checkpoint) -> bool:
    """Return whether a tensor belongs to a module at the root that the base does not have at all.

    A further layer, or a part within one, is another architecture.
    """
    root, dot, _ = name.partition(".")
    outer = leading_parts(base.names)
    roots = {n[len(outer) :].partition(".")[0] for n in base.names}
    roots |= {n.partition(".")[0] for n in base.names}
    numbered = root.isdigit() and any(part.isdigit() for part in roots)
    if dot and root not in roots:
        return not numbered
    # Within the model that has the prefix of its kind: bert.pooler.
    inner, dot, _ = name[len(root) + 1 :].partition(".")
    known = any(_under(n, f"{root}.{inner}") for n in base.names)
    return bool(dot) and not known and bool(_POOLER.fullmatch(inner))


def _require_overlap(plan: _Plan, base: Checkpoint, label: str) -> None:
    """Refuse an expert most of whose tensors are not the base's, naming the prefixes."""
    groups = _groups(base)
    if len(plan.missing) * 2 <= len(groups) or not plan.missing:
        return
    mine, theirs = leading_parts(plan.expert.names), leading_parts(base.names)
    told = (
        f"its names begin with {mine!r} and the base's with {theirs!r}"
        if mine != theirs
        else f"it has, for example, {listed(plan.expert.names, 3)}"
    )
    raise MergeError(
        f"expert {label!r} lacks {len(plan.missing)} of the base's tensors: "
        f"{listed(plan.missing)}; {told}",
        hint="experts must be fine-tuned from this base, with the same architecture; prefixes are "
        "understood where what follows them has the base's names",
    )


def _conform(
    plan: _Plan, base: Checkpoint, label: str, modules: set[str], missing: MissingRule
) -> Checkpoint:
    """Return the expert in the base's names; itself where nothing has to change."""
    names, heads, from_base = dict(plan.names), dict(plan.heads), [*plan.buffers]
    in_heads: list[str] = []
    lacking = list(plan.missing)
    for canonical in _groups(base):
        if not any(_under(canonical, module) for module in modules):
            continue
        in_heads.append(canonical)
        if canonical in names:
            heads[canonical] = names.pop(canonical)
        elif canonical in lacking:
            lacking.remove(canonical)
    # Further parts of a head that the base has in another form.
    for shown, own in list(plan.extra.items()):
        if any(_under(shown, module) for module in modules):
            heads[shown] = own
            del plan.extra[shown]
    copies = {name: copy for name in lacking if (copy := _copied(name, base, names)) is not None}
    lacking = [name for name in lacking if name not in copies]
    if missing == "base":
        from_base += lacking  # otherwise whoever knows the model's ties refuses them
    renamed = any(name != own for name, own in names.items())
    if not (renamed or from_base or in_heads or heads or copies or plan.dropped or plan.copies):
        return plan.expert
    changes = {
        "removed": plan.renaming.removed,
        "added": plan.renaming.added,
        "wrappers": list(plan.renaming.wrappers) if renamed else [],
        "renamed": renamed,
        "buffers": sorted(plan.buffers),
        "left_out": sorted([*plan.dropped, *plan.copies]),
        "missing": sorted(lacking) if missing == "base" else [],
        "heads": sorted(heads),
        "heads_of_base": sorted(in_heads),
        "modules": sorted(modules),
    }
    view = _View(plan.expert, base, names | copies | plan.extra, [*from_base, *in_heads])
    told = {key: value for key, value in changes.items() if value}
    return Conformed(view, plan.expert, names, heads, told)


def _copied(name: str, base: Checkpoint, names: Mapping[str, str]) -> str | None:
    """Return the expert's tensor that a missing output layer is tied to, by the base's values."""
    if not is_output_layer(name):
        return None
    inputs = {n: own for n, own in names.items() if is_output_layer(n, inputs=True)}
    alike = {n: own for n, own in inputs.items() if base.layout(n) == base.layout(name)}
    return next((own for n, own in alike.items() if same_values(base, name, base, n)), None)


class _View:
    """The tensors of an expert in the base's names, some of them the base's own."""

    def __init__(
        self,
        expert: Checkpoint,
        base: Checkpoint,
        names: Mapping[str, str],
        from_base: Iterable[str],
    ) -> None:
        self._expert, self._base = expert, base
        self._names, self._from_base = dict(names), frozenset(from_base)
        self.layouts: Mapping[str, Layout] = {
            **{name: expert.layout(own) for name, own in names.items()},
            **{name: base.layout(name) for name in self._from_base},
        }
        first: dict[str, str] = {}
        ties: dict[str, str] = {}
        # The base's canonical names first, so that ties lead to them.
        for name in sorted(names, key=lambda name: (name in base.ties, name)):
            kept = first.setdefault(expert.ties.get(names[name], names[name]), name)
            if kept != name:
                ties[name] = kept
        self.ties: Mapping[str, str] = ties

    def load(self, name: str) -> Tensor:
        if name in self._from_base:
            return self._base.load(name)
        return self._expert.load(self._names[name])

    def read(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        if name in self._from_base:
            return self._base.read(name, start, stop, out=out)
        return self._expert.read(self._names[name], start, stop, out=out)

    def version(self) -> object | None:
        return None


class Conformed(Checkpoint):
    """An expert in the base's names, with the digest, source and folder of the expert as given.

    Attributes:
        given: The expert as given.
        names_given: Name in the base -> the expert's own name, of the tensors that both have.
        heads: Name in a model of the task -> the expert's own name, for its task head.
    """

    def __init__(
        self,
        view: _View,
        given: Checkpoint,
        names: Mapping[str, str],
        heads: Mapping[str, str],
        changes: Mapping[str, Any],
    ) -> None:
        super().__init__(view, source=given.source, directory=given.directory)
        self.given = given
        self.names_given = dict(names)
        self.heads = dict(heads)
        self._changes = dict(changes)

    @property
    def original(self) -> Checkpoint:
        """The expert as given."""
        return self.given

    @property
    def configuration(self) -> Mapping[str, Any] | None:
        """That of the expert as given."""
        return self.given.configuration

    @property
    def vocabulary_changes(self) -> Mapping[str, Any]:
        """What was renamed, taken from the base, left out and kept apart."""
        return self._changes

    def digest(self) -> str:
        """Return the digest of the expert as given."""
        return self.given.digest()


def changes_told(changes: Mapping[str, Any]) -> Iterator[str]:
    """Yield, in words, what was done to an expert: for the log and the model card."""
    prefixes = [f"the prefix {changes['removed']!r} removed"] if changes.get("removed") else []
    prefixes += [f"the prefix {changes['added']!r} added"] if changes.get("added") else []
    prefixes += [f"the wrapper {name!r} left out" for name in changes.get("wrappers", ())]
    if prefixes or changes.get("renamed"):
        yield "names read as the base's, " + (", ".join(prefixes) or "in their present spelling")
    if changes.get("buffers"):
        yield f"constant buffers taken from the base: {listed(changes['buffers'])}"
    if changes.get("left_out"):
        yield f"buffers and copies of tied tensors left out: {listed(changes['left_out'])}"
    if changes.get("missing"):
        yield f"tensors that it lacks left as they are in the base: {listed(changes['missing'])}"
    if changes.get("heads"):
        yield f"task head kept apart and not merged: {listed(changes['heads'])}"
    if changes.get("heads_of_base"):
        yield f"output layer left as it is in the base: {listed(changes['heads_of_base'])}"
    if changes.get("vocabulary"):
        yield f"embeddings fitted to the base's vocabulary (rule {changes['vocabulary']!r})"
