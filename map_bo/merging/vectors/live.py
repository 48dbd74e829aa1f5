"""The live model: its weights are views of one flat buffer, so that merging is loading."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass
from functools import reduce
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from map_bo.errors import MergeError, listed
from map_bo.merging.align.conform import is_constant
from map_bo.merging.align.layout import FlatLayout, Slot
from map_bo.merging.align.renaming import match_names
from map_bo.merging.checkpoints.saved_names import (
    Saved,
    left_out_of_files,
    saved_as,
    state_tensors,
)
from map_bo.merging.vectors.bound import Bound, HeldWeights
from map_bo.merging.vectors.module_state import ModuleState, casting
from map_bo.merging.vectors.operator import PreparedMerge

__all__ = ["LiveModel", "model_ties", "names_of_base", "ties_of_base"]


def model_ties(model: nn.Module) -> dict[str, str]:
    """Return alias -> first name, for the names of a model's tensors that share one.

    Names are those of ``model.state_dict()`` and those in the model's files, where they differ.
    """
    named = state_tensors(model)
    in_files = {name: part.of(named[part.name]) for name, part in saved_as(model).items()}
    return _ties(named) | _ties(in_files)


def names_of_base(model: nn.Module, known: Collection[str]) -> dict[str, str]:
    """Return name in a model's files -> name in the base, of the tensors that both have.

    A model with a head has a prefix that its base without one does not have, or the other way
    round; see `match_names`.

    Args:
        model: The model.
        known: Names of the base.
    """
    found = match_names(list(saved_as(model)), sorted(known), lambda own, there: True, "the model")
    return {own: there for there, own in found.names.items()}


def ties_of_base(model: nn.Module, known: Collection[str]) -> dict[str, str]:
    """Return the ties of a model, as `model_ties` does, under the names of the base (``known``)."""
    ties = model_ties(model)
    if not ties or set(ties.values()) <= set(known):
        return ties
    names = names_of_base(model, known)
    return {names.get(alias, alias): names.get(kept, kept) for alias, kept in ties.items()}


def _ties(named: Mapping[str, Tensor]) -> dict[str, str]:
    first: dict[object, str] = {}
    ties: dict[str, str] = {}
    for name, tensor in named.items():
        canonical = first.setdefault(_memory(tensor), name)
        if canonical != name:
            ties[name] = canonical
    return ties


@dataclass(frozen=True, eq=False)
class _StandIn:
    """A place of the model where an inference tensor, which cannot be bound, has a stand-in."""

    place: dict[str, Any] | list[Any]
    key: Any
    found: Tensor


class LiveModel:
    """A context in which a model's weights are views of one flat buffer.

    While it is entered, `write` merges a candidate straight into the model: nothing is copied
    afterwards. When it is left, also through an exception, the model is as it was found: the
    same parameter and buffer objects in the same memory with the same values, gradients,
    ``requires_grad`` flags, training modes, hooks and submodules.

    `clean`, and every `write` after another, undoes what an evaluator may have done to the model,
    so that nothing leaks into the next candidate: changed weights, BatchNorm statistics and
    counters, gradients, modes, hooks, attributes such as ``eps``, parameters and submodules that
    were replaced, added or removed; see :class:`~map_bo.merging.vectors.module_state.ModuleState`.
    The model is then in evaluation mode.

    Parameters and buffers that were made in inference mode cannot be written to outside of it;
    while the model is live, others stand in for them.

    Dtypes: the buffer has the model's floating dtype. In a model of several, it has the one
    that holds them all (float32 for bfloat16 and float32); tensors of that dtype are views and
    the others are copied from it after each candidate, which rounds once.

    Names are those of the checkpoints, which for models of transformers may be other than those of
    the modules, with several tensors where the module has one; see `saved_as`. Such a tensor is
    filled from the buffer piece by piece after each candidate.

    Tensors that the layout does not merge (integer counters) start every candidate with the
    base's value where the base has them, else, like buffers outside the state dict, with the
    value found.

    Args:
        model: The model; on the device of the task vectors.
        layout: The layout of the task vectors.
        fixed: Canonical name -> value, for the layout's fixed tensors.
        heads: Tensors of the model that no checkpoint merges: parts of task heads, which
            `put_head` fills.
        spare: Tensors of the layout that the model may lack.

    Attributes:
        cast_inputs: Whether the model, if it has one floating dtype, takes floating inputs of any,
            and casts them. Set it before the model is entered.

    Raises:
        MergeError: When the model's tensors are not those of the layout (names, shapes, floating
            or not), lie on several devices, or are tied where the layout keeps them apart.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: FlatLayout,
        *,
        fixed: Mapping[str, Tensor] | None = None,
        heads: Collection[str] = (),
        spare: Collection[str] = (),
    ) -> None:
        self.model = model
        self._layout = layout
        self._fixed = dict(fixed or {})
        self._flat: Tensor | None = None
        self._bound: list[Bound] = []
        self._views: list[tuple[Tensor, Slot]] = []  # pieces of the live memory
        self._modes: list[tuple[nn.Module, bool]] = []
        self._stand_ins: list[_StandIn] = []
        self._state: ModuleState | None = None
        self._inputs: RemovableHandle | None = None
        self._attributes: list[tuple[object, str, object]] = []
        self._headed = False
        self._entered = False
        self._written = False
        self._held: HeldWeights | None = None
        self.cast_inputs = False
        shapes = {name: value.shape for name, value in self._fixed.items()}
        named = state_tensors(model)
        known = [*(slot.name for slot in layout.slots), *layout.fixed]
        saved = saved_as(model, known)
        if not saved.keys() >= set(known):
            saved = _renamed(saved, named, layout, shapes)
        masks = {name for name, value in self._fixed.items() if value.is_floating_point()}
        found = _match(model, layout, shapes, saved, named, masks, set(heads), set(spare))
        self._slots, self._in_files, self._pieces = _by_module(found, saved, named)
        owners = self._slots.keys() | {part.name for part, _ in self._pieces}
        floating = [tensor for name, tensor in named.items() if name in owners]
        devices = {tensor.device for tensor in floating}
        if len(devices) != 1:
            raise MergeError(
                f"the model's tensors lie on {listed(sorted(map(str, devices)))}",
                hint="a live model lives on one device",
            )
        self.device = devices.pop()
        self.dtype = reduce(torch.promote_types, (tensor.dtype for tensor in floating))

    @property
    def flat(self) -> Tensor:
        """``P``: the buffer that the weights are views of; only while entered."""
        if self._flat is None or not self._entered:
            raise MergeError("the model is not live", hint="use it inside `with`")
        return self._flat

    def write(self, prepared: PreparedMerge, c: Tensor) -> nn.Module:
        """Merge the candidate ``c`` (``d``) into the model and return it, in evaluation mode."""
        if self._written:
            self.clean()
        flat = self.flat
        self._written, self._held = True, None
        prepared.write(c, flat)
        with torch.no_grad():
            for bound in self._bound:
                if bound.slot is not None and bound.live.dtype != flat.dtype:
                    bound.live.copy_(bound.slot.of(flat))
            for view, slot in self._views:
                view.copy_(slot.of(flat))
        return self.model

    def hold(self) -> None:
        """Keep in mind the weights as they are now, for `rewind`."""
        self._held = HeldWeights(self._bound, self.flat)

    def rewind(self) -> bool:
        """Undo what was done to the model since `hold`, as `clean` does.

        Returns:
            Whether the merged weights are those that were held, bit for bit. Where they are not,
            or none are held, the candidate has to be written again.
        """
        if self._written:
            self.clean()
        if self._held is None or not self._held.intact():
            self._held = None
        self._written = self._held is not None
        return self._written

    def put_head(self, head: Mapping[str, Tensor], labels: Mapping[int, str] | None = None) -> None:
        """Give the model the head of a task, until the next `write`.

        Tensors take the place of the model's own of that name, whatever their shapes; where it has
        none, modules are made for them, with linear layers for matrices. What a model and its
        layers say of their width (``out_features``, ``num_labels``) follows.

        Args:
            head: Name in the model -> tensor.
            labels: Label names by row of the output layer, for ``config.id2label``.
        """
        if not self._entered:
            raise MergeError("the model is not live", hint="use it inside `with`")
        self._headed = True
        with torch.inference_mode(False):
            for name, tensor in head.items():
                path, _, last = name.rpartition(".")
                module = self._module_at(path, head)
                value = tensor.to(device=self.device, copy=True)
                if value.is_floating_point():
                    value = value.to(self.dtype)
                if last in module._buffers:
                    module._buffers[last] = value
                    continue
                old = module._parameters.get(last)
                wanted = value.is_floating_point() and (old is None or old.requires_grad)
                module._parameters[last] = nn.Parameter(value, requires_grad=wanted)
                if last == "weight" and isinstance(module, nn.Linear):
                    self._set(module, "out_features", len(value))
                    self._set(module, "in_features", value.shape[1])
        if labels:
            self._set_labels(labels)

    def _module_at(self, path: str, head: Mapping[str, Tensor]) -> nn.Module:
        """Return the module of a path, made where there is none."""
        module: nn.Module = self.model
        at = ""
        for part in path.split(".") if path else ():
            at = f"{at}.{part}" if at else part
            inner = module._modules.get(part)
            if inner is None:
                weight = head.get(f"{at}.weight")
                inner = nn.Module()
                if weight is not None and weight.dim() == 2:
                    # Its parameters are put there by `put_head`.
                    inner = nn.Linear(1, 1, bias=f"{at}.bias" in head, device=self.device)
                inner.eval()
                module._modules[part] = inner
            module = inner
        return module

    def _set(self, owner: object, name: str, value: object) -> None:
        self._attributes.append((owner, name, vars(owner)[name]))
        vars(owner)[name] = value

    def _set_labels(self, labels: Mapping[int, str]) -> None:
        config = vars(self.model).get("config")
        if config is not None and isinstance(vars(config).get("id2label"), dict):
            self._set(config, "id2label", dict(labels))
            if isinstance(vars(config).get("label2id"), dict):
                self._set(config, "label2id", {name: i for i, name in labels.items()})
        for module, _ in self._modes:
            if isinstance(vars(module).get("num_labels"), int):
                self._set(module, "num_labels", len(labels))

    def merged_tensors(self) -> list[tuple[Tensor, Slot]]:
        """Return the parameters and buffers that are merged, each once, with their slots.

        Two tensors that share memory have the same slot. Only while entered. Tensors that are
        several in the model's files are left out; see `require_whole`.
        """
        if not self._entered:
            raise MergeError("the model is not live", hint="use it inside `with`")
        return [(bound.tensor, bound.slot) for bound in self._bound if bound.slot is not None]

    def written_tensors(self) -> list[Tensor]:
        """Return the tensors of the model whose values `write` decides; only while entered."""
        return [bound.tensor for bound in self._bound if bound.value is None]

    def require_whole(self) -> None:
        """Refuse a model with tensors that are several in its files, as gradients need to.

        Raises:
            MergeError: Naming one of them.
        """
        if self._pieces:
            raise MergeError(
                f"{self._pieces[0][0].name!r} is one tensor in {type(self.model).__name__} and "
                "several in its files, and gradients by those are not known",
                hint="pass gradients=False",
            )

    def __enter__(self) -> LiveModel:
        """Bind the model's tensors to the buffer; the model has no useful weights yet."""
        if self._entered:
            raise MergeError(
                "the model is live already", hint="leave the first `with` before the next"
            )
        # Tensors made in inference mode could not be evaluated outside it.
        with torch.inference_mode(False), torch.no_grad():
            if self._flat is None:
                self._flat = torch.zeros(self._layout.size, dtype=self.dtype, device=self.device)
            self._modes = [(module, module.training) for module in self.model.modules()]
            self._entered = True
            try:
                self._stand_in()
                self._bound = self._bindings(self._flat)
                for module, _ in self._modes:
                    module.training = False
                if self.cast_inputs and len({b.live.dtype for b in self._bound if b.slot}) == 1:
                    self._inputs = self.model.register_forward_pre_hook(
                        casting(self.dtype), with_kwargs=True, prepend=True
                    )
                self._state = ModuleState(self.model, [bound.tensor for bound in self._bound])
                self.clean()
            except BaseException:
                self._restore()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the model as it was found."""
        self._restore()

    def _bindings(self, flat: Tensor) -> list[Bound]:
        named = state_tensors(self.model)
        names = {id(tensor): name for name, tensor in reversed(named.items())}
        bound: list[Bound] = []
        copies: dict[object, Tensor] = {}
        cut = {part.name for part, _ in self._pieces}  # all of it is filled after each candidate
        for tensor in _tensors(self.model):
            name = names.get(id(tensor))  # None for a buffer that is not persistent
            slot = None if name is None else self._slots.get(name)
            value: Tensor | None = None
            if slot is not None and tensor.dtype == flat.dtype:
                live = slot.of(flat)
            else:
                # Tensors that share memory go on sharing it.
                live = copies.setdefault(_memory(tensor), tensor.detach().clone())
                if slot is None and name not in cut:
                    in_file = self._in_files.get(name, name) if name is not None else None
                    canonical = self._layout.ties.get(in_file, in_file) if in_file else None
                    found = tensor.detach().clone()
                    value = self._fixed[canonical].to(found) if canonical in self._fixed else found
            bound.append(
                Bound(tensor, tensor.data, tensor.grad, tensor.requires_grad, live, slot, value)
            )
        lives = {id(each.tensor): each.live for each in bound}
        self._views = [(part.of(lives[id(named[part.name])]), s) for part, s in self._pieces]
        return bound

    def clean(self) -> tuple[list[str], list[str]]:
        """Undo whatever was done to the model since it was entered, its merged weights apart.

        Returns:
            What had been changed beside tensors and modes, and what could not be undone; see
            :meth:`ModuleState.restore`.
        """
        assert self._state is not None
        with torch.inference_mode(False), torch.no_grad():
            if self._held is not None and not self._held.untouched():
                self._held = None
            self._remove_head()
            changes, troubles = self._state.restore()
            if self._headed:  # what was changed was changed by `put_head` too
                changes, self._headed = [], False
            self._renew_memory()
            for bound in self._bound:
                try:
                    bound.attach()
                except RuntimeError as error:
                    troubles.append(f"a tensor of shape {list(bound.live.shape)} ({error})")
                    continue
                if bound.value is not None:
                    bound.live.copy_(bound.value)
            if troubles:
                self._held = None
            elif self._held is not None:
                self._held.renew()
        self._written = False
        return changes, troubles

    def _renew_memory(self) -> None:
        """Make a new buffer where the memory of the old was given up (``resize_`` of a storage)."""
        assert self._flat is not None
        needed = self._flat.numel() * self._flat.element_size()
        if self._flat.untyped_storage().nbytes() < needed:
            self._flat.untyped_storage().resize_(needed)
            self._held = None
        for bound in self._bound:
            storage = bound.live.untyped_storage()
            if bound.slot is None and storage.nbytes() < bound.live.nbytes:
                storage.resize_(bound.live.nbytes)
                self._held = None

    def _stand_in(self) -> None:
        """Put ordinary tensors where the model has inference tensors."""
        found = {id(tensor): tensor for tensor in _tensors(self.model) if tensor.is_inference()}
        if not found:
            return
        others: dict[int, Tensor] = {}
        for key, tensor in found.items():
            # Only its shape counts: all values are written before the model is used.
            copy = tensor.detach().clone()
            parameter = isinstance(tensor, nn.Parameter)
            others[key] = nn.Parameter(copy, tensor.requires_grad) if parameter else copy
        for module, _ in self._modes:
            for place in vars(module).values():
                if isinstance(place, dict | list):
                    items = list(place.items() if isinstance(place, dict) else enumerate(place))
                    for key, value in items:
                        if id(value) in others:
                            self._stand_ins.append(_StandIn(place, key, value))
                            place[key] = others[id(value)]

    def _remove_head(self) -> None:
        for owner, name, value in reversed(self._attributes):
            vars(owner)[name] = value
        self._attributes = []

    def _restore(self) -> None:
        self._entered = False
        with torch.inference_mode(False), torch.no_grad():
            self._remove_head()
            if self._state is not None:
                self._state.restore()
            for bound in self._bound:
                bound.restore()
            if self._inputs is not None:
                self._inputs.remove()
            for one in reversed(self._stand_ins):
                one.place[one.key] = one.found
            for module, mode in self._modes:
                module.training = mode
        self._bound, self._views, self._modes, self._stand_ins = [], [], [], []
        self._state, self._inputs, self._held = None, None, None


def _tensors(model: nn.Module) -> list[Tensor]:
    """Return every parameter and buffer once, also buffers that are not persistent."""
    unique = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return list(unique.values())


def _memory(tensor: Tensor) -> object:
    """Return what two tensors have in common exactly when they are one tensor in memory."""
    if not tensor.numel() or tensor.device.type == "meta":
        return id(tensor)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def _by_module(
    found: Mapping[str, Slot], saved: Mapping[str, Saved], named: Mapping[str, Tensor]
) -> tuple[dict[str, Slot], dict[str, str], list[tuple[Saved, Slot]]]:
    """Return slots and names in files by the module's own names, and the pieces with slots."""
    groups: dict[object, list[str]] = {}
    for name, tensor in named.items():
        groups.setdefault(_memory(tensor), []).append(name)
    slots: dict[str, Slot] = {}
    in_files: dict[str, str] = {}
    pieces: list[tuple[Saved, Slot]] = []
    for name, part in saved.items():
        if part.shape is not None:
            pieces += [(part, found[name])] if name in found else []
            continue
        for own in groups[_memory(named[part.name])]:
            in_files.setdefault(own, name)
            if name in found:
                slots[own] = found[name]
    return slots, in_files, pieces


def _renamed(
    saved: Mapping[str, Saved],
    named: Mapping[str, Tensor],
    layout: FlatLayout,
    fixed: Mapping[str, torch.Size],
) -> dict[str, Saved]:
    """Return what the model's files hold under the names of the layout, and the rest as it is."""
    shapes = {slot.name: slot.shape for slot in layout.slots} | dict(fixed)
    shapes |= {alias: shapes[kept] for alias, kept in layout.ties.items() if kept in shapes}

    def fits(own: str, there: str) -> bool:
        return saved[own].of(named[saved[own].name]).shape == shapes[there]

    found = match_names(list(saved), sorted(shapes), fits, "the model")
    own = {mine: there for there, mine in found.names.items()}
    return {own.get(name, name): part for name, part in saved.items()}


def _match(
    model: nn.Module,
    layout: FlatLayout,
    fixed: Mapping[str, torch.Size],
    saved: Mapping[str, Saved],
    state: Mapping[str, Tensor],
    masks: Set[str],
    heads: Set[str],
    spare: Set[str],
) -> dict[str, Slot]:
    """Return, for each floating tensor of the model's files, its slot of the layout."""
    named = {name: part.of(state[part.name]) for name, part in saved.items()}
    kind = type(model).__name__
    slots = {slot.name: slot for slot in layout.slots}
    ties = _ties(named)
    own = {id(tensor) for tensor in _tensors(model)}
    groups: dict[str, list[str]] = {}
    for name in named:
        groups.setdefault(ties.get(name, name), []).append(name)
    result: dict[str, Slot] = {}
    missing: list[str] = []
    computed = left_out_of_files(model, named)
    for canonical, group in groups.items():
        tensor = named[canonical]
        # A name that the checkpoint leaves out is found under the name that it is tied to.
        found = {layout.ties.get(name, name) for name in group} & (slots.keys() | {*layout.fixed})
        if not found:
            constant = is_constant(canonical, tensor.shape) or canonical in computed
            if tensor.is_floating_point() and not constant and not heads & set(group):
                missing.append(canonical)
            continue
        if len(found) > 1:
            raise MergeError(
                f"the model ties {listed(group)}, and the checkpoints keep them apart",
                hint="untie them in the model, or pass the ties when the task vectors are loaded",
            )
        name = found.pop()
        if id(state[saved[canonical].name]) not in own:
            raise MergeError(
                f"tensor {name!r} of the state dict is not a parameter or buffer of the model",
                hint="the model changes its state dict when saving; give it without such hooks",
            )
        if (name in slots) != tensor.is_floating_point() and name not in masks:
            raise MergeError(
                f"tensor {name!r} is {tensor.dtype} in the model and of another kind in the base",
                hint="give the model that the base was saved from",
            )
        shape = slots[name].shape if name in slots else fixed.get(name, tensor.shape)
        if tensor.shape != shape:
            raise MergeError(
                f"tensor {name!r} is {list(tensor.shape)} in the model and {list(shape)} in the "
                "base",
                hint="give the model that the base was saved from",
            )
        if name in slots:
            result |= dict.fromkeys(group, slots[name])
    if missing:
        raise MergeError(
            f"the base lacks {len(missing)} tensors of the model {kind}: {listed(missing)}",
            hint=f"give the model that the base was saved from; the base has, for example, "
            f"{listed(slots)}",
        )
    unused = sorted(
        name
        for name in slots.keys() - {slot.name for slot in result.values()} - spare
        if not is_constant(name, slots[name].shape)
    )
    if unused:
        raise MergeError(
            f"the model {kind} lacks {len(unused)} tensors of the base: {listed(unused)}",
            hint="give the model that the base was saved from",
        )
    return result
