"""Problems that are built again elsewhere: pickled as the call that made them, without weights.

A worker in another process or on another machine builds the problem for itself. What a problem
holds by then may be gigabytes, and what it was made from is a few paths and settings.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ClassVar, ParamSpec, Self, TypeVar

import torch
from torch import nn

__all__ = ["Rebuilt", "rebuilt"]

P = ParamSpec("P")
R = TypeVar("R", bound="Rebuilt")

_SMALL = 1024  # parameters of at most so many numbers travel as they are


class Rebuilt:
    """Pickles as the call that made it; copies are copies and make nothing.

    A subclass whose ``__init__`` takes arguments that pickle needs nothing more. What is made by a
    function should carry that function's call, see :func:`rebuilt`.
    """

    _without_weights: ClassVar[tuple[str, ...]] = ()
    """Arguments that may be modules, of which the values of large parameters do not matter."""
    _made_by: tuple[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:  # noqa: D102
        made = super().__new__(cls)
        made._made_by = (cls, args, kwargs)
        return made

    def made_by(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Remember that ``function(*args, **kwargs)`` makes this object again."""
        self._made_by = (function, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        function, args, kwargs = self._made_by
        call = inspect.signature(function).bind(*args, **kwargs)
        for name in self._without_weights:
            if isinstance(module := call.arguments.get(name), nn.Module):
                call.arguments[name] = _Architecture(module)
        return _call, (function, call.args, call.kwargs)

    def __copy__(self) -> Self:
        made: Self = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made


def rebuilt(function: Callable[P, R]) -> Callable[P, R]:
    """Let what an importable function returns pickle as its call; a decorator."""

    @wraps(function)
    def make(*args: P.args, **kwargs: P.kwargs) -> R:
        made = function(*args, **kwargs)
        if isinstance(made, Rebuilt):
            made.made_by(make, *args, **kwargs)
        return made

    return make


def _call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    def unwrapped(value: Any) -> Any:
        return value.module if isinstance(value, _Architecture) else value

    return function(
        *map(unwrapped, args), **{name: unwrapped(value) for name, value in kwargs.items()}
    )


class _Architecture:
    """A module that travels without the values of its large parameters, which come back as zeros.

    Buffers travel as they are: those that are not saved with a model are computed when it is made.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __getstate__(self) -> nn.Module:
        large = [p for p in self.module.parameters() if p.numel() > _SMALL]
        memo = {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
            for p in large
        }
        return copy.deepcopy(self.module, dict(memo))

    def __setstate__(self, module: nn.Module) -> None:
        made: dict[int, nn.Parameter] = {}  # tied parameters stay tied
        for part in module.modules():
            for name, p in list(part._parameters.items()):
                if p is not None and p.is_meta:
                    if id(p) not in made:
                        zeros = torch.zeros_like(p, device="cpu")
                        made[id(p)] = nn.Parameter(zeros, requires_grad=p.requires_grad)
                    part._parameters[name] = made[id(p)]
        self.module = module
