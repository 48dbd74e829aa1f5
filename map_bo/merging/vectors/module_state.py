"""The state of a module beside its weights: attributes, structure, hooks and what they hold."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from operator import is_
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["ModuleState", "TensorHooks", "casting", "hooks_of", "restore_hooks", "same_items"]

_PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device)
_MAPPINGS = (dict, OrderedDict)
_LIBRARIES = {*sys.stdlib_module_names, "torch", "numpy", "builtins"}
_DEEPEST = 6  # objects within objects
_LONGEST = 10_000  # entries of a container that are looked through one by one
_OF_PYTHON = {"__annotations__", "__doc__", "__dict__", "__weakref__", "_abc_impl", "__module__"}
_REGISTERS = {"_modules": "module", "_parameters": "parameter", "_buffers": "buffer"}
_MISSING = object()


def same_items(now: Mapping[Any, Any], found: Mapping[Any, Any]) -> bool:
    """Return whether two mappings hold the same objects under the same keys in the same order."""
    if len(now) != len(found):
        return False
    return all(map(is_, now.values(), found.values())) and list(now) == list(found)


class ModuleState:
    """A photograph of everything that hangs on a module, apart from its parameters and buffers.

    It holds the attributes of all submodules (so also which submodules, parameters, buffers and
    hooks there are), their classes with what the classes define, and what the attributes hold:
    containers, tensors that are not registered, arrays, generators and plain objects such as a
    configuration. Objects of torch and of Python's own library are taken to be values.

    Args:
        model: The module.
        tensors: Its parameters and buffers, whose contents are somebody else's business.
    """

    def __init__(self, model: nn.Module, tensors: list[Tensor]) -> None:
        self._seen = {id(tensor) for tensor in tensors}
        self._kept: list[object] = []  # so that no number of an object is given out again
        self._modules: list[tuple[nn.Module, type, dict[str, Any]]] = []
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._lists: list[tuple[list[Any] | deque[Any], list[Any]]] = []
        self._sets: list[tuple[set[Any], set[Any]]] = []
        self._values: list[tuple[Callable[[], bool], Callable[[], object], str]] = []
        self._names: dict[int, str] = {}
        self._classes: dict[type, dict[str, Any]] = {}
        for name, module in model.named_modules():
            self._names[id(module)] = name
        for module in model.modules():
            self._visit(module, 0)
        for _, kind, _ in self._modules:
            for each in kind.__mro__:
                if each is not object and each not in self._classes:
                    self._classes[each] = dict(vars(each))
        contents = {id(now): found for now, found in self._dicts}
        self._registers = {
            id(attributes[kind]): (module, word, contents[id(attributes[kind])])
            for module, _, attributes in self._modules
            for kind, word in _REGISTERS.items()
            if id(attributes.get(kind)) in contents
        }

    def _visit(self, value: object, depth: int) -> None:
        if isinstance(value, _PLAIN) or id(value) in self._seen or depth > _DEEPEST:
            return
        self._seen.add(id(value))
        self._kept.append(value)
        if isinstance(value, nn.Module):
            found = dict(vars(value))
            self._modules.append((value, type(value), found))
            self._visit_all(found.values(), depth)
        elif isinstance(value, Tensor):
            self._watch_tensor(value)
        elif isinstance(value, np.ndarray):
            self._watch_array(value)
        elif isinstance(value, dict):
            self._dicts.append((value, dict(value)))
            self._visit_all(value.values(), depth)
        elif isinstance(value, list | deque):
            self._lists.append((value, list(value)))
            self._visit_all(value, depth)
        elif isinstance(value, set):
            self._sets.append((value, set(value)))
        elif isinstance(value, tuple):
            self._visit_all(value, depth)
        elif isinstance(value, torch.Generator | np.random.Generator | random.Random):
            self._watch_generator(value)
        elif _is_plain_object(value):
            self._dicts.append((vars(value), dict(vars(value))))
            self._visit_all(vars(value).values(), depth)

    def _visit_all(self, values: Any, depth: int) -> None:
        if len(values) > _LONGEST:
            return
        for value in values:
            kind = type(value)
            if kind is bool or value is None:
                continue
            if kind in _MAPPINGS and not value:  # as most registers and hooks are
                if id(value) not in self._seen:
                    self._seen.add(id(value))
                    self._dicts.append((value, {}))
            elif kind not in _PLAIN:
                self._visit(value, depth + 1)

    def _watch_tensor(self, tensor: Tensor) -> None:
        if tensor.layout != torch.strided or tensor.device.type == "meta":
            return
        memory = tensor.data
        storage, size = memory.untyped_storage(), memory.untyped_storage().nbytes()
        with torch.inference_mode(False), torch.no_grad():
            copy = memory.clone()
            wide = memory.view(torch.uint8) if memory.dim() and memory.is_contiguous() else None

        def same() -> bool:
            if storage.nbytes() < size:  # the memory was given up; reading would crash
                return False
            if tensor.data_ptr() != memory.data_ptr() or tensor.dtype != memory.dtype:
                return False
            if tensor.shape != memory.shape:
                return False
            # Bit for bit, so that NaN is equal to itself.
            if wide is not None:
                return torch.equal(wide, copy.view(torch.uint8))
            return torch.equal(memory, copy)

        def put() -> None:
            if storage.nbytes() < size:
                storage.resize_(size)
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                if not tensor.is_inference():
                    tensor.data = memory
                memory.copy_(copy)

        self._values.append((same, put, "a tensor"))

    def _watch_array(self, array: np.ndarray[Any, Any]) -> None:
        if array.dtype.hasobject:
            return
        copy = array.copy()

        def put() -> None:
            np.copyto(array, copy)

        self._values.append((lambda: array.tobytes() == copy.tobytes(), put, "an array"))

    def _watch_generator(
        self, source: torch.Generator | np.random.Generator | random.Random
    ) -> None:
        if isinstance(source, torch.Generator):
            state = source.get_state()
            put: Callable[[], object] = lambda: source.set_state(state)  # noqa: E731
        elif isinstance(source, np.random.Generator):
            bits, held = source.bit_generator, source.bit_generator.state
            put = lambda: setattr(bits, "state", held)  # noqa: E731
        else:
            numbers = source.getstate()
            put = lambda: source.setstate(numbers)  # noqa: E731
        self._values.append((lambda: False, put, "a generator"))

    def restore(self) -> tuple[list[str], list[str]]:
        """Put everything back.

        Returns:
            What had changed in plain words, such as ``"module 2: eps was 1e-05, is 10.0"``; and
            what could not be put back, with the reason.
        """
        changes: list[str] = []
        troubles: list[str] = []
        for kind, content in self._classes.items():
            now = vars(kind)
            if not same_items(now, content):
                self._restore_class(kind, content, changes, troubles)
        for module, kind, attributes in self._modules:
            if type(module) is not kind:
                changes.append(f"{self._name(module)} was a {kind.__name__}")
                try:
                    module.__class__ = kind
                except TypeError as error:
                    troubles.append(f"{self._name(module)} was a {kind.__name__} ({error})")
                    continue
            own = vars(module)
            if not same_items(own, attributes):
                changes += self._differences(self._name(module), own, attributes)
                own.clear()
                own.update(attributes)
        for items, found in self._dicts:
            if (items or found) and not same_items(items, found):
                changes += self._structure(items, items)
                items.clear()
                items.update(found)
        for entries, before in self._lists:
            if len(entries) != len(before) or not all(map(is_, entries, before)):
                entries.clear()
                entries.extend(before)
        for members, held in self._sets:
            if members != held:
                members.clear()
                members.update(held)
        for same, put, what in self._values:
            try:
                if not same():
                    put()
            except Exception as error:
                troubles.append(f"{what} that the model holds ({error})")
        return changes, troubles

    def _name(self, module: nn.Module) -> str:
        name = self._names.get(id(module))
        return "the model" if not name else f"module {name}"

    def _structure(self, register: object, now: Mapping[Any, Any]) -> list[str]:
        """Return what differs between a register of a module, if it is one, and what is there."""
        if id(register) not in self._registers:
            return []
        module, word, found = self._registers[id(register)]
        return [
            f"{self._name(module)}: {word} {key!r} was {_verb(key, now, found)}"
            for key in {**found, **now}
            if now.get(key, _MISSING) is not found.get(key, _MISSING)
        ]

    def _differences(
        self, name: str, now: Mapping[str, Any], found: Mapping[str, Any]
    ) -> list[str]:
        texts = []
        for key in {**found, **now}:
            before, after = found.get(key, _MISSING), now.get(key, _MISSING)
            if before is after:
                continue
            if key in _REGISTERS and isinstance(after, dict):
                texts += self._structure(before, after)
                continue
            if isinstance(before, _PLAIN) and isinstance(after, _PLAIN):
                if before != after:
                    texts.append(f"{name}: {key} was {before!r}, is {after!r}")
            else:
                texts.append(f"{name}: {key} was {_verb(key, now, found)}")
        return texts

    def _restore_class(
        self,
        kind: type,
        content: Mapping[str, Any],
        changes: list[str],
        troubles: list[str],
    ) -> None:
        now = dict(vars(kind))
        for key in {**content, **now}:
            before = content.get(key, _MISSING)
            if key in _OF_PYTHON or now.get(key, _MISSING) is before:
                continue
            text = f"class {kind.__name__}: {key} was {_verb(key, now, content)}"
            changes.append(text)
            try:
                if before is _MISSING:
                    delattr(kind, key)
                else:
                    setattr(kind, key, before)
            except (AttributeError, TypeError) as error:
                troubles.append(f"{text} ({error})")


def _verb(key: object, now: Mapping[Any, Any], found: Mapping[Any, Any]) -> str:
    if key not in found:
        return "added"
    return "replaced" if key in now else "removed"


def _is_plain_object(value: object) -> bool:
    """Return whether a value is an object of somebody's own, such as a configuration."""
    if isinstance(value, SimpleNamespace):
        return True
    kind = type(value)
    return (
        not isinstance(value, type)
        and kind.__module__.partition(".")[0] not in _LIBRARIES
        and isinstance(getattr(value, "__dict__", None), dict)
    )


TensorHooks = tuple[dict[int, Any] | None, dict[int, Any] | None]
"""The hooks of a tensor: on its gradient, and after that was accumulated."""


def hooks_of(tensor: Tensor) -> TensorHooks:
    """Return the hooks that a tensor has."""
    before, after = tensor._backward_hooks, tensor._post_accumulate_grad_hooks
    return (dict(before) if before else None, dict(after) if after else None)


def restore_hooks(tensor: Tensor, found: TensorHooks) -> None:
    """Give a tensor the hooks that it had."""
    if hooks_of(tensor) != found:
        # Torch changes these in place, and forgets them when they are set.
        before, after = (None if each is None else OrderedDict(each) for each in found)
        tensor._backward_hooks = before
        tensor._post_accumulate_grad_hooks = after  # type: ignore[assignment]


def casting(dtype: torch.dtype) -> Callable[..., Any]:
    """Return a forward pre-hook that casts floating inputs."""

    def cast(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        if isinstance(value, dict):
            return {key: cast(each) for key, each in value.items()}
        return type(value)(map(cast, value)) if type(value) in (list, tuple) else value

    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return cast(args), cast(kwargs)

    return hook
