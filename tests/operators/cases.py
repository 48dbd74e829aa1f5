"""Task vectors with the shapes that make merging hard, and the operators to merge them with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from map_bo.merging.align.layout import FlatLayout
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.vectors.kernel import KernelMerge
from map_bo.merging.vectors.operator import Deltas
from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.operators.averages import Slerp, WeightedAverage
from map_bo.operators.consensus import Consensus
from map_bo.operators.nearswap import NearSwap
from map_bo.operators.pcb import Pcb
from map_bo.operators.sce import Sce
from map_bo.operators.searchable import SearchableOperator
from map_bo.operators.shared_regions import Ram
from map_bo.operators.sparse import Breadcrumbs, Dare, Della, Magnitude, Ties
from map_bo.operators.spectral.isotropic import IsoC, IsoCTS
from map_bo.operators.spectral.knots import KnOTS
from map_bo.operators.spectral.tsv import TSVM
from map_bo.operators.spherical import MultiSlerp, NuSlerp
from map_bo.operators.statistics.data_free import DataFreeRegMean
from map_bo.operators.stock import ModelStock
from map_bo.plain import to_plain
from map_bo.rng import make_generator

SHAPES: Mapping[str, tuple[int, ...]] = {
    "conv.weight": (5, 4, 3, 3),
    "empty": (0,),
    "hollow": (3, 0),
    "layer.0.bias": (7,),
    "layer.0.weight": (13, 11),
    "layer.1.weight": (17, 9),
    "one": (1, 1),
    "scalar": (),
}

SIGNED: tuple[SearchableOperator, ...] = (
    Ties(),
    Ties(search=["density", "scale"]),
    Ties(trim="tensor", election="weighted_mass", normalisation="weights", density=0.5),
    Ties(election="count", normalisation="none", density=0.6, scale=0.5),
    Magnitude(trim="tensor", density=0.3, search=["scale"]),
    Breadcrumbs(density=0.5, gamma=0.1),
    Breadcrumbs(density=0.4, trim="global", joining="elect", search=["density", "gamma"]),
    Dare(drop_rate=0.4),
    Dare(joining="elect", drop_rate=0.5, search=["drop_rate"]),
    Della(),
    Della(joining="sum", search=["drop_rate", "epsilon", "scale"]),
    Consensus(),
    Consensus(agreement=1, search=["strictness"]),
    TSVM(),
    IsoC(others="sum", skip="layer.1"),
    IsoCTS(common=0.6),
    KnOTS(trim="tensor", search=["density"]),
    NearSwap(strength=0.5),
    NearSwap(unit="absolute", strength=0.3, search={"strength": (0.1, 0.6)}),
    Pcb(density=0.3),
    Pcb(search=["density"]),
    Ram(threshold=0.4),
    Ram(threshold=0.2, over="tensor", search=["rescale", "most"]),
    Sce(density=0.5),
    Sce(search=["density"]),
)
AVERAGES: tuple[SearchableOperator, ...] = (
    WeightedAverage(),
    Slerp(),
    Slerp(norms="own"),
    Slerp(of="weights"),
    Slerp(of="weights", norms="own"),
)
UNSIGNED: tuple[SearchableOperator, ...] = (
    *AVERAGES,
    DataFreeRegMean(),
    DataFreeRegMean(search=["alpha", "ridge"]),
    MultiSlerp(),
    MultiSlerp(of="weights"),
    NuSlerp(),
    NuSlerp(along="column", of="weights"),
    NuSlerp(along="tensor"),
    ModelStock(),
    ModelStock(each="row"),
)
OPERATORS = SIGNED + UNSIGNED


def fields_of(operator: SearchableOperator) -> dict[str, Any]:
    """Return the settings of an operator as plain data."""
    return dict(to_plain(operator)["fields"])


def label(operator: SearchableOperator) -> str:
    """Return a readable name of an operator for a test."""
    plain = {k: v for k, v in fields_of(operator).items() if v != fields_of(type(operator)())[k]}
    return "-".join([operator.name, *(f"{k}={v}" for k, v in plain.items() if k != "search")]) + (
        "-search" if operator.search else ""
    )


def hard_vectors(
    seed: int = 0,
    experts: int = 3,
    *,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    dtype: torch.dtype = torch.float32,
    zeros: float = 0.1,
) -> TaskVectors:
    """Return random task vectors with some zeros and some values that are equal."""
    generator = make_generator(seed)
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    def delta(value: Tensor) -> Tensor:
        found = torch.randn(value.shape, generator=generator)
        found = torch.where(torch.rand(value.shape, generator=generator) < 0.2, 0.5, found)
        return torch.where(torch.rand(value.shape, generator=generator) < zeros, 0.0, found)

    tuned = {
        f"e{n}": {name: value + delta(value) for name, value in base.items()}
        for n in range(experts)
    }
    return TaskVectors.load(
        open_checkpoint(base),
        {name: open_checkpoint(tensors) for name, tensors in tuned.items()},
        dtype=dtype,
        check_base=False,
    )


def flat_vectors(base: Tensor, deltas: Tensor) -> TaskVectors:
    """Return task vectors of one tensor: ``n`` numbers of the base and ``N x n`` deltas."""
    slot = next(iter(FlatLayout.of(open_checkpoint({"w": base}), {}).slots))
    return TaskVectors(
        tuple(f"e{n}" for n in range(len(deltas))),
        FlatLayout((slot,), size=base.numel()),
        torch.cat([base.flatten()[None], deltas.flatten(1)]),
    )


def merge(
    operator: SearchableOperator,
    vectors: Deltas,
    c: Tensor | list[float],
    *,
    chunk: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Merge with an operator, in pieces of ``chunk`` numbers."""
    prepared = operator.prepare(vectors)
    return write(prepared if chunk is None else chunked(prepared, chunk), vectors, c, dtype)


def chunked(prepared: KernelMerge, chunk: int) -> KernelMerge:
    """Return the same merge in pieces of another length."""
    prepared._chunk = chunk
    return prepared


def write(
    prepared: KernelMerge,
    vectors: Deltas,
    c: Tensor | list[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the merged flat tensor."""
    out = torch.full((vectors.layout.size,), torch.nan, dtype=dtype)
    prepared.write(torch.as_tensor(c, dtype=torch.float64), out)
    return out


def coefficients(operator: SearchableOperator, experts: int, seed: int = 0) -> Tensor:
    """Return a random row of an operator's space."""
    names = tuple(f"e{n}" for n in range(experts))
    lower = -0.5 if operator.signed else 0.0
    space = operator.space(names, lower=lower, upper=1.5)
    return space.sample(1, generator=make_generator(100 + seed))[0]
