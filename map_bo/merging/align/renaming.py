"""Which names of two models mean one tensor, where a wrapper or another class named them.

Training loops wrap a model and save it with the wrapper's name before each of its own:
``_orig_mod.`` (torch.compile), ``module.`` (DataParallel, DDP, DeepSpeed), ``model.`` (Lightning),
``_fsdp_wrapped_module.`` (FSDP), ``base_model.model.`` (peft). transformers keeps a model with a
head under a prefix (``bert.``) that the same model without a head does not have, and reads old
names of layer and weight normalisation. No list of prefixes is needed: any that makes the rest fit
is understood, and the wrappers that stand in the middle of a name are left out of it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from map_bo.errors import MergeError

__all__ = ["Renaming", "canonical_name", "leading_parts", "match_names"]

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_fpw_module"}
# What transformers reads under other names than it writes.
_LEGACY = (
    (re.compile(r"(LayerNorm|layer_norm|layernorm)\.gamma$"), r"\1.weight"),
    (re.compile(r"(LayerNorm|layer_norm|layernorm)\.beta$"), r"\1.bias"),
    (re.compile(r"\.weight_g$"), ".parametrizations.weight.original0"),
    (re.compile(r"\.weight_v$"), ".parametrizations.weight.original1"),
)
_DEPTH = 4  # parts of the longest prefix
_PREFIXES = 12  # prefixes that are tried on either side

Fits = Callable[[str, str], bool]
"""Whether a tensor of one's own (name) can be one of theirs (name): the same shape, say."""


@dataclass(frozen=True)
class Renaming:
    """How the names of one model are those of another.

    Attributes:
        names: Their name -> one's own name of the same tensor.
        removed: The prefix that one's own names have and theirs do not.
        added: The prefix that theirs have and one's own do not.
        wrappers: Names of wrappers that were left out of one's own names, or of theirs.
        rest: One's own names that are none of theirs -> what they are called without the wrapper.
    """

    names: Mapping[str, str]
    removed: str = ""
    added: str = ""
    wrappers: tuple[str, ...] = ()
    rest: Mapping[str, str] = field(default_factory=dict)

    @property
    def told(self) -> str:
        """What differs, in words; empty for the same names."""
        parts = [f"without the prefix {self.removed!r}"] if self.removed else []
        parts += [f"with the prefix {self.added!r}"] if self.added else []
        parts += [f"without the wrapper {name!r}" for name in self.wrappers]
        return ", ".join(parts)


def canonical_name(name: str) -> str:
    """Return a name without wrappers, in transformers' present spelling."""
    if any(wrapper in name for wrapper in _WRAPPERS):
        name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    for pattern, text in _LEGACY:
        name = pattern.sub(text, name)
    return name


def leading_parts(names: Collection[str]) -> str:
    """Return the longest prefix of whole parts that all names begin with, its dot included."""
    parts = [name.split(".")[:-1] for name in names]
    if not parts:
        return ""
    shared = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return "".join(f"{part}." for part in shared)


def match_names(own: Sequence[str], theirs: Sequence[str], fits: Fits, label: str) -> Renaming:
    """Find their name of each of one's own tensors.

    Names as they are come first; then those without wrappers, in transformers' present spelling;
    then those with a prefix removed, added or exchanged. Of these the first with which most of
    their tensors are found is taken.

    Args:
        own: One's own names.
        theirs: Their names.
        fits: Whether two tensors can be one.
        label: What one's own model is called, for errors.

    Raises:
        MergeError: When two prefixes fit equally well, as with two copies of a model in one file.
    """
    plain = {name: name for name in own}
    known = set(theirs)
    if known <= set(own):
        return Renaming({n: n for n in theirs}, rest={n: n for n in own if n not in known})
    shown = {name: canonical_name(name) for name in own}
    of_theirs: dict[str, str] = {}
    for name in theirs:
        of_theirs.setdefault(canonical_name(name), name)
    wrappers = tuple(
        sorted({part for n in (*own, *theirs) for part in n.split(".") if part in _WRAPPERS})
    )
    if len(set(shown.values())) < len(shown):
        shown = plain  # wrappers that tell tensors apart

    def matched(removed: str, added: str) -> dict[str, str]:
        found: dict[str, str] = {}
        for name, short in shown.items():
            there = of_theirs.get(inner(short, removed, added))
            if there is not None and fits(name, there):
                found.setdefault(there, name)
        return found

    def inner(short: str, removed: str, added: str) -> str:
        # A head lies outside what has the prefix.
        changed = added + short[len(removed) :] if short.startswith(removed) else short
        return changed if changed in of_theirs else short

    best, chosen = matched("", ""), ("", "")
    rivals: list[str] = []
    if len(best) < len(of_theirs):
        for removed, added in _candidates(list(shown.values()), list(of_theirs)):
            found = matched(removed, added)
            if len(found) > len(best):
                best, chosen, rivals = found, (removed, added), []
            elif found and len(found) == len(best) and removed and chosen[0]:
                # Another part of the file, not the same tensors by a longer way.
                rivals += [removed] if set(found.values()).isdisjoint(best.values()) else []
    if rivals:
        raise MergeError(
            f"{label} holds several parts that fit: under {chosen[0]!r} and {rivals[0]!r}",
            hint="save the one to merge by itself",
        )
    removed, added = chosen
    used = set(best.values())
    outer = leading_parts(list(shown.values()))
    outer = outer if removed.startswith(outer) else ""
    rest = {}
    for name, short in shown.items():
        if name not in used:
            there = inner(short, removed, added)
            rest[name] = there if there in of_theirs else short[len(outer) :]
    return Renaming(best, removed, added, wrappers, rest)


def _candidates(own: Sequence[str], theirs: Sequence[str]) -> list[tuple[str, str]]:
    """Return pairs of a prefix to remove and one to add, the plainest first."""
    # A prefix is one of a model: it stands before half of what is looked for, at least.
    least = len(theirs) / 2
    mine, other = _prefixes(own, least), _prefixes(theirs, least)
    return [
        *((prefix, "") for prefix in mine),
        *(("", prefix) for prefix in other),
        *((one, two) for one in mine for two in other if one != two),
    ]


def _prefixes(names: Sequence[str], least: float) -> list[str]:
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")[:-1]
        for depth in range(1, min(_DEPTH, len(parts)) + 1):
            counts[".".join(parts[:depth]) + "."] += 1
    counts = Counter({prefix: count for prefix, count in counts.items() if count >= least})
    ordered = sorted(counts, key=lambda prefix: (-counts[prefix], prefix.count("."), prefix))
    return ordered[:_PREFIXES]
