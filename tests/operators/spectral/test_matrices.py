"""Ready task vectors: where they are kept, and that adapters stay factors."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from map_bo.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from map_bo.merging.vectors.kernel import KernelMerge
from map_bo.merging.vectors.on_disk import OnDiskVectors
from map_bo.merging.vectors.operator import HasDerivatives, HasFactors
from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.operators.spectral import matrices
from map_bo.operators.spectral.isotropic import IsoCTS
from map_bo.operators.spectral.matrices import ReadyOperator, changes_of, matrices_of
from map_bo.operators.spectral.tsv import TSVM
from tests.contracts.operator_contract import example_vectors
from tests.merging.adapter_files import as_dense, small_adapters, small_base
from tests.operators.cases import write

C = [0.4, -0.3, 0.9]


@pytest.mark.parametrize("operator", [TSVM(), IsoCTS()], ids=lambda each: each.name)
def test_mapped_rows_are_made_ready_once_for_all_processes(
    operator: ReadyOperator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = write(operator.prepare(example_vectors()), example_vectors(), C)
    mapped = example_vectors(cache=tmp_path)
    before = set(tmp_path.iterdir())
    found = write(operator.prepare(mapped), mapped, C)
    assert torch.equal(found, expected)
    made = {p.name for p in set(tmp_path.iterdir()) - before if p.is_dir()}
    assert len(made) == 1
    monkeypatch.setattr(matrices, "_fill", None)  # not called again
    other = pickle.loads(pickle.dumps(mapped))  # as in another process
    assert torch.equal(write(operator.prepare(other), other, C), expected)
    blocks = replace(operator, blocks={"a": "first", "b": "*"})
    row = [value for value in C for _ in range(2)]
    assert torch.equal(write(blocks.prepare(mapped), mapped, row), expected)


def test_other_settings_have_a_file_of_their_own(tmp_path: Path) -> None:
    mapped = example_vectors(cache=tmp_path)
    few, many = (write(TSVM(share=s).prepare(mapped), mapped, C) for s in (0.1, 0.9))
    assert not torch.allclose(few, many, atol=1e-3)


@pytest.mark.parametrize("operator", [TSVM(), IsoCTS()], ids=lambda each: each.name)
def test_where_memory_is_short_they_are_made_anew(operator: ReadyOperator) -> None:
    vectors = replace(example_vectors(), spare_memory=False)
    prepared = operator.prepare(vectors)
    assert not isinstance(prepared, HasDerivatives)  # it keeps nothing to have them from
    expected = write(operator.prepare(example_vectors()), vectors, C)
    torch.testing.assert_close(write(prepared, vectors, C), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("operator", [TSVM(), IsoCTS(common=0.5)], ids=lambda each: each.name)
def test_adapters_stay_factors(operator: ReadyOperator, tmp_path: Path) -> None:
    base = small_base()
    adapters = small_adapters(tmp_path, base)
    vectors = TaskVectors.load(base, adapters)
    whole = TaskVectors.load(base, {name: as_dense(e) for name, e in adapters.items()})
    prepared = operator.prepare(vectors)
    assert isinstance(prepared, KernelMerge)
    ready = prepared.deltas
    assert isinstance(ready, TaskVectors)
    assert ready.rows.shape[0] == 1  # the base's
    expected = write(operator.prepare(whole), whole, C)
    assert not torch.allclose(expected, whole.base, atol=1e-3)
    torch.testing.assert_close(write(prepared, vectors, C), expected, rtol=1e-4, atol=1e-5)
    some = {name: as_dense(e) if name == "code" else e for name, e in adapters.items()}
    mixed = TaskVectors.load(base, some)
    found = write(operator.prepare(mixed), mixed, C)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    cached = TaskVectors.load(base, adapters, cache=tmp_path / "cache")
    found = write(operator.prepare(cached), cached, C)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_changes_are_factors_wherever_adapters_are(tmp_path: Path) -> None:
    base = small_base()
    adapters = small_adapters(tmp_path, base)
    resident, on_disk = TaskVectors.load(base, adapters), OnDiskVectors(base, adapters)
    assert isinstance(resident, HasFactors)
    assert isinstance(on_disk, HasFactors)
    for index, slot in enumerate(resident.layout.slots):
        rows = resident.read(index, 0, slot.numel)
        for vectors in (resident, on_disk):
            factors = vectors.factors(index)
            for n, low in factors.items():
                torch.testing.assert_close(low.dense().flatten(), rows[1 + n])
        assert resident.factors(index).keys() == on_disk.factors(index).keys()
        if len(slot.shape) == 2:
            both = zip(changes_of(resident, index), rows[1:], strict=True)
            for change, row in both:
                dense = change if isinstance(change, torch.Tensor) else change.dense()
                torch.testing.assert_close(dense.flatten(), row)
    whole = {name: as_dense(e) for name, e in adapters.items()}
    assert TaskVectors.load(base, whole).factors(0) == {}
    assert OnDiskVectors(base, whole).factors(0) == {}


def test_which_tensors_are_matrices() -> None:
    layout = TaskVectors.load(small_base(), {"a": _moved()}).layout
    names = [layout.slots[i].name for i in sorted(matrices_of(layout, "head"))]
    assert names == ["layers.0.fc.weight", "layers.1.fc.weight"]
    assert TSVM().share_of_others(4) == 0.25
    assert TSVM(others="sum").share_of_others(4) == 1.0


def _moved() -> Checkpoint:
    base = small_base()
    return open_checkpoint({name: base.load(name) + 0.1 for name in base.names})
