"""Operators merge rows that are mapped from a file as those in memory, and keep less for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from map_bo.merging.vectors.operator import MergeOperator
from map_bo.operators.averages import Slerp, WeightedAverage
from map_bo.operators.consensus import Consensus
from map_bo.operators.sparse import Breadcrumbs, Dare, Della, Magnitude, Ties
from map_bo.operators.spectral.isotropic import IsoC, IsoCTS
from map_bo.operators.spectral.knots import KnOTS
from map_bo.operators.spectral.tsv import TSVM
from tests.contracts.operator_contract import example_vectors

OPERATORS: dict[str, MergeOperator] = {
    "ties": Ties(search=("density",)),
    "ties by tensor": Ties(trim="tensor"),
    "dare": Dare(),
    "della": Della(),
    "breadcrumbs": Breadcrumbs(),
    "magnitude": Magnitude(),
    "consensus": Consensus(),
    "slerp": Slerp(),
    "average": WeightedAverage(),
    "tsv-m": TSVM(),
    "iso-c": IsoC(),
    "iso-cts": IsoCTS(),
    "knots": KnOTS(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_mapped_rows_give_the_same_bits(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    operator = OPERATORS[name]
    found = []
    for cache in (None, tmp_path):
        vectors = example_vectors(dtype=dtype, cache=cache)
        space = operator.space(vectors.experts, lower=0.0, upper=1.0)
        out = torch.empty(vectors.layout.size)
        c = torch.linspace(0.3, 0.8, space.d, dtype=torch.float64)
        operator.prepare(vectors).write(c, out)
        found.append(out)
    assert torch.equal(*found)
    assert not torch.equal(found[0], vectors.base.float())
