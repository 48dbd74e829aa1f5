"""Where each tensor of an adapter belongs: the base's tensor that it changes, or what of it.

Adapters go by the names of modules, checkpoints by those of files, which may cut a module's tensor
into several.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from map_bo.errors import CheckpointError, MergeError, listed
from map_bo.merging.adapters.lora import (
    LoraSettings,
    Orientation,
    OwnTensor,
    place,
    with_parameters,
)
from map_bo.merging.adapters.low_rank import Cut, cut_of
from map_bo.merging.checkpoints.checkpoint import Checkpoint
from map_bo.merging.checkpoints.saved_names import ModuleTensors, Saved
from map_bo.merging.checkpoints.skeleton import module_tensors, says_tied
from map_bo.merging.checkpoints.tensors import TensorReader

__all__ = ["AdapterFiles", "Factors", "Kind", "Places", "check_ties", "find_places"]

Kind = Literal["linear", "transposed", "embedding", "conv", "stack"]
"""How a module uses its weight: ``out x in``, ``in x out`` (GPT-2's ``Conv1D``), a table of rows,
a convolution without groups, or a stack of matrices, one for each expert of a mixture."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Factors:
    """A pair of factors in the adapter's file, and what it is of the tensor that it changes.

    Attributes:
        A: Name of the first factor.
        B: Name of the second.
        scale: What their product is multiplied by.
        kind: The kind of the module.
        shape: Shape of the module's tensor, which the base may have in several.
        part: What the base's tensor is of the module's.
        cut: The same as a part of the matrix, or of the ``index``-th matrix of a stack; None for
            the whole.
        dense: Whether the change of the base's tensor is no product of two factors, as that of a
            whole stack.
        index: Index of the matrix in a stack.
        in_by_out: Whether the matrices of a stack are stored ``in x out``.
        sharing: How many of the base's tensors this pair changes.
    """

    A: str
    B: str
    scale: float
    kind: Kind
    shape: torch.Size
    part: Saved | None = None
    cut: Cut | None = None
    dense: bool = False
    index: int = 0
    in_by_out: bool = False
    sharing: int = 1

    @property
    def flipped(self) -> bool:
        """Whether the base stores the transpose of what the factors multiply to."""
        return self.kind in ("transposed", "embedding")

    def of_part(self, part: Saved, sharing: int) -> Factors:
        """Return the pair as that of one of the base's tensors.

        Args:
            part: What it is of the module's tensor.
            sharing: How many such there are.
        """
        matrix, index, offset = self.shape, 0, part.offset
        if self.kind == "stack":
            matrix = self.shape[1:]
            index, offset = divmod(part.offset, max(1, matrix.numel()))
        else:
            matrix = torch.Size((self.shape[0], self.shape[1:].numel()))
        if part.shape is None:
            return replace(self, part=part, dense=self.kind == "stack", sharing=sharing)
        cut = cut_of(matrix, part.shape, part.stride, offset)
        return replace(self, part=part, cut=cut, dense=cut is None, index=index, sharing=sharing)


@dataclass(frozen=True)
class Places:
    """Where each tensor of an adapter belongs.

    Attributes:
        own: Name in the adapter's file -> what it is.
        placed: What it changes, as the trained model called it -> the name in the base, or in the
            base's model.
        prefix: The change of prefix between the two.
        base: The base.
        modules: The tensors of the base's model, where names are its.
    """

    own: Mapping[str, OwnTensor]
    placed: Mapping[str, str]
    prefix: tuple[str, str]
    base: Checkpoint
    modules: ModuleTensors | None = None

    def parts(self, target: str) -> tuple[tuple[str, Saved], ...]:
        """Return the base's tensors that make up a target, by canonical names."""
        name = self.placed[target]
        if self.modules is None:
            return ((self.base.ties.get(name, name), Saved(name)),)
        return tuple((self.base.ties.get(n, n), part) for n, part in self.modules.parts[name])

    def shape(self, target: str) -> torch.Size:
        """Return the shape of the module's tensor."""
        name = self.placed[target]
        return self.base.shape(name) if self.modules is None else self.modules.shapes[name]

    def in_by_out(self, target: str) -> bool:
        """Return whether the module says that its stack of matrices lies ``in x out``."""
        module = self.placed[target].rpartition(".")[0]
        return self.modules is not None and module in self.modules.in_by_out


def find_places(
    own: Mapping[str, OwnTensor],
    settings: LoraSettings,
    base: Checkpoint,
    folder: str,
    model: nn.Module | None,
) -> Places:
    """Place an adapter's tensors by the names of the base's files, or else of its modules.

    Args:
        own: The adapter's tensors, as `own_tensors` returns them.
        settings: Its settings.
        base: The base.
        folder: Where it is, for errors.
        model: The model of the base, where it is known.

    Raises:
        MergeError: When a tensor has no place.
    """

    def placed(known: Iterable[str], modules: ModuleTensors | None) -> Places:
        names = tuple(known)
        whole = with_parameters(own, settings, names, folder)
        targets = dict.fromkeys(tensor.target for tensor in whole.values())
        return Places(whole, *place(targets, names, folder), base, modules)

    known = set(base.names)
    by_files: Places | MergeError
    try:
        by_files = placed(base.names, None)
    except MergeError as error:
        by_files = error
    if isinstance(by_files, Places) and by_files.prefix == ("", "") and not settings.parameters:
        return by_files
    if not all(tensor.target in known for tensor in own.values()):
        modules = module_tensors(base, model)
        if modules is not None:
            whole = with_parameters(own, settings, tuple(modules.shapes), folder)
            joined = sorted(
                {t.target for t in whole.values()} & (modules.shapes.keys() - modules.parts.keys())
            )
            if joined:
                raise MergeError(
                    f"the adapter {folder} changes {listed(joined)}, which the base's files hold "
                    "as one tensor with others",
                    hint="give the base as a model in memory, whose names are those of the modules",
                )
            try:
                # Names without any change of prefix are sure; with one, those of the files are
                # as good.
                found = placed((n for n in modules.shapes if n in modules.parts), modules)
            except MergeError:
                if isinstance(by_files, MergeError):
                    raise by_files from None
            else:
                if found.prefix == ("", "") or isinstance(by_files, MergeError):
                    return found
    if isinstance(by_files, MergeError):
        raise by_files
    return by_files


def check_ties(
    found: Places,
    settings: LoraSettings,
    base: Checkpoint,
    folder: str,
    model: nn.Module | None = None,
) -> None:
    """Tell that an adapter of one of two tied tensors changes both, unless it was meant to.

    Args:
        found: The adapter's tensors and their places.
        settings: Its settings.
        base: The base. What its files leave out because it is tied, its model tells.
        folder: Where the adapter is.
        model: The model of the base, where it is known.

    Raises:
        MergeError: When it has a full value for one of them alone: trained so, the two are no
            longer one tensor.
    """
    if settings.tied:
        return
    changed = {found.placed[tensor.target]: tensor for tensor in found.own.values()}
    factors = {n for n, tensor in changed.items() if tensor.role != "value"}
    modules = found.modules
    if modules is None and says_tied(base):
        modules = module_tensors(base, model)
    ties = dict(base.ties)
    if modules is not None:
        for name, parts in modules.parts.items():
            own = parts[0][1].name
            if len(parts) == 1 and own != name:
                ties.setdefault(name, own if found.modules is not None else parts[0][0])
    for alias, name in ties.items():
        touched = changed.keys() & {alias, name}
        if len(touched) != 1:
            continue
        (only,) = touched
        if only not in factors:
            raise MergeError(
                f"the adapter {folder} has a value of its own for {only!r}, which the base ties to "
                f"{alias if only == name else name!r}: trained so, they are two tensors, and in "
                "the base they are one",
                hint="train it with ensure_weight_tying=True, or untie the base first "
                "(tie_word_embeddings=False) and give that",
            )
        logger.warning(
            "the adapter %s changes %s, which the base ties to %s: merged, both change, and "
            "the adapter was trained with one of them changed",
            folder,
            name,
            alias,
        )


@dataclass(frozen=True)
class AdapterFiles:
    """Reads what each tensor of an adapter does to the base, and checks its shape."""

    found: Places
    settings: LoraSettings
    reader: TensorReader
    base: Checkpoint
    folder: Path

    def factors(self) -> dict[str, Factors]:
        """Return tensor of the base -> its pair of factors."""
        pairs: dict[str, dict[str, str]] = {}
        modules: dict[str, str] = {}
        for name, tensor in self.found.own.items():
            if tensor.role in ("A", "B", "embedding_A", "embedding_B"):
                pairs.setdefault(tensor.target, {})[tensor.role] = name
                # peft matches ranks of bare parameters by the parameter, others by the module.
                bare = tensor.part != "weight" or tensor.depth
                modules[tensor.target] = tensor.target if bare else tensor.module
        wholes: dict[str, Factors] = {}
        square: list[str] = []
        orientation = Orientation(self.base, self.settings.fan_in_fan_out)
        seen: dict[str, str] = {}
        for target, pair in pairs.items():
            if self._is_repeated(target, pair, pairs, seen):
                continue
            wholes[target] = made = self._pair(target, pair, modules[target])
            name = self.found.parts(target)[0][0]
            if made.kind == "linear" and self._may_be_flipped(made):
                square.append(target)
            elif made.kind in ("linear", "transposed"):
                orientation.seen[name] = made.flipped
        for target in square:
            flipped = orientation.of_square(self.found.parts(target)[0][0])
            wholes[target] = replace(wholes[target], kind=_linear(flipped))
        found: dict[str, Factors] = {}
        for target, made in wholes.items():
            parts = self.found.parts(target)
            found |= {name: made.of_part(part, len(parts)) for name, part in parts}
        return found

    def _is_repeated(
        self,
        target: str,
        pair: Mapping[str, str],
        pairs: Mapping[str, Mapping[str, str]],
        seen: dict[str, str],
    ) -> bool:
        """Return whether a pair is that of a tensor which is tied to one seen before.

        Raises:
            MergeError: When it is another pair.
        """
        name = self.found.parts(target)[0][0]
        first = seen.setdefault(name, target)
        if first == target or not {n for n, _ in self.found.parts(target)} & {
            n for n, _ in self.found.parts(first)
        }:
            return False
        if self.settings.tied and self._same_product(pairs[first], pair):
            return True
        raise MergeError(
            f"the adapter {self.folder} changes the tied tensor {name!r} under two names",
            hint="merge it into its base first (peft: merge_and_unload) and give that",
        )

    def _same_product(self, one: Mapping[str, str], two: Mapping[str, str]) -> bool:
        def product(pair: Mapping[str, str]) -> Tensor:
            first, second = (self.reader.load(pair[role]).double() for role in sorted(pair))
            # An embedding's factors are those of the transpose.
            return (second @ first).T if "embedding_A" in pair else second @ first

        products = [product(pair) for pair in (one, two)]
        return any(torch.allclose(products[0], each) for each in (products[1], products[1].T))

    def _pair(self, target: str, pair: Mapping[str, str], module: str) -> Factors:
        embedded = "embedding_A" in pair
        roles = ("embedding_A", "embedding_B") if embedded else ("A", "B")
        if set(pair) != set(roles):
            raise CheckpointError(
                f"the adapter {self.folder} lacks a factor of module {module!r}: it has only "
                f"{_factor_names(pair)}",
                hint="factors come in pairs, lora_A and lora_B; save the adapter again",
            )
        A, B = (pair[role] for role in roles)
        layouts = self.reader.layouts
        a, b, shape = layouts[A].shape, layouts[B].shape, self.found.shape(target)
        rank, scale = self.settings.rank(module), self.settings.scale(module)
        made = Factors(A, B, scale, "linear", shape)
        stacked = len(shape) == 3 and len(a) == len(b) == 2
        if stacked and a[0] == b[1] and not a[0] % shape[0]:
            a = torch.Size((a[0] // shape[0], a[1]))
            ways = [a[1] == shape[2] and b[0] == shape[1], a[1] == shape[1] and b[0] == shape[2]]
            plain, flipped = any(ways), False
            # Where both fit, as the module says; older versions of peft took all for in x out.
            said = self.found.in_by_out(target)
            made = replace(made, kind="stack", in_by_out=said if all(ways) else ways[1])
        elif embedded:
            plain, flipped = False, len(shape) == 2 and shape == (a[-1], b[0])
            made = replace(made, kind="embedding")
        else:
            plain = shape == (b[0], *a[1:])
            flipped = len(a) == 2 and shape == (a[1], b[0])
            if len(a) > 2:
                made = replace(made, kind="conv")
            elif flipped and not plain:
                made = replace(made, kind="transposed")
        if not (plain or flipped) or (made.kind != "stack" and a[0] != b[1:].numel()):
            raise MergeError(
                f"the adapter {self.folder} changes {target!r}, which is {list(shape)}, by "
                f"factors of {list(layouts[A].shape)} and {list(b)}",
                hint="give the base that the adapter was trained from; of convolutions only those "
                "without groups are read",
            )
        if a[0] != rank:
            raise CheckpointError(
                f"the adapter {self.folder} has rank {a[0]} in {module!r}, and {rank} by its "
                "configuration",
                hint="the scale depends on it: give adapter_config.json and weights of one adapter",
            )
        return made

    def _may_be_flipped(self, made: Factors) -> bool:
        a, b = (self.reader.layouts[name].shape for name in (made.A, made.B))
        return len(made.shape) == 2 and made.shape == (a[1], b[0]) == (b[0], a[1])

    def values(self) -> dict[str, str]:
        """Return tensor of the base -> the adapter's name of its full new value."""
        values: dict[str, str] = {}
        for name, tensor in self.found.own.items():
            if tensor.role != "value":
                continue
            self._require_shape(name, tensor.target)
            for target, _ in self.found.parts(tensor.target):
                if target in values and not torch.equal(
                    self.reader.load(values[target]), self.reader.load(name)
                ):
                    raise MergeError(
                        f"the adapter {self.folder} gives the tied tensor {target!r} two values, "
                        f"{values[target]!r} and {name!r}",
                        hint="untie the base's weights and save it again",
                    )
                values.setdefault(target, name)
        return values

    def biases(self) -> dict[str, tuple[str, float]]:
        """Return tensor of the base -> name and scale of a bias that is added."""
        biases: dict[str, tuple[str, float]] = {}
        for name, tensor in self.found.own.items():
            if tensor.role == "bias":
                self._require_shape(name, tensor.target)
                for target, _ in self.found.parts(tensor.target):
                    biases[target] = (name, self.settings.scale(tensor.module))
        return biases

    def parts_of(self, names: set[str]) -> dict[str, Saved]:
        """Return, for those tensors that are not the whole of a module's, what they are of it."""
        parts: dict[str, Saved] = {}
        for tensor in self.found.own.values():
            if tensor.role in ("value", "bias"):
                for name, part in self.found.parts(tensor.target):
                    if name in names and part.shape is not None:
                        parts[name] = part
        return parts

    def _require_shape(self, own: str, target: str) -> None:
        given, shape = self.reader.layouts[own].shape, self.found.shape(target)
        if given != shape:
            raise MergeError(
                f"the adapter {self.folder} has {own!r} of {list(given)}, and "
                f"{self.found.placed[target]!r} is {list(shape)} in the base",
                hint="give the base that the adapter was trained from; a resized embedding needs "
                "a base of that size",
            )


def _linear(flipped: bool) -> Kind:
    return "transposed" if flipped else "linear"


def _factor_names(pair: Mapping[str, str]) -> str:
    """Return the names of the factors that there are, for an error."""
    return " and ".join(f"lora_{role}" for role in sorted(pair))
