"""Operators that are not linear merge adapters as they merge whole models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from map_bo.merging.vectors.operator import MergeOperator
from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.operators.averages import Slerp, WeightedAverage
from map_bo.operators.consensus import Consensus
from map_bo.operators.sparse import Breadcrumbs, Dare, Della, Magnitude, Ties
from map_bo.operators.spectral.isotropic import IsoC, IsoCTS
from map_bo.operators.spectral.knots import KnOTS
from map_bo.operators.spectral.tsv import TSVM
from map_bo.operators.statistics.data_free import DataFreeRegMean
from tests.merging.adapter_files import as_dense, small_adapters, small_base

OPERATORS: dict[str, MergeOperator] = {
    "ties": Ties(),
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
    "regmean without data": DataFreeRegMean(),
    "knots": KnOTS(),
}


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_adapters_are_merged_as_whole_models(name: str, tmp_path: Path) -> None:
    base = small_base()
    adapters = small_adapters(tmp_path, base)
    merged = []
    for experts in (adapters, {label: as_dense(e) for label, e in adapters.items()}):
        vectors = TaskVectors.load(base, experts)
        space = OPERATORS[name].space(vectors.experts, lower=0.0, upper=1.0)
        out = torch.empty(vectors.layout.size)
        c = torch.linspace(0.3, 0.8, space.d, dtype=torch.float64)
        OPERATORS[name].prepare(vectors).write(c, out)
        merged.append(out)
    assert not torch.equal(merged[0], vectors.base)
    torch.testing.assert_close(merged[0], merged[1], rtol=1e-5, atol=1e-5)
