"""Recipes: how a problem is built elsewhere, without sending what it holds.

A recipe is the name of an importable function and a few arguments. For most problems those are
themselves, pickled as the call that made them (:mod:`map_bo.problems.rebuilding`): paths, settings
and functions by name. Weights do not travel; what would need them is refused before anything
starts.
"""

from __future__ import annotations

import io
import os
import pickle
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, Protocol, Self, runtime_checkable

from torch import Tensor

from map_bo.errors import ConfigError, MapBoError, WorkersError, first_line
from map_bo.problems.problem import Problem
from map_bo.workers.workers import WorkerSettings

__all__ = ["LARGEST", "BuildsByRecipe", "Recipe"]

LARGEST = 16 * 2**20
"""Bytes that a problem may take on its way to a worker."""

_FACTORY_HINT = (
    "put functions into a module that workers can import, or give a function that makes the "
    "problem: map_bo.Processes(4, factory=make_problem)"
)
_SIZE_HINT = (
    "save weights and data to a file and give its path, or give a function that makes the "
    "problem: map_bo.Processes(4, factory=make_problem)"
)


@dataclass(frozen=True)
class Recipe:
    """A function, by name, that returns the problem; plain data that travel anywhere.

    Attributes:
        factory: ``"package.module:qualname"``.
        args: Its arguments, plain data.
        kwargs: Those with names.
        directory: What relative paths are relative to; entered while the problem is built, where
            it exists.
        paths: Folders in which modules of the user's own are looked for, after those that the
            worker has.
        main: Whether names of ``__main__`` are among it, so that only processes which import the
            driver's script can follow it.
    """

    factory: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    directory: str = ""
    paths: tuple[str, ...] = ()
    main: bool = False

    @classmethod
    def of(cls, problem: Problem, *, script: bool = False) -> Self:
        """Return the recipe of a problem: it is pickled, without weights.

        Args:
            problem: The problem of the driver.
            script: Whether workers import the driver's script, so that functions of ``__main__``
                are known to them.

        Raises:
            ConfigError: When it holds something that cannot be found or built elsewhere, or too
                much; the hint says what to do.
        """
        content, main = _pickled(problem, script=script)
        return cls(
            "map_bo.workers.recipe:unpickled", (content,), {}, os.getcwd(), _own_paths(), main
        )

    @classmethod
    def calling(cls, factory: str | Callable[[], Problem], *, script: bool = False) -> Self:
        """Return the recipe of what a function returns.

        Args:
            factory: The function, or its name ``"package.module:qualname"``.
            script: As for :meth:`of`.

        Raises:
            ConfigError: When the function cannot be found by its name.
        """
        if isinstance(factory, str):
            found = _function(factory)
            if not callable(found):
                raise ConfigError(f"the factory {factory!r} is not a function", hint=_FACTORY_HINT)
            module = factory.partition(":")[0]
            return cls(factory, (), {}, os.getcwd(), _own_paths(), module == "__main__")
        if not callable(factory):
            raise ConfigError(
                f"the factory must be a function, got {factory!r:.80}",
                hint="give a function without arguments that returns the problem",
            )
        content, main = _pickled(factory, script=script)
        return cls("map_bo.workers.recipe:called", (content,), {}, os.getcwd(), _own_paths(), main)

    @classmethod
    def configured(cls, tree: Mapping[str, Any]) -> Self:
        """Return the recipe of a problem of the command line.

        Args:
            tree: The resolved configuration as plain data; the groups of problem and operator.
        """
        return cls(
            "map_bo.app.build:problem_of",  # from above: only its name is known here
            (dict(tree),),
            {},
            os.getcwd(),
            _own_paths(),
        )

    def build(self) -> Problem:
        """Build the problem, here.

        Raises:
            WorkersError: When it cannot be imported or built, with the reason.
            MapBoError: What the problem itself refuses, such as a file that cannot be read.
        """
        sys.path += [path for path in self.paths if path not in sys.path]
        before = os.getcwd()
        if self.directory and Path(self.directory).is_dir():
            os.chdir(self.directory)
        try:
            made = _function(self.factory)(*self.args, **self.kwargs)
        except MapBoError:
            raise
        except Exception as error:  # whatever the user's own code raises
            raise WorkersError(
                f"the problem cannot be built in a worker: {type(error).__name__}: "
                f"{first_line(error)}",
                hint="workers need the same modules and files as the driver; "
                "test it with a factory: map_bo.Processes(1, factory=make_problem)",
            ) from error
        finally:
            os.chdir(before)
        if not isinstance(made, Problem):
            raise WorkersError(
                f"{self.factory} returned a {type(made).__name__} and no problem",
                hint="return what has `space`, `metrics` and `evaluate(X, *, generator)`",
            )
        return made


@runtime_checkable
class BuildsByRecipe(Protocol):
    """Settings of workers that can be given the recipe of the problem."""

    def with_recipe(self, recipe: Recipe) -> WorkerSettings:
        """Return the settings with a recipe, unless they have one or a factory already."""
        ...


def unpickled(content: bytes) -> Any:
    """Return the problem that :meth:`Recipe.of` has pickled."""
    return pickle.loads(content)


def called(content: bytes) -> Any:
    """Return what the function returns that :meth:`Recipe.calling` has pickled."""
    return pickle.loads(content)()


def _function(name: str) -> Any:
    module, _, qualname = name.partition(":")
    try:
        found: Any = import_module(module)
        for part in qualname.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"the function {name!r} cannot be imported: {first_line(error)}",
            hint="write it as package.module:function, of a module that workers can import",
        ) from error
    return found


def _own_paths() -> tuple[str, ...]:
    """Return where this process finds modules that are not installed with its Python."""
    home = Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()
    found = []
    for path in sys.path:
        folder = Path(path or os.getcwd()).resolve()
        if folder.is_dir() and not any(folder.is_relative_to(one / "lib") for one in home):
            found.append(str(folder))
    return tuple(dict.fromkeys(found))


def _pickled(value: object, *, script: bool) -> tuple[bytes, bool]:
    """Return a value pickled, and whether it names something of ``__main__``.

    Raises:
        ConfigError: When it cannot travel.
    """
    content = _Bounded()
    pickler = _Pickler(content, script=script)
    try:
        pickler.dump(value)
    except MapBoError:
        raise
    except Exception as error:  # whatever an object's own reduction raises
        raise ConfigError(
            "the problem cannot be built in another process: "
            f"{type(error).__name__}: {first_line(error)}",
            hint=_FACTORY_HINT,
        ) from error
    return content.getvalue(), pickler.main


class _Bounded(io.BytesIO):
    def write(self, content: Any, /) -> int:
        if self.tell() + len(content) > LARGEST:
            raise ConfigError(
                f"the problem takes more than {LARGEST // 2**20} MB to send to workers",
                hint=_SIZE_HINT,
            )
        return super().write(content)


class _Pickler(pickle.Pickler):
    """Refuses, by name, what could not be found elsewhere, and tensors that are too large."""

    def __init__(self, file: io.BytesIO, *, script: bool) -> None:
        super().__init__(file, protocol=5)
        self.main = False
        self._script = script
        self._sent = 0

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, FunctionType | type):
            self._refuse_unknown(value)
        elif isinstance(value, ModuleType):
            raise ConfigError(
                f"the problem cannot be built in another process: it holds the module "
                f"{value.__name__}",
                hint=_FACTORY_HINT,
            )
        elif isinstance(value, Tensor):
            if not value.is_meta:
                self._sent += value.numel() * value.element_size()
            if self._sent > LARGEST:
                raise ConfigError(
                    f"the problem takes more than {LARGEST // 2**20} MB to send to workers: it "
                    f"holds a tensor of {list(value.shape)}",
                    hint=_SIZE_HINT,
                )
            if value.device.type not in ("cpu", "meta"):  # the worker's own device has another name
                return _reduced(value.detach().cpu())
            if value.untyped_storage().nbytes() > LARGEST:  # a view of something large
                return _reduced(value.detach().clone())
        return NotImplemented

    def _refuse_unknown(self, value: Any) -> None:
        name = getattr(value, "__qualname__", "")
        what = "class" if isinstance(value, type) else "function"
        where = getattr(value, "__module__", None)
        if "<lambda>" in name or "<locals>" in name:
            kind = "a lambda" if name.endswith("<lambda>") else f"the local {what} {name}"
            raise ConfigError(
                f"the problem cannot be built in another process: it holds {kind} of "
                f"{where}, which cannot be imported",
                hint=_FACTORY_HINT,
            )
        if where != "__main__":
            return
        self.main = True
        if not self._script or not _main_is_a_file():
            raise ConfigError(
                f"the problem cannot be built in another process: the {what} {name} is defined in "
                + ("this script" if _main_is_a_file() else "an interactive session"),
                hint=_FACTORY_HINT,
            )


def _reduced(value: Any) -> Any:
    return value.__reduce_ex__(5)


def _main_is_a_file() -> bool:
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    return getattr(main, "__spec__", None) is not None or (
        file is not None and Path(file).is_file()
    )
