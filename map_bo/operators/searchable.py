"""What operators have in common: blocks of coefficients, and settings that can be searched.

The operator itself can be searched too (`OperatorChoice`): one of several operators merges, and the
search says which. A row of the space then has the experts' coefficients, the code of an operator,
and the settings that operators search, each under the name of its operator; see
:mod:`map_bo.choice`. A merge that was chosen is a merge of that operator with its settings, and is
exported, described and followed as such.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import Tensor

from map_bo.choice import ChoiceAxis
from map_bo.errors import MergeError, listed
from map_bo.merging.vectors.blocks import Blocks, HasBlocks
from map_bo.merging.vectors.kernel import Kernel, KernelMerge, check_coefficients
from map_bo.merging.vectors.operator import ChecksValues, Deltas, MergeOperator, PreparedMerge
from map_bo.space import CoefficientSpace
from map_bo.values import real_number, whole_number

__all__ = ["OperatorChoice", "SearchableOperator", "each_operator"]

_OPERATOR = "operator"  # the column that says which operator merges


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


@dataclass(frozen=True)
class OperatorChoice:
    """Merging by one of several operators, which is searched together with the coefficients.

    All options scale the experts by the same coefficients, one for each expert, or each expert and
    block. Settings that an option searches (``Ties(search=["density"])``) are columns of their own,
    ``ties.density``, which move nothing under the other options.

    Every option is prepared, so their preparations take memory together; a candidate then costs
    what its own operator costs.

    Attributes:
        options: Name -> operator, two or more. Base, experts and uniform blend are measured with
            the first of them, and the uniform blend with each: with task arithmetic first, the
            experts among them are the experts as they are.
        blocks: Blocks that all options get; see `SearchableOperator`. None leaves each its own,
            which must then be the same.

    Raises:
        MergeError: When there are fewer than two options, one is no operator or itself a choice,
            or their blocks differ.
    """

    options: Mapping[str, MergeOperator]
    blocks: Mapping[str, str] | str | None = None

    def __post_init__(self) -> None:
        options = self.options
        if not isinstance(options, Mapping) or len(options) < 2:
            names = list(options) if isinstance(options, Mapping) else options
            raise MergeError(
                f"a choice of operators needs two or more options, got {names!r}",
                hint="give {NAME: OPERATOR, ...}, or the one operator itself",
            )
        for name, one in options.items():
            if not isinstance(one, MergeOperator) or isinstance(one, OperatorChoice | type):
                raise MergeError(
                    f"option {name!r} must be the settings of a merge operator, got {one!r:.80}",
                    hint="give settings, such as map_bo.TaskArithmetic()",
                )
        if self.blocks is not None:
            options = {name: self._in_blocks(name, one) for name, one in options.items()}
        object.__setattr__(self, "options", {str(name): one for name, one in options.items()})
        blocks = {n: o.blocks if isinstance(o, HasBlocks) else None for n, o in options.items()}
        first = next(iter(blocks.values()))
        differing = [name for name, own in blocks.items() if own != first]
        if differing:
            raise MergeError(
                f"the options have different blocks: {listed(differing)} and {next(iter(blocks))}",
                hint="give the choice its blocks, which all options then have",
            )
        object.__setattr__(self, "blocks", first)

    def _in_blocks(self, name: str, one: MergeOperator) -> MergeOperator:
        if not isinstance(one, HasBlocks):
            raise MergeError(
                f"option {name!r} takes no blocks", hint="leave out the blocks, or that option"
            )
        # A word is as good as patterns to an operator, which keeps it until it is known.
        with_blocks: Any = one.with_blocks
        found: MergeOperator = with_blocks(self.blocks)
        return found

    def with_blocks(self, patterns: Mapping[str, str]) -> OperatorChoice:
        """Return the same choice with these blocks in all options; see `HasBlocks`."""
        return OperatorChoice(self.options, patterns)

    def with_each(self, change: Callable[[MergeOperator], MergeOperator]) -> OperatorChoice:
        """Return the choice with every option changed."""
        return OperatorChoice({name: change(one) for name, one in self.options.items()})

    def space(self, experts: tuple[str, ...], *, lower: float, upper: float) -> CoefficientSpace:
        """Return the experts' coefficients, the operator's column, and the options' settings.

        Raises:
            MergeError: When an option takes no such bounds, or other coefficients than the first.
        """
        spaces = {
            name: one.space(experts, lower=lower, upper=upper) for name, one in self.options.items()
        }
        first_name, first = next(iter(spaces.items()))
        shared = _coefficients(first)
        for name, own in spaces.items():
            if list(_coefficients(own).items()) != list(shared.items()) or own.constraints:
                raise MergeError(
                    f"option {name!r} takes the coefficients {listed(_coefficients(own))}, and "
                    f"{first_name!r} takes {listed(shared)}",
                    hint="a choice is between operators that scale the experts alike; search the "
                    "others in runs of their own",
                )
        taken = [name for name in shared if name.partition(".")[0] in spaces and "." in name]
        if taken:
            raise MergeError(
                f"the coefficients {listed(taken)} are called like settings of an option",
                hint="name the options otherwise",
            )
        owners, columns = {}, []
        for name, own in spaces.items():
            settings = zip(own.names, own.lower, own.upper, own.owner, strict=True)
            ends = [(setting, low, high) for setting, low, high, owner in settings if owner < 0]
            for (setting, low, high), default in zip(ends, own.defaults, strict=True):
                owners[f"{name}.{setting}"] = name
                columns.append((f"{name}.{setting}", low, high, default))
        columns.insert(0, (_OPERATOR, 0.0, float(len(spaces) - 1), 0.0))
        return CoefficientSpace(
            (*shared, *(name for name, *_ in columns)),
            (*(shared[name][0] for name in shared), *(low for _, low, _, _ in columns)),
            (*(shared[name][1] for name in shared), *(high for _, _, high, _ in columns)),
            owner=(*(shared[name][2] for name in shared), *(-1 for _ in columns)),
            experts=first.experts,
            defaults=tuple(default for *_, default in columns),
            choice=ChoiceAxis(_OPERATOR, tuple(spaces), owners),
        )

    def prepare(self, deltas: Deltas) -> PreparedMerge:
        """Prepare every option, once.

        Raises:
            MergeError: When one of them does not fit the tensors.
        """
        space = self.space(deltas.experts, lower=0.0, upper=1.0)
        return _PreparedChoice(
            space,
            tuple(one.prepare(deltas) for one in self.options.values()),
            tuple(
                [space.names.index(column) for column in self._columns(name, deltas.experts)]
                for name in self.options
            ),
        )

    def check_values(self, values: Mapping[str, float]) -> None:
        """Refuse values that the chosen operator cannot merge with; see `ChecksValues`."""
        name = list(self.options)[round(values[_OPERATOR])]
        chosen = self.options[name]
        if isinstance(chosen, ChecksValues):
            own = {}
            for column, value in values.items():
                option, dot, setting = column.partition(".")
                if not dot or option not in self.options:
                    own[column] = value
                elif option == name:
                    own[setting] = value
            del own[_OPERATOR]
            chosen.check_values(own)

    def chosen(
        self, experts: tuple[str, ...], c: Tensor
    ) -> tuple[MergeOperator, tuple[str, ...], Tensor]:
        """Return the operator that merges with ``c`` (``d``), its coefficients' names and values.

        What is searched of it keeps its column, under its own name; see `Chooses`.
        """
        space = self.space(experts, lower=0.0, upper=1.0)
        values = dict(zip(space.names, c.tolist(), strict=True))
        name = list(self.options)[round(values[_OPERATOR])]
        columns = self._columns(name, experts)
        found = {column.removeprefix(f"{name}."): values[column] for column in columns}
        return self.options[name], tuple(found), c.new_tensor(list(found.values()))

    def _columns(self, option: str, experts: tuple[str, ...]) -> list[str]:
        """Return the columns that an option takes, in its own order."""
        own = self.options[option].space(experts, lower=0.0, upper=1.0)
        return [
            name if owner >= 0 else f"{option}.{name}"
            for name, owner in zip(own.names, own.owner, strict=True)
        ]


def _coefficients(space: CoefficientSpace) -> dict[str, tuple[float, float, int]]:
    """Return name -> bounds and owner of the columns that belong to experts."""
    columns = zip(space.names, space.lower, space.upper, space.owner, strict=True)
    return {name: (low, high, owner) for name, low, high, owner in columns if owner >= 0}


@dataclass(frozen=True, eq=False)
class _PreparedChoice:
    """All options, ready; see `PreparedMerge`."""

    space: CoefficientSpace
    options: tuple[PreparedMerge, ...]
    columns: tuple[list[int], ...]

    def write(self, c: Tensor, out: Tensor) -> None:
        """Write the merge of the chosen operator with its part of ``c`` (``d``) into ``out``."""
        c = check_coefficients(c, self.space.d)
        assert self.space.placed_choice is not None
        code = int(self.space.placed_choice.codes(c))
        self.options[code].write(c[self.columns[code]], out)


def each_operator(operator: MergeOperator) -> tuple[MergeOperator, ...]:
    """Return the operators that may merge: those of a choice, else the operator itself."""
    if isinstance(operator, OperatorChoice):
        return tuple(operator.options.values())
    return (operator,)
