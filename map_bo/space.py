"""The space that scaling coefficients live in: a named box with optional linear constraints."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Generator, Tensor

from map_bo.choice import ChoiceAxis, PlacedChoice
from map_bo.errors import SpaceError, did_you_mean
from map_bo.values import real_number

__all__ = ["Anchors", "CoefficientSpace", "LinearConstraint"]

_TOLERANCE = 1e-6


@dataclass(frozen=True)
class LinearConstraint:
    """``weights . x <= bound``, or ``weights . x == bound`` when ``equality``.

    Attributes:
        weights: One weight a coefficient.
        bound: Right-hand side.
        equality: Whether the constraint must hold with equality.
    """

    weights: tuple[float, ...]
    bound: float
    equality: bool = False

    def slack(self, X: Tensor) -> Tensor:
        """Return how far each row of ``X`` (``... x d``) is from feasible; 0 when it is."""
        gap = X @ torch.tensor(self.weights, dtype=X.dtype, device=X.device) - self.bound
        return gap.abs() if self.equality else gap.clamp_min(0.0)


@dataclass(frozen=True, eq=False)
class Anchors:
    """The points that a user has anyway: the base, the experts and their uniform blend.

    Attributes:
        names: ``a`` names: ``"base"``, the experts' names, ``"uniform blend"``.
        kinds: ``a`` kinds: ``"base"``, ``"expert"`` or ``"blend"``.
        X: ``a x d`` coefficients.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    X: Tensor

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class CoefficientSpace:
    """A box of ``d`` named coefficients, with optional linear constraints.

    A coefficient whose bounds are equal is *fixed*: it keeps its column in every ``n x d`` tensor
    and takes part in every merge, and only the others are searched.

    Attributes:
        names: ``d`` unique names.
        lower: ``d`` lower bounds.
        upper: ``d`` upper bounds.
        constraints: Linear constraints on top of the box; the box and they must share a point.
        owner: For each coefficient the index of the expert that it scales; with one coefficient
            per expert (the default) this is ``0 .. d-1``, with one per expert and block of layers
            several coefficients share an owner. -1 is a setting of the merge operator, such as
            a density, that belongs to no expert.
        experts: Names of the experts; defaults to ``names``.
        importance: ``d`` positive relative sizes, such as the norms of the parts of the task
            vectors that the coefficients scale: how far a coefficient of 1 moves the model.
            Only their ratios count; empty says that all are alike.
        defaults: The value of each coefficient that belongs to no expert, in their order, at the
            anchors: an operator's setting has no natural zero.
        choice: The options of one column, which belongs to no expert and holds their codes; see
            :mod:`map_bo.choice`. Its default is the option of base, experts and blend; every
            other option has an anchor of its own, its uniform blend.

    Raises:
        SpaceError: On bounds, names, weights or constraints that contradict each other.
    """

    names: tuple[str, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    constraints: tuple[LinearConstraint, ...] = ()
    owner: tuple[int, ...] = field(default=())
    experts: tuple[str, ...] = field(default=())
    importance: tuple[float, ...] = field(default=())
    defaults: tuple[float, ...] = field(default=())
    choice: ChoiceAxis | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "names", tuple(self.names))
        put(self, "lower", tuple(float(value) for value in self.lower))
        put(self, "upper", tuple(float(value) for value in self.upper))
        d = len(self.names)
        if d == 0:
            raise SpaceError("a space needs at least one coefficient", hint="give an expert")
        if len(set(self.names)) != d:
            twice = sorted({name for name in self.names if self.names.count(name) > 1})
            raise SpaceError(
                f"coefficient names appear twice: {', '.join(twice)}",
                hint="give each coefficient a name of its own",
            )
        if len(self.lower) != d or len(self.upper) != d:
            raise SpaceError(
                f"{d} coefficients have {len(self.lower)} lower and {len(self.upper)} upper bounds",
                hint="give one lower and one upper bound per coefficient",
            )
        finite = torch.isfinite(torch.tensor(self.lower + self.upper, device="cpu"))
        if not bool(finite.all()) or any(
            low > high for low, high in zip(self.lower, self.upper, strict=True)
        ):
            raise SpaceError(
                f"every lower bound must be finite and at most its upper bound, got "
                f"{list(self.lower)} and {list(self.upper)}",
                hint="correct the bounds; equal bounds fix a coefficient",
            )
        if not self.owner:
            put(self, "owner", tuple(range(d)))
        if not self.experts:
            put(self, "experts", self.names)
        if len(self.owner) != d or set(self.owner) - {-1} != set(range(len(self.experts))):
            raise SpaceError(
                f"owner {self.owner} does not assign {d} coefficients to "
                f"{len(self.experts)} experts",
                hint="give the index of an expert per coefficient, or -1 for a setting",
            )
        put(self, "defaults", tuple(float(value) for value in self.defaults))
        if len(self.defaults) != self.owner.count(-1):
            raise SpaceError(
                f"{self.owner.count(-1)} coefficients belong to no expert, and "
                f"{len(self.defaults)} have a default",
                hint="give one default per setting of the operator",
            )
        settings = [i for i, owner in enumerate(self.owner) if owner < 0]
        for i, default in zip(settings, self.defaults, strict=True):
            if not self.lower[i] <= default <= self.upper[i]:
                raise SpaceError(
                    f"the default {default} of {self.names[i]} is not in "
                    f"[{self.lower[i]}, {self.upper[i]}]",
                    hint="anchors are measured with it: widen the bounds, or move it inside",
                )
        put(self, "importance", tuple(float(size) for size in self.importance))
        if self.importance and (
            len(self.importance) != d or not all(0 < s < float("inf") for s in self.importance)
        ):
            raise SpaceError(
                f"importance must be {d} positive finite sizes, got {list(self.importance)}",
                hint="give one size per coefficient, or none at all",
            )
        for constraint in self.constraints:
            if len(constraint.weights) != d or not any(constraint.weights):
                raise SpaceError(
                    f"a constraint has weights {constraint.weights} for {d} coefficients",
                    hint="give one weight per coefficient, not all of them 0",
                )
        if self.choice is not None:
            weights = [dict(zip(self.names, c.weights, strict=True)) for c in self.constraints]
            bounds = zip(self.names, self.lower, self.upper, strict=True)
            self.choice.check({n: (a, b) for n, a, b in bounds}, self._rest, weights)
        if self.constraints:
            middle = (self._low + self._high).unsqueeze(0) / 2
            if not bool(self.contains(self.project(middle)).all()):
                raise SpaceError(
                    "no point of the box satisfies the constraints",
                    hint="widen the bounds or relax a constraint",
                )

    @cached_property
    def placed_choice(self) -> PlacedChoice | None:
        """The choice among the columns of this space; None where there is none."""
        if (axis := self.choice) is None:
            return None
        return PlacedChoice.of(axis, self.names, self._rest, free=axis.name not in self.fixed)

    @property
    def _rest(self) -> dict[str, float]:
        return dict(zip(self.settings, self.defaults, strict=True))

    @cached_property
    def by_option(self) -> tuple[CoefficientSpace, ...]:
        """The space of each option alone, in which all columns but its own are fixed.

        What maximises over this space does so over each of them. Without a free choice it is one.
        """
        axis = self.choice
        if axis is None or axis.name in self.fixed:
            return (self,)
        return tuple(self.with_fixed({axis.name: code}) for code in range(len(axis.options)))

    @cached_property
    def _without_choice(self) -> CoefficientSpace:
        return replace(self, choice=None)

    def named(self, x: Sequence[float]) -> dict[str, float | str]:
        """Return the coefficients of one row (``d``) by name, as a reader wants them.

        A choice has the name of its option, and inactive settings are left out.
        """
        values = dict(zip(self.names, map(float, x), strict=True))
        return {**values} if self.choice is None else self.choice.named(values)

    @property
    def is_single_point(self) -> bool:
        """Whether bounds and constraints leave a single point, so that nothing can be searched."""
        corners = self._low + torch.eye(self.d, dtype=torch.float64) * (self._high - self._low)
        ends = self.normalise(self.project(torch.cat([self.bounds, corners])))
        return bool((ends - ends[:1]).abs().max() <= _TOLERANCE)

    def refuse_single_point(self) -> None:
        """Refuse a space in which nothing can be searched.

        Raises:
            SpaceError: When it holds a single point.
        """
        if self.is_single_point:
            raise SpaceError(
                f"the space holds a single point, {self.project(self.bounds)[0].tolist()}, so "
                "there is nothing to search",
                hint="leave at least one coefficient free, widen the bounds or relax a constraint",
            )

    @property
    def fixed(self) -> dict[str, float]:
        """The coefficients whose bounds are equal, and their values."""
        bounds = zip(self.names, self.lower, self.upper, strict=True)
        return {name: low for name, low, high in bounds if low == high}

    @property
    def constraints_on_free(self) -> tuple[LinearConstraint, ...]:
        """The constraints with weight 0 for fixed coefficients, their share taken off the bound."""
        fixed = [low == high for low, high in zip(self.lower, self.upper, strict=True)]
        if not any(fixed):
            return self.constraints
        found = []
        for one in self.constraints:
            parts = list(zip(one.weights, self.lower, fixed, strict=True))
            weights = tuple(0.0 if still else weight for weight, _, still in parts)
            if any(weights):
                taken = sum(weight * value for weight, value, still in parts if still)
                found.append(replace(one, weights=weights, bound=one.bound - taken))
        return tuple(found)

    def with_fixed(self, values: Mapping[str, float | str] | None) -> CoefficientSpace:
        """Return the space with some coefficients fixed, inside their bounds or not.

        Args:
            values: Value by the name of a coefficient, or of an expert for all its coefficients;
                for a choice the name of an option.

        Raises:
            SpaceError: On an unknown name, or a value that is not finite.
        """
        if values is not None and not isinstance(values, Mapping):
            raise SpaceError(
                f"fixed must map names of coefficients to values, got {values!r}",
                hint='give them by name, such as {"math": 1.0}',
            )
        if not values:
            return self
        lower, upper, defaults = list(self.lower), list(self.upper), list(self.defaults)
        if self.choice is not None and self.choice.name in values:
            values = {**values, **self.choice.alone(values[self.choice.name], self._rest)}
        for name, given in values.items():
            value = float(real_number(f"the fixed value of {name}", given, error=SpaceError))
            columns = [i for i, own in enumerate(self.names) if own == name]
            if not columns and name in self.experts:
                expert = self.experts.index(name)
                columns = [i for i, owner in enumerate(self.owner) if owner == expert]
            if not columns:
                raise SpaceError(
                    f"there is no coefficient {name!r} to fix",
                    hint=did_you_mean(name, dict.fromkeys((*self.names, *self.experts))),
                )
            for i in columns:
                lower[i] = upper[i] = value
                if self.owner[i] < 0:
                    defaults[self.owner[:i].count(-1)] = value
        return replace(self, lower=tuple(lower), upper=tuple(upper), defaults=tuple(defaults))

    @property
    def resting(self) -> tuple[float, ...]:
        """The name of :attr:`defaults` in version 0.1."""
        warnings.warn(
            "CoefficientSpace.resting is now CoefficientSpace.defaults; the old name goes in "
            "version 0.3",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.defaults

    @classmethod
    def box(
        cls,
        experts: Sequence[str],
        *,
        blocks: Sequence[str] = (),
        lower: float = 0.0,
        upper: float = 1.0,
        sum_at_most: float | None = None,
        simplex: bool = False,
        fixed: Mapping[str, float | str] | None = None,
    ) -> CoefficientSpace:
        """Return ``[lower, upper]`` for every expert, or for every expert and block of layers.

        Args:
            experts: Names of the ``N`` experts.
            blocks: Names of ``B`` blocks; coefficients are then named ``expert/block`` and
                ordered expert by expert, ``d = N B``.
            lower: Lower bound of every coefficient.
            upper: Upper bound of every coefficient.
            sum_at_most: Bound on the sum of the experts' coefficients (within each block).
            simplex: Require that sum to be exactly 1 (within each block).
            fixed: Coefficients that are not searched, see :meth:`with_fixed`.
        """
        experts, blocks = tuple(experts), tuple(blocks)
        parts = len(blocks) or 1
        names = tuple(f"{e}/{b}" for e in experts for b in blocks) if blocks else experts
        owner = tuple(i for i in range(len(experts)) for _ in range(parts))
        d = len(names)
        box = cls(names, (lower,) * d, (upper,) * d, owner=owner, experts=experts)
        box = box.with_fixed(fixed)
        if simplex:
            return box.with_sum(1.0, equality=True)
        return box if sum_at_most is None else box.with_sum(float(sum_at_most))

    def with_sum(self, bound: float, *, equality: bool = False) -> CoefficientSpace:
        """Return the space with a bound on the sum over the experts, within each block.

        Coefficients that belong to no expert count in no sum.
        """
        part = [
            self.owner[:i].count(owner) if owner >= 0 else -1 for i, owner in enumerate(self.owner)
        ]
        sums = tuple(
            LinearConstraint(tuple(float(p == block) for p in part), bound, equality)
            for block in range(self.blocks)
        )
        return replace(self, constraints=(*self.constraints, *sums))

    @property
    def d(self) -> int:
        """Number of coefficients."""
        return len(self.names)

    @property
    def blocks(self) -> int:
        """The most coefficients that an expert has: 1, or the number of blocks of layers."""
        return max(self.owner.count(i) for i in range(len(self.experts)))

    @property
    def settings(self) -> tuple[str, ...]:
        """Names of the coefficients that belong to no expert."""
        return tuple(n for n, owner in zip(self.names, self.owner, strict=True) if owner < 0)

    @property
    def groups(self) -> tuple[int, ...]:
        """For each coefficient its expert's index, or ``N + k`` for the k-th setting."""
        further = iter(range(len(self.experts), len(self.experts) + self.d))
        return tuple(next(further) if owner < 0 else owner for owner in self.owner)

    @property
    def _low(self) -> Tensor:
        return torch.tensor(self.lower, dtype=torch.float64, device="cpu")

    @property
    def _high(self) -> Tensor:
        return torch.tensor(self.upper, dtype=torch.float64, device="cpu")

    @property
    def bounds(self) -> Tensor:
        """``2 x d``: lower and upper bounds, as botorch wants them."""
        return torch.stack([self._low, self._high])

    @property
    def width(self) -> Tensor:
        """``d`` positive widths of the box; 1 for a fixed coefficient."""
        width = self._high - self._low
        return torch.where(width > 0, width, torch.ones_like(width))

    def stretched(self, power: float) -> CoefficientSpace:
        """Return a box, of widths divided by ``importance ** power``, around the same middle.

        In its unit cube a coefficient moves in proportion to what it does, so surrogates that
        scale their inputs by this box instead of the space's own have the importances in their
        prior: lengthscales shrink by ``s_i ** power``, and the weight of a linear feature has a
        prior variance ``~ s_i^(2 power)``, of a square ``~ s_i^(4 power)``, of a cross feature
        ``~ (s_i s_j)^(2 power)``.

        Power 1 is what the method's Taylor expansion says of them: ``b_i = v_i . g`` and
        ``A_ij = v_i' H v_j``, with ``v_i`` the part of a task vector that coefficient ``i``
        scales. Where gradient ``g`` and Hessian ``H`` favour no direction (``E g g' = a I``, and
        independent entries of variance ``h`` in ``H``), ``E b_i^2 = a |v_i|^2`` and
        ``E A_ij^2 = h |v_i|^2 |v_j|^2``, and the importances are the norms ``|v_i|``.

        The importances count relative to their root mean square. Constraints are dropped. With
        power 0, and where there are no importances, it is the space itself.
        """
        if not self.importance or power == 0:
            return self
        sizes = torch.tensor(self.importance, dtype=torch.float64, device="cpu").pow(power)
        sizes = sizes / sizes.square().mean().sqrt()
        middle, half = (self._low + self._high) / 2, (self._high - self._low) / 2 / sizes
        box = torch.stack([middle - half, middle + half])
        if self.choice is not None:  # what belongs to no expert keeps its bounds, for its default
            box = torch.where(torch.tensor(self.owner, device="cpu") < 0, self.bounds, box)
        low, high = (tuple(ends.tolist()) for ends in box)
        if self.choice is None:
            return CoefficientSpace(self.names, low, high)
        return replace(self, lower=low, upper=high, constraints=(), importance=())

    def normalise(self, X: Tensor) -> Tensor:
        """Map the box onto the unit cube (``... x d``); fixed coefficients become 0."""
        U = (X - self._low.to(X)) / self.width.to(X)
        placed = self.placed_choice
        return U if placed is None else placed.to_cube(X, U)

    def unnormalise(self, U: Tensor) -> Tensor:
        """Map the unit cube onto the box (``... x d``); options share their edge evenly."""
        X = U * (self._high - self._low).to(U) + self._low.to(U)
        placed = self.placed_choice
        return X if placed is None else placed.from_cube(U, X)

    def contains(self, X: Tensor, *, tolerance: float = _TOLERANCE) -> Tensor:
        """Return for each row of ``X`` (``n x d``) whether it is in the space."""
        inside = ((X >= self._low - tolerance) & (X <= self._high + tolerance)).all(-1)
        for constraint in self.constraints:
            norm = float(torch.tensor(constraint.weights, device="cpu").norm())
            inside = inside & (constraint.slack(X) <= tolerance * max(1.0, norm))
        if self.placed_choice is not None:
            inside = inside & ((X - self.placed_choice.settle(X)).abs() <= tolerance).all(-1)
        return inside

    def check(self, X: Tensor) -> Tensor:
        """Return ``X`` as float64 ``n x d``, or raise when it has another shape or leaves."""
        where = X.device if isinstance(X, Tensor) else "cpu"
        X = torch.as_tensor(X, dtype=torch.float64, device=where)
        if X.dim() != 2 or X.shape[-1] != self.d:
            raise SpaceError(
                f"coefficients have shape {tuple(X.shape)}, and the space has {self.d} of them: "
                f"{', '.join(self.names)}",
                hint=f"give an n x {self.d} tensor",
            )
        if not bool(torch.isfinite(X).all()):
            raise SpaceError("coefficients hold NaN or infinity", hint="give finite coefficients")
        outside = ~self.contains(X)
        if bool(outside.any()):
            row = X[outside][0].tolist()
            raise SpaceError(
                f"{int(outside.sum())} of {len(X)} rows leave the space; the first is {row}",
                hint="call space.project(X), or widen the bounds",
            )
        return X

    def project(self, X: Tensor) -> Tensor:
        """Return the nearest points of the space (``n x d``, Euclidean).

        Exact for the box alone, for one constraint, and for several that share no coefficient
        (one per block). Constraints that overlap go through Dykstra's alternating projections onto
        the sets "box and one constraint", which converge to the nearest point of all of them.
        Codes of a choice are rounded, and settings that are then inactive put to their defaults.
        """
        if self.placed_choice is not None:
            return self.placed_choice.settle(self._without_choice.project(X))
        if not self.constraints or not len(X):
            return X.clamp(self._low.to(X), self._high.to(X))
        supports = torch.tensor([c.weights for c in self.constraints], device="cpu") != 0
        if bool((supports.sum(0) <= 1).all()):
            result = X.clamp(self._low.to(X), self._high.to(X))
            for constraint, used in zip(self.constraints, supports, strict=True):
                result[:, used] = self._project_one(X, constraint)[:, used]
            return result
        corrections = [torch.zeros_like(X) for _ in self.constraints]
        for _ in range(300):
            moved = 0.0
            for i, constraint in enumerate(self.constraints):
                target = X + corrections[i]
                nearest = self._project_one(target, constraint)
                corrections[i] = target - nearest
                moved = max(moved, float((nearest - X).abs().max()))
                X = nearest
            if moved < 1e-9:
                break
        return X

    def _project_one(self, X: Tensor, constraint: LinearConstraint) -> Tensor:
        low, high = self._low.to(X), self._high.to(X)
        weights = torch.tensor(constraint.weights, dtype=X.dtype, device=X.device)
        inside = X.clamp(low, high)
        gap = inside @ weights - constraint.bound
        wrong = gap.abs() > 1e-12 if constraint.equality else gap > 1e-12
        if not bool(wrong.any()):
            return inside
        # The nearest point is x(t) = clamp(x - t w) for the multiplier t at which its weighted
        # sum meets the bound. That sum falls with t and is linear between the values of t at
        # which a coordinate meets its bound, so t is found by interpolating between two of them.
        rows, used = X[wrong], weights != 0
        ends = [(rows[:, used] - bound[used]) / weights[used] for bound in (low, high)]
        knots = torch.cat(ends, -1).sort(-1).values
        sums = (rows.unsqueeze(1) - knots.unsqueeze(-1) * weights).clamp(low, high) @ weights
        last = knots.shape[-1] - 1
        left = ((sums >= constraint.bound).sum(-1, keepdim=True) - 1).clamp(0, last - 1)
        t0, t1 = knots.gather(-1, left), knots.gather(-1, left + 1)
        s0, s1 = sums.gather(-1, left), sums.gather(-1, left + 1)
        share = ((s0 - constraint.bound) / (s0 - s1).clamp_min(1e-300)).clamp(0.0, 1.0)
        result = inside.clone()
        result[wrong] = (rows - (t0 + share * (t1 - t0)) * weights).clamp(low, high)
        return result

    def sample(self, n: int, *, generator: Generator) -> Tensor:
        """Return ``n x d`` points: uniform in the box, projected where constraints cut it."""
        U = torch.rand(n, self.d, generator=generator, dtype=torch.float64)
        return self.project(self.unnormalise(U))

    def anchors(self) -> Anchors:
        """Return the base, every expert and the uniform blend, those that lie in the space.

        Fixed coefficients keep their value in all of them: the base is then the base with what is
        fixed, and an expert of which nothing is free is no anchor.
        """
        owner = torch.tensor(self.owner, device="cpu")
        fixed = self._low == self._high
        free = [bool((~fixed[owner == i]).any()) for i in range(len(self.experts))]
        experts = torch.stack([(owner == i).double() for i in range(len(self.experts))])
        X = torch.cat(
            [
                torch.zeros(1, self.d, dtype=torch.float64, device="cpu"),
                experts,
                torch.full((1, self.d), 1.0 / max(sum(free), 1), dtype=torch.float64, device="cpu"),
            ]
        )
        X[:, owner < 0] = torch.tensor(self.defaults, dtype=torch.float64, device="cpu")
        X[:, fixed] = self._low[fixed]
        names = ("base", *self.experts, "uniform blend")
        kinds = ("base", *("expert" for _ in self.experts), "blend")
        keep = self.contains(X).tolist()
        keep = [inside and there for inside, there in zip(keep, (True, *free, True), strict=True)]
        if sum(free) <= 1:
            keep[-1] = False  # the blend of one expert is that expert
        kept = [i for i, inside in enumerate(keep) if inside]
        found = Anchors(tuple(names[i] for i in kept), tuple(kinds[i] for i in kept), X[kept])
        placed = self.placed_choice
        if placed is None or not placed.free or not keep[-1]:
            return found
        blends, options = placed.under_others(X[-1])
        more = tuple(f"uniform blend, {option}" for option in options)
        found_kinds = (*found.kinds, *("blend" for _ in more))
        return Anchors((*found.names, *more), found_kinds, torch.cat([found.X, blends]))

    def describe(self) -> dict[str, Any]:
        """Return the space as plain data for the run's record."""
        data: dict[str, Any] = {
            "names": list(self.names),
            "lower": list(self.lower),
            "upper": list(self.upper),
            "constraints": [
                {"weights": list(c.weights), "bound": c.bound, "equality": c.equality}
                for c in self.constraints
            ],
            "owner": list(self.owner),
            "experts": list(self.experts),
        }
        # Only where there are some, so that the records of all other spaces stay as they were.
        if self.importance:
            data["importance"] = list(self.importance)
        if self.defaults:
            data["resting"] = list(self.defaults)  # the word of 0.1, by which records are compared
        if self.choice is not None:
            data["choice"] = self.choice.describe()
        return data

    @classmethod
    def from_description(cls, data: Mapping[str, Any]) -> CoefficientSpace:
        """Rebuild a space from :meth:`describe`."""
        constraints = tuple(
            LinearConstraint(tuple(c["weights"]), c["bound"], c["equality"])
            for c in data["constraints"]
        )
        return cls(
            tuple(data["names"]),
            tuple(data["lower"]),
            tuple(data["upper"]),
            constraints,
            tuple(data["owner"]),
            tuple(data["experts"]),
            tuple(data.get("importance", ())),
            tuple(data.get("resting", ())),
            ChoiceAxis.from_description(data["choice"]) if data.get("choice") else None,
        )
