"""A column of a space that names one of several options, such as the operator of a merge.

It holds the codes ``0 .. K-1`` of ``K`` options, which have no order: what compares two points asks
only whether their options are the same. A setting of one option (the density of TIES) has a column
too. Under every other option it is *inactive*: it stands at its default there, so that points which
are the same merge are the same row.

One code, and not one column per option: a row keeps a readable record and a fixed width, nothing
can lie between two options, and no constraint has to keep a row on a corner of a simplex.
Surrogates, which need coordinates, spread the code over columns of their own
(:mod:`map_bo.surrogates.features`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from map_bo.errors import SpaceError, did_you_mean

__all__ = ["ChoiceAxis", "PlacedChoice", "TakesChoice", "handles_choice"]


@runtime_checkable
class TakesChoice(Protocol):
    """Settings of a surrogate or sampler that say whether they handle a space with a choice.

    What does not say so is refused in such a space before anything is evaluated.
    """

    @property
    def takes_choice(self) -> bool:
        """Whether it compares options by being the same alone, and handles inactive settings."""
        ...


def handles_choice(part: object) -> bool:
    """Return whether settings say that they handle a space with a choice."""
    return isinstance(part, TakesChoice) and part.takes_choice


@dataclass(frozen=True)
class ChoiceAxis:
    """The options of a choice, and the settings that only one of them has.

    Attributes:
        name: Name of the column with the codes.
        options: ``K`` names; code ``k`` stands for the ``k``-th.
        settings: Name of a column -> option that the setting belongs to.

    Raises:
        SpaceError: When there are fewer than two options, or two of one name; when a setting
            belongs to an unknown one.
    """

    name: str
    options: tuple[str, ...]
    settings: Mapping[str, str] | Sequence[tuple[str, str]] = field(default=())

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "options", tuple(self.options))
        # As pairs, so that a space can be hashed.
        put(self, "settings", tuple((str(a), str(b)) for a, b in dict(self.settings).items()))
        if len(self.options) < 2 or len(set(self.options)) != len(self.options):
            raise SpaceError(
                f"a choice needs two or more options of different names, got {list(self.options)}",
                hint="give each option a name of its own, or leave the choice out",
            )
        for column, option in self.owners.items():
            if option not in self.options:
                raise SpaceError(
                    f"the setting {column} belongs to {option!r}, which is not an option",
                    hint=did_you_mean(option, self.options),
                )

    @property
    def owners(self) -> dict[str, str]:
        """Name of a column -> option that the setting belongs to."""
        return dict(self.settings)

    def code(self, option: object) -> int:
        """Return the code of an option, given by its name or as a code.

        Raises:
            SpaceError: When there is no such option.
        """
        if isinstance(option, str) and option in self.options:
            return self.options.index(option)
        whole = isinstance(option, int | float) and not isinstance(option, bool)
        if whole and option in range(len(self.options)):
            return int(option)  # type: ignore[call-overload, no-any-return]  # a number, as checked
        raise SpaceError(
            f"{self.name} has no option {option!r}", hint=f"options are {', '.join(self.options)}"
        )

    def named(self, values: Mapping[str, float]) -> dict[str, float | str]:
        """Return coefficients with the option's name for its code, without inactive settings."""
        option = self.options[round(values[self.name])]
        inactive = {name for name, owner in self.owners.items() if owner != option}
        found = {name: value for name, value in values.items() if name not in inactive}
        return {**found, self.name: option}

    def alone(self, option: object, defaults: Mapping[str, float]) -> dict[str, float]:
        """Return what is fixed where one option is all there is: name -> value."""
        code = self.code(option)
        kept = {name for name, owner in self.owners.items() if owner == self.options[code]}
        return {self.name: code, **{n: defaults[n] for n in self.owners if n not in kept}}

    def check(
        self,
        bounds: Mapping[str, tuple[float, float]],
        defaults: Mapping[str, float],
        constraints: Sequence[Mapping[str, float]],
    ) -> None:
        """Refuse a space that has no place for the choice.

        Args:
            bounds: Name -> lower and upper bound of every column.
            defaults: Name -> default of every column that belongs to no expert.
            constraints: Name -> weight, for each linear constraint.

        Raises:
            SpaceError: When a column is lacking, has other bounds, or is constrained.
        """
        used = {self.name, *self.owners}
        lacking = sorted(used - set(defaults))
        if lacking:
            raise SpaceError(
                f"the choice {self.name} needs columns that belong to no expert, and the space "
                f"lacks {', '.join(lacking)}",
                hint="give a column, with owner -1, for the codes and for every setting",
            )
        (low, high), default, last = bounds[self.name], defaults[self.name], len(self.options) - 1
        if default not in range(last + 1) or (low, high) not in {(0, last), (default, default)}:
            raise SpaceError(
                f"the codes of {self.name} go from 0 to {last} and one of them is the default, got "
                f"bounds {[low, high]} and {default}",
                hint="fix an option with fixed={NAME: OPTION}",
            )
        if any(weights[name] for weights in constraints for name in used):
            raise SpaceError(
                f"a constraint has a weight for {self.name} or a setting of one option",
                hint="constrain the coefficients of experts alone",
            )

    def describe(self) -> dict[str, Any]:
        """Return the axis as plain data; :meth:`from_description` reads it."""
        return {"name": self.name, "options": list(self.options), "settings": self.owners}

    @classmethod
    def from_description(cls, data: Mapping[str, Any]) -> ChoiceAxis:
        """Rebuild an axis from :meth:`describe`."""
        return cls(str(data["name"]), tuple(data["options"]), dict(data["settings"]))


@dataclass(frozen=True, eq=False)
class PlacedChoice:
    """A choice among the columns of a space.

    Attributes:
        axis: The options.
        column: Index of the column with the codes.
        free: Whether it is searched; else the column is fixed at one code.
        inactive: ``K x d`` booleans: settings that are inactive under each option.
        resting: ``d`` values of inactive settings; 0 elsewhere.
    """

    axis: ChoiceAxis
    column: int
    free: bool
    inactive: Tensor
    resting: Tensor

    @classmethod
    def of(
        cls, axis: ChoiceAxis, names: Sequence[str], defaults: Mapping[str, float], *, free: bool
    ) -> PlacedChoice:
        """Find the columns of a choice.

        Args:
            axis: The choice.
            names: ``d`` names of columns.
            defaults: Name -> default of the columns that belong to no expert.
            free: Whether the choice is searched.
        """
        owners = axis.owners
        inactive = [
            [name in owners and owners[name] != option for name in names] for option in axis.options
        ]
        resting = [float(defaults.get(name, 0.0)) for name in names]
        return cls(
            axis,
            list(names).index(axis.name),
            free,
            torch.tensor(inactive, device="cpu"),
            torch.tensor(resting, dtype=torch.float64, device="cpu"),
        )

    @property
    def count(self) -> int:
        """The number ``K`` of options."""
        return len(self.axis.options)

    def codes(self, X: Tensor) -> Tensor:
        """Return the code of each row (``... x d``), ``...`` whole numbers."""
        codes = X[..., self.column].detach().nan_to_num(0.0).round()
        return codes.clamp(0, self.count - 1).long()

    def active(self, X: Tensor) -> Tensor:
        """Return which columns each row (``... x d``) is moved by; the codes' own is not one."""
        found = ~self.inactive.to(X.device)[self.codes(X)]
        found[..., self.column] = False
        return found

    def counts(self, X: Tensor) -> dict[str, int]:
        """Return how many rows (``n x d``) each option has, by its name."""
        found = torch.bincount(self.codes(X), minlength=self.count).tolist()
        return dict(zip(self.axis.options, found, strict=True))

    def settle(self, X: Tensor) -> Tensor:
        """Return rows (``... x d``) with whole codes and inactive settings at their defaults."""
        codes = self.codes(X)
        X = torch.where(self.inactive.to(X.device)[codes], self.resting.to(X), X)
        return self._with(X, codes.to(X))

    def to_cube(self, X: Tensor, U: Tensor) -> Tensor:
        """Return ``U``, ``X`` in the unit cube, with each code in the middle of its interval.

        The ``K`` options share the edge of the cube evenly, so a uniform point has each of them
        with the same probability.
        """
        return self._with(U, (self.codes(X).to(U) + 0.5) / self.count) if self.free else U

    def from_cube(self, U: Tensor, X: Tensor) -> Tensor:
        """Return ``X``, the point of the box for ``U``, as a row of the space."""
        if self.free:
            codes = (U[..., self.column] * self.count).floor().clamp(0, self.count - 1)
            X = self._with(X, codes)
        return self.settle(X)

    def under_others(self, x: Tensor) -> tuple[Tensor, tuple[str, ...]]:
        """Return a row (``d``) under every option but its own, ``K-1 x d``, and their names."""
        others = [code for code in range(self.count) if code != int(self.codes(x))]
        rows = self._with(x.repeat(len(others), 1), torch.tensor(others).to(x))
        return self.settle(rows), tuple(self.axis.options[code] for code in others)

    def _with(self, X: Tensor, values: Tensor) -> Tensor:
        there = torch.arange(X.shape[-1], device=X.device) == self.column
        return torch.where(there, values.unsqueeze(-1), X)
