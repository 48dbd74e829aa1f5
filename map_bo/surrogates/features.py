"""The features of a quadratic: ``[1 | z_i | z_i^2 | z_i z_j]`` with ``z`` in ``[-1, 1]``.

Centring the box on zero makes the constant, linear and cross features orthogonal over it, so
that one prior variance for each group says what it seems to say.

*A choice.* Where a column names one of ``K`` options (:mod:`map_bo.choice`), options are
exchangeable: two points under one option, or under two, are all that matters. The features are
those of a quadratic that all options share and, times the indicator of its option, those of each
option's own deviation from it, with prior variances of their own for the groups of the deviations::

    f(x, k) = phi(x) . w + phi_k(x) . u_k,    w_g ~ N(0, s_g),    u_kg ~ N(0, t_g).

That is the exchangeable kernel ``K(x, x') + [k = k'] D(x, x')`` in weight space: a hierarchical
model, whose deviations shrink towards 0 as far as the evidence for ``t`` says. A setting of one
option is in that option's own features alone.

Where points are compared by distance, the code is ``K`` columns, 1 for the row's option and 0 for
the others (:func:`inputs`). A squared-exponential kernel with a lengthscale for each of them is the
product of the kernel over coefficients and ``exp(-(1 / l_j^2 + 1 / l_k^2) / 2)`` between options
``j != k``: the Hamming kernel of botorch's ``CategoricalKernel``, with a distance of its own for
every option (the continuous relaxation of Saves et al., *A mixed-categorical correlation kernel for
Gaussian process*, Neurocomputing 550, 2023). An inactive setting is in the middle of its range.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from map_bo.space import CoefficientSpace

__all__ = [
    "GROUPS",
    "OptionColumns",
    "centred",
    "feature_groups",
    "group_sizes",
    "inputs",
    "n_features",
    "quadratic_feature_gradients",
    "quadratic_features",
    "space_features",
    "space_groups",
]

GROUPS = ("constant", "linear", "square", "cross")

# Prior variance of what an option has of its own, as a share of what all options share. At 1/2 two
# options are correlated by 2/3 before anything is measured; the evidence decides from there.
_APART = 0.5


def n_features(d: int) -> int:
    """Return ``D = (d + 1)(d + 2) / 2``, the number of coefficients of a quadratic."""
    return (d + 1) * (d + 2) // 2


def feature_groups(d: int) -> Tensor:
    """Return for each of the ``D`` features the index of its group in :data:`GROUPS`."""
    sizes = torch.tensor([1, d, d, d * (d - 1) // 2])
    return torch.repeat_interleave(torch.arange(len(GROUPS)), sizes)


def centred(X: Tensor, space: CoefficientSpace) -> Tensor:
    """Return ``X`` (``... x d``) with the box of ``space`` mapped onto ``[-1, 1]^d``."""
    return 2 * space.normalise(X) - 1


def quadratic_features(Z: Tensor) -> Tensor:
    """Return the features (``... x D``) of centred coefficients ``Z`` (``... x d``)."""
    d = Z.shape[-1]
    first, second = torch.triu_indices(d, d, offset=1, device=Z.device)
    return torch.cat(
        [torch.ones_like(Z[..., :1]), Z, Z.square(), Z[..., first] * Z[..., second]], dim=-1
    )


def quadratic_feature_gradients(Z: Tensor) -> Tensor:
    """Return the derivatives of the features by ``Z`` (``... x d``), ``... x d x D``."""
    d = Z.shape[-1]
    first, second = torch.triu_indices(d, d, offset=1, device=Z.device)
    eye = torch.eye(d, dtype=Z.dtype, device=Z.device)
    linear = eye.expand(*Z.shape, d)
    square = 2 * eye * Z.unsqueeze(-2)
    by_first = eye[:, first] * Z[..., second].unsqueeze(-2)
    by_second = eye[:, second] * Z[..., first].unsqueeze(-2)
    zeros = torch.zeros_like(Z).unsqueeze(-1)
    return torch.cat([zeros, linear, square, by_first + by_second], dim=-1)


def inputs(X: Tensor, space: CoefficientSpace) -> Tensor:
    """Return ``X`` (``... x d``) in the unit cube, where distances mean something.

    With a choice it is ``... x (d - 1 + K)``: the other columns, inactive settings in the middle of
    their range, and then one column per option.
    """
    U, placed = space.normalise(X), space.placed_choice
    if placed is None:
        return U
    rest = torch.arange(space.d, device=X.device) != placed.column
    U = torch.where(placed.active(X), U, 0.5)[..., rest]
    option = torch.nn.functional.one_hot(placed.codes(X), placed.count)
    return torch.cat([U, option.to(U)], -1)


@dataclass(frozen=True)
class OptionColumns:
    """Which of the columns of :func:`inputs` the features of a space with a choice are made of.

    Attributes:
        shared: Columns of the features that all options share.
        own: For each of the ``K`` options the columns of its own features.
        width: Number of columns before those of the options.
    """

    shared: tuple[int, ...]
    own: tuple[tuple[int, ...], ...]
    width: int

    @classmethod
    def of(cls, space: CoefficientSpace) -> OptionColumns | None:
        """Return those of a space; None where it has no choice."""
        if space.choice is None:
            return None
        owners = space.choice.owners
        names = [name for name in space.names if name != space.choice.name]
        own = tuple(
            tuple(i for i, name in enumerate(names) if owners.get(name, option) == option)
            for option in space.choice.options
        )
        shared = tuple(i for i, name in enumerate(names) if name not in owners)
        return cls(shared, own, len(names))

    def features(self, U: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the shared features, then those of each option, ``... x D``.

        Args:
            U: ``... x (width + K)`` points as :func:`inputs` returns them.
            of: Returns the features of some columns of the unit cube.
        """
        parts = [of(U[..., list(self.shared)])]
        for k, columns in enumerate(self.own):
            here = self.width + k
            parts.append(U[..., here : here + 1] * of(U[..., list(columns)]))
        return torch.cat(parts, -1)

    def groups(self, of: Callable[[int], Tensor], count: int) -> Tensor:
        """Return the group of each feature (``D``): ``count`` shared ones, then as many own.

        Args:
            of: Returns the groups of the features of so many columns.
            count: How many groups there are without a choice.
        """
        own = [count + of(len(columns)) for columns in self.own]
        return torch.cat([of(len(self.shared)), *own])

    def sizes(self, of: Callable[[int], Tensor], count: int) -> Tensor:
        """Return by what the prior variance of each group is divided (``2 count``).

        A row has the features of one option only, so the group of the deviations counts those of
        the option with the most.
        """
        shared = torch.bincount(of(len(self.shared)), minlength=count)
        own = [torch.bincount(of(len(columns)), minlength=count) for columns in self.own]
        most = torch.stack(own).amax(0)
        return torch.cat([shared.clamp_min(1).double(), most.clamp_min(1).double() / _APART])


def _of_cube(U: Tensor) -> Tensor:
    return quadratic_features(2 * U - 1)


def space_features(X: Tensor, space: CoefficientSpace) -> Tensor:
    """Return the quadratic features (``... x D``) of points ``X`` (``... x d``) of a space."""
    options = OptionColumns.of(space)
    if options is None:
        return quadratic_features(centred(X, space))
    return options.features(inputs(X, space), _of_cube)


def space_groups(space: CoefficientSpace) -> Tensor:
    """Return for each of the ``D`` features of a space the index of its group."""
    options = OptionColumns.of(space)
    if options is None:
        return feature_groups(space.d)
    return options.groups(feature_groups, len(GROUPS))


def group_sizes(space: CoefficientSpace) -> Tensor:
    """Return by what the prior variance of each group of a space's features is divided (``G``)."""
    options = OptionColumns.of(space)
    if options is None:
        groups = feature_groups(space.d)
        return groups.bincount(minlength=len(GROUPS)).clamp_min(1).double()
    return options.sizes(feature_groups, len(GROUPS))
