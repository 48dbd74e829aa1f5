from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from map_bo.errors import StoreError
from map_bo.loop.optimize import optimize
from map_bo.nested.optimize import optimize_nested
from map_bo.nested.settings import Nested
from tests.nested.hills import Hills, nested, options, outcome


def test_one_stage_is_the_flat_run() -> None:
    flat = optimize(Hills(), 16, progress=False, tracking="none", **options(verify=2))
    one = nested(budget=16, stages=1, verify=2)
    assert torch.equal(one.seen.X, flat.seen.X)
    assert torch.equal(one.front.X, flat.front.X)
    assert torch.equal(one.front.real.nan_to_num(), flat.front.real.nan_to_num())
    assert one.data_sets == 16 * 4
    assert one.summary["hypervolume"] == flat.summary["hypervolume"]
    given = {"a": 2.0, "b": 1.0}
    assert torch.allclose(one.choose(given).x, flat.choose(given).x)


@pytest.mark.slow
def test_a_finished_run_is_returned_without_measuring(tmp_path: Path) -> None:
    first, again = Hills(), Hills()
    how, folder = Nested(stages=2), tmp_path / "run"
    one = optimize_nested(first, 24, nested=how, run_dir=folder, progress=False, **options())
    two = optimize_nested(again, 24, nested=how, run_dir=folder, progress=False, **options())
    assert not again.measured
    assert outcome(one) == outcome(two)


def test_another_run_in_the_directory_is_refused(tmp_path: Path) -> None:
    how: dict[str, Any] = {"run_dir": tmp_path, "progress": False, "tracking": "none"}
    optimize_nested(Hills(), 24, nested=Nested(stages=2), **how, **options())
    with pytest.raises(StoreError, match=r"nested\.stages was 2"):
        optimize_nested(Hills(), 24, nested=Nested(stages=1), **how, **options())
    with pytest.raises(StoreError, match="another run"):
        optimize(Hills(), 24, **how, **options())
