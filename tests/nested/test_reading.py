from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from map_bo.errors import StoreError
from map_bo.loop.optimize import optimize
from map_bo.loop.reading import load_result
from map_bo.nested.optimize import optimize_nested
from map_bo.nested.reading import load_nested
from map_bo.nested.settings import Nested
from tests.nested.hills import Hills, options, outcome, quick
from tests.unsealed import unseal


@pytest.mark.slow
def test_the_record_is_that_of_a_run_and_reads_back(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = optimize_nested(
        Hills(), 24, nested=Nested(stages=2), run_dir=folder, progress=False, **options()
    )
    flat = load_result(folder)
    assert torch.equal(flat.front.X, result.front.X)
    assert torch.equal(flat.seen.X, result.seen.X)
    back = load_nested(folder, surrogate=quick().surrogate)
    given = {"a": 3.0, "b": 1.0, "c": 1.0, "d": 0.0}
    assert torch.allclose(back.choose(given).x, result.choose(given).x, atol=1e-6)
    assert outcome(back) == outcome(result)
    assert json.loads((folder / "summary.json").read_text())["nested"]["stages"] == 2
    page = (folder / "report.html").read_text()
    assert "The merge tree" in page
    assert "a+b" in page
    assert (folder / "plots" / "tree.png").stat().st_size > 1000


def test_informed_choices_read_back(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    how = Nested(stages=2, promote="surrogate")
    result = optimize_nested(
        Hills(), 28, nested=how, run_dir=folder, progress=False, tracking="none", **options()
    )
    back = load_nested(folder, surrogate=quick().surrogate)
    given = {"a": 3.0, "b": 1.0, "c": 1.0, "d": 0.0}
    assert torch.allclose(back.choose(given).x, result.choose(given).x, atol=1e-6)


def test_a_flat_run_is_refused(tmp_path: Path) -> None:
    optimize(Hills(), 10, run_dir=tmp_path, progress=False, tracking="none", **options())
    with pytest.raises(StoreError, match="is not nested") as caught:
        load_nested(tmp_path)
    assert caught.value.hint == "read it with map_bo.load_result"


def test_a_record_without_its_tree_is_refused(tmp_path: Path) -> None:
    optimize_nested(Hills(), 24, run_dir=tmp_path, progress=False, tracking="none", **options())
    unseal(tmp_path)
    record = tmp_path / "events.jsonl"
    lines = record.read_text().splitlines(keepends=True)
    record.write_text("".join(line for line in lines if '"kind":"planned"' not in line))
    with pytest.raises(StoreError, match="cannot be read as that of a nested run"):
        load_nested(tmp_path)
