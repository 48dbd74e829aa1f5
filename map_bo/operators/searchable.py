"""What operators have in common: blocks of coefficients, and settings that can be searched."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from map_bo.errors import MergeError, listed
from map_bo.merging.vectors.blocks import Blocks
from map_bo.merging.vectors.kernel import Kernel, KernelMerge
from map_bo.merging.vectors.operator import Deltas
from map_bo.space import CoefficientSpace
from map_bo.values import real_number, whole_number

__all__ = ["SearchableOperator"]


@dataclass(frozen=True, kw_only=True)
class SearchableOperator:
    """Settings of an operator with a coefficient for each expert and block.

    Attributes:
        blocks: Block name -> regular expression on tensor names; see `Blocks`. In words
            ``"layers:K"``, ``"kinds"`` or ``"balanced:K"``, see `blocks_of`. None gives one
            coefficient per expert.
        search: Settings that join the search space beside the coefficients: names, which are then
            searched within the bounds of ``searchable``, or name -> (lower, upper). The value of
            the setting itself, or the bound next to it, is what anchors (base, experts, blend)
            are measured with.
    """

    name: ClassVar[str]
    searchable: ClassVar[Mapping[str, tuple[float, float]]] = {}
    """Settings that can be searched, with their default bounds."""
    signed: ClassVar[bool] = True
    """Whether coefficients may be negative."""

    blocks: Mapping[str, str] | str | None = None
    search: Sequence[str] | Mapping[str, Sequence[float]] = field(default=())

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "blocks", Blocks(self.blocks).patterns)
        bounds = self._bounds()
        put(self, "search", bounds)
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        self.check(settings)
        # Settings may be possible alone and not together, so all corners are tried.
        for corner in itertools.product(*bounds.values()):
            self.check({**settings, **dict(zip(bounds, corner, strict=True))})

    def _bounds(self) -> dict[str, tuple[float, float]]:
        asked = self.search or ()
        if isinstance(asked, str) or not isinstance(asked, Iterable):
            asked = [str(asked)]
        bounds: dict[str, tuple[float, float]] = {}
        for name in asked:
            if name not in self.searchable:
                known = ", ".join(self.searchable) or "none"
                raise MergeError(
                    f"{self.name} cannot search {name!r}", hint=f"settings to search: {known}"
                )
            given = asked[name] if isinstance(asked, Mapping) else self.searchable[name]
            try:
                low, high = map(float, given)
            except (TypeError, ValueError):
                low = high = math.nan
            if not -math.inf < low < high < math.inf:
                raise MergeError(
                    f"the bounds of {name} must be two ascending numbers, got {given!r}",
                    hint="give [lower, upper]",
                )
            bounds[name] = (low, high)
        return bounds

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse values of settings that are not possible.

        Raises:
            MergeError: Naming the setting.
        """

    def check_values(self, values: Mapping[str, float]) -> None:
        """Refuse coefficients and settings that are not possible; see `ChecksValues`."""
        searched = {name: value for name, value in values.items() if name in self.search}
        if searched:
            fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
            self.check({**fields, **searched})
        negative = [n for n, v in values.items() if n not in searched and v < 0]
        if negative and not self.signed:
            raise MergeError(
                f"the coefficients {listed(negative)} must not be negative, got "
                f"{listed(str(values[name]) for name in negative)}",
                hint=f"{self.name} takes coefficients from 0 on",
            )

    def space(self, experts: tuple[str, ...], *, lower: float, upper: float) -> CoefficientSpace:
        """Return a box: a coefficient for each expert and block, then the searched settings.

        Raises:
            MergeError: When the operator takes no negative coefficients and ``lower`` is one.
        """
        if not self.signed and lower < 0:
            raise MergeError(
                f"{self.name} takes no negative coefficients, and the lower bound is {lower}",
                hint="use a lower bound of 0",
            )
        box = CoefficientSpace.box(
            experts, blocks=Blocks(self.blocks).names, lower=lower, upper=upper
        )
        bounds: Mapping[str, tuple[float, float]] = self.search  # type: ignore[assignment]
        if not bounds:
            return box
        defaults = [
            min(max(float(getattr(self, name)), low), high) for name, (low, high) in bounds.items()
        ]
        return CoefficientSpace(
            (*box.names, *bounds),
            (*box.lower, *(low for low, _ in bounds.values())),
            (*box.upper, *(high for _, high in bounds.values())),
            owner=(*box.owner, *(-1 for _ in bounds)),
            experts=box.experts,
            defaults=tuple(defaults),
        )

    def with_blocks(self, patterns: Mapping[str, str]) -> Self:
        """Return the same operator with these blocks; see `HasBlocks`."""
        return dataclasses.replace(self, blocks=patterns)

    def prepare(self, deltas: Deltas) -> KernelMerge:
        """Do, once, all the work that does not depend on the coefficients.

        Raises:
            MergeError: When the blocks do not fit the tensors.
        """
        return self.prepare_pieces(deltas)

    def prepare_pieces(self, deltas: Deltas) -> KernelMerge:
        """Prepare a merge that reads pieces alone; see `ReadsPieces`.

        Raises:
            MergeError: When the blocks do not fit the tensors.
        """
        blocks = Blocks(self.blocks)
        table = blocks.table(deltas.layout)  # first: a wrong pattern should not wait for the rest
        kernel = self.kernel(deltas)
        return KernelMerge(
            deltas, kernel, table, len(blocks), settings=tuple(self.search), signed=self.signed
        )

    def kernel(self, deltas: Deltas) -> Kernel:
        """Return the operator's kernel for these task vectors."""
        raise NotImplementedError

    def block(self, name: str) -> int:
        """Return the index of the block of a tensor; 0 where there are no blocks."""
        return Blocks(self.blocks).of(name)


def share(name: str, value: object, *, open_above: bool = False) -> None:
    """Refuse a setting that is not a share of 1.

    Raises:
        MergeError: When it is not in ``[0, 1]``, or ``[0, 1)`` where ``open_above``.
    """
    hint = "give a number, such as 0.2"
    if real_number(name, value, least=0, most=1, error=MergeError, hint=hint) == 1 and open_above:
        raise MergeError(f"{name} must be a share in [0, 1), got {value!r}", hint=hint)


def number(name: str, value: object, *, least: float = -math.inf) -> None:
    """Refuse a setting that is not a finite number, or below ``least``.

    Raises:
        MergeError: Naming the setting.
    """
    real_number(name, value, least=least, error=MergeError)


def whole(name: str, value: object, *, least: int | None = None) -> None:
    """Refuse a setting that is not a whole number, or below ``least``.

    Raises:
        MergeError: Naming the setting.
    """
    whole_number(name, value, least=least, error=MergeError)


def one_of(name: str, value: object, known: Sequence[str]) -> None:
    """Refuse a setting that is none of the known words.

    Raises:
        MergeError: Naming them.
    """
    if value not in known:
        raise MergeError(
            f"{name} must be one of {', '.join(known)}, got {value!r}",
            hint=f"set {name} to one of them",
        )
