"""Fingerprints of settings, functions and modules: the same content, the same text, anywhere.

A key of something that was computed must change with all that it was computed from. Of weights and
examples there are digests. A fingerprint is for the rest: the architecture with everything that
hangs on it, an operator, and code of one's own that either of them calls. What cannot be told for
certain has none, so that nothing is ever mistaken for something else.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
import logging
import re
import sys
from collections import deque
from collections.abc import Iterable, Mapping
from enum import Enum
from functools import cache
from importlib import metadata
from importlib.util import find_spec, resolve_name
from pathlib import Path, PurePath
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodType,
    MethodWrapperType,
    ModuleType,
    SimpleNamespace,
    WrapperDescriptorType,
)
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from map_bo.errors import DataError
from map_bo.plain import Described

__all__ = ["fingerprint", "library_version"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis))
_BY_TEXT = (
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
    *(range, slice, PurePath, inspect.Signature),
)
_BUILTIN = (
    *(BuiltinFunctionType, MethodWrapperType, WrapperDescriptorType),
    *(MemberDescriptorType, GetSetDescriptorType),
)
_OF_CLASSES = {  # written by Python, or text for people
    *("__dict__", "__weakref__", "__module__", "__doc__", "__annotations__", "__qualname__"),
    *("__firstlineno__", "__static_attributes__", "__abstractmethods__", "_abc_impl"),
    *("__annotate__", "__annotations_cache__", "__annotate_func__", "__slots__"),
    *("__parameters__", "__orig_bases__", "__match_args__", "__dataclass_fields__"),
    *("__dataclass_params__", "__hash__", "__protocol_attrs__", "__non_callable_proto_members__"),
}
_HOOKS = re.compile(r"_(forward|backward)(_pre)?_hooks")  # by numbers that count in the process
_NOT_OF_RESULTS = re.compile(r".*_hooks(_with_kwargs|_always_called)?|_is_full_backward_hook")
_NAMES_OF_PLACES = {  # and other notes of transformers that differ from process to process
    *("_name_or_path", "name_or_path", "_commit_hash", "transformers_version"),
    "_original_object_hash",
}
_NOTES = {"warnings_issued", "training"}
_ROOMS = ("merging", "operators", "evaluators", "problems")  # of map_bo, that decide numbers
_DEEPEST = 200


def fingerprint(value: object, *, written: Iterable[Tensor] = ()) -> str:
    """Return a SHA-256 over everything that a value consists of.

    Plain values, containers, tensors and arrays count with their contents; modules with their
    classes, structure and attributes; functions and classes of one's own with their code and
    whatever that refers to, those of installed packages with name and version; other objects with
    their attributes. Where a folder or a file lies does not count, where transformers notes it.

    Args:
        value: The value.
        written: Tensors whose contents do not count, only their shapes and dtypes.

    Raises:
        DataError: For something whose content cannot be told, such as an open file; it says where.
    """
    walk = _Walk({id(tensor) for tensor in written})
    walk.visit(value, "it", 0)
    return walk.total.hexdigest()


class _Walk:
    def __init__(self, written: set[int]) -> None:
        self.total = hashlib.sha256()
        self._written = written
        self._seen: dict[int, int] = {}
        self._classes: set[type] = set()  # of one's own, whose contents were added
        self._kept: list[object] = []  # so that no number of an object is given out again

    def _add(self, *parts: object) -> None:
        for part in parts:
            data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
            self.total.update(b"%d:" % len(data))
            self.total.update(data)

    def _is_known(self, value: object) -> bool:
        number = self._seen.setdefault(id(value), len(self._seen))
        if number < len(self._kept):
            self._add("again", number)
            return True
        self._kept.append(value)
        return False

    def visit(self, value: object, where: str, depth: int) -> None:
        """Add a value; ``where`` it is, for errors."""
        if depth > _DEEPEST:
            raise DataError(f"{where} is nested too deeply", hint="give it flatter settings")
        deeper = depth + 1
        kind = type(value)
        if isinstance(value, Enum):
            self._add("enum", kind.__qualname__, value.name)
        elif isinstance(value, _PLAIN):
            self._add(kind.__name__, value.hex() if isinstance(value, float) else repr(value))
        elif isinstance(value, _BY_TEXT):
            self._add(kind.__name__, value)
        elif isinstance(value, Tensor):
            self._tensor(value, where)
        elif isinstance(value, np.ndarray | np.generic):
            array = np.asarray(value)
            if array.dtype.hasobject:
                raise _unknown(value, where)
            self._add("array", array.dtype, array.shape, array.tobytes())
        elif isinstance(value, list | tuple | deque):
            items = list(value)
            self._add(kind.__qualname__, len(items))
            for i, part in enumerate(items):
                self.visit(part, f"{where}[{i}]", deeper)
        elif isinstance(value, set | frozenset):
            self._add("set", *sorted(_of_part(part, where, self._written) for part in value))
        elif isinstance(value, dict):
            self._add(kind.__qualname__)
            self._mapping(value, where, deeper)
        elif isinstance(value, logging.Logger):
            self._add("logger", value.name)
        elif isinstance(value, re.Pattern):
            self._add("pattern", value.pattern, value.flags)
        elif isinstance(value, torch.Generator):
            self._add("generator", value.get_state().numpy().tobytes())
        elif isinstance(value, ModuleType):
            self._add("module", value.__name__, _version_of_module(value, where))
        elif not self._is_known(value):
            self._object(value, where, deeper)

    def _mapping(self, items: Mapping[Any, Any], where: str, depth: int) -> None:
        self._add("mapping", len(items))
        for key, part in items.items():
            self.visit(key, f"a key of {where}", depth)
            self.visit(part, f"{where}[{key!r:.40}]", depth)

    def _tensor(self, tensor: Tensor, where: str) -> None:
        self._add("tensor", tensor.dtype, tuple(tensor.shape))
        if id(tensor) in self._written or tensor.device.type == "meta":
            return
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise _unknown(tensor, where)
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._add(hashlib.sha256(content.numpy().data).digest())

    def _object(self, value: object, where: str, depth: int) -> None:
        kind = type(value)
        if isinstance(value, type):
            self._class(value, where, depth)
        elif isinstance(value, FunctionType):
            self._function(value, where, depth)
        elif isinstance(value, MethodType):
            self.visit(value.__func__, where, depth)
            self.visit(value.__self__, where, depth)
        elif isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                self.visit(part, where, depth)
        elif isinstance(value, classmethod | staticmethod):
            self.visit(value.__func__, where, depth)
        elif isinstance(value, property):
            self.visit((value.fget, value.fset), where, depth)
        elif isinstance(value, functools.cached_property):
            self.visit(value.func, where, depth)
        elif isinstance(value, functools._lru_cache_wrapper):
            self.visit(value.__wrapped__, where, depth)
        elif isinstance(value, SimpleNamespace):
            self._attributes(vars(value), where, depth)
        elif isinstance(value, _BUILTIN):
            self._add("builtin", value.__module__, value.__qualname__)
        elif isinstance(value, nn.Module):
            self._module(value, where, depth)
        elif isinstance(value, Described):
            self._class(kind, where, depth)
            self.visit(value.describe(), where, depth)
        elif kind.__module__.partition(".")[0] in sys.stdlib_module_names or not hasattr(
            value, "__dict__"
        ):
            raise _unknown(value, where)
        else:
            self._class(kind, where, depth)
            self._attributes(vars(value), where, depth)

    def _attributes(self, items: Mapping[str, Any], where: str, depth: int) -> None:
        for name, part in items.items():
            if name not in _NAMES_OF_PLACES and name not in _NOTES:
                self._add(name)
                self.visit(part, f"{where}.{name}", depth)

    def _module(self, module: nn.Module, where: str, depth: int) -> None:
        self._class(type(module), where, depth)
        others: dict[str, Any] = {}
        for name, part in vars(module).items():
            if _HOOKS.fullmatch(name):
                self.visit(list(part.values()), f"{where}.{name}", depth)
            elif not _NOT_OF_RESULTS.fullmatch(name):
                others[name] = part
        self._attributes(others, where, depth)

    def _class(self, kind: type, where: str, depth: int) -> None:
        self._add("class", kind.__module__, kind.__qualname__)
        version = library_version(kind.__module__)
        if version is not None:
            self._add(version)
            return
        for base in kind.__mro__:
            version = library_version(base.__module__)
            self._add(base.__module__, base.__qualname__, version or "")
            if version is not None or base in self._classes:
                continue
            self._classes.add(base)
            generated = "__dataclass_fields__" in vars(base)
            for name, part in vars(base).items():
                if name not in _OF_CLASSES and not (generated and _is_generated(name, part)):
                    self._add(name)
                    self.visit(part, f"{where} ({base.__qualname__}.{name})", depth + 1)

    def _function(self, function: FunctionType, where: str, depth: int) -> None:
        self._add("function", function.__module__, function.__qualname__)
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        self.visit((function.__defaults__, function.__kwdefaults__, cells), where, depth)
        version = library_version(function.__module__ or "")
        if version is not None:
            self._add(version)
            return
        if vars(function):
            self._attributes(vars(function), where, depth)
        names = self._code(function.__code__)
        scope = function.__globals__
        package = scope.get("__package__")
        for name in sorted(_imports(function.__code__, package if package else "")):
            self._add(name)
            if library_version(name) is not None:
                continue
            if name in sys.modules:
                self.visit(sys.modules[name], f"{name} of {where}", depth)
            elif name.partition(".")[0] in sys.modules or find_spec(name.partition(".")[0]):
                raise DataError(
                    f"{where} imports {name}, which nothing else has imported yet",
                    hint="import it at the top of its module",
                )
        for name in sorted(names & scope.keys()):
            self._add(name)
            self.visit(scope[name], f"{name} of {where}", depth)

    def _code(self, code: CodeType) -> set[str]:
        """Add the instructions and constants of code; return the names that it refers to."""
        self._add(code.co_code, *code.co_names, code.co_flags)
        names = set(code.co_names)
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                names |= self._code(constant)
            else:
                self.visit(constant, "a constant", 0)
        return names


def _is_generated(name: str, part: object) -> bool:
    """Return whether a dataclass has made a function, of fields that are values anyway."""
    if not (name.startswith("__") and isinstance(part, FunctionType)):
        return False
    return part.__code__.co_filename == "<string>"


def _of_part(value: object, where: str, written: set[int]) -> str:
    walk = _Walk(written)
    walk.visit(value, where, 0)
    return walk.total.hexdigest()


def _unknown(value: object, where: str) -> DataError:
    kind = type(value)
    return DataError(
        f"{where} is a {kind.__module__}.{kind.__qualname__}, whose content cannot be told",
        hint="keep it out of the model and its settings, or do without a cache of evaluations",
    )


@cache
def library_version(module: str) -> str | None:
    """Return which version of an installed package a module is of; None for one's own modules.

    Args:
        module: Its name, such as ``torch.nn.modules.linear``.
    """
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names:
        return f"python {sys.version_info.major}.{sys.version_info.minor}"
    if top == "map_bo":
        return f"map_bo {_own_code()}"
    try:
        spec = find_spec(top) if top else None
    except ValueError:  # as of a script that is run
        spec = None
    places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or ())]
    if not any({"site-packages", "dist-packages"} & set(Path(p).parts) for p in places if p):
        return None
    found = sys.modules.get(top)
    said = vars(found).get("__version__") if found is not None else None
    if isinstance(said, str):
        return f"{top} {said}"
    try:
        return f"{top} {metadata.version(top)}"
    except metadata.PackageNotFoundError:
        return None


@cache
def _own_code() -> str:
    """Return a digest of the parts of map_bo that decide what is measured."""
    root = Path(__file__).parents[1]
    files = [*root.glob("*.py"), *(f for room in _ROOMS for f in (root / room).rglob("*.py"))]
    total = hashlib.sha256()
    for file in sorted(files):
        total.update(file.relative_to(root).as_posix().encode())
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def _imports(code: CodeType, package: str) -> set[str]:
    """Return the modules that code imports when it runs, by their whole names.

    Args:
        code: The code of a function.
        package: The package of its module.
    """
    found: set[str] = set()
    before: list[Any] = []
    for step in dis.get_instructions(code):
        if step.opname == "IMPORT_NAME":
            level, wanted = before[-2:]
            if level and not package:  # it cannot be imported
                continue
            name = resolve_name("." * level + step.argval, package) if level else step.argval
            found.add(name)
            parts = {f"{name}.{part}" for part in wanted or ()}
            found |= parts & sys.modules.keys()  # the others are what the module holds
        if step.opname not in ("EXTENDED_ARG", "CACHE"):
            before.append(step.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= _imports(constant, package)
    return found


def _version_of_module(module: ModuleType, where: str) -> str:
    """Return the version of a module; of one's own a digest of its file.

    With it count the files of all of one's own modules that it refers to.
    """
    version = library_version(module.__name__)
    if version is not None:
        return version
    digest = _digest_of_file(module)
    if digest is None:
        raise DataError(
            f"{where} is the module {module.__name__}, whose file cannot be read",
            hint="import what is used",
        )
    found = {module.__name__: digest}
    waiting = [module]
    while waiting:
        for part in list(vars(waiting.pop()).values()):
            if isinstance(part, ModuleType):
                name = part.__name__
            elif isinstance(part, FunctionType | type):
                name = part.__module__ or ""
            else:
                continue
            behind = sys.modules.get(name)
            if not isinstance(behind, ModuleType) or name in found:
                continue
            if library_version(name) is not None:
                continue
            found[name] = _digest_of_file(behind) or ""  # none of a package without a file
            waiting.append(behind)
    return " ".join(f"{name} {found[name]}" for name in sorted(found))


_files: WeakKeyDictionary[ModuleType, tuple[object, str]] = WeakKeyDictionary()


def _digest_of_file(module: ModuleType) -> str | None:
    """Return a digest of a module's file as it was when first asked for; None without a file.

    What is written to the file later is not what runs, until the module is loaded again.
    """
    spec, known = module.__spec__, _files.get(module)
    if known is not None and known[0] is spec:
        return known[1]
    file = vars(module).get("__file__")
    if not isinstance(file, str) or not Path(file).is_file():
        return None
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    _files[module] = spec, digest
    return digest
